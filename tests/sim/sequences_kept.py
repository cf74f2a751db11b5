"""Directed sequences about a copy that was given up: rule 19, and what is kept.

The image is compared with what it has to be (K1) at each kill and power cut, in sync and whenever a
sequence asks for it.
"""

import random

from nbdmirror.core import giveup, roles
from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.kept import INDEX_OFFSET_BYTES
from nbdmirror.core.node import Role
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.limits import MIB
from tests.sim.sequences_scene import Request, Scene
from tests.sim.world import ViolationError

BY_MAP = "COPY_BY_MAP"
FAR = 5_000


def split(s: Scene, *, overlap: bool = True) -> tuple[list[Request], list[Request]]:
    """A and B go on alone, write different things, meet, and both know; B is told to step back."""
    s.pair()
    # What both have, so that an extent can be overwritten that nobody changed since.
    common = [s.write(s.a, FAR + number) for number in range(4)]
    s.flush(s.a)
    s.run(12_000)
    s.part()
    s.alone(s.a)
    s.promote(s.b)
    mine = [s.write(s.a, 5, 8), s.write(s.a, 300)]
    theirs = [s.write(s.b, 9 if overlap else 40, 8), s.write(s.b, 900)]
    s.heal()
    s.until(lambda: all(Flags.SPLIT in s.on_disk(h).flags for h in (s.a, s.b)))
    s.command(s.b, roles.demote(s.node(s.b)))
    assert all(s.has(s.b, each) for each in common)
    return mine, theirs


def give_up(s: Scene, *, keep: bool = True) -> bool:
    """An operator gives up the copy of B."""
    s.checker.forced = True
    kept = s.command(s.b, giveup.give_up(s.node(s.b), keep=keep))
    s.checker.operator_decided(s.a)
    return bool(kept)


def holds_image(s: Scene) -> None:
    """What B gave up is all there."""
    before = s.checker.counts["kept"]
    s.checker.check_kept(s.b, "asked")
    assert s.checker.counts["kept"] == before + 1, "there was nothing to compare"


def after(s: Scene, steps: int, limit_ms: int) -> None:
    """Let so many events happen, wherever that is."""
    end = s.world.steps + steps
    s.world.run(s.world.now_ms + limit_ms, lambda: s.world.steps > end)


def given_up_copy_is_kept(s: Scene) -> None:
    """B becomes a target by map; what it held stays, also under writes of after the resync."""
    mine, theirs = split(s)
    assert give_up(s)
    s.synced()
    assert s.row(s.a) == f"one side incomplete: {BY_MAP}"
    s.both_have(*mine)
    assert not any(s.has(s.b, each) for each in theirs)
    holds_image(s)
    kept = s.node(s.b).keep.kept
    assert kept is not None
    assert kept.count < 64, "only what differs is overwritten"
    # Extents that nobody had changed since the common base, by every way that changes any.
    later = [s.write(s.a, FAR), s.write(s.a, FAR + 1, fua=True)]
    s.answered(s.begin_zero(s.a, FAR + 2))
    s.answered(s.begin_zero(s.a, FAR + 3, trim=True))
    s.both_have(*later)
    holds_image(s)
    # B serves: its own clients overwrite it as well.
    s.command(s.a, roles.demote(s.node(s.a)))
    s.until(lambda: not s.session(s.b).peer_primary)
    s.promote(s.b)
    s.synced()
    s.both_have(s.write(s.b, 7_000), s.write(s.b, 12))
    holds_image(s)
    s.run(6_000)
    assert s.on_disk(s.b).saved_bytes == s.node(s.b).saved_bytes > 0, "how much is remembered"
    s.kill(s.b)
    s.start(s.b)
    holds_image(s)
    s.command(s.b, giveup.discard_kept(s.node(s.b)))
    assert not s.b.kept_exists
    assert s.on_disk(s.b).saved_bytes == 0


def nothing_kept_if_not_wanted(s: Scene) -> None:
    """Without keeping B is a target by map all the same."""
    mine, _ = split(s)
    assert not give_up(s, keep=False)
    s.synced()
    assert s.row(s.a) == f"one side incomplete: {BY_MAP}"
    s.both_have(*mine)
    assert not s.b.kept_exists


def kept_through_power_cuts(s: Scene) -> None:
    """The target loses its power again and again while it is overwritten."""
    mine, _ = split(s)
    assert give_up(s)
    for number in range(12):
        after(s, 60 + 7 * number, 20_000)
        s.b.end(power=True)
        holds_image(s)
        s.start(s.b)
    s.synced()
    s.both_have(*mine)
    holds_image(s)


def half_a_batch(s: Scene) -> None:
    """A power cut leaves the entries of a batch on the disk, and not what they stand for."""
    mine, _ = split(s)
    assert give_up(s)
    file = s.b.kept

    def entries() -> list[int]:
        return [
            serial for serial, change in file.pending.items()
            if INDEX_OFFSET_BYTES <= change.offset < MIB
        ]  # fmt: skip

    s.until(entries)
    assert len(file.pending) > len(entries()), "the contents are not durable either"
    file.make_durable(entries())
    s.power(s.b)
    holds_image(s)
    s.start(s.b)
    s.synced()
    s.both_have(*mine)
    holds_image(s)


def no_room_to_keep(s: Scene) -> None:
    """Too little space: nothing is overwritten that cannot be kept, until there is more.

    One extent and its entry do not fit; with room for one, that one would be overwritten.
    """
    mine, theirs = split(s, overlap=False)
    s.node(s.b).keep.limit_bytes = 4096
    assert give_up(s)
    s.until(lambda: s.node(s.b).keep.hold)
    s.until(lambda: "waits with the resync" in s.node(s.a).refusal)
    s.run(3000)
    assert s.node(s.b).session is None
    assert all(s.has(s.b, each) for each in theirs)
    assert s.node(s.b).role is not Role.PRIMARY
    holds_image(s)
    s.power(s.b)
    holds_image(s)
    s.start(s.b)
    s.node(s.b).keep.limit_bytes = 4096
    s.until(lambda: s.node(s.b).keep.hold)
    s.command(s.b, giveup.give_space(s.node(s.b), MIB))
    s.synced()
    s.both_have(*mine)
    holds_image(s)


def no_room_then_discarded(s: Scene) -> None:
    """The other way out: nothing is kept, and the resync goes on."""
    mine, _ = split(s)
    s.node(s.b).keep.limit_bytes = 8192
    assert give_up(s)
    s.until(lambda: s.node(s.b).keep.hold)
    s.command(s.b, giveup.discard_kept(s.node(s.b)))
    s.synced()
    s.both_have(*mine)


def no_room_then_given_up_again(s: Scene) -> None:
    """The operator gives up what is left of it: all of it is copied anew, and nothing waits."""
    mine, _ = split(s)
    s.node(s.b).keep.limit_bytes = 8192
    assert give_up(s)
    s.until(lambda: s.node(s.b).keep.hold)
    s.discard(s.b)
    s.checker.operator_decided(s.a)
    s.synced()
    s.both_have(*mine)
    kept = s.node(s.b).keep.kept
    assert kept is not None
    assert kept.closed, "and it says so"
    holds_image(s)


def no_room_then_forced(s: Scene) -> None:
    """The operator regrets it: the copy, of which little was overwritten, serves again."""
    split(s)
    s.node(s.b).keep.limit_bytes = 8192
    assert give_up(s)
    s.until(lambda: s.node(s.b).keep.hold)
    s.stop(s.a)
    s.promote(s.b, force=True)
    s.checker.operator_decided(s.b)
    theirs = s.write(s.b, 70)
    s.start(s.a)
    s.until(lambda: Flags.SPLIT in s.on_disk(s.b).flags)
    s.checker.forced = True
    s.command(s.a, giveup.give_up(s.node(s.a), keep=True))
    s.checker.operator_decided(s.b)
    s.synced()
    s.both_have(theirs)


def full_after_the_resync(s: Scene) -> None:
    """An old image does not cost the second copy: it is closed, and has what was overwritten."""
    split(s)
    assert give_up(s)
    s.synced()
    node = s.node(s.b)
    kept = node.keep.kept
    assert kept is not None
    node.keep.limit_bytes = kept.used_bytes
    s.both_have(s.write(s.a, FAR), s.write(s.a, FAR + 1))
    assert s.checker.both_synced()
    assert kept.closed
    holds_image(s)
    s.kill(s.b)
    s.start(s.b)
    s.synced()
    kept = s.node(s.b).keep.kept
    assert kept is not None
    assert kept.closed, "that it is not complete is not forgotten"
    # A later resync is one like any other: nothing waits for an old image.
    s.part()
    s.alone(s.a)
    s.write(s.a, 6_000, 200)
    s.heal()
    s.synced()


def kept_before_the_crash(s: Scene) -> None:
    """B dies between the file and its word: it is asked again, and no second image is made."""
    split(s)
    ended = s.begin(s.b, giveup.give_up(s.node(s.b), keep=True))
    s.until(lambda: s.b.kept_exists)
    assert not ended
    s.b.end(power=True)
    s.start(s.b)
    assert s.on_disk(s.b).data_state is DataState.UPTODATE
    s.run(2000)
    assert give_up(s)
    s.synced()
    holds_image(s)


def second_image_is_refused(s: Scene) -> None:
    """One at a time: the image of an earlier day is not lost by giving up another copy."""
    split(s)
    assert give_up(s)
    s.synced()
    s.part()
    s.alone(s.a)
    s.promote(s.b)
    s.write(s.a, 50)
    s.write(s.b, 60)
    s.heal()
    s.until(lambda: all(Flags.SPLIT in s.on_disk(h).flags for h in (s.a, s.b)))
    s.command(s.b, roles.demote(s.node(s.b)))
    again = giveup.give_up(s.node(s.b), keep=True)
    assert "`nbdmirror kept discard`" in s.refused(s.b, again)
    holds_image(s)
    assert not give_up(s, keep=False)
    s.synced()
    holds_image(s)


def flushed_alone_but_never_wrote(s: Scene) -> None:
    """A flush that is answered alone begins a generation; without a write it is no second line."""
    s.pair()
    s.part()
    pending = s.begin_flush(s.b)
    del pending
    s.promote(s.b)
    theirs = s.write(s.b, 6)
    flushed = s.begin_flush(s.a)
    s.alone(s.a)
    s.answered(flushed)
    assert flushed.acknowledged
    assert s.on_disk(s.a).pending == NO_GENERATION, "a line of its own has begun"
    assert not s.node(s.a).dirty.any()
    s.command(s.a, roles.demote(s.node(s.a)))
    s.heal()
    s.synced()
    assert s.row(s.b) == f"one side wrote nothing: {BY_MAP}"
    s.both_have(theirs)


def by_chance(s: Scene, seed: int) -> int:
    """A split brain, resolved among kills, power cuts and writes; returns how often K1 was asked.

    The disk and the network draw by the seed here, and tear what is not durable.
    """
    rng = random.Random(seed)
    split(s, overlap=rng.random() < 0.5)
    s.world.rng["disk"] = random.Random(f"{seed}/disk")
    s.world.rng["net"] = random.Random(f"{seed}/net")
    assert give_up(s)
    for _ in range(rng.randrange(4, 14)):
        what = rng.random()
        after(s, rng.randrange(5, 400), 3000)
        if what < 0.45:
            s.b.end(power=rng.random() < 0.7)
            s.start(s.b)
        elif what < 0.8 and s.a.node is not None and s.a.node.role is Role.PRIMARY:
            extent = rng.choice((5, 9, 40, 300, 900, FAR, FAR + 1, rng.randrange(8000)))
            s.begin_write(s.a, extent, rng.randrange(1, 5), fua=rng.random() < 0.2)
        elif s.a.node is not None and s.a.node.frozen:
            s.begin(s.a, roles.alone(s.a.node))
    for _ in range(20):
        if s.checker.both_synced():
            break
        if s.node(s.a).frozen and s.node(s.a).session is None:
            s.begin(s.a, roles.alone(s.node(s.a)))
        s.run(2000)
    session = s.node(s.b).session
    if session is None or session.phase is not Phase.SYNCED:
        raise ViolationError(f"seed {seed}: never in sync: {s.sim.describe()}")
    holds_image(s)
    return s.checker.counts["kept"]


def by_chances(count: int) -> int:
    """So many seeds, each on a stage of its own; returns how often K1 was asked."""
    return sum(by_chance(Scene("none"), seed) for seed in range(count))


def kept_whatever_happens(_: Scene) -> None:
    """Kills and power cuts at any moment, under writes: the image is never lost."""
    assert by_chances(12) > 60
