"""The state of one engine, and the few paths that every other path is made of.

Owns role, right to acknowledge, the superblock in memory (changed only after both slots hold it),
the intent log, the dirty map, the range locks and the current session. It must never acknowledge
anything itself: the paths in io.py do, and they ask here. Called by every other module of the
core.

Three things decide whether a client hears "done":

- a *session* that sends: the peer acknowledges, too;
- the *right* (flag ALONE in the superblock): this node may acknowledge what the peer does not have;
- neither: the operation is *frozen* until somebody decides.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from nbdmirror.core.aftermath import Keep, Split
from nbdmirror.core.durable import NO_GENERATION, NO_LIMIT_SEQ, Durable, Opened, wake_all
from nbdmirror.core.lease import Lease
from nbdmirror.core.ports import MetaStore, Path, Shell, Store, Waiter
from nbdmirror.core.ranges import RangeLocks
from nbdmirror.core.session import EMPTY, Operation, Phase, Session, Verdict
from nbdmirror.core.superblock import (
    Flags,
)
from nbdmirror.core.wire import FrameType
from nbdmirror.errors import NotPrimaryError, RefusedError, StaleCommandError, StoreError
from nbdmirror.limits import (
    ACK_TIMEOUT_MS,
    FLUSH_BYTES,
    FLUSH_INTERVAL_MS,
    FREEZE_LIMIT_MS,
    KEEP_BYTES,
    QUIESCE_TIMEOUT_MS,
    READ_LEASE_MS,
    UNFLUSHED_ENTRIES_MAX,
)

# Changes that an engine begins by itself; every other one is a command's.
PEER_LEFT = "peer left"
STEP_BACK = "step back"
OWN_CHANGES = frozenset({PEER_LEFT, STEP_BACK})

STUCK = (
    "writes of before do not return from this node's disk; nothing is decided or opened over "
    "them: look at the disk, then restart the engine"
)


class Role(Enum):
    """What an engine does. It starts in NONE, always."""

    NONE = "none"
    PRIMARY = "primary"
    SECONDARY = "secondary"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about the data path."""

    ack_timeout_ms: int = ACK_TIMEOUT_MS
    flush_interval_ms: int = FLUSH_INTERVAL_MS
    flush_bytes: int = FLUSH_BYTES
    freeze_limit_ms: int = FREEZE_LIMIT_MS
    read_lease_ms: int = READ_LEASE_MS
    confirm_reads: bool = False
    hand_over: bool = True
    keep_bytes: int = KEEP_BYTES


class Node(Durable):
    """One engine. All plain methods return at once; paths say so by their type."""

    def __init__(  # noqa: PLR0915 - one line per fact
        self,
        shell: Shell,
        store: Store,
        meta: MetaStore,
        opened: Opened,
        settings: Settings,
        instance: bytes,
    ) -> None:
        super().__init__(shell, meta, opened)
        self.store = store
        self.settings = settings
        self.instance = instance
        self.fell_back = opened.fell_back
        self.cache_survived = opened.cache_survived
        self.boot_id = opened.boot_id
        self.mount_id = opened.mount_id
        self.locks = RangeLocks(shell.waiter)
        # What an earlier engine of this node agreed on is in the superblock.
        length_ms = max(settings.read_lease_ms, self.sb.read_lease_ms)
        self.lease = Lease(length_ms, shell.now_ms(), confirms=settings.confirm_reads)
        self.role = Role.NONE
        self.epoch = 0
        self.changing = ""
        self.stopping = False
        self.stop_first = False
        self.giving_up = False
        self.refusal = ""
        self.seq = 0
        self.stable_seq = 0
        self.session: Session | None = None
        self.last_session: Session | None = None
        self.active: dict[Session, int] = {}
        self.inflight: dict[Operation, None] = {}
        # Flushes whose sync of the local file has not returned.
        self.syncing: dict[Operation, None] = {}
        self.unflushed: deque[tuple[int, int, int]] = deque()
        self.unflushed_bytes = 0
        self.pending_clear: deque[tuple[int, int, int]] = deque()
        self.frozen_reason = ""
        self.question = ""
        self.held = False
        self.ack_timeout_ms = settings.ack_timeout_ms
        self.recorded = NO_GENERATION
        self.arbiter_reachable = True
        self.resync: dict[str, int] = {}
        self.background_flush = False
        self.trim_ok = True
        self.fast_zero_ok = True
        self.own_trim_ok = True
        self.own_fast_zero_ok = True
        # What it had not flushed may show in its page cache and not be on its disk (rule 5).
        self.peer_failed = False
        # Whether a controller commands this engine, and what its peer's last said to it.
        self.commanded = False
        self.polled = False
        self.attended = False
        self.was_attended = False
        # The session after which this node has answered, by way of the controllers, that it stays.
        self.stays_after = 0
        self.split = Split()
        self.keep = Keep(settings.keep_bytes)
        self.relayed = EMPTY
        self.relayed_count = 0
        self._fenced_waiters: list[Waiter] = []
        self._answer_waiters: list[Waiter] = []
        self._change_waiters: list[Waiter] = []
        self._idle_waiters: list[Waiter] = []
        self._leg_waiters: list[tuple[set[Operation], Waiter]] = []

    # --- what this node may do ---------------------------------------------------------------

    @property
    def right(self) -> bool:
        """Whether this node may acknowledge what its peer does not have."""
        return super().right and not self.giving_up

    @property
    def frozen(self) -> bool:
        """Whether a primary can neither replicate nor acknowledge alone."""
        session = self.session
        return (
            self.role is Role.PRIMARY
            and not self.right
            and not (session is not None and session.sending)
        )

    @property
    def arbiter_has_memory(self) -> bool:
        """Whether the right to go alone comes from a compare-and-swap."""
        return self.sb.arbiter.has_memory

    def require_primary(self) -> int:
        """The role gate of every client operation (rule 6, section "life of a write", step 2).

        Returns the epoch, which names this term of the node.

        Raises:
            NotPrimaryError: this node does not serve.
            StoreError: the last copy failed; it answers EIO until it is declared good.
        """
        if self.role is not Role.PRIMARY:
            raise NotPrimaryError(f"this node is {self.role.value}, not primary")
        if self.failed and self.right:
            raise StoreError(5, self.failed)
        return self.epoch

    def require_term(self, epoch: int) -> None:
        """The gate again, after a wait: a request never goes on in a later term of its node.

        Raises:
            NotPrimaryError: this node does not serve, or did not in between.
            StoreError: as require_primary.
        """
        if epoch != self.epoch:
            raise NotPrimaryError("this node stepped back while the request waited")
        self.require_primary()

    def take_role(self, role: Role) -> None:
        """Change the role; commands decided under the old epoch are refused from here on."""
        if role is not self.role:
            self.stop_first = False
            self.role = role
            self.epoch += 1
            self.shell.emit("role", role=role.value, epoch=self.epoch)

    def new_numbers(self, stable_seq: int) -> None:
        """Another sender's numbers begin: what the hot set knows by the old ones is all dirty."""
        self.stable_seq = stable_seq
        for hot in self.log.hot.values():
            hot.last_seq = 0

    def sending_session(self) -> Session | None:
        """The session that operations are replicated through, if there is one."""
        session = self.session
        return session if session is not None and session.sending else None

    def evict(self, limit: int = NO_LIMIT_SEQ) -> Path:
        """Make room in the hot set; returns how many regions went (0: flush both nodes first).

        `limit` holds back more; a number of an earlier session can never let more go.
        """

        def highest() -> int:
            """Asked again when the pages are saved: a write may have gone to the peer meanwhile."""
            return min(limit, self.stable_seq) if self.unflushed or self.frozen else limit

        return (yield from self.evict_below(highest))

    def sync(self) -> Path:
        """Make the local data durable, for a decision that relies on it.

        With it what the peer has acknowledged and the local file is still taking: it may be told to
        the client before the decision is stored, and would then be on the peer's disk only.

        Raises:
            StoreError: it is not; this copy has failed, for what it lost is clean in the cache.
            RefusedError: a local write does not return, or this copy failed otherwise meanwhile;
                nothing was decided.
        """
        if not self.failed:
            yield from self.legs_ended(lambda op: op.verdict is Verdict.ACKNOWLEDGED)
        try:
            yield (self.store.fdatasync,)
        except StoreError as error:
            self.note_failure(str(error))
            yield from self.record_failure()
            raise
        if self.failed:
            raise RefusedError(f"this node's disk failed: {self.failed}; nothing was decided")

    def note_failure(self, reason: str, *, lost: bool = True) -> None:
        """This copy failed; nobody waits for what its disk will not do any more.

        A loss is recorded at once: an engine that ends before it is would be believed again.
        """
        is_news = lost and not self.failure_lost
        super().note_failure(reason, lost=lost)
        wake_all([waiter for _, waiter in self._leg_waiters])
        self._leg_waiters.clear()
        if is_news:
            self.shell.spawn("record-failure", self.record_failure())

    def record_failure(self) -> Path:
        """Store that this copy failed, as well as it can; else the survivor's generation marks it.

        Before the peer is told (rule 7): a restart in between would trust a page cache that shows
        what the disk has lost.
        """
        try:
            yield from self.change(
                lambda sb: replace(sb, flags=sb.flags | Flags.FAILED | Flags.CACHE_LOST)
            )
        except StoreError as error:
            self.shell.emit("failure-not-recorded", reason=str(error))

    # --- what the peer may lack --------------------------------------------------------------

    def remember_unflushed(self, seq: int, offset: int, end: int) -> None:
        """Note a range that this session carried and that both nodes have not flushed yet."""
        self.unflushed.append((seq, offset, end))
        self.unflushed_bytes += end - offset

    def unflushed_full(self) -> bool:
        """Whether writers have to wait for a flush of both nodes."""
        return (
            self.unflushed_bytes >= 2 * self.settings.flush_bytes
            or len(self.unflushed) >= UNFLUSHED_ENTRIES_MAX
        )

    def advance_stable(self, seq: int) -> None:
        """Everything up to `seq` is durable on both nodes: forget it, and clear what it copied."""
        if seq <= self.stable_seq:
            return
        self.stable_seq = seq
        unflushed = self.unflushed
        while unflushed and unflushed[0][0] <= seq:
            _, offset, end = unflushed.popleft()
            self.unflushed_bytes -= end - offset
        pending = self.pending_clear
        while pending and pending[0][0] <= seq:
            _, first, last = pending.popleft()
            self.dirty.clear(first, last)

    def mark_different(self, offset: int, end: int) -> None:
        """A range differs now: dirty, and no copy made earlier may clear it any more (rule 3)."""
        self.dirty.mark(offset, end)
        size = self.geometry.extent_bytes
        first, last = offset // size, (end + size - 1) // size
        self.pending_clear = deque(
            copy for copy in self.pending_clear if copy[2] <= first or last <= copy[1]
        )

    def forget_peer(self) -> None:
        """Rule 3: what the peer has not flushed becomes dirty; copies not flushed stay dirty."""
        for operation in self.inflight:
            if operation.end > operation.offset:
                self.dirty.mark(operation.offset, operation.end)
        for _, offset, end in self.unflushed:
            self.dirty.mark(offset, end)
        self.unflushed.clear()
        self.unflushed_bytes = 0
        self.pending_clear.clear()
        self.last_session = None
        # Numbers of another sender may be higher than those that this node gives next.
        self.new_numbers(self.seq)

    # --- the end of a session, and what follows ----------------------------------------------

    def lose_session(self, session: Session, reason: str, *, ask: bool = True) -> None:
        """Close a session and freeze, or go on alone where this node has the right.

        `ask`: put the question at once. Not where the session is given up to begin it anew.
        """
        if not session.live:
            return
        was = session.phase
        session.close(reason)
        if self.session is session:
            self.session = None
            self.lease.forget()
            self.last_session = session if was is Phase.SYNCED else None
            if was is Phase.SYNCED:
                self.split.parted_ms = self.split.now_ms
        if session.sending and self.role is not Role.PRIMARY:
            self.fence()
        elif session.sending and self.right:
            self.go_on_alone()
        elif session.sending:
            self.frozen_reason = reason
            if ask and not session.peer_left:
                # With the word of rule 16 the freeze ends by itself.
                self.ask("frozen")
        if self.role is Role.SECONDARY and self.session is None:
            self.take_role(Role.NONE)
        self._look_again()
        self.shell.emit("session-lost", session=f"{session.number:016x}", reason=reason)

    def go_on_alone(self) -> None:
        """Mark what the peer may lack and settle every operation in flight (right is stored)."""
        assert self.right
        self.forget_peer()
        self.frozen_reason = ""
        self.answer()
        for operation in self.inflight:
            operation.settle(Verdict.ALONE)

    def fence(self) -> None:
        """Answer every operation in flight with "not primary"; its outcome is unknown.

        One that froze before it was sent is on this node only, so its range is dirty from here on.
        """
        for operation in self.inflight:
            if operation.end > operation.offset and operation.verdict is None:
                self.mark_different(operation.offset, operation.end)
            operation.settle(Verdict.FENCED)
        wake_all(self._fenced_waiters)

    def wait_for_fence(self) -> Path:
        """Hold an operation whose local leg failed until this node has stepped back."""
        while self.role is Role.PRIMARY and not self.stopping:
            waiter = self.shell.waiter()
            self._fenced_waiters.append(waiter)
            yield (waiter.wait,)

    # --- questions to whoever commands -------------------------------------------------------

    def ask(self, question: str) -> None:
        """Put a question; it stays in the state until `answer` and is told to every new reader."""
        self.question = question
        self.shell.emit("question", question=question, reason=self.frozen_reason)

    def answer(self) -> None:
        """The question is settled; wake whoever waits for that."""
        self.question = ""
        self._look_again()

    def _look_again(self) -> None:
        """Wake whatever waits for a change of this node's standing, reads too."""
        wake_all(self._answer_waiters)
        self.lease.wake()

    def wait_for_answer(self) -> Path:
        """Wait for the next answer or change."""
        waiter = self.shell.waiter()
        self._answer_waiters.append(waiter)
        yield (waiter.wait,)

    # --- one change of role at a time ---------------------------------------------------------

    def begin_change(self, name: str) -> None:
        """Reserve the right to change role or standing.

        Raises:
            StaleCommandError: another change is under way; it is not queued.
        """
        if self.changing:
            raise StaleCommandError(
                f"{name}: {self.changing} is under way; wait for it and try again"
            )
        self.changing = name

    def end_change(self) -> None:
        """Let the next change begin."""
        self.changing = ""
        wake_all(self._change_waiters)

    def wait_to_change(self, name: str) -> Path:
        """Like begin_change, but after whatever is under way."""
        while self.changing:
            yield from self.change_ended()
        self.changing = name

    def change_ended(self, timeout_s: float | None = None) -> Path:
        """Wait for the end of a change; False when the time ran out."""
        waiter = self.shell.waiter()
        self._change_waiters.append(waiter)
        return (yield (waiter.wait, timeout_s))

    # --- idleness ----------------------------------------------------------------------------

    def finish(self, operation: Operation) -> None:
        """An operation leaves the table; wakes whoever drains."""
        del self.inflight[operation]
        if self._leg_waiters:
            self._leg_left(operation)
        if not self.inflight:
            wake_all(self._idle_waiters)

    def drain(self, timeout_s: float) -> Path:
        """Wait until no client operation is in flight; False when the time ran out."""
        while self.inflight:
            waiter = self.shell.waiter()
            self._idle_waiters.append(waiter)
            if not (yield (waiter.wait, timeout_s)):
                return False
        return True

    def enter(self, session: Session) -> None:
        """A path that may change data for this session begins."""
        self.active[session] = self.active.get(session, 0) + 1

    def leave(self, session: Session) -> None:
        """Such a path ended."""
        self.active[session] -= 1
        if not self.active[session]:
            del self.active[session]
            wake_all(self._idle_waiters)

    def quiesce(self) -> Path:
        """Wait until nothing of an ended session can change data any more.

        Raises:
            RefusedError: something does not return from the disk.
        """
        while any(not session.live for session in self.active):
            waiter = self.shell.waiter()
            self._idle_waiters.append(waiter)
            if not (yield (waiter.wait, QUIESCE_TIMEOUT_MS / 1000)):
                raise RefusedError(STUCK)

    def own_writes_ended(self) -> Path:
        """Wait until no write of a term that has ended can change data any more.

        A primary's own writes are ordered by its range locks. Those of a peer know nothing of them:
        one that was answered long ago would land on top of what the peer sends.

        Raises:
            RefusedError: something does not return from the disk.
        """
        if self.role is not Role.PRIMARY:
            yield from self.legs_ended(lambda _: True)
            # The failure of this copy ends that wait, too, and not the writes.
            if any(not op.local_done for op in self.inflight):
                raise RefusedError(STUCK)

    def legs_ended(self, wanted: Callable[[Operation], bool]) -> Path:
        """Wait for the local legs that are under way now, or for the failure of this copy; bounded.

        Raises:
            RefusedError: one of them does not return.
        """
        legs = {op for op in self.inflight if not op.local_done and wanted(op)}
        if not legs:
            return
        waiter = self.shell.waiter()
        entry = (legs, waiter)
        self._leg_waiters.append(entry)
        ended = yield (waiter.wait, QUIESCE_TIMEOUT_MS / 1000)
        if not ended and entry in self._leg_waiters:
            self._leg_waiters.remove(entry)
            raise RefusedError(STUCK)

    def local_leg_ended(self, operation: Operation) -> None:
        """The local file has taken an operation; wakes whoever waits for that."""
        operation.local_done = True
        if self._leg_waiters:
            self._leg_left(operation)

    def _leg_left(self, operation: Operation) -> None:
        for entry in self._leg_waiters[:]:
            legs, waiter = entry
            legs.discard(operation)
            if not legs:
                self._leg_waiters.remove(entry)
                waiter.wake(True)

    # --- in sync -------------------------------------------------------------------------------

    def forget_peer_after_loss(self, session: Session) -> None:
        """The session that could have been resumed will not be: its operations stay, as dirty."""
        if self.last_session is session:
            self.last_session = None

    def in_sync(self, session: Session) -> None:
        """Both copies are equal and known to be: nothing of an earlier life counts any more."""
        session.phase = Phase.SYNCED
        self.cache_survived = True
        self.fell_back = self.peer_failed = False
        self.refusal = ""
        self.split.found_ms = None
        self.resync = {}
        self.shell.emit("in-sync", generation=self.sb.generation.hex())


def is_write(operation: Operation) -> bool:
    """Whether an operation changes data."""
    return operation.kind is not FrameType.FLUSH
