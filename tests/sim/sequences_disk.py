"""Sequences of disks that fail: each operation, on either side, and what the client hears.

A is primary, B secondary, in sync. An error on the secondary costs redundancy only; on the primary
the node steps back while another copy can serve. Each function is one sequence; its docstring is
what must come out.
"""

import errno
from dataclasses import replace
from typing import Any

from nbdmirror.core import io, roles
from nbdmirror.core.node import Role, Settings
from nbdmirror.core.ports import Path, ReadBuffer
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.core.upkeep import LOCAL_IO_FACTOR
from nbdmirror.errors import RefusedError
from nbdmirror.limits import ACK_TIMEOUT_MS
from tests.sim.disk import CHANGES
from tests.sim.host import EngineLife, Host
from tests.sim.sequences_crashes import begin_resync
from tests.sim.sequences_scene import NEVER_MS, Request, Scene

SLOW_FACTOR = 50
HELD_MS = 40_000
HANG_LIMIT_MS = (LOCAL_IO_FACTOR + 1) * ACK_TIMEOUT_MS


def is_told(request: Request, error: str) -> bool:
    """Whether a request ended with that error."""
    return (request.problem or "").startswith(error)


def spawns(life: EngineLife) -> list[str]:
    """The names of the paths that an engine begins beside others from now on."""
    names: list[str] = []
    spawn = life.spawn

    def noted(name: str, path: Path) -> None:
        names.append(name)
        spawn(name, path)

    life.spawn = noted  # type: ignore[method-assign] # a look at what production begins
    return names


def returns(s: Scene, host: Host) -> None:
    """The engine is replaced, and its copy made good."""
    s.kill(host)
    host.data.heal()
    s.start(host)
    s.synced()


def remote_zero_fails(s: Scene) -> None:
    """B cannot zero: the request waits until A durably knows that B lacks it, and succeeds."""
    s.pair()
    s.write(s.a, 5)
    s.b.data.fail(errno.EIO, "zero")
    pending = s.begin_zero(s.a, 5)
    s.until(lambda: s.node(s.a).session is None)
    assert pending.problem is None
    s.alone(s.a)
    s.until(lambda: pending.acknowledged)
    s.until(lambda: Flags.FAILED in s.on_disk(s.b).flags)
    returns(s, s.b)
    s.both_have(pending)


def remote_trim_without_space(s: Scene) -> None:
    """B has no room to trim: it writes zeros instead, and nobody else notices."""
    s.pair()
    s.write(s.a, 5)
    s.b.data.fail(errno.ENOSPC, "trim", "zero")
    pending = s.begin_zero(s.a, 5, trim=True)
    s.until(lambda: pending.acknowledged)
    assert not s.b.data.once
    s.run(50)
    assert s.checker.both_synced()
    s.both_have(pending)


def local_zero_not_offered(s: Scene) -> None:
    """A's file system has lost the operation: zeros are written, and the copies are equal."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.failing.update(dict.fromkeys(("trim", "zero"), errno.EOPNOTSUPP))
    for trim in (False, True):
        s.write(s.a, 5)
        pending = s.begin_zero(s.a, 5, trim=trim)
        s.answered(pending)
        assert pending.acknowledged
        s.both_have(pending)
    s.synced()


def local_trim_fails(s: Scene) -> None:
    """A cannot trim: ESHUTDOWN, A is outdated, B serves; A is copied anew."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.fail(errno.EIO, "trim")
    pending = s.begin_zero(s.a, 5, trim=True)
    s.until(lambda: s.node(s.a).role is Role.NONE)
    s.answered(pending)
    assert is_told(pending, "NotPrimaryError")
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.b).flags)
    assert s.on_disk(s.a).data_state is DataState.OUTDATED
    s.promote(s.b)
    kept = s.write(s.b, 7)
    returns(s, s.a)
    s.both_have(kept)


def failed_primary_acknowledges_nothing(s: Scene) -> None:
    """A's disk fails one request: what follows, or ran beside it, waits until A has stepped back,
    although A's file takes it and B has it: B is the only copy that counts.
    """
    s.pair()
    s.a.data.fail(errno.EIO, "zero")
    s.b.data.slow_factor = SLOW_FACTOR
    beside = s.begin_write(s.a, 600, 200)
    s.begin_zero(s.a, 5)
    s.until(lambda: s.node(s.a).failed)
    after, flush = s.begin_write(s.a, 6), s.begin_flush(s.a)
    for pending in (beside, after, flush):
        s.answered(pending)
        assert is_told(pending, "NotPrimaryError")
    s.until(lambda: s.on_disk(s.a).data_state is DataState.OUTDATED)


def local_read_fails(s: Scene) -> None:
    """A cannot read while B is in sync: no EIO, A steps back."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.fail(errno.EIO, "read")
    pending = s.begin_read(s.a, 5)
    s.answered(pending)
    assert is_told(pending, "NotPrimaryError")
    s.until(lambda: s.on_disk(s.a).data_state is DataState.OUTDATED)


def flush_without_space(s: Scene) -> None:
    """What was acknowledged finds no room at the flush: that is a loss of A, and no ENOSPC."""
    s.pair()
    first = s.write(s.a, 5)
    s.a.data.fail(errno.ENOSPC, "sync")
    pending = s.begin_flush(s.a)
    s.answered(pending)
    assert is_told(pending, "NotPrimaryError")
    s.until(lambda: Flags.FAILED in s.on_disk(s.a).flags)
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.b).flags)
    s.promote(s.b)
    returns(s, s.a)
    s.both_have(first)
    assert s.has(s.a, first, durable=True)


def second_flush_fails(s: Scene) -> None:
    """A flush freezes, A goes on alone and flushes once more for it, and that fails: A has failed
    and knows it after a restart.
    """
    s.pair()
    s.write(s.a, 5)
    s.cut()
    pending = s.begin_flush(s.a)
    s.until(lambda: s.node(s.a).frozen)
    ended = s.begin(s.a, roles.alone(s.node(s.a)))
    s.until(lambda: s.node(s.a).right)
    s.a.data.fail(errno.EIO, "sync")
    s.answered(pending)
    assert ended
    assert is_told(pending, "StoreError")
    assert s.node(s.a).failed
    s.until(lambda: Flags.FAILED in s.on_disk(s.a).flags)


def durable_write_not_synced(s: Scene) -> None:
    """A is alone, and a write with FUA is written but not synced: EIO, and so is all that follows.

    What is in the page cache of A shows is not believed after a restart.
    """
    s.pair()
    s.part()
    s.alone(s.a)
    s.a.data.fail(errno.EIO, "sync")
    for fua in (True, False):
        pending = s.begin_write(s.a, 5, fua=fua)
        s.answered(pending)
        assert is_told(pending, "StoreError")
    s.until(lambda: Flags.FAILED in s.on_disk(s.a).flags)
    s.kill(s.a)
    s.start(s.a)
    assert "rule 5" in s.refused(s.a, roles.promote(s.node(s.a)))


def last_copy_is_full(s: Scene) -> None:
    """A is alone and full: ENOSPC for each change, nothing is given up, and room heals it."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.a.data.failing.update(dict.fromkeys(CHANGES, errno.ENOSPC))
    for pending in (s.begin_write(s.a, 5), s.begin_zero(s.a, 6), s.begin_zero(s.a, 7, trim=True)):
        s.answered(pending)
        assert is_told(pending, "OutOfSpaceError")
    s.flush(s.a)
    assert not s.node(s.a).failed
    s.a.data.heal()
    kept = s.write(s.a, 5)
    s.heal()
    s.synced()
    s.both_have(kept)


def failure_while_the_right_is_taken(s: Scene) -> None:
    """A read fails while `alone` waits for its flush: the right is not taken by a failed copy."""
    s.pair()
    s.write(s.a, 5)
    s.part()
    pending = s.begin_write(s.a, 7)
    s.a.data.slow_factor = SLOW_FACTOR
    ended = s.begin(s.a, roles.alone(s.node(s.a)))
    s.run(50)
    s.a.data.fail(errno.EIO, "read")
    s.begin_read(s.a, 9)
    s.until(lambda: s.node(s.a).failed)
    assert not ended
    s.until(lambda: ended)
    assert isinstance(ended[0][1], RefusedError)
    assert not s.node(s.a).right
    s.run(1000)
    assert pending.problem is None


def full_in_the_joint_step(s: Scene) -> None:
    """A has given up its right and finds no room: B may serve, so the client hears no ENOSPC."""
    begin_resync(s)
    s.until(lambda: s.session(s.a).phase is Phase.JOINT)
    s.b.meta.slow_factor = SLOW_FACTOR
    s.until(lambda: not s.node(s.a).right and not s.node(s.a).giving_up)
    s.a.data.fail(errno.ENOSPC, "write")
    pending = s.begin_write(s.a, 7)
    s.until(lambda: s.node(s.a).failed)
    assert pending.problem is None
    s.command(s.a, roles.demote(s.node(s.a)))
    s.answered(pending)
    assert is_told(pending, "NotPrimaryError")
    s.b.meta.slow_factor = 1
    returns(s, s.a)


def full_before_the_joint_step(s: Scene) -> None:
    """A finds no space for W when all is copied and it still has the right: compared once more."""
    s.pair()
    s.write(s.a, 5)
    s.part()
    s.alone(s.a)
    finished = len(s.told("A resync-finished"))
    s.heal()
    s.until(lambda: len(s.told("A resync-finished")) > finished)
    assert s.node(s.a).right
    s.a.data.fail(errno.ENOSPC, "write")
    pending = s.begin_write(s.a, 7)
    s.answered(pending)
    assert is_told(pending, "OutOfSpaceError")
    s.synced()
    assert not s.node(s.a).dirty.any()


# --- a call of the local disk that does not return ----------------------------------------------


def hands_over(s: Scene) -> None:
    """A counts as failed within the bound, and B can serve."""
    s.until(lambda: s.node(s.a).role is Role.NONE, HANG_LIMIT_MS)
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.b).flags)
    s.until(lambda: not s.node(s.b).changing)
    s.promote(s.b)
    s.write(s.b, 7)


def one_tidying_at_a_time(s: Scene) -> None:
    """A's metadata hangs: it is not tidied again and again, each time by one more worker."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.write(s.a, 5)
    s.a.meta.hold_ms["write"] = NEVER_MS
    s.begin_write(s.a, 5000)
    spawned = spawns(s.life(s.a))
    s.run(60_000)
    assert spawned.count("tidy") <= 1


def flush_hangs(s: Scene) -> None:
    """The sync of a client's flush does not return, while hot regions take writes: handed over."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.hold_ms["sync"] = NEVER_MS
    pending = s.begin_flush(s.a)
    s.run(1000)
    s.write(s.a, 5)
    hands_over(s)
    assert not pending.acknowledged


def background_flush_hangs(s: Scene) -> None:
    """The same for a flush that no client waits for."""
    s.a.settings = Settings()
    s.pair()
    s.a.data.hold_ms["sync"] = NEVER_MS
    s.write(s.a, 5)
    s.until(lambda: s.node(s.a).background_flush)
    s.write(s.a, 5)
    hands_over(s)


def read_hangs(s: Scene) -> None:
    """A read of a bad sector does not return, while others do: handed over, not told an error."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.hold_ms["read"] = NEVER_MS
    pending = s.begin_read(s.a, 5)
    s.run(1000)
    s.answered(s.begin_read(s.a, 6))
    hands_over(s)
    assert pending.problem is None


# --- a local write that takes its time ---------------------------------------------------------


def peer_left_behind_a_late_write(s: Scene) -> None:
    """B leaves while a write hangs on A, longer than a flush waits: A goes on when it returns."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.hold_ms["write"] = HELD_MS
    pending = s.begin_write(s.a, 7)
    s.run(200)
    s.stop(s.b)
    assert s.on_disk(s.b).data_state is DataState.OUTDATED
    other = s.begin_write(s.a, 3000)
    s.until(lambda: s.told("A peer-left stored=False"))
    assert other.problem is None
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.a).flags, 2 * HELD_MS)
    s.until(lambda: pending.acknowledged and other.acknowledged)


def peer_back_before_its_word_is_stored(s: Scene) -> None:
    """The same, but B comes back first: its word counts no more, and nobody goes alone."""
    s.pair()
    s.write(s.a, 5)
    s.a.data.hold_ms["write"] = HELD_MS
    pending = s.begin_write(s.a, 7)
    s.run(200)
    s.stop(s.b)
    s.until(lambda: s.told("A peer-left stored=False"))
    s.start(s.b)
    s.until(lambda: pending.acknowledged, 2 * HELD_MS)
    s.synced()
    s.run(2 * HELD_MS)
    assert Flags.PEER_OUTDATED not in s.on_disk(s.a).flags
    assert s.checker.both_synced()


def late_write_before_a_swap(s: Scene) -> None:
    """A's own leg of W1 hangs over a swap: it may not land on what B sends for the same block."""
    s.pair()
    s.a.data.hold_ms["write"] = HELD_MS
    first = s.begin_write(s.a, 5)
    s.run(100)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.until(lambda: not s.session(s.b).peer_primary)
    s.promote(s.b)
    s.until(lambda: s.told("A session-lost .*do not return"))
    assert not s.checker.both_synced()
    second = s.begin_write(s.b, 5)
    s.answered(first, HELD_MS)
    s.synced()
    s.until(lambda: second.acknowledged)
    s.both_have(second)


def late_write_behind_a_cut(s: Scene) -> None:
    """The same, and the link is lost before A steps back: nothing calls A's disk failed."""
    s.pair()
    s.a.data.hold_ms["write"] = HELD_MS
    s.begin_write(s.a, 5)
    s.run(100)
    s.part()
    s.promote(s.b)
    s.command(s.a, roles.demote(s.node(s.a)))
    second = s.write(s.b, 5)
    s.heal()
    s.run(HELD_MS)
    s.synced()
    s.both_have(second)


def failure_beside_a_hung_write(s: Scene) -> None:
    """A waits for its hung write before it meets B, and its copy fails: it does not go on then."""
    s.pair()
    s.a.data.hold_ms["write"] = HELD_MS
    s.begin_write(s.a, 5)
    s.run(100)
    s.part()
    s.promote(s.b)
    s.command(s.a, roles.demote(s.node(s.a)))
    node = s.node(s.a)
    s.heal()
    decided = len(s.told("A decided"))
    s.until(lambda: node.session is not None)
    s.run(200)
    node.note_failure("a disk that fails", lost=False)
    s.run(2000)
    assert len(s.told("A decided")) == decided
    assert node.role is Role.NONE


def request_of_an_earlier_term(s: Scene) -> None:
    """W2 waits for W1's range while A steps back and serves again: it is not carried out then."""
    for host in s.sim.hosts:
        host.settings = replace(host.settings, ack_timeout_ms=5 * ACK_TIMEOUT_MS)
    s.pair()
    s.a.data.hold_ms["write"] = HELD_MS
    s.begin_write(s.a, 5)
    s.run(100)
    waiting = s.begin_write(s.a, 5)
    s.run(100)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.promote(s.a)
    s.answered(waiting, HELD_MS)
    assert is_told(waiting, "NotPrimaryError")
    assert not s.has(s.a, waiting)
    assert not s.has(s.b, waiting)


def only_copy_with_a_hung_write(s: Scene) -> None:
    """A is alone and steps back over a hung write: it may serve again, its own locks order it."""
    s.pair()
    s.kill(s.b)
    s.alone(s.a)
    s.a.data.hold_ms["write"] = HELD_MS
    first = s.begin_write(s.a, 5)
    s.run(100)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.promote(s.a)
    other, second = s.write(s.a, 7), s.begin_write(s.a, 5)
    s.answered(first, HELD_MS)
    s.until(lambda: second.acknowledged)
    s.start(s.b)
    s.synced()
    s.both_have(other, second)


def pieces_and_a_decision(s: Scene) -> None:
    """W has two pieces: B has the first, and A's disk still takes it when B is lost. A waits for
    that, and only for that: the second is frozen until A has decided.
    """
    s.pair()
    s.a.data.hold_ms["write"] = 400
    pending = s.begin_write(s.a, 0, 512)
    s.run(50)
    s.kill(s.b)
    s.command(s.a, roles.alone(s.node(s.a)))
    s.until(lambda: pending.acknowledged)
    s.start(s.b)
    s.synced()
    s.both_have(pending)


def pieces_and_the_peers_word(s: Scene) -> None:
    """The same when B leaves in order: nothing failed, and nothing stands still."""
    s.pair()
    s.a.data.hold_ms["write"] = 400
    pending = s.begin_write(s.a, 0, 512)
    s.run(20)
    s.stop(s.b)
    s.until(lambda: pending.acknowledged)
    assert Flags.PEER_OUTDATED in s.on_disk(s.a).flags
    s.start(s.b)
    s.synced()
    s.both_have(pending)


def slow_peer_makes_progress(s: Scene) -> None:
    """B needs more than the deadline for all that is in flight, and far less for each frame."""
    s.pair()
    store = s.life(s.b).store
    pwrite = store.pwrite

    def slow(buffer: ReadBuffer, offset: int) -> Any:
        operation = pwrite(buffer, offset)
        operation.delay_ms = 5 * ACK_TIMEOUT_MS // 100
        return operation

    store.pwrite = slow  # type: ignore[method-assign]
    pending = [s.begin_write(s.a, 256 * (n + 1), 256) for n in range(31)]
    s.until(lambda: all(request.acknowledged for request in pending))
    assert not s.told("session-lost")


def slow_peer_takes_small_writes(s: Scene) -> None:
    """The same with many small writes: B is slow in requests, not in bytes."""
    s.pair()
    store = s.life(s.b).store
    pwrite = store.pwrite

    def slow(buffer: ReadBuffer, offset: int) -> Any:
        operation = pwrite(buffer, offset)
        operation.delay_ms = 10
        return operation

    store.pwrite = slow  # type: ignore[method-assign]
    pending = [s.begin_write(s.a, 2 * n) for n in range(5 * ACK_TIMEOUT_MS // 40)]
    s.until(lambda: all(request.acknowledged for request in pending))
    assert not s.told("session-lost")


def block_status_waits_for_a_zero(s: Scene) -> None:
    """That a range reads as zeros is shown when both have it: after a failover it may be data."""
    s.pair()
    s.write(s.a, 5)
    s.cut()
    pending = s.begin_zero(s.a, 5)
    s.run(100)
    ended = s.begin(s.a, io.extents(s.node(s.a), 5 * 4096, 4096))
    s.run(500)
    assert not ended
    s.heal()
    s.until(lambda: ended and pending.acknowledged)
    assert ended[0][0] == []


# --- failures of flush and mark ------------------------------------------------------------------


def failure_is_stored_before_it_is_told(s: Scene) -> None:
    """B's sync fails, and B is killed as soon as A has heard: B still knows of its failure."""
    s.pair()
    first = s.write(s.a, 5)
    s.b.data.fail(errno.EIO, "sync")
    s.b.meta.slow_factor = SLOW_FACTOR
    s.begin_flush(s.a)
    s.until(lambda: s.told("A session-lost .*its disk failed"))
    assert Flags.FAILED in s.on_disk(s.b).flags
    s.kill(s.b)
    s.b.meta.slow_factor = 1
    s.start(s.b)
    assert "rule 5" in s.refused(s.b, roles.promote(s.node(s.b)))
    s.synced()
    assert s.has(s.b, first, durable=True)


def failure_that_could_not_be_stored(s: Scene) -> None:
    """B's disk takes neither the flush nor the mark of that; it recovers, and B is restarted.

    B's page cache shows what its disk lost, so what A knows as not flushed is sent, not compared.
    """
    s.pair()
    first = s.write(s.a, 5)
    s.b.data.fail(errno.EIO, "sync")
    s.b.meta.failing["write"] = errno.EIO
    pending = s.begin_flush(s.a)
    s.until(lambda: s.node(s.a).session is None)
    s.alone(s.a)
    s.until(lambda: pending.acknowledged)
    s.kill(s.b)
    assert Flags.FAILED not in s.on_disk(s.b).flags
    s.b.meta.heal()
    s.start(s.b)
    s.synced()
    assert s.has(s.b, first, durable=True)
