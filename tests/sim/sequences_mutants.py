"""Sequences for rules that chance seldom tries: each shows one mutant that seeds may miss.

A is primary, B secondary, in sync. Each function is one sequence; its docstring is what must come
out.
"""

import errno

from nbdmirror.core import roles
from nbdmirror.core.node import Role
from nbdmirror.core.superblock import DataState, Flags, PendingKind
from nbdmirror.errors import StoreError
from nbdmirror.limits import ACK_TIMEOUT_MS, BASE_COUNT_MAX, SILENCE_MS
from tests.sim.sequences_crashes import begin_resync
from tests.sim.sequences_scene import Scene

SLOW_FACTOR = 3000


def intent_not_written(s: Scene) -> None:
    """The intent log cannot be written: the data is not written either."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.a.meta.fail(errno.EIO, "sync")
    pending = s.begin_write(s.a, 10_000)
    s.until(lambda: pending.problem is not None)
    assert not pending.acknowledged
    assert not s.has(s.a, pending)


def frozen_then_alone(s: Scene) -> None:
    """A write that came while A was frozen is in the map before it is acknowledged."""
    s.pair()
    s.part()
    pending = s.begin_write(s.a, 5)
    s.run(200)
    assert pending.problem is None
    s.alone(s.a)
    s.until(lambda: pending.acknowledged)
    assert s.node(s.a).dirty.dirty_in(5 * 4096, 6 * 4096)
    s.heal()
    s.synced()
    s.both_have(pending)


def failed_sync_is_remembered(s: Scene) -> None:
    """The flush before a decision failed: a restart does not make that copy good."""
    s.pair()
    s.write(s.a, 5)
    s.part()
    s.a.data.fail(errno.EIO, "sync")
    ended = s.begin(s.a, roles.alone(s.node(s.a)))
    s.until(lambda: ended)
    assert isinstance(ended[0][1], StoreError)
    s.until(lambda: Flags.FAILED in s.on_disk(s.a).flags)
    s.kill(s.a)
    s.start(s.a)
    assert "rule 5" in s.refused(s.a, roles.promote(s.node(s.a)))


def promoted_while_applying(s: Scene) -> None:
    """B is promoted while a frame is being written: the gate opens when that has ended, and what
    followed it is dropped.
    """
    s.pair()
    s.b.data.slow_factor = SLOW_FACTOR
    for extent in range(5, 35):
        s.begin_write(s.a, extent)
    s.run(40)
    s.b.data.slow_factor = 1
    s.kill(s.a)
    assert s.node(s.b).active
    ended = s.begin(s.b, roles.promote(s.node(s.b)))
    s.until(lambda: s.node(s.b).role is Role.PRIMARY)
    assert not s.node(s.b).active
    s.until(lambda: ended)


def target_map_cut_off(s: Scene) -> None:
    """Only the target knows of a write that the source never had; the link goes before its map is
    there: it still knows at the next contact.
    """
    s.pair()
    s.cut()
    lost = s.begin_write(s.a, 5)
    s.run(100)
    s.kill(s.a)
    assert s.has(s.a, lost)
    s.heal()
    s.promote(s.b)
    kept = s.write(s.b, 3000)
    s.start(s.a)
    decided = len(s.told("A decided"))
    s.until(lambda: len(s.told("A decided")) > decided)
    s.cut()
    s.run(20)
    s.net.reset_all()
    s.heal()
    s.synced()
    s.both_have(kept)
    assert not s.has(s.a, lost)


def dirty_in_sync_drains(s: Scene) -> None:
    """An extent that is dirty while both are in sync is copied by itself."""
    s.pair()
    s.node(s.a).dirty.mark(0, 4096)
    s.until(lambda: not s.node(s.a).dirty.any())
    s.synced()


def leave_under_load(s: Scene) -> None:
    """B leaves while A is written to: all that both had is durable on A before it goes on alone."""
    s.pair()
    ended = s.begin(s.b, roles.stop(s.node(s.b)))
    pending = []
    for extent in range(5, 205):
        pending.append(s.begin_write(s.a, extent))
        s.run(1)
    s.until(lambda: ended and Flags.PEER_OUTDATED in s.on_disk(s.a).flags)
    s.until(lambda: all(request.acknowledged for request in pending))


def evicted_region_is_in_the_map(s: Scene) -> None:
    """A is alone and writes to more regions than the log holds: after a power cut all are known."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.node(s.a).log.capacity = 4
    extents = range(0, 12 * 256, 256)
    for extent in extents:
        s.write(s.a, extent, fua=True)
    s.power(s.a)
    s.start(s.a)
    dirty = s.node(s.a).dirty
    assert all(dirty.dirty_in(at * 4096, (at + 1) * 4096) for at in extents)
    s.heal()
    s.synced()


def unflushed_region_stays_hot(s: Scene) -> None:
    """In sync, more regions than the log holds: one that B has not flushed is not let go."""
    s.pair()
    for host in (s.a, s.b):
        s.node(host).log.capacity = 4
    written = [s.write(s.a, extent) for extent in range(0, 12 * 256, 256)]
    s.power(s.b)
    s.kill(s.a)
    s.start(s.a)
    s.start(s.b)
    s.synced()
    s.both_have(*written)


def lost_cache_survives_a_clean_stop(s: Scene) -> None:
    """A lost W with its power, and is stopped in order before it met B: it is still held back."""
    s.pair()
    first = s.write(s.a, 5)
    s.cut()
    s.power(s.a)
    s.start(s.a)
    s.stop(s.a)
    s.start(s.a)
    assert "rule 12" in s.refused(s.a, roles.promote(s.node(s.a)))
    s.heal()
    s.synced()
    assert s.leads(s.b)
    s.both_have(first)
    s.stop(s.a)
    s.start(s.a)
    s.synced()
    assert Flags.CACHE_LOST not in s.on_disk(s.a).flags


def failed_flush_at_the_stop_is_recorded(s: Scene) -> None:
    """A is stopped, and the flush of its stop fails: the next engine on A knows that."""
    s.pair()
    s.write(s.a, 5)
    s.kill(s.b)
    s.a.data.fail(errno.EIO, "sync")
    s.command(s.a, roles.stop(s.node(s.a)))
    s.a.end(power=False)
    s.start(s.a)
    assert "rule 5" in s.refused(s.a, roles.promote(s.node(s.a)))


def page_of_the_map_in_the_cache_only(s: Scene) -> None:
    """A was alone and is killed; its next engine fails to write the map and ends, the one after it
    reads that page from the cache: once the log names other regions a power cut must not take it.
    """
    s.pair()
    s.part()
    s.alone(s.a)
    first = s.write(s.a, 5, fua=True)
    s.kill(s.a)
    s.a.meta.fail(errno.EIO, "sync")
    s.a.start()
    s.until(lambda: s.a.life is None)
    s.start(s.a)
    s.promote(s.a)
    second = s.write(s.a, 10_000, fua=True)
    s.power(s.a)
    s.start(s.a)
    assert s.node(s.a).dirty.dirty_in(5 * 4096, 6 * 4096)
    s.heal()
    s.synced()
    s.both_have(first, second)


def flush_does_not_cover_a_write_under_way(s: Scene) -> None:
    """W is on B and still on its way to A's file when both flush: A's log goes on naming it."""
    s.pair()
    s.node(s.a).log.capacity = 4
    s.a.data.slow_factor = SLOW_FACTOR
    slow = s.begin_write(s.a, 5)
    s.until(lambda: s.has(s.b, slow) and s.a.data.started)
    s.a.data.slow_factor = 1
    s.flush(s.a)
    for extent in range(256, 8 * 256, 256):
        s.write(s.a, extent)
    s.until(lambda: slow.acknowledged)
    s.power(s.a)
    s.start(s.a)
    s.synced()
    s.both_have(slow)


def replay_cut_off(s: Scene) -> None:
    """A resumes with a flush for a write that B has applied, and is cut off before it arrives: the
    number of that flush belongs to nothing any more, so the two compare anew.
    """
    s.pair()
    s.b.data.slow_factor = 20
    pending = s.begin_write(s.a, 5, fua=True)
    s.until(lambda: s.session(s.a).awaiting_flush)
    s.net.reset_all()
    s.b.data.slow_factor = 1
    s.until(lambda: s.told("B resumed"))
    s.node(s.b).lose_session(s.session(s.b), "cut off")
    s.until(lambda: pending.acknowledged)
    s.synced()
    assert len(s.told("A resumed")) == 1
    s.both_have(pending)


def joint_step_broken_off_often(s: Scene) -> None:
    """Each time A has begun the joint step and goes on alone; B is never copied to in full."""
    begin_resync(s)
    for _ in range(BASE_COUNT_MAX):
        s.until(lambda: s.on_disk(s.a).pending_kind is PendingKind.JOINT)
        s.part()
        assert s.on_disk(s.b).data_state is DataState.INCONSISTENT
        s.alone(s.a)
        s.write(s.a, 5)
        s.heal()
    s.synced()
    rows = {match[1] for match in s.told(r"A decided verdict=(\w+)")[1:]}
    assert rows == {"COPY_BY_MAP"}


def joint_generation_in_the_cache_only(s: Scene) -> None:
    """B takes J, and the sync of that fails; A goes on alone, B is restarted and reads J from its
    page cache: it is behind A, and copied to by map.
    """
    begin_resync(s)
    s.until(lambda: s.on_disk(s.a).pending_kind is PendingKind.JOINT)
    joint = s.on_disk(s.a).pending
    s.b.meta.fail(errno.EIO, "sync")
    s.until(lambda: s.node(s.b).failed)
    s.alone(s.a)
    kept = s.write(s.a, 7)
    s.kill(s.b)
    assert s.on_disk(s.b).generation == joint
    s.start(s.b)
    s.synced()
    assert s.row(s.a) == "in the base: COPY_BY_MAP"
    s.both_have(kept)


def paused_again_and_again(s: Scene) -> None:
    """A is awake for moments only: it loses the peer that is gone all the same, and later."""
    s.pair()
    session = s.session(s.a)
    s.cut()
    awake_ms, rounds = 500, 0
    while session.live:
        s.a.pause(2 * SILENCE_MS)
        s.run(2 * SILENCE_MS + awake_ms)
        rounds += 1
        assert rounds * awake_ms < 3 * ACK_TIMEOUT_MS
    assert rounds * awake_ms >= ACK_TIMEOUT_MS - awake_ms


def awake_for_moments(s: Scene) -> None:
    """A is never awake for longer than one tick: even so it loses a peer that is gone, in time."""
    s.pair()
    session = s.session(s.a)
    s.cut()
    for _ in range(100):
        s.a.pause(SILENCE_MS // 2 + 100)
        s.run(SILENCE_MS // 2 + 120)
        if not session.live:
            return
    raise AssertionError("the peer is gone and was never lost")
