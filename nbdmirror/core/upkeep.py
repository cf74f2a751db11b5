"""What happens by the clock: echoes, deadlines, the background flush, and tidying when idle.

`Upkeep.tick` is called every few hundred milliseconds with the engine's monotonic time and returns
at once; what takes time is spawned. No clock decides about writes: a deadline only ends a session.
"""

from nbdmirror.core.io import background_flush
from nbdmirror.core.messages import Relay
from nbdmirror.core.node import Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.ranges import Hold
from nbdmirror.core.roles import hand_over, step_back
from nbdmirror.core.session import Phase, Session
from nbdmirror.errors import NbdMirrorError
from nbdmirror.limits import ATTENDED_MS, CONTROLLER_LOST_MS, KEEPALIVE_MS, SILENCE_MS

FLUSH_DEADLINE_FACTOR = 5
LOCAL_IO_FACTOR = 5
PROGRESS_MS = 1_000
# What each tick counts for at least: who is never awake for longer is awake all the same.
TICK_MS = 100
TIDY_MS = 5_000
HOT_REGIONS_KEPT_COUNT = 32


class Upkeep:
    """The timers of one engine."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.last_ms: int | None = None
        self.session: Session | None = None
        self.acked_mark = (0, 0)
        self.flushed_mark = (0, 0)
        self.echo_sent_ms = 0
        self.heard_ms = 0
        self.flush_ms = 0
        self.flushed_seq = 0
        self.tidy_ms = 0
        self.tidying = False
        self.idle_seq = 0
        self.frozen_ms = 0
        self.failed_ms: int | None = None
        self.local_mark = (0, 0)
        self.read_mark: tuple[Hold | None, int] = (None, 0)
        self.progress_mark = (0, 0)
        self.attended_ms = 0
        self.polled_ms = 0

    def tick(self, now_ms: int) -> None:
        """Do what is due at `now_ms`."""
        node = self.node
        node.split.now_ms = now_ms
        session = node.session
        gap = 0 if self.last_ms is None else now_ms - self.last_ms
        self.last_ms = now_ms
        if session is not self.session:
            self.restart(session, now_ms)
        elif gap > SILENCE_MS // 2:
            self.slept(gap - TICK_MS)
        if session is not None:
            self.deadlines(session, now_ms)
            self.echo(session, now_ms)
        self.flush(now_ms)
        self.ask(now_ms)
        self.local_io(now_ms)
        self.failure(now_ms)
        self.attend(now_ms)
        self.unattended(now_ms)
        self.progress(now_ms)
        if now_ms - self.tidy_ms >= TIDY_MS and not self.tidying:
            self.tidy_ms = now_ms
            self.tidying = True
            node.shell.spawn("tidy", self.tidy(self.idle_seq))
            self.idle_seq = node.seq if node.right and session is None else node.stable_seq

    def tidy(self, idle_seq: int) -> Path:
        """One tidying at a time: on a disk that hangs each would keep a worker."""
        try:
            yield from tidy(self.node, idle_seq)
        finally:
            self.tidying = False

    def restart(self, session: Session | None, now_ms: int) -> None:
        """Forget what was measured before."""
        self.session = session
        self.acked_mark = self.flushed_mark = (-1, now_ms)
        self.heard_ms = now_ms
        self.echo_sent_ms = 0

    def slept(self, gap_ms: int) -> None:
        """This process was not running: silence is counted only while awake (rule 18).

        What was counted before stays counted: a node that is paused again and again would else
        never lose a peer that is gone (rule 8).
        """
        self.acked_mark = later(self.acked_mark, gap_ms)
        self.flushed_mark = later(self.flushed_mark, gap_ms)
        self.local_mark = later(self.local_mark, gap_ms)
        self.read_mark = (self.read_mark[0], self.read_mark[1] + gap_ms)
        self.heard_ms += gap_ms
        self.frozen_ms += gap_ms
        self.attended_ms += gap_ms
        self.polled_ms += gap_ms
        self.echo_sent_ms = 0

    def deadlines(self, session: Session, now_ms: int) -> None:
        """A peer that does not acknowledge, flush or echo in time is lost, whatever it says."""
        timeout = self.node.ack_timeout_ms
        if session.heard:
            session.heard = False
            self.heard_ms = now_ms
        idle = not session.window and not session.resync_window
        if idle or self.acked_mark[0] != session.acked_seq:
            self.acked_mark = (session.acked_seq, now_ms)
        if not session.awaiting_flush or self.flushed_mark[0] != session.peer_flushed_seq:
            self.flushed_mark = (session.peer_flushed_seq, now_ms)
        if now_ms - self.acked_mark[1] > timeout:
            self.lose(session, f"no acknowledgement for {timeout} ms")
        elif now_ms - self.flushed_mark[1] > timeout * FLUSH_DEADLINE_FACTOR:
            self.lose(session, f"no flush within {timeout * FLUSH_DEADLINE_FACTOR} ms")
        elif now_ms - self.heard_ms > timeout:
            self.lose(session, f"no echo for {timeout} ms")

    def lose(self, session: Session, reason: str) -> None:
        """End a session for a deadline."""
        self.node.lose_session(session, reason)
        self.session = None

    def echo(self, session: Session, now_ms: int) -> None:
        """Ask for a sign of life, and tell the last durable intent transaction with it."""
        node = self.node
        every_ms = KEEPALIVE_MS
        if session.sending and node.arbiter_has_memory:
            # Each third of the read lease, rather a tick early than late.
            every_ms = min(every_ms, node.lease.length_ms // 3 - TICK_MS)
        if session.live and now_ms - self.echo_sent_ms >= every_ms:
            self.echo_sent_ms = now_ms
            node.lease.ask(session, now_ms, node.log.txn)
            node.shell.spawn("echo", kick(session))

    def flush(self, now_ms: int) -> None:
        """The background flush of both nodes, or of this one when it is alone."""
        node = self.node
        if now_ms - self.flush_ms < node.settings.flush_interval_ms or node.background_flush:
            return
        sending = node.sending_session() is not None
        due = bool(node.unflushed) if sending else node.right and node.seq > self.flushed_seq
        if due and not node.frozen:
            self.flush_ms = now_ms
            self.flushed_seq = node.seq
            node.shell.spawn("background-flush", background_flush(node))

    def ask(self, now_ms: int) -> None:
        """A freeze that nobody was asked about becomes a question when it lasts."""
        node = self.node
        if not node.frozen:
            self.frozen_ms = now_ms
            node.held = False
            return
        if not node.question and now_ms - self.frozen_ms > SILENCE_MS:
            node.ask("frozen")
        if not node.held and now_ms - self.frozen_ms > node.settings.freeze_limit_ms:
            # Who takes over is the operator's decision here, so the bound ends in a hold.
            node.held = True
            node.shell.emit("held", reason=node.frozen_reason)

    def local_io(self, now_ms: int) -> None:
        """Rule 8: I/O that does not return is the loss of that side, where another side is."""
        node = self.node
        seq, read = oldest_local(node), node.locks.oldest_shared()
        if seq == 0 or seq != self.local_mark[0]:
            self.local_mark = (seq, now_ms)
        if read is None or read is not self.read_mark[0]:
            self.read_mark = (read, now_ms)
        session = node.sending_session()
        if session is None or session.phase is not Phase.SYNCED:
            return
        limit_ms = node.ack_timeout_ms * LOCAL_IO_FACTOR
        for what, since_ms in (("write or flush", self.local_mark[1]), ("read", self.read_mark[1])):
            if now_ms - since_ms > limit_ms:
                node.note_failure(f"a local {what} has not returned for {limit_ms} ms", lost=False)

    def progress(self, now_ms: int) -> None:
        """The speed of a resync, for display."""
        resync = self.node.resync
        if not resync:
            self.progress_mark = (0, now_ms)
            return
        began, since_ms = self.progress_mark
        examined = resync["examined_bytes"]
        if examined < began:
            self.progress_mark = (examined, now_ms)  # another one began
        elif now_ms - since_ms >= PROGRESS_MS:
            resync["bytes_per_s"] = (examined - began) * 1000 // (now_ms - since_ms)
            self.progress_mark = (examined, now_ms)

    def failure(self, now_ms: int) -> None:
        """Hand over where this copy failed and a peer can serve."""
        node = self.node
        if not node.failed:
            return
        if self.failed_ms is None:
            self.failed_ms = now_ms
        session = node.session
        if session is not None and now_ms - self.failed_ms > node.ack_timeout_ms * LOCAL_IO_FACTOR:
            # The metadata lies on the same disk: the survivor's new generation marks this side.
            self.lose(session, f"the local disk failed: {node.failed}")
            return
        synced = session is not None and session.sending and session.phase is Phase.SYNCED
        if node.role is Role.PRIMARY and synced and not node.changing:
            node.shell.spawn("step-back", step_back(node))

    def attend(self, now_ms: int) -> None:
        """A controller that is connected and does not poll any more is none; the peer is told."""
        node = self.node
        if node.polled:
            node.polled = False
            self.polled_ms = now_ms
        attended = node.commanded and now_ms - self.polled_ms <= ATTENDED_MS
        if attended is node.attended:
            return
        node.attended = attended
        session = node.session
        if session is not None:
            session.tell(Relay(attended=attended, payload=b""))
            node.shell.spawn("attended", kick(session))

    def unattended(self, now_ms: int) -> None:
        """A primary that lost its controller hands over to a peer that has one.

        It goes on serving where it cannot, or where only an operator may change roles, and it never
        begins by itself to acknowledge alone.
        """
        node = self.node
        if node.attended or not node.was_attended or not node.settings.hand_over:
            self.attended_ms = now_ms
            return
        if now_ms - self.attended_ms <= CONTROLLER_LOST_MS:
            return
        session = node.sending_session()
        if session is None or session.phase is not Phase.SYNCED or not session.peer_attended:
            return
        if node.role is Role.PRIMARY and not node.changing:
            node.shell.spawn("hand-over", hand_over(node))


def later(mark: tuple[int, int], gap_ms: int) -> tuple[int, int]:
    """A mark (number, since) as if the gap had not been."""
    number, since_ms = mark
    return number, since_ms + gap_ms


def oldest_local(node: Node) -> int:
    """The number of the oldest operation whose local leg has not returned, 0 if there is none.

    A flush counts until its sync has returned, too; a hot region takes writes all the time.
    """
    for operation in node.inflight:
        if not operation.local_done or operation in node.syncing:
            return operation.seq
    return 0


def kick(session: Session) -> Path:
    """Put what is queued on the wire."""
    yield (session.link.kick,)


def tidy(node: Node, idle_seq: int) -> Path:
    """Write pages that were only cleared, let cold regions go, remember the peer's transaction.

    A region is cold when its last write was stable a round ago: it costs a commit to get it back,
    and as long as it is hot a crash costs a comparison of all of it.
    """
    if node.failed or node.stopping:
        return
    session = node.sending_session()
    if session is not None and session.phase is Phase.SYNCED and node.dirty.any():
        # Rule 13: dirty extents with the peer connected drain by themselves.
        node.lose_session(session, "dirty extents while in sync: comparing anew", ask=False)
        node.forget_peer_after_loss(session)
        return
    try:
        yield from node.save_pages(node.dirty.stale_pages()[:256])
        if len(node.log.hot) > HOT_REGIONS_KEPT_COUNT and not node.frozen:
            yield from node.evict(idle_seq)
        if node.saved_bytes != node.sb.saved_bytes:
            # Else rot at the end of what is kept would look like what a crash leaves.
            yield from node.change(lambda sb: sb, always=True)
        # One behind is near enough: two idle nodes would remember each other for ever.
        unremembered = node.log.peer_txn - node.log.durable_peer_txn
        if node.log.version > node.log.durable:
            yield from node.commit(node.log.version)
        elif unremembered > 1:
            yield from node.commit_anew()
    except NbdMirrorError as error:
        node.shell.emit("tidy-failed", reason=str(error))
