"""Sequences that broke weaker rules: each was found against an earlier wording of docs/safety.md.

A is primary, B secondary, in sync; W is a write acknowledged by both and flushed by nobody. Each
function is one sequence; its docstring is what must come out.
"""

import errno

from nbdmirror.core import io, roles
from nbdmirror.core.node import PEER_LEFT, Role
from nbdmirror.core.superblock import DataState, Flags, PendingKind
from nbdmirror.errors import RefusedError, StaleCommandError
from nbdmirror.limits import (
    ACK_TIMEOUT_MS,
    LOG_OFFSET_BYTES,
    MAP_OFFSET_BYTES,
    META_BLOCK_BYTES,
    WINDOW_BYTES_MAX,
)
from tests.sim.arbiter import Held
from tests.sim.disk import Change
from tests.sim.host import TICK_MS
from tests.sim.sequences_crashes import begin_resync
from tests.sim.sequences_scene import NOBODY, Scene

HANG_FACTOR = 1_000_000


# --- freeze, flush, then the right -------------------------------------------------------------


def alone_flushes_first(s: Scene) -> None:
    """W is on A's disk before A goes on alone, so A may lead after a power cut."""
    s.pair()
    first = s.write(s.a, 5)
    s.part()
    s.alone(s.a)
    s.power(s.a)
    assert s.has(s.a, first)
    s.start(s.a)
    s.promote(s.a)


def claim_flushes_first(s: Scene) -> None:
    """W is on the disk of the claimer before the claim is sent."""
    s.pair()
    first = s.write(s.a, 5)
    s.part()
    s.command(s.b, s.asking(s.b))
    assert s.has(s.b, first, durable=True)


def take_over_flushes_first(s: Scene) -> None:
    """W is on B's disk before B is primary alone."""
    s.pair()
    first = s.write(s.a, 5)
    s.kill(s.a)
    s.promote(s.b)
    assert s.has(s.b, first, durable=True)


def source_flushes_before_target_is_written_off(s: Scene) -> None:
    """A leads after a restart; B is written off only when W is on A's disk."""
    s.pair()
    first = s.write(s.a, 5)
    s.kill(s.a)
    s.start(s.a)
    s.until(lambda: s.on_disk(s.b).data_state is DataState.INCONSISTENT)
    s.power(s.a)
    assert s.has(s.a, first)
    s.start(s.a)
    s.synced()
    s.both_have(first)


def resync_block_not_flushed(s: Scene) -> None:
    """B loses power after it acknowledged copied blocks: they are copied again."""
    begin_resync(s)
    s.until(lambda: not s.session(s.a).resync_window and s.node(s.a).pending_clear)
    s.power(s.b)
    s.start(s.b)
    s.synced()


# --- the page cache ----------------------------------------------------------------------------


def power_cut_bars_promotion(s: Scene) -> None:
    """B lost W with its power: it is not promoted, and gets W when it meets A."""
    s.pair()
    first = s.write(s.a, 5)
    s.cut()
    s.power(s.b)
    s.start(s.b)
    assert "rule 12" in s.refused(s.b, roles.promote(s.node(s.b)))
    s.heal()
    s.synced()
    s.both_have(first)


def power_cut_bars_claim(s: Scene) -> None:
    """The same with an arbiter: the record knows nothing of unflushed writes."""
    s.pair()
    first = s.write(s.a, 5)
    s.cut()
    s.power(s.b)
    s.start(s.b)
    assert "rule 12" in s.refused(s.b, s.asking(s.b))
    s.heal()
    s.synced()
    s.both_have(first)


def alone_then_reboot(s: Scene) -> None:
    """A node that durably was alone resumes after a power cut, without its peer."""
    s.pair()
    s.part()
    s.alone(s.a)
    first = s.write(s.a, 5, fua=True)
    s.power(s.a)
    s.start(s.a)
    s.promote(s.a)
    assert s.has(s.a, first)
    s.write(s.a, 6)


# --- claims ------------------------------------------------------------------------------------


def claim_applied_late(s: Scene) -> None:
    """The link heals during a claim: no session before it is settled, then a joint step."""
    s.pair()
    s.part()
    asked = s.command(s.a, s.asking(s.a))
    s.heal()
    s.run(3000)
    assert s.node(s.a).session is None
    assert s.swap(s.a, asked)
    s.command(s.a, roles.claimed(s.node(s.a), asked["generation"], won=True))
    s.synced()
    assert s.arbiter.held.owner == NOBODY


def claim_applied_then_killed(s: Scene) -> None:
    """A died before it heard that it had won: it finds its own claim in the record."""
    s.pair()
    s.part()
    asked = s.command(s.a, s.asking(s.a))
    assert s.swap(s.a, asked)
    s.kill(s.a)
    s.start(s.a)
    assert s.on_disk(s.a).pending_kind is PendingKind.CLAIM
    assert s.claim(s.a)
    s.promote(s.a)
    s.write(s.a, 5)


def winner_died(s: Scene) -> None:
    """A won and died without writing: B cannot know that, and waits."""
    s.pair()
    s.part()
    assert s.claim(s.a)
    s.kill(s.a)
    assert not s.claim(s.b)
    s.heal()
    s.start(s.a)
    s.synced()


def arbiter_has_to_agree(s: Scene) -> None:
    """With an arbiter neither goes on alone without a claim that was won."""
    s.pair()
    s.part()
    pending = s.begin_write(s.a, 5)
    for path in (roles.alone(s.node(s.a)), roles.promote(s.node(s.b))):
        assert "claim" in s.refused(s.a if "alone" in str(path) else s.b, path)
    s.run(1000)
    assert pending.problem is None
    assert s.claim(s.a)
    s.until(lambda: pending.acknowledged)


# --- sessions ----------------------------------------------------------------------------------


def late_frames(s: Scene) -> None:
    """B is promoted while A's frames are under way: they change nothing, and A is not answered."""
    s.pair()
    s.cut()
    pending = s.begin_write(s.a, 5)
    s.until(lambda: s.node(s.b).session is None)
    s.promote(s.b)
    s.heal()
    s.run(1500)
    assert not s.has(s.b, pending)
    assert not pending.acknowledged


def same_engine_resumes(s: Scene) -> None:
    """The connection breaks and the same two engines go on where they were: nothing is copied."""
    s.pair()
    first = s.write(s.a, 5)
    s.cut()
    pending = s.begin_write(s.a, 6)
    s.run(100)
    s.net.reset_all()
    s.heal()
    s.until(lambda: pending.acknowledged)
    assert s.told("A resumed")
    assert len(s.told("A resync-started")) == 1
    s.both_have(first, pending)


def other_engine_does_not_resume(s: Scene) -> None:
    """B restarted without its page cache while A was frozen: W is copied to it again."""
    s.pair()
    first = s.write(s.a, 5)
    s.cut()
    pending = s.begin_write(s.a, 6)
    s.power(s.b)
    s.start(s.b)
    s.heal()
    s.synced()
    assert not s.told("A resumed")
    s.until(lambda: pending.acknowledged)
    s.both_have(first, pending)


# --- leaving -----------------------------------------------------------------------------------


def both_stop_at_once(s: Scene) -> None:
    """Not both become outdated: the last one to stop can start."""
    s.pair()
    first = s.write(s.a, 5)
    ended = [s.begin(host, roles.stop(s.node(host))) for host in (s.a, s.b)]
    s.until(lambda: all(ended))
    for host in (s.a, s.b):
        host.end(power=False)
    states = [s.on_disk(host).data_state for host in (s.a, s.b)]
    assert DataState.UPTODATE in states, states
    s.start(s.a)
    s.start(s.b)
    s.synced()
    s.both_have(first)


def leave_makes_durable(s: Scene) -> None:
    """W is on A's disk before A relies on B's word that it left."""
    s.pair()
    first = s.write(s.a, 5)
    s.stop(s.b)
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.a).flags)
    assert s.has(s.a, first, durable=True)


# --- disks and metadata ------------------------------------------------------------------------


def remote_flush_fails(s: Scene) -> None:
    """B's flush fails: B is out and durably behind, then A's flush alone is success."""
    s.pair()
    first = s.write(s.a, 5)
    s.b.data.fail(errno.EIO, "sync")
    pending = s.begin_flush(s.a)
    s.until(lambda: s.node(s.a).session is None)
    assert pending.problem is None
    s.alone(s.a)
    s.until(lambda: pending.acknowledged)
    assert s.has(s.a, first, durable=True)
    s.until(lambda: Flags.FAILED in s.on_disk(s.b).flags)
    s.kill(s.b)
    s.start(s.b)
    s.synced()
    s.both_have(first)


def last_copy_fails(s: Scene) -> None:
    """A is alone and its disk fails: EIO from then on, until an operator declares it good."""
    s.pair()
    s.part()
    s.alone(s.a)
    s.a.data.fail(errno.EIO, "write")
    for extent in (5, 6):
        pending = s.begin_write(s.a, extent)
        s.answered(pending)
        assert (pending.problem or "").startswith("StoreError")


def no_space_during_resync(s: Scene) -> None:
    """No space on A for a block whose copy is under way: it stays dirty, the copies end equal."""
    begin_resync(s)
    s.until(lambda: s.node(s.a).pending_clear)
    _, first, _ = s.node(s.a).pending_clear[0]
    s.a.data.fail(errno.ENOSPC, "write")
    pending = s.begin_write(s.a, first)
    s.until(lambda: pending.problem is not None)
    assert "OutOfSpace" in (pending.problem or "")
    s.synced()


def damaged_log(s: Scene) -> None:
    """One block of A's intent log is damaged: everything on A may differ."""
    s.pair()
    s.write(s.a, 5)
    s.stop(s.b)
    s.until(lambda: s.node(s.a).right)
    s.kill(s.a)
    at = LOG_OFFSET_BYTES + META_BLOCK_BYTES
    s.a.meta.apply(Change(at, at + META_BLOCK_BYTES, b"\xee" * META_BLOCK_BYTES))
    s.start(s.a)
    assert s.node(s.a).dirty.count == s.node(s.a).geometry.extent_count


def damaged_map(s: Scene) -> None:
    """A page of A's dirty map is damaged: everything it covers is dirty."""
    s.pair()
    s.write(s.a, 5)
    s.stop(s.b)
    s.until(lambda: s.node(s.a).right)
    s.stop(s.a)
    at = MAP_OFFSET_BYTES
    s.a.meta.apply(Change(at, at + META_BLOCK_BYTES, b"\xee" * META_BLOCK_BYTES))
    s.start(s.a)
    extents = s.node(s.a).geometry.extents_of_page(0)
    assert s.node(s.a).dirty.count == len(extents)


# --- bounds ------------------------------------------------------------------------------------


def peer_disk_hangs(s: Scene) -> None:
    """B answers echoes and no write: that is the loss of B, within the bound."""
    s.pair()
    s.write(s.a, 5)
    s.b.data.slow_factor = HANG_FACTOR
    pending = [s.begin_write(s.a, extent) for extent in range(6, 26)]
    s.until(lambda: s.node(s.a).session is None, ACK_TIMEOUT_MS + 1000)
    s.alone(s.a)
    s.until(lambda: all(request.acknowledged for request in pending))


def idle_link_cut(s: Scene) -> None:
    """Nothing is written, the link goes without a word: both notice, within the bound."""
    s.pair()
    s.cut()
    s.until(lambda: s.node(s.a).session is None, ACK_TIMEOUT_MS + 1000)
    s.until(lambda: s.node(s.b).session is None, 1000)


def local_disk_hangs(s: Scene) -> None:
    """A's disk does not return: A steps back and B can serve."""
    s.pair()
    s.a.data.slow_factor = HANG_FACTOR
    for extent in range(6, 26):
        s.begin_write(s.a, extent)
    s.until(lambda: s.node(s.a).role is Role.NONE, 40_000)
    s.a.data.slow_factor = 1
    s.until(lambda: Flags.PEER_OUTDATED in s.on_disk(s.b).flags, 60_000)
    s.until(lambda: not s.node(s.b).changing)
    s.promote(s.b)


def window_is_bounded(s: Scene) -> None:
    """B reads nothing: what A holds for it is bounded, and nothing is lost."""
    s.pair()
    s.cut()
    pending = [s.begin_write(s.a, number * 256, 256) for number in range(40)]
    session = s.session(s.a)
    s.run(1000)
    assert session.live
    assert session.window_bytes <= WINDOW_BYTES_MAX
    s.heal()
    s.until(lambda: all(request.acknowledged for request in pending))
    s.both_have(*pending)


# --- commands ----------------------------------------------------------------------------------


def two_changes_at_once(s: Scene) -> None:
    """A second change of role meanwhile is refused, not queued."""
    s.pair()
    first = s.begin(s.a, roles.demote(s.node(s.a)))
    second = s.begin(s.a, roles.demote(s.node(s.a)))
    s.until(lambda: first and second)
    errors = [ended[0][1] for ended in (first, second)]
    assert sorted(isinstance(error, RefusedError) for error in errors) == [False, True]


def stale_command(s: Scene) -> None:
    """A command that was decided before the role changed does nothing, however late it runs."""
    s.pair()
    node = s.node(s.a)
    epoch = node.epoch
    s.command(s.a, roles.demote(node))
    ended = s.begin(s.a, roles.decided_under(node, epoch, roles.promote(node)))
    s.until(lambda: ended)
    assert isinstance(ended[0][1], StaleCommandError)
    assert node.role is Role.NONE


def command_while_the_peers_word_is_stored(s: Scene) -> None:
    """A leaves; B stores that, and a promotion which comes meanwhile waits instead of failing."""
    s.pair()
    s.begin(s.a, roles.stop(s.node(s.a)))
    node = s.node(s.b)
    s.until(lambda: node.changing == PEER_LEFT)
    s.command(s.b, roles.decided_under(node, node.epoch, roles.promote(node)))
    assert Flags.PEER_OUTDATED in s.on_disk(s.b).flags
    assert node.role is Role.PRIMARY


def swap_of_roles(s: Scene) -> None:
    """Demote one, promote the other one: no new generation, nothing is copied."""
    s.pair()
    first = s.write(s.a, 5)
    generation = s.on_disk(s.a).generation
    s.command(s.a, roles.demote(s.node(s.a)))
    s.until(lambda: not s.session(s.b).peer_primary)
    s.promote(s.b)
    s.synced()
    second = s.write(s.b, 6)
    assert {s.on_disk(h).generation for h in (s.a, s.b)} == {generation} or s.leads(s.b)
    s.both_have(first, second)


def read_waits_for_write(s: Scene) -> None:
    """A read of a range that is being written shows it only when both have it."""
    s.pair()
    s.cut()
    pending = s.begin_write(s.a, 5)
    s.run(100)
    buffer = bytearray(4096)
    ended = s.begin(s.a, io.read(s.node(s.a), buffer, 5 * 4096))
    s.run(500)
    assert not ended
    s.heal()
    s.until(lambda: ended and pending.acknowledged)


def record_lost_to_nobody(s: Scene) -> None:
    """A claim against a record that holds another generation is lost, and the node steps back."""
    s.pair()
    s.part()
    s.checker.forced = True
    s.arbiter.held = Held(s.arbiter.held.counter + 1, bytes([9]) * 16, NOBODY)
    s.run(TICK_MS)
    s.checker.forced = False
    assert not s.claim(s.a)
    assert s.node(s.a).role is Role.NONE
    s.heal()
    s.synced()
