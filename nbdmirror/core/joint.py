"""The joint step (rule 9): how two nodes get a generation that is theirs together.

A generation is alone or joint, never first one and then the other. The order of the four parts is
the rule; each is durable before the next begins:

    (a) the source gives up its right to acknowledge alone and stores a fresh joint generation J as
        pending: from here it freezes when the peer goes;
    (b) the arbiter's record becomes (J, no owner), where the arbiter has a memory; what it replaces
        was read before the peer's engine last answered in this session;
    (c) the target has flushed, takes J and is up to date;
    (d) the source takes J.
"""

from collections.abc import Callable
from dataclasses import replace

from nbdmirror.core.durable import NO_GENERATION, add_base
from nbdmirror.core.messages import JointTake, JointTaken
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path
from nbdmirror.core.session import Phase, Session
from nbdmirror.core.superblock import (
    DataState,
    Flags,
    PendingKind,
    Superblock,
    advance_generation,
)
from nbdmirror.errors import PeerProtocolError, SessionLostError, StaleCommandError

# An echo is answered at once, also while the peer's disk hangs. Whoever asks has other commands.
CONFIRM_S = 1.5


def joint_step(node: Node, session: Session) -> Path:
    """Run (a) to (d) as the source; returns when this session is in sync.

    Raises:
        SessionLostError: the session ended; the next contact finds out how far it got.
        PeerProtocolError: the peer took another generation than it was given.
    """
    yield from wait_for_arbiter(node, session)
    require_equal(node, session)
    generation = yield from give_up_right(node, session)
    yield from record(node, session, generation)
    require_live(session)
    session.tell(JointTake(generation=generation, last_seq=node.seq))
    yield (session.link.kick,)
    taken = yield from session.expect(JointTaken)
    if taken.generation != generation:
        raise PeerProtocolError("the peer took another joint generation than it was given")
    require_live(session)
    yield from node.change(joined(node, session, generation, keep_primary=True))
    require_live(session)
    node.in_sync(session)


def joined(
    node: Node, session: Session, generation: bytes, *, keep_primary: bool
) -> Callable[[Superblock], Superblock]:
    """The edit that takes a joint generation: up to date, nothing pending, nothing behind.

    The mirror knows its peer: another identity is refused (rule 20).
    """

    def edit(sb: Superblock) -> Superblock:
        if not session.live:
            raise SessionLostError(session.reason)
        kept = Flags.SPARSE | (Flags.WAS_PRIMARY if keep_primary else Flags(0))
        return replace(
            advance_generation(sb, generation),
            base=(),
            pending=NO_GENERATION,
            pending_kind=PendingKind.NONE,
            data_state=DataState.UPTODATE,
            flags=sb.flags & kept,
            forced_over=NO_GENERATION,
            peer_uuid=session.peer.node_uuid,
            boot_id=node.boot_id,
            mount_id=node.mount_id,
        )

    return edit


def wait_for_arbiter(node: Node, session: Session) -> Path:
    """Part (a) is not begun while an arbiter with a memory cannot be reached.

    The source keeps its right, the target stays not promotable, and the state says so.
    """
    while node.arbiter_has_memory and not node.arbiter_reachable:
        require_live(session)
        node.ask("arbiter-unreachable")
        yield from node.wait_for_answer()
    require_live(session)


def require_equal(node: Node, session: Session) -> None:
    """Nothing became different since the resync ended, and from part (a) on nothing can.

    A write that found no space here, under the right, is on the target only and dirty.

    Raises:
        SessionLostError: something did; the next contact compares anew.
    """
    if node.dirty.any():
        node.lose_session(session, "extents became different: comparing anew", ask=False)
        raise SessionLostError(session.reason)


def give_up_right(node: Node, session: Session) -> Path:
    """Part (a). Returns the joint generation, durably pending.

    A step that broke off is repeated with the same generation: the peer may have taken it, and if
    it then went on alone from there, a second one would look like a line of its own (split brain).
    """
    require_live(session)
    again = node.sb.pending_kind is PendingKind.JOINT
    generation = node.sb.pending if again else node.shell.random_bytes(16)

    def give_up(sb: Superblock) -> Superblock:
        # A pending claim may be known to the record.
        return replace(
            sb,
            flags=sb.flags & ~(Flags.ALONE | Flags.PEER_OUTDATED),
            base=sb.base if again else add_base(sb.base, sb.pending),
            pending=generation,
            pending_kind=PendingKind.JOINT,
        )

    session.phase = Phase.JOINT
    # In memory first: a session lost while this is being stored must freeze, not go on alone.
    node.giving_up = True
    try:
        yield from node.change(give_up)
    finally:
        node.giving_up = False
    return generation


def record(node: Node, session: Session, generation: bytes) -> Path:
    """Part (b): wait until whoever commands has set the record to (J, no owner)."""
    if not node.arbiter_has_memory:
        return
    node.recorded = NO_GENERATION
    try:
        while node.recorded != generation:
            require_live(session)
            # Asked again each time: whatever else was answered meanwhile cleared the question.
            if node.question != "record-joint":
                node.ask("record-joint")
            yield from node.wait_for_answer()
    finally:
        # A step that broke off asks nothing any more.
        if node.question == "record-joint":
            node.answer()


def confirm(node: Node, generation: bytes) -> Path:
    """The peer's engine answers, in the session whose joint step asks for the record, after now.

    A claim ends a session before it is sent, and no session begins before it is settled. So what
    the record held before this began is nothing that the peer has won since it joined the session;
    and what it wins later finds another version than the one that is replaced (rule 9b).

    Raises:
        StaleCommandError: that joint step asks no more, its session ended meanwhile, or the peer
            does not answer; it is asked again as long as the question stands.
    """
    session = node.session
    if session is None or not is_asked(node, generation):
        raise StaleCommandError(f"confirm-joint: no joint step asks for {generation.hex()} now")
    lease = node.lease
    lease.ask(session, node.shell.now_ms(), node.log.txn)
    number = lease.number
    yield (session.link.kick,)
    while session.live and lease.answered_number < number:
        if not (yield from lease.wait(node.shell.waiter(), CONFIRM_S)):
            raise StaleCommandError(f"confirm-joint: the peer gave no answer within {CONFIRM_S} s")
    if not session.live or not is_asked(node, generation):
        raise StaleCommandError(f"confirm-joint: the session of {generation.hex()} ended meanwhile")


def is_asked(node: Node, generation: bytes) -> bool:
    """Whether part (b) waits for this generation."""
    asked = node.question == "record-joint" and node.sb.pending_kind is PendingKind.JOINT
    return asked and node.sb.pending == generation


def require_live(session: Session) -> None:
    """Stop a step whose session ended while it was waiting."""
    if not session.live:
        raise SessionLostError(session.reason)
