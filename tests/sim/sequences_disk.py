"""Sequences of disks that fail: each operation, on either side, and what the client hears.

A is primary, B secondary, in sync. An error on the secondary costs redundancy only; on the primary
the node steps back while another copy can serve. Each function is one sequence; its docstring is
what must come out.
"""

import errno

from nbdmirror.core import roles
from nbdmirror.core.node import Role
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.errors import RefusedError
from tests.sim.disk import CHANGES
from tests.sim.host import Host
from tests.sim.sequences_crashes import begin_resync
from tests.sim.sequences_scene import Request, Scene

SLOW_FACTOR = 50


def is_told(request: Request, error: str) -> bool:
    """Whether a request ended with that error."""
    return (request.problem or "").startswith(error)


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
