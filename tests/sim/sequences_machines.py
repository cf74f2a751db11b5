"""Sequences of machines that are replaced or set back: the map is about the peer it was made for.

A is primary, B secondary, in sync. Each function is one sequence; its docstring is what must come
out.
"""

import copy
from typing import TypeAlias

from nbdmirror.core import roles
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import DataState
from tests.sim.disk import Blocks, SimFile
from tests.sim.host import Host
from tests.sim.sequences_crashes import begin_resync
from tests.sim.sequences_scene import SETTLE_MS, Scene

Images: TypeAlias = list[tuple[SimFile, Blocks]]
FAR = 3000


def images(host: Host) -> Images:
    """What is on the disks of a host now."""
    return [(file, copy.copy(file.durable)) for file in (host.data, host.meta)]


def put(s: Scene, host: Host, old: Images) -> None:
    """Another machine, or another time of it, in a host's place; nobody promised to survive that
    without the peer.
    """
    for file, durable in old:
        file.cache, file.durable, file.touched = copy.copy(durable), copy.copy(durable), None
        file.version += 1
    host.sb = host.judge().superblock
    s.sim.abstract.blocks[host.index] = host.sb
    s.sim.abstract.unsure[host.index] = None
    s.checker.holders[host.index] = False


def replaced(s: Scene) -> Images:
    """B breaks down and A takes a new machine in its place; returns what the old one has."""
    s.power(s.b)
    s.alone(s.a)
    old = images(s.b)
    for file in (s.b.data, s.b.meta):
        file.cache, file.durable = {}, {}
    s.b.create(creator=False, arbiter=s.b.sb.arbiter, zeroed=False)
    put(s, s.b, images(s.b))
    s.command(s.a, roles.accept_peer(s.node(s.a)))
    return old


def old_one_is_back(s: Scene, old: Images) -> None:
    """The new machine breaks down, the old one is switched on again: refused until accepted."""
    s.power(s.b)
    put(s, s.b, old)
    if s.node(s.a).frozen:
        s.alone(s.a)
    s.start(s.b)
    s.until(lambda: "accept-peer" in s.node(s.a).refusal)
    assert not s.told("A decided .*row=equal"), "compared with a map that is about another machine"
    s.command(s.a, roles.accept_peer(s.node(s.a)))
    s.synced()
    assert s.leads(s.a)


def old_peer_after_its_replacement(s: Scene) -> None:
    """What A copied to B's replacement is not taken for copied to B, which comes back instead."""
    s.pair()
    before = s.write(s.a, 5)
    s.flush(s.a)
    s.part()
    s.alone(s.a)
    alone = s.write(s.a, FAR, fua=True)
    old = replaced(s)
    s.heal()
    s.start(s.b)
    s.until(lambda: s.node(s.a).session is not None and s.session(s.a).phase is Phase.RESYNC)
    s.until(lambda: not s.node(s.a).dirty.dirty_in(FAR * 4096, (FAR + 1) * 4096))
    assert s.on_disk(s.b).data_state is DataState.INCONSISTENT
    old_one_is_back(s, old)
    s.both_have(before, alone)


def old_peer_with_the_same_generation(s: Scene) -> None:
    """The same where A wrote nothing alone: W, which only B's replacement was given, reaches B."""
    s.pair()
    before = s.write(s.a, 5)
    s.flush(s.a)
    s.run(SETTLE_MS)
    old = replaced(s)
    s.start(s.b)
    s.until(lambda: s.node(s.a).session is not None and s.session(s.a).phase is Phase.RESYNC)
    after = s.write(s.a, FAR, fua=True)
    s.until(lambda: not s.node(s.a).dirty.any() and not s.node(s.a).unflushed)
    old_one_is_back(s, old)
    s.both_have(before, after)


def old_peer_with_its_page_cache(s: Scene) -> None:
    """The same where A lost power since and B did not: A leads, as its line is its own."""
    s.pair()
    before = s.write(s.a, 5)
    s.flush(s.a)
    s.run(SETTLE_MS)
    boot_id = s.b.boot_id
    old = replaced(s)
    s.start(s.b)
    s.until(lambda: s.node(s.a).session is not None and s.session(s.a).phase is Phase.RESYNC)
    after = s.write(s.a, FAR, fua=True)
    s.power(s.a)
    s.start(s.a)
    s.b.end(power=True)
    s.b.boot_id = boot_id
    put(s, s.b, old)
    s.start(s.b)
    s.until(lambda: "accept-peer" in s.node(s.a).refusal)
    s.command(s.a, roles.accept_peer(s.node(s.a)))
    s.synced()
    assert s.leads(s.a)
    s.both_have(before, after)


def set_back_to_before_the_resync(s: Scene) -> None:
    """B is set back to a snapshot of before, in the middle of its resync: it is copied in full."""
    s.pair()
    s.write(s.a, 5, fua=True)
    s.flush(s.a)
    s.run(SETTLE_MS)
    s.power(s.b)
    s.alone(s.a)
    first = s.write(s.a, FAR, fua=True)
    set_back_when_copied(s, images(s.b))
    assert s.row(s.a) == "rolled back: COPY_FULL"
    s.both_have(first)


def set_back_in_the_resync(s: Scene) -> None:
    """The same with a snapshot of after the resync began, and before W was copied."""
    s.pair()
    s.part()
    s.alone(s.a)
    first = s.write(s.a, FAR, fua=True)
    s.heal()
    s.until(lambda: s.on_disk(s.b).data_state is DataState.INCONSISTENT)
    set_back_when_copied(s, images(s.b))
    assert s.row(s.a) == "one side incomplete: COPY_FULL"
    s.both_have(first)


def set_back_when_copied(s: Scene, snapshot: Images) -> None:
    """B runs until A has cleared the bit of W, then it is set back."""
    s.start(s.b)
    s.until(lambda: s.on_disk(s.b).data_state is DataState.INCONSISTENT)
    s.until(lambda: not s.node(s.a).dirty.dirty_in(FAR * 4096, (FAR + 1) * 4096))
    assert s.on_disk(s.b).data_state is DataState.INCONSISTENT
    s.power(s.b)
    put(s, s.b, snapshot)
    if s.node(s.a).frozen:
        s.alone(s.a)
    s.start(s.b)
    s.synced()


def written_in_the_first_session(s: Scene) -> None:
    """W is on A and on a B that is gone before it was joined: a new, empty B is copied to."""
    for host in (s.a, s.b):
        host.create(creator=host is s.a, arbiter=host.sb.arbiter, zeroed=True)
        put(s, host, images(host))
    s.checker.holders = [True, False]
    blank = images(s.b)
    s.start(s.a)
    s.promote(s.a)
    s.start(s.b)
    s.until(lambda: s.node(s.a).session is not None and s.leads(s.a))
    # The joint step takes its time.
    s.a.meta.slow_factor = 100
    first = s.write(s.a, 5)
    s.flush(s.a)
    node = s.node(s.a)
    assert not node.dirty.any()
    assert not node.unflushed
    s.power(s.b)
    s.a.meta.slow_factor = 1
    s.run(SETTLE_MS)
    if node.frozen:
        s.alone(s.a)
    put(s, s.b, blank)
    s.start(s.b)
    s.synced()
    assert s.row(s.a) == "one side incomplete: COPY_FULL"
    s.both_have(first)


def another_peer_in_a_session(s: Scene) -> None:
    """Another peer is accepted in the middle of a resync: no copy made to this one clears a bit."""
    begin_resync(s)
    s.until(lambda: s.node(s.a).pending_clear)
    node = s.node(s.a)
    s.command(s.a, roles.accept_peer(node))
    assert node.session is None or node.session.phase is Phase.NEGOTIATING
    assert node.dirty.count == node.geometry.extent_count
    s.synced()
