"""The twenty crash sequences of a pair: who dies, who writes, who returns, and what must come out.

A is primary, B secondary, in sync. Each function is one sequence; its docstring is the result
that must come out. Where the arbiter matters the sequence names it.
"""

import copy
import errno

from nbdmirror.core import roles
from nbdmirror.core.node import Role
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.limits import META_BLOCK_BYTES, SUPERBLOCK_SLOT_OFFSETS_BYTES
from tests.sim.disk import Change
from tests.sim.sequences_scene import Request, Scene

BY_MAP = "COPY_BY_MAP"
FULL = "COPY_FULL"


def secondary_loses_power_idle(s: Scene) -> None:
    """1: equal generations, but what B had not flushed is copied to it again."""
    s.pair()
    first = s.write(s.a, 5)
    s.power(s.b)
    assert not s.has(s.b, first)
    s.start(s.b)
    s.synced()
    assert s.row(s.a) == f"equal generations: {BY_MAP}"
    assert s.leads(s.a)
    s.both_have(first)


def peer_dies_alone_writes(s: Scene) -> None:
    """2: A is ahead of B by what its map says, and copies that."""
    s.pair()
    before = s.write(s.a, 5)
    s.kill(s.b)
    s.alone(s.a)
    after = s.write(s.a, 6)
    assert s.on_disk(s.a).generation != s.on_disk(s.b).generation
    s.start(s.b)
    s.synced()
    assert s.row(s.a) == f"in the base: {BY_MAP}"
    s.both_have(before, after)


def primary_killed_returns(s: Scene) -> None:
    """3: equal generations; both kept their page cache, so the last primary leads."""
    s.pair()
    first = s.write(s.a, 5)
    pending = s.begin_write(s.a, 6)
    s.kill(s.a)
    assert pending.problem == "dead"
    s.start(s.a)
    s.synced()
    assert s.row(s.a) == f"equal generations: {BY_MAP}"
    s.both_have(first)


def primary_loses_power_returns(s: Scene) -> None:
    """3: B alone kept the last writes, so B leads."""
    s.pair()
    first = s.write(s.a, 5)
    s.power(s.a)
    assert not s.has(s.a, first)
    s.start(s.a)
    s.synced()
    assert s.row(s.a) == f"equal generations: {BY_MAP}"
    assert s.leads(s.b)
    s.both_have(first)


def primary_dies_secondary_takes_over(s: Scene) -> None:
    """4: B is ahead; it copies what it wrote and what was hot on A."""
    s.pair()
    first = s.write(s.a, 5)
    pending = s.begin_write(s.a, 2000)
    s.kill(s.a)
    s.promote(s.b)
    second = s.write(s.b, 6)
    s.start(s.a)
    s.synced()
    assert pending.problem == "dead"
    assert s.row(s.b) == f"in the base: {BY_MAP}"
    assert s.leads(s.b)
    s.both_have(first, second)


def both_lose_power(s: Scene) -> None:
    """5: nobody starts alone; together the last primary leads, and what was flushed is there."""
    s.pair()
    first = s.write(s.a, 5)
    s.flush(s.a)
    s.write(s.a, 6)
    s.power(s.b)
    s.power(s.a)
    s.start(s.a)
    assert "rule 12" in s.refused(s.a, roles.promote(s.node(s.a)))
    s.start(s.b)
    s.synced()
    assert s.leads(s.a)
    s.both_have(first)
    s.promote(s.a)


def stale_node_boots_alone(s: Scene) -> None:
    """6: A is the owner by the record; B, which lacks what A wrote, cannot take over."""
    s.pair()
    s.kill(s.b)
    s.alone(s.a)
    s.write(s.a, 5)
    s.kill(s.a)
    s.start(s.b)
    assert not s.claim(s.b)
    assert "claim it first" in s.refused(s.b, roles.promote(s.node(s.b)))
    s.start(s.a)
    s.synced()
    assert s.leads(s.a)


def stale_node_without_cache_boots_alone(s: Scene) -> None:
    """6, without an arbiter: B lost its page cache, so it waits for A."""
    s.pair()
    s.power(s.b)
    s.alone(s.a)
    s.write(s.a, 5)
    s.kill(s.a)
    s.start(s.b)
    assert "rule 12" in s.refused(s.b, roles.promote(s.node(s.b)))


def stale_node_forced(s: Scene) -> None:
    """7: two lines of acknowledged writes: split brain, both kept until one is discarded."""
    s.pair()
    s.power(s.b)
    s.alone(s.a)
    mine = s.write(s.a, 5)
    s.kill(s.a)
    s.start(s.b)
    s.checker.forced = True
    s.promote(s.b, force=True)
    s.checker.operator_decided(s.b)
    theirs = s.write(s.b, 6)
    s.start(s.a)
    both_kept(s, mine, theirs)


def both_kept(s: Scene, mine: Request, theirs: Request) -> None:
    """A split brain is recorded by both and left alone; a discard of A ends it."""
    s.until(lambda: all(Flags.SPLIT in s.on_disk(h).flags for h in (s.a, s.b)))
    s.run(3000)
    assert not s.checker.both_synced()
    assert s.has(s.a, mine)
    assert not s.has(s.a, theirs)
    assert s.has(s.b, theirs)
    assert not s.has(s.b, mine)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.discard(s.a)
    s.checker.operator_decided(s.b)
    s.synced()
    assert s.has(s.a, theirs)
    assert not s.has(s.a, mine)


def promoted_but_never_wrote(s: Scene) -> None:
    """8: B never wrote, so A is simply ahead: no split brain."""
    s.pair()
    s.part()
    s.alone(s.a)
    first = s.write(s.a, 5)
    s.promote(s.b)
    s.heal()
    s.until(lambda: s.told("A .*reason=.* is primary and will be overwritten"))
    assert s.node(s.b).role is Role.PRIMARY
    s.command(s.b, roles.demote(s.node(s.b)))
    s.synced()
    assert s.row(s.a) == f"in the base: {BY_MAP}"
    s.both_have(first)


def both_alone(s: Scene) -> None:
    """9, without an arbiter: both wrote: split brain, both copies are kept."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.promote(s.b)
    mine, theirs = s.write(s.a, 5), s.write(s.b, 6)
    s.heal()
    both_kept(s, mine, theirs)


def second_claim_loses(s: Scene) -> None:
    """9: the record lets only one go on; the other one acknowledges nothing."""
    s.pair()
    s.part()
    assert s.claim(s.b)
    s.promote(s.b)
    pending = s.begin_write(s.a, 5)
    s.run(200)
    assert s.has(s.a, pending)
    assert not s.claim(s.a)
    assert s.node(s.a).role is Role.NONE
    assert pending.problem
    theirs = s.write(s.b, 6)
    s.heal()
    s.synced()
    assert s.leads(s.b)
    s.both_have(theirs)


def begin_resync(s: Scene) -> None:
    """A is alone and has written; B is back and is being copied to."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.write(s.a, 0, 200)
    s.write(s.a, 5000, 200)
    s.heal()
    s.until(lambda: s.on_disk(s.b).data_state is DataState.INCONSISTENT)


def source_dies_in_resync(s: Scene) -> None:
    """10: B is refused; A goes on from the bits on its disk."""
    begin_resync(s)
    s.kill(s.a)
    assert "rule 14" in s.refused(s.b, roles.promote(s.node(s.b)))
    s.start(s.a)
    s.synced()
    assert s.row(s.a) == f"one side incomplete: {BY_MAP}"


def target_dies_in_resync(s: Scene) -> None:
    """11: what was copied and not flushed is copied again."""
    begin_resync(s)
    s.until(lambda: s.node(s.a).pending_clear)
    s.power(s.b)
    s.write(s.a, 9000)
    s.start(s.b)
    s.synced()


def link_flaps_in_resync(s: Scene) -> None:
    """11: the resync goes on where it was."""
    begin_resync(s)
    for _ in range(3):
        s.until(lambda: s.node(s.a).pending_clear)
        s.net.reset_all()
        s.until(lambda: s.node(s.a).session is not None)
    s.synced()


def until_target_took(s: Scene) -> None:
    """A resync ran to the point where B has taken J and A has not heard of it; the link is cut."""
    begin_resync(s)
    s.until(lambda: s.on_disk(s.b).generation == s.on_disk(s.a).pending)
    assert s.on_disk(s.a).generation != s.on_disk(s.b).generation
    s.part()


def joint_taken_is_lost(s: Scene) -> None:
    """12: A acknowledges nothing alone any more, and the two find that they hold the same."""
    until_target_took(s)
    pending = s.begin_write(s.a, 7)
    s.run(3000)
    assert not s.node(s.a).right
    assert pending.problem is None
    s.heal()
    s.synced()
    assert s.row(s.a).startswith("equal generations")
    s.until(lambda: pending.acknowledged)
    s.both_have(pending)


def local_disk_fails(s: Scene) -> None:
    """13: A steps back and is outdated; B serves; A's disk is copied anew."""
    s.pair()
    first = s.write(s.a, 5)
    s.a.data.fail(errno.EIO, "write")
    pending = s.begin_write(s.a, 6)
    s.until(lambda: s.node(s.a).role is Role.NONE)
    s.until(lambda: pending.problem)
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.b).flags)
    assert not pending.acknowledged
    assert s.on_disk(s.a).data_state is DataState.OUTDATED
    s.promote(s.b)
    second = s.write(s.b, 7)
    s.kill(s.a)
    s.start(s.a)
    s.synced()
    assert s.row(s.b).endswith(FULL)
    s.both_have(first, second)


def remote_disk_fails(s: Scene) -> None:
    """14: the write is acknowledged once A durably knows that B lacks it; B is out."""
    s.pair()
    s.b.data.fail(errno.ENOSPC, "write")
    pending = s.begin_write(s.a, 5)
    s.until(lambda: s.node(s.a).session is None)
    s.run(500)
    assert pending.problem is None
    s.alone(s.a)
    s.until(lambda: pending.acknowledged)
    assert "disk failed" in s.refused(s.b, roles.promote(s.node(s.b)))
    s.kill(s.b)
    s.start(s.b)
    s.synced()
    s.both_have(pending)


def clean_stops(s: Scene) -> None:
    """15: nothing was written in between, so nothing is copied."""
    s.pair()
    s.write(s.a, 5)
    s.stop(s.b)
    s.until(lambda: s.node(s.a).right)
    s.stop(s.a)
    assert s.on_disk(s.b).data_state is DataState.OUTDATED
    assert s.on_disk(s.a).data_state is DataState.UPTODATE
    s.start(s.a)
    s.start(s.b)
    s.synced()
    assert s.told("A resync-finished .*copied_bytes=(\\d+)")[-1][1] == "0"


def left_node_does_not_start(s: Scene) -> None:
    """16: B said that it is outdated, and is: it waits for A."""
    s.pair()
    s.stop(s.b)
    s.until(lambda: s.node(s.a).right)
    first = s.write(s.a, 5)
    s.stop(s.a)
    s.start(s.b)
    assert "rule 14" in s.refused(s.b, roles.promote(s.node(s.b)))
    s.start(s.a)
    s.synced()
    s.both_have(first)


def new_disk(s: Scene) -> None:
    """17: everything is copied to a blank disk."""
    s.pair()
    first = s.write(s.a, 5)
    s.discard(s.b)
    s.until(lambda: s.told("A decided verdict=COPY_FULL row=one side incomplete"))
    s.alone(s.a) if s.node(s.a).frozen else None
    s.synced()
    s.both_have(first)


def rolled_back(s: Scene) -> None:
    """18: A is an old backup with a generation that fits; everything is copied to it."""
    s.pair()
    s.write(s.a, 5)
    s.flush(s.a)
    backup = [(file, copy.copy(file.durable)) for file in (s.a.data, s.a.meta)]
    later = s.write(s.a, 5000)
    s.flush(s.a)
    # The peer stores the number of A's last transaction when it tidies up.
    number = s.node(s.a).log.txn
    s.until(lambda: s.node(s.b).log.durable_peer_txn >= number)
    s.power(s.a)
    for file, durable in backup:
        file.cache, file.durable, file.touched = copy.copy(durable), durable, None
        file.version += 1
    s.a.sb = s.a.judge().superblock
    # Nobody promised to survive that without the peer.
    s.checker.holders = [False, True]
    s.start(s.a)
    s.synced()
    assert s.row(s.b) == f"rolled back: {FULL}"
    assert s.leads(s.b)
    s.both_have(later)


def primary_hangs(s: Scene) -> None:
    """19: A wakes up deposed, and acknowledges not one write more."""
    s.pair()
    s.a.pause(10_000)
    pending = s.begin_write(s.a, 5)
    s.until(lambda: s.node(s.b).session is None)
    assert s.claim(s.b)
    s.promote(s.b)
    second = s.write(s.b, 6)
    s.run(12_000)
    assert not pending.acknowledged
    assert not s.claim(s.a)
    s.until(lambda: pending.problem)
    s.synced()
    s.both_have(second)


def torn_superblock(s: Scene) -> None:
    """20: the older slot is used, and such a node neither starts alone nor leads."""
    s.pair()
    s.stop(s.b)
    s.until(lambda: s.node(s.a).right)
    s.stop(s.a)
    at = SUPERBLOCK_SLOT_OFFSETS_BYTES[0]
    s.a.meta.apply(Change(at, at + 512, b"\xee" * 512))
    s.start(s.a)
    assert s.node(s.a).fell_back
    assert "rule 7" in s.refused(s.a, roles.promote(s.node(s.a)))
    assert META_BLOCK_BYTES > 512
