"""What arrives on a session, sorted: answers wake who waits, data goes to the replica path.

Called by the thread that received the bytes, under the engine's lock; returns at once.
"""

from nbdmirror.core.leave import flush_and_answer, peer_left
from nbdmirror.core.messages import (
    Bye,
    Failed,
    JointTake,
    LeaveAsk,
    Left,
    MapPage,
    Message,
    Relay,
    Role,
    SourceBegin,
    Stable,
)
from nbdmirror.core.node import Node
from nbdmirror.core.session import EMPTY, Phase, Session
from nbdmirror.core.wire import Frame, FrameType
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import WINDOW_ENTRIES_MAX

OUTGOING_BUFFERS_MAX = 16 * WINDOW_ENTRIES_MAX
DATA = frozenset(
    {
        FrameType.WRITE,
        FrameType.ZERO,
        FrameType.TRIM,
        FrameType.FLUSH,
        FrameType.RESYNC_DATA,
        FrameType.RESYNC_ZERO,
        FrameType.HASH,
    }
)
ASIDE = frozenset({FrameType.ECHO_REQUEST, FrameType.ECHO_REPLY, FrameType.HASH_REPLY})
ORDERED = (Stable, JointTake)


def receive(node: Node, session: Session) -> None:
    """Take every complete frame of the channel. A violation ends the session."""
    more = True
    while more:
        try:
            frames = session.channel.frames()
        except PeerProtocolError as error:
            violation(node, session, error)
            return
        more = bool(frames) and take(node, session, frames)


def take(node: Node, session: Session, frames: list[Frame]) -> bool:
    """Sort checked frames. True when more may be waiting: what follows a control message is held
    back until it was seen. The frames may have been checked before the lock was taken.
    """
    more = False
    try:
        for frame in frames:
            handle(node, session, frame)
            more = more or frame.type is FrameType.CONTROL
        require_reader(session)
    except PeerProtocolError as error:
        violation(node, session, error)
        return False
    if session.inbox:
        session.wake_replica()
    return more


def violation(node: Node, session: Session, error: PeerProtocolError) -> None:
    """The peer did what the protocol does not allow: say so, and end the session."""
    node.shell.emit("protocol-error", reason=str(error))
    session.tell(Bye(reason=str(error)))
    node.lose_session(session, str(error))


def require_reader(session: Session) -> None:
    """A peer that asks and does not read the answers may not fill this node's memory.

    Raises:
        PeerProtocolError: too much is queued for it.
    """
    if len(session.outgoing) > OUTGOING_BUFFERS_MAX:
        raise PeerProtocolError("the peer asks and asks, but does not read the answers")


def handle(node: Node, session: Session, frame: Frame) -> None:
    """One checked frame; nothing of a session that has ended."""
    if not session.live:
        return
    kind = frame.type
    if kind is FrameType.ACK:
        session.acknowledged(bounded(node, session, frame.seq))
    elif kind in DATA:
        require_receiver(session, kind.name)
        session.inbox.append(frame)
    elif kind is FrameType.FLUSHED:
        session.flushed(bounded(node, session, frame.seq))
    elif kind is FrameType.CONTROL:
        control(node, session, frame)
    elif kind in ASIDE:
        aside(node, session, frame)
    else:
        raise PeerProtocolError(f"the peer could not carry out {frame.seq}: errno {frame.aux}")


def require_receiver(session: Session, what: str) -> None:
    """Rule 6: only the target of this session takes data.

    Raises:
        PeerProtocolError: this node is not that.
    """
    if not session.receiving and not session.may_receive:
        raise PeerProtocolError(f"{what}, but this node does not receive in this session")


def aside(node: Node, session: Session, frame: Frame) -> None:
    """Echoes and the answers to comparisons."""
    kind = frame.type
    if kind is FrameType.ECHO_REQUEST:
        node.log.peer_txn = max(node.log.peer_txn, frame.aux)
        if session.peer_primary and session.may_receive:
            node.lease.lend(node.shell.now_ms())
        session.queue(FrameType.ECHO_REPLY, 0, frame.seq, 0, node.log.txn, EMPTY)
    elif kind is FrameType.ECHO_REPLY:
        session.heard = True
        if session.sending and session is node.session:
            node.lease.answered(frame.seq)
    else:
        waiter = session.hash_waiters.pop(frame.seq, None)
        if waiter is None:
            raise PeerProtocolError(f"a comparison that nobody asked for: {frame.seq}")
        waiter.wake(bytes(frame.payload))


def bounded(node: Node, session: Session, seq: int) -> int:
    """An acknowledgement is only for what was sent in this session.

    Raises:
        PeerProtocolError: it is for something else.
    """
    if not session.sending or seq > node.seq:
        raise PeerProtocolError(f"acknowledges {seq}, sent was {node.seq}")
    return seq


def control(node: Node, session: Session, frame: Frame) -> None:
    """One control message."""
    message: Message = frame.payload
    if isinstance(message, ORDERED) or (isinstance(message, LeaveAsk) and session.receiving):
        require_receiver(session, type(message).__name__)
        session.inbox.append(frame)
    elif isinstance(message, LeaveAsk):
        node.shell.spawn("answer-leave", flush_and_answer(node, session, message))
    elif isinstance(message, Left):
        session.peer_left = True
        node.shell.spawn("peer-left", peer_left(node, session, message))
    elif isinstance(message, Role | Relay):
        note(node, session, message)
    elif isinstance(message, MapPage):
        if session.phase is not Phase.NEGOTIATING:
            raise PeerProtocolError("a page of the dirty map in the middle of a session")
        node.dirty.merge_page(message.index, message.payload)
    elif isinstance(message, (Bye, Failed)):
        reason = message.reason if isinstance(message, Bye) else f"its disk failed: {message.where}"
        node.peer_failed = node.peer_failed or isinstance(message, Failed)
        node.refusal = f"peer: {reason}"
        node.lose_session(session, f"peer: {reason}")
    else:
        if isinstance(message, SourceBegin):
            begin_data(node, session, message)
        session.mail(message)


def note(node: Node, session: Session, message: Role | Relay) -> None:
    """What the peer says of itself, whenever it likes."""
    if isinstance(message, Role):
        session.peer_primary = message.primary
        if not message.primary:
            node.lease.returned()
        return
    session.peer_attended = message.attended
    if message.payload:
        node.relayed = message.payload
        node.relayed_count += 1


def begin_data(node: Node, session: Session, message: SourceBegin) -> None:
    """Data frames may follow, from this number on: only to a node that expects them (rule 6)."""
    if not session.may_receive:
        raise PeerProtocolError("data to a node that is not the target of this session")
    session.channel.open_data(node.sb.device_bytes, message.first_seq)
