"""The joint step, broken off: by a cut, by a claim, by a controller that comes late (rule 9)."""

from functools import partial

from nbdmirror.core import roles
from nbdmirror.core.cluster.claiming import Claimant
from nbdmirror.core.describe import describe
from nbdmirror.core.ports import Path
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.errors import StaleCommandError
from tests.sim.arbiter import at_arbiter, command_of
from tests.sim.host import MIRROR_ID
from tests.sim.sequences_crashes import begin_resync, until_target_took
from tests.sim.sequences_scene import NOBODY, Scene


def joint_lost_then_both_claim(s: Scene) -> None:
    """B took J, A did not hear of it: the record is free, and only the first claim wins."""
    until_target_took(s)
    assert s.arbiter.held.owner == NOBODY
    assert not s.node(s.a).right
    assert s.claim(s.b)
    s.promote(s.b)
    assert not s.claim(s.a)
    mine = s.write(s.b, 7)
    s.heal()
    s.synced()
    assert s.leads(s.b)
    s.both_have(mine)


def joint_step_broken_off_again(s: Scene) -> None:
    """A repeats the step and is cut off again; B goes on from J: it is ahead, no split brain."""
    until_target_took(s)
    s.record_joint = False
    s.heal()
    s.until(lambda: s.node(s.a).question == "record-joint")
    assert s.on_disk(s.b).data_state is DataState.UPTODATE
    s.part()
    s.record_joint = True
    assert s.claim(s.b)
    s.promote(s.b)
    first = s.write(s.b, 7)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.heal()
    s.synced()
    assert s.leads(s.b)
    s.both_have(first)


def late_look_at_the_record(s: Scene) -> None:
    """A's controller was told to record J, and looks when B has claimed and serves: B keeps it.

    A knows of nothing: for its engine the session still lives.
    """
    until_target_took(s)
    s.record_joint = False
    s.heal()
    s.until(lambda: s.node(s.a).question == "record-joint")
    told = describe(s.node(s.a))
    s.cut()
    assert s.claim(s.b)
    s.promote(s.b)
    held = s.arbiter.held
    assert s.node(s.a).session is not None
    late = Claimant(MIRROR_ID, s.a.index + 1).record_joint(told)
    refused = s.refused(s.a, at_arbiter(s.arbiter, late, no_time, partial(command_of, s.node(s.a))))
    assert "confirm-joint" in refused
    assert s.arbiter.held == held
    first = s.write(s.b, 7)
    s.command(s.a, roles.demote(s.node(s.a)))
    s.record_joint = True
    s.heal()
    s.synced()
    assert s.leads(s.b)
    s.both_have(first)


def no_time() -> Path:
    """A way to the store that takes no time."""
    yield from ()


def claim_settled_in_joint_step(s: Scene) -> None:
    """The record is told to say what A has, and A learns it while it gives that up: it stays so."""
    s.pair()
    s.part()
    ended = s.begin(s.a, s.asking(s.a))
    s.until(lambda: ended)
    asked = ended[0][0]
    assert s.swap(s.a, asked)
    s.command(s.a, roles.claimed(s.node(s.a), asked["generation"], won=True))
    s.heal()
    s.until(lambda: s.node(s.a).giving_up)
    late = s.begin(s.a, roles.claimed(s.node(s.a), asked["generation"], won=True))
    s.until(lambda: late)
    assert isinstance(late[0][1], StaleCommandError), late
    assert Flags.ALONE not in s.on_disk(s.a).flags
    s.synced()


def cut_in_joint_step(s: Scene) -> None:
    """The link goes while A gives up its right: it freezes and acknowledges nothing alone."""
    begin_resync(s)
    s.until(lambda: s.node(s.a).giving_up or s.session(s.a).phase.value == "joint")
    s.net.reset_all()
    s.cut()
    pending = s.begin_write(s.a, 7)
    s.run(3000)
    assert pending.problem is None
    assert not s.node(s.a).right
    s.heal()
    s.until(lambda: pending.acknowledged)
    s.synced()
    s.both_have(pending)
