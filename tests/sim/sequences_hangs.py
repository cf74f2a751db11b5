"""Sequences of disks that are slow: calls that take their time, or do not return at all.

A is primary, B secondary, in sync. A disk that hangs is the loss of that side where another one can
serve; one that is slow is not, and what it still writes harms nobody. Each function is one
sequence; its docstring is what must come out.
"""

from dataclasses import replace
from typing import Any

from nbdmirror.core import io, roles
from nbdmirror.core.node import Role, Settings
from nbdmirror.core.ports import Path, ReadBuffer
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.core.upkeep import LOCAL_IO_FACTOR
from nbdmirror.limits import ACK_TIMEOUT_MS
from tests.sim.host import EngineLife
from tests.sim.sequences_disk import is_told
from tests.sim.sequences_scene import NEVER_MS, Scene

HELD_MS = 40_000
HANG_LIMIT_MS = (LOCAL_IO_FACTOR + 1) * ACK_TIMEOUT_MS


def spawns(life: EngineLife) -> list[str]:
    """The names of the paths that an engine begins beside others from now on."""
    names: list[str] = []
    spawn = life.spawn

    def noted(name: str, path: Path) -> None:
        names.append(name)
        spawn(name, path)

    life.spawn = noted  # type: ignore[method-assign] # a look at what production begins
    return names


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
