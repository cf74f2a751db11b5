"""Leaving is a question (rule 16): ask, hear "I stay", only then be durably outdated and say so.

The last one to stop is never outdated: without the answer a leaver stays up to date. The word
counts only inside the session it was said in; the stayer stores "peer outdated" before it relies
on it. Where there is no channel, the controllers carry question, answer and word for the engines,
bound to the last session instead.
"""

from dataclasses import dataclass, replace

from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.io import flush_pair
from nbdmirror.core.messages import LeaveAnswer, LeaveAsk, Left
from nbdmirror.core.node import PEER_LEFT, Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.session import Phase, Session
from nbdmirror.core.superblock import DataState, Flags, PendingKind, Superblock
from nbdmirror.errors import NbdMirrorError, PeerProtocolError, RefusedError, StoreError

STAY_AGAIN_S = 1.0


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
    yield from node.change(left)
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
    else:
        reason = reason_to_leave(node)
        if message.generation != node.sb.generation:
            reason = reason or "another generation"
    session.tell(
        LeaveAnswer(stay=not reason, generation=node.sb.generation, reason=reason or "I stay")
    )


def reason_to_leave(node: Node) -> str:
    """Why this node cannot be the one that stays; "" if it can."""
    if node.sb.data_state is not DataState.UPTODATE:
        return f"this node is {node.sb.data_state.name.lower()}"
    if node.stopping or node.changing in ("leave", "stop"):
        return "this node is leaving, too"
    return f"this node's disk failed: {node.failed}" if node.failed else ""


def peer_left(node: Node, session: Session, message: Left) -> Path:
    """The peer is durably outdated and says so: flush, store it, and go on without it.

    Rule 10: what both had acknowledged is durable here before "peer outdated" is stored. While the
    local disk holds that up, the word is kept, and other commands have their turn in between. It is
    true until a joint step begins, and that shows in this node's own generations.
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
    node.lease.returned()
    node.lose_session(session, "the peer left and is outdated")
    while is_open(node, message.generation):
        yield from node.wait_to_change(PEER_LEFT)
        try:
            yield from stay(node)
        except (RefusedError, StoreError) as error:
            node.shell.emit("peer-left", stored=False, reason=str(error))
        else:
            return
        finally:
            node.end_change()
        yield (node.shell.waiter().wait, STAY_AGAIN_S)


def is_open(node: Node, generation: bytes) -> bool:
    """Whether the word of a peer that left is still to be stored: nothing else was decided."""
    return (
        node.session is None
        and not node.stopping
        and not node.failed
        and node.sb.generation == generation
        and node.sb.pending == NO_GENERATION
    )


def stay(node: Node) -> Path:
    """Store that the peer is outdated; nothing if it has come back, or something else decided."""
    node.last_session = None
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


# --- leaving without a channel: the two controllers carry the words ------------------------------


@dataclass(frozen=True, slots=True)
class Word:
    """What a controller carries between two engines that have no channel, or for a dead one."""

    generation: bytes
    session: int


def would_stay(node: Node, generation: bytes) -> tuple[str, int]:
    """Asked by the peer's controller, for an engine that is dead or cut off: does this node stay?

    Returns (why not, the number of the session that was the last one). Nothing changes but that,
    having said so, it does not leave after that session itself. It stays only if its last session
    was in sync and nothing was decided since: then it has every write that the leaver acknowledged.
    """
    last = node.last_session
    if node.session is not None:
        reason = "the peer's engine is connected"
    elif last is None:
        reason = "not in sync with you until now"
    else:
        reason = reason_to_leave(node)
        if node.right or node.sb.pending != NO_GENERATION or generation != node.sb.generation:
            reason = reason or "another generation"
    if reason or last is None:
        return reason, 0
    node.stays_after = last.number
    return "", last.number


def reason_not_to_speak(sb: Superblock, *, fell_back: bool) -> str:
    """Why a dead engine's copy may not be marked as behind, by its metadata alone; "" if it may.

    It was one of a pair in sync, and no more: whatever it decided for itself is its own to settle.
    """
    if fell_back or sb.flags & Flags.FELL_BACK:
        return "its metadata is damaged, and what it did last is not known"
    if sb.data_state is not DataState.UPTODATE:
        return f"it is {sb.data_state.name.lower()}"
    if sb.flags & (Flags.ALONE | Flags.PEER_OUTDATED | Flags.SPLIT):
        return "it went on alone, and its peer is the one behind"
    if sb.pending_kind is not PendingKind.NONE:
        return "a step of its generations is pending"
    return ""


def left(sb: Superblock) -> Superblock:
    """The edit of a copy that leaves: complete, and behind from now on."""
    return replace(sb, data_state=DataState.OUTDATED)


def leave_by_word(node: Node, word: Word) -> Path:
    """Be outdated, durably: the peer has answered "I stay", by way of the controllers.

    Raises:
        RefusedError: this node serves, is connected, or the answer was for another moment.
    """
    require_unchanged_since(node, word, "leave")
    if node.role is Role.PRIMARY:
        raise RefusedError("leave: this node is primary; demote it first")
    if node.stays_after == word.session:
        raise RefusedError("leave: this node has answered that it stays itself")

    def edit(sb: Superblock) -> Superblock:
        require_unchanged_since(node, word, "leave")
        return left(sb)

    yield from node.change(edit)
    node.last_session = None
    node.shell.emit("leave", stays=True, reason="the peer stays; this node is outdated")


def left_by_word(node: Node, word: Word) -> Path:
    """The peer is durably outdated and its controller says so: flush, store it, go on without it.

    Raises:
        RefusedError: it has come back, or something else was decided since the answer.
    """
    require_unchanged_since(node, word, "peer left")
    node.lease.returned()
    yield from stay(node)
    if not node.sb.flags & Flags.PEER_OUTDATED:
        raise RefusedError("peer left: it has come back, or this node is stopping; look again")


def require_unchanged_since(node: Node, word: Word, what: str) -> None:
    """The word counts for the moment it was asked about, and for no later one.

    Raises:
        RefusedError: there was a session, a decision or another generation since.
    """
    last = node.last_session
    number = last.number if last is not None else 0
    if (
        node.session is not None
        or number != word.session
        or node.sb.generation != word.generation
        or node.sb.data_state is not DataState.UPTODATE
    ):
        raise RefusedError(f"{what}: the word is about an earlier moment; look again")
