"""Directed sequences of production's controllers: who goes on, who waits, who gives way.

Each shows a row or a condition of core/cluster/policy.py at work; the mutants of
tests/sim/mutants/policy.py take these away. A sequence asserts what its docstring says.
"""

from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.limits import SUPERBLOCK_SLOT_OFFSETS_BYTES
from tests.sim.conducted import NodeSide
from tests.sim.conducted_scene import Stage
from tests.sim.disk import Change

# Silence, channel, a look or two, and what storing takes.
TAKEOVER_MS = 6_000
SAYS_ONE_WORD_MS = 3_000
REST_MS = 1_500


def no_second_line(s: Stage) -> None:
    """Nothing was acknowledged by one node that the other one knows nothing of."""
    assert s.checker.counts["splits"] == 0, "both went on, each for itself"
    assert not (s.is_primary(s.a) and s.is_primary(s.b)), "both are primary"


def takes_over(s: Stage, node: NodeSide, limit_ms: int = TAKEOVER_MS) -> None:
    """It serves within that time."""
    s.until(lambda: s.serves(node), limit_ms)


def node_of_the_primary_dies(s: Stage) -> None:
    """Both processes of the primary die: the other node serves within the promised time."""
    s.serving()
    s.kill(s.a)
    s.a.application.running = False  # its host is gone, too
    takes_over(s, s.b)
    no_second_line(s)
    s.together()


def engine_of_the_primary_dies(s: Stage) -> None:
    """Its controller speaks for it: no silence is waited for, and it returns as the second."""
    s.serving()
    s.a.host.crash(power=False)
    s.until(lambda: s.is_primary(s.b) and s.node(s.b).right, SAYS_ONE_WORD_MS)
    assert s.a.host.sb.data_state is DataState.OUTDATED, "its copy is known to be behind"
    s.together()
    no_second_line(s)


def channel_is_lost_controllers_talk(s: Stage) -> None:
    """The replication cable is cut, the second network is not: the peer leaves, and A goes on."""
    s.serving()
    s.cut_channel()
    s.until(lambda: not s.node(s.a).frozen and s.node(s.a).right, TAKEOVER_MS)
    assert s.node(s.b).sb.data_state is DataState.OUTDATED, "it was not asked to leave"
    s.run(TAKEOVER_MS)
    assert not s.is_primary(s.b), "it hears a primary"
    no_second_line(s)
    s.together()


def controller_is_reborn_in_a_cut(s: Stage) -> None:
    """B's controller starts while the channel is away: it listens before it believes in silence."""
    s.serving()
    s.cut_channel()
    s.b.kill()
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    # Long enough to clean up and look before anything is heard, and within the silence.
    s.air.delay_ms = (300, 301)
    s.b.boot()
    s.run(TAKEOVER_MS)
    assert not s.is_primary(s.b), "it took over before it had listened"
    no_second_line(s)
    s.together()


def heartbeats_of_one_direction(s: Stage) -> None:
    """The channel is cut, and A does not hear B: B still hears A, and does not take over."""
    s.serving()
    s.cut_channel()
    s.air.cut[1][1] = True
    s.run(2 * TAKEOVER_MS)
    assert not s.is_primary(s.b), "it hears a primary"
    no_second_line(s)
    s.together()


def stale_node_boots_alone(s: Stage) -> None:
    """B misses writes that A acknowledged alone, and boots when A is gone: it waits."""
    s.serving()
    s.kill(s.b)
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    s.run(REST_MS)
    s.kill(s.a)
    s.a.application.running = False
    s.b.boot()
    s.run(3 * TAKEOVER_MS)
    assert not s.is_primary(s.b), "nobody knows there what A did"
    s.together()
    no_second_line(s)


def alone_is_heard_once(s: Stage) -> None:
    """A goes on alone and says so, is heard once, and dies: B was left behind, and waits."""
    s.serving()
    s.cut_channel()
    s.air.cut[1][1] = True
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    s.run(REST_MS)
    s.kill(s.a)
    s.a.application.running = False
    s.run(3 * TAKEOVER_MS)
    assert not s.is_primary(s.b), "it heard that A went on without it"
    s.together()
    no_second_line(s)


def engine_restarted_in_a_cut(s: Stage) -> None:
    """B's engine is restarted while the two are cut off: it does not know what A did since."""
    s.serving()
    s.cut()
    s.b.host.crash(power=False)
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    s.run(2 * TAKEOVER_MS)
    assert not s.is_primary(s.b), "it was in sync in the life of another engine"
    s.together()
    no_second_line(s)


def cut_lets_both_go_on(s: Stage) -> None:
    """With `none` both serve in a cut; at contact one gives way, and an operator chooses."""
    s.serving(3)
    s.cut()
    takes_over(s, s.b)
    takes_over(s, s.a)
    s.until(lambda: s.checker.counts["splits"] == 1)
    s.heal()
    s.until(lambda: s.is_primary(s.a) != s.is_primary(s.b))
    s.until(lambda: not (s.a.application.running and s.b.application.running))
    s.world.spawn(s.world.life, "operator", s.operator.run())
    s.together()


def alone_without_a_write(s: Stage) -> None:
    """With `none` both serve in a cut, and nobody writes: no operator is needed, one gives way."""
    s.serving(0)
    s.cut()
    takes_over(s, s.b)
    takes_over(s, s.a)
    s.together()
    no_second_line(s)


def cut_off_primary_steps_back(s: Stage) -> None:
    """With `ping` a primary that sees no router steps back, and its application is stopped."""
    s.serving()
    s.cut()
    s.a.router_cut = True
    takes_over(s, s.b)
    s.until(lambda: not s.a.application.running)
    assert not s.is_primary(s.a), "it was told no"
    no_second_line(s)
    s.together()


def switch_comes_back(s: Stage) -> None:
    """The router is there a moment before the other node is heard: neither believes in it yet."""
    s.serving()
    s.cut()
    s.a.router_cut = s.b.router_cut = True
    s.run(2 * TAKEOVER_MS)
    assert not s.is_primary(s.a), "it was told no"
    s.a.router_cut = s.b.router_cut = False
    s.run(1_400)
    no_second_line(s)
    s.together()
    no_second_line(s)


def forced_peer_deposes(s: Stage) -> None:
    """An operator forces B in a cut: A, which is alone, reads it in the record and gives way."""
    s.serving()
    s.cut()
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    s.run(REST_MS)
    s.operator.order("prim --force", s.b)
    s.until(lambda: s.is_primary(s.b), TAKEOVER_MS)
    s.until(lambda: not s.is_primary(s.a) and not s.a.application.running, TAKEOVER_MS)


def record_was_given_away(s: Stage) -> None:
    """A, alone, dies; an operator forces B; A boots with its right, and reads the record first."""
    s.serving()
    s.cut()
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    s.run(REST_MS)
    s.kill(s.a)
    s.a.application.running = False
    s.operator.order("prim --force", s.b)
    s.until(lambda: s.serves(s.b), TAKEOVER_MS)
    s.a.boot()
    s.run(2 * TAKEOVER_MS)
    assert s.node(s.a).epoch == 0, "it served, and the record names the other one"


def leftovers_are_removed(s: Stage) -> None:
    """A's controller dies, then its engine: the next controller takes the application down."""
    s.serving()
    s.a.kill()
    s.run(REST_MS)
    s.a.host.crash(power=False)
    takes_over(s, s.b, 4 * TAKEOVER_MS)
    assert s.a.application.running, "nobody was there to stop it"
    s.a.boot()
    s.until(lambda: not s.a.application.running, TAKEOVER_MS)
    s.together()
    no_second_line(s)


def held_back_for_a_moment(s: Stage) -> None:
    """A checker of A fails for a moment while A is being named: never both are promoted."""
    s.pair.checker_when, s.air.delay_ms = "before", (100, 101)
    s.a.checker_down = s.b.checker_down = True
    for node in s.pair.nodes:
        node.boot()
    s.until(s.checker.both_synced, 60_000)
    s.run(REST_MS)
    s.net.slow = True
    for after_ms, node, down in (
        (0, s.a, False), (105, s.b, False), (45, s.a, True), (105, s.a, False),
    ):  # fmt: skip
        s.run(after_ms)
        node.checker_down = down
        assert node.controller is not None
        node.controller.wake()
    for _ in range(60):
        s.run(10)
        no_second_line(s)
    s.net.slow = False
    s.together()


def swap_by_an_operator(s: Stage) -> None:
    """`swap`: the application is stopped before the role is given up; then exactly B serves."""
    s.serving()
    s.operator.order("swap", s.b)
    takes_over(s, s.b)
    no_second_line(s)
    s.together()
    assert s.is_primary(s.b), "it is the same one again"


def cut_leaves_the_owner(s: Stage) -> None:
    """With a memory the primary is first at the arbiter; the other one is told no."""
    s.serving()
    s.cut()
    s.until(lambda: s.node(s.a).right, TAKEOVER_MS)
    s.run(2 * TAKEOVER_MS)
    assert s.serves(s.a), "it has the right"
    no_second_line(s)
    s.together()


def fell_back(s: Stage) -> None:
    """A, alone by the record, finds one slot of its metadata damaged after a restart."""
    s.serving()
    s.kill(s.b)
    s.until(lambda: s.node(s.a).right and not s.node(s.a).sb.pending_kind, TAKEOVER_MS)
    s.run(REST_MS)
    s.kill(s.a)
    s.a.application.running = False
    at = SUPERBLOCK_SLOT_OFFSETS_BYTES[0]
    s.a.host.meta.apply(Change(at, at + 512, b"\xee" * 512))


def record_confirms_who_fell_back(s: Stage) -> None:
    """Nothing newer was relied on, for the record names what the older slot says: A serves."""
    fell_back(s)
    s.a.boot()
    s.until(lambda: s.serves(s.a), 2 * TAKEOVER_MS)
    assert not s.node(s.a).fell_back
    assert Flags.FELL_BACK not in s.a.host.sb.flags, "the next restart asks again"
    s.b.boot()
    s.together()
    no_second_line(s)


def record_of_another_confirms_nobody(s: Stage) -> None:
    """The record names B, which was forced meanwhile: A stays in doubt, and waits."""
    fell_back(s)
    s.b.boot()
    s.run(REST_MS)
    s.operator.order("prim --force", s.b)
    s.until(lambda: s.serves(s.b), 2 * TAKEOVER_MS)
    s.cut()
    s.a.boot()
    s.run(2 * TAKEOVER_MS)
    assert s.node(s.a).fell_back
    assert not s.is_primary(s.a)


EVERYWHERE = (
    node_of_the_primary_dies,
    engine_of_the_primary_dies,
    channel_is_lost_controllers_talk,
    controller_is_reborn_in_a_cut,
    heartbeats_of_one_direction,
    stale_node_boots_alone,
    alone_is_heard_once,
    leftovers_are_removed,
    held_back_for_a_moment,
    swap_by_an_operator,
)
NONE = (engine_restarted_in_a_cut, cut_lets_both_go_on, alone_without_a_write)
PING = (cut_off_primary_steps_back, switch_comes_back)
MEMORY = (
    forced_peer_deposes,
    record_was_given_away,
    cut_leaves_the_owner,
    record_confirms_who_fell_back,
    record_of_another_confirms_nobody,
)
