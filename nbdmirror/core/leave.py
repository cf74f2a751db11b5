"""Leaving is a question (rule 16): ask, hear "I stay", only then be durably outdated and say so.

The last one to stop is never outdated: without the answer a leaver stays up to date. The word
counts only inside the session it was said in; the stayer stores "peer outdated" before it relies
on it.
"""

from dataclasses import replace

from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.io import flush_pair
from nbdmirror.core.messages import LeaveAnswer, LeaveAsk, Left
from nbdmirror.core.node import PEER_LEFT, Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.session import Phase, Session
from nbdmirror.core.superblock import DataState, Flags, PendingKind, Superblock
from nbdmirror.errors import NbdMirrorError, PeerProtocolError


def ask_to_leave(node: Node, session: Session) -> Path:
    """Ask the peer to stay; True when this node is durably outdated and has said so.

    The caller has drained and flushed. Returns False when the peer does not stay: nothing changed.
    """
    session.tell(LeaveAsk(generation=node.sb.generation))
    yield (session.link.kick,)
    try:
        answer = yield from session.expect(LeaveAnswer, node.ack_timeout_ms)
    except NbdMirrorError as error:
        node.shell.emit("leave", stays=False, reason=str(error))
        return False
    if not answer.stay or answer.generation != node.sb.generation or not session.live:
        node.shell.emit("leave", stays=False, reason=answer.reason)
        return False
    yield from node.change(lambda sb: replace(sb, data_state=DataState.OUTDATED))
    session.tell(
        Left(
            mirror_id=node.sb.mirror_id,
            generation=node.sb.generation,
            leaver=node.sb.node_id,
            stayer=session.peer.node_id,
            session=session.number,
        )
    )
    yield (session.link.kick,)
    node.shell.emit("leave", stays=True, reason="the peer stays; this node is outdated")
    return True


def flush_and_answer(node: Node, session: Session, message: LeaveAsk) -> Path:
    """As the sender: flush both first, so that an idle pair that parts has nothing to copy."""
    try:
        yield from flush_pair(node)
    except NbdMirrorError as error:
        node.shell.emit("leave-without-flush", reason=str(error))
    answer_leave(node, session, message)
    yield (session.link.kick,)


def answer_leave(node: Node, session: Session, message: LeaveAsk) -> None:
    """Answer the question. Staying means: up to date, connected in sync, not leaving itself."""
    if session.phase is not Phase.SYNCED:
        reason = "not in sync with you"
    elif node.sb.data_state is not DataState.UPTODATE:
        reason = f"this node is {node.sb.data_state.name.lower()}"
    elif node.stopping or node.changing in ("leave", "stop"):
        reason = "this node is leaving, too"
    elif node.failed:
        reason = f"this node's disk failed: {node.failed}"
    elif message.generation != node.sb.generation:
        reason = "another generation"
    else:
        reason = ""
    session.tell(
        LeaveAnswer(stay=not reason, generation=node.sb.generation, reason=reason or "I stay")
    )


def peer_left(node: Node, session: Session, message: Left) -> Path:
    """The peer is durably outdated and says so: flush, store it, and go on without it.

    Rule 10: what both had acknowledged is durable here before "peer outdated" is stored.
    """
    bound = (message.mirror_id, message.generation, message.leaver, message.stayer, message.session)
    mine = (
        node.sb.mirror_id,
        node.sb.generation,
        session.peer.node_id,
        node.sb.node_id,
        session.number,
    )
    if bound != mine:
        raise PeerProtocolError("the word of leaving is not bound to this session")
    node.lose_session(session, "the peer left and is outdated")
    yield from node.wait_to_change(PEER_LEFT)
    try:
        yield from stay(node, session)
    finally:
        node.end_change()


def stay(node: Node, session: Session) -> Path:
    """Store that the peer is outdated; nothing if it has come back, or something else decided."""
    node.forget_peer_after_loss(session)
    yield from node.quiesce()
    yield from node.sync()
    if node.sb.pending != NO_GENERATION or node.session is not None or node.stopping:
        return
    claim = node.shell.random_bytes(16)
    primary = node.role is Role.PRIMARY

    def edit(sb: Superblock) -> Superblock:
        flags = sb.flags | Flags.PEER_OUTDATED
        if not primary:
            return replace(sb, flags=flags)
        return replace(sb, flags=flags | Flags.ALONE, pending=claim, pending_kind=PendingKind.CLAIM)

    yield from node.change(edit)
    if node.role is Role.PRIMARY and node.right:
        node.go_on_alone()
