"""Going on with a session that was lost, between the same two engines: replay in order (rule 4).

Owns what both ends have to agree on for it, and the two ends of the data's direction, which a
session that begins anew opens in the same way. Must never resume where anything was decided since.
"""

from nbdmirror.core.joint import require_live
from nbdmirror.core.lease import begin_lease
from nbdmirror.core.messages import SourceBegin, State
from nbdmirror.core.node import Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.replica import replica
from nbdmirror.core.session import EMPTY, Operation, Phase, Session
from nbdmirror.core.session import Verdict as Outcome
from nbdmirror.core.wire import FrameType
from nbdmirror.errors import PeerRefusedError


def may_resume(mine: State, theirs: State, session: Session) -> bool:
    """`reconnected` (replay in order) is only for the same two engine instances.

    Exactly one of them sends, neither may act alone or changed its generation since.
    """
    return bool(
        mine.resume_session
        and mine.resume_session == theirs.resume_session
        and mine.peer_instance == session.peer.instance
        and mine.generation == theirs.generation
        and mine.primary_now != theirs.primary_now
    )


def resume(node: Node, session: Session, mine: State, theirs: State) -> Path:
    """Go on where the lost session of the same two engines stopped: replay in order."""
    last = node.last_session
    assert last is not None
    if last.sending:
        require_contiguous(node, theirs.resume_applied)
        session.phase = Phase.SYNCED
        session.acked_seq = theirs.resume_applied
        hear_answers(session)
        session.sending = True
        session.tell(SourceBegin(first_seq=theirs.resume_applied + 1, resume=True))
        begin_lease(node, session)
        replay(node, session, theirs.resume_applied)
        node.frozen_reason = ""
        node.answer()
        yield (session.link.kick,)
    else:
        yield from session.expect(SourceBegin)
        session.phase = Phase.SYNCED
        session.applied_seq = session.acked_seq = mine.resume_applied
        session.flush_done_seq = last.flush_done_seq
        session.stable_seq = last.stable_seq
        receive(node, session)
    node.last_session = None
    node.shell.emit("resumed", session=f"{session.number:016x}")


def replay(node: Node, session: Session, applied: int) -> None:
    """Send again what the peer did not apply, under its old numbers; settle what it did.

    A durable operation that was applied waits for a flush of the new session.
    """
    flush_again = False
    for operation in unsettled(node):
        if operation.seq > applied:
            session.submit(operation)
        elif operation.durable:
            session.awaiting_flush.append(operation)
            flush_again = True
        else:
            operation.settle(Outcome.ACKNOWLEDGED)
    if flush_again:
        node.seq += 1
        session.queue(FrameType.FLUSH, 0, node.seq, 0, 0, EMPTY)


def unsettled(node: Node) -> list[Operation]:
    """The frozen operations, in the order of their numbers."""
    return [op for op in node.inflight if op.verdict is None]


def require_contiguous(node: Node, applied: int) -> None:
    """Every number that the peer lacks must still be here.

    Raises:
        PeerRefusedError: one is missing; the next contact compares from the beginning.
    """
    wanted = [op.seq for op in unsettled(node) if op.seq > applied]
    if applied > node.seq or wanted != list(range(applied + 1, node.seq + 1)):
        node.last_session = None
        raise PeerRefusedError(
            "what the peer has not applied is not all here any more; compare anew"
        )


def hear_answers(session: Session) -> None:
    """Let acknowledgements in; data frames stay refused by the channel itself."""
    session.channel.open_answers()


def receive(node: Node, session: Session) -> None:
    """Start applying."""
    require_live(session)
    node.take_role(Role.SECONDARY)
    session.receiving = True
    node.shell.spawn_replica(replica(node, session))
