"""What goes wrong around production's controllers, on top of what goes wrong around engines.

Owns the mix of a conducted run: controllers and whole nodes die and stand still, heartbeats get
lost, routers and switches go, scripts fail (application.py), operators type at bad moments, an
arbiter is far, slow, or started again empty.
"""

from nbdmirror.core.ports import Path
from tests.sim.checks import Checker
from tests.sim.conducted import NodeSide, Pair
from tests.sim.faults import Faults
from tests.sim.host import Host
from tests.sim.net import Network
from tests.sim.operator import Operator
from tests.sim.world import World, sleep

# Two shares of each kind: most seeds have few kinds, so that each of them meets calm moments.
RARE = (0, 0, 1, 3)
ORDERS = ("swap", "swap", "stop", "prim", "restart", "stop --both", "failover off")


class ConductedFaults(Faults):
    """The faults of one conducted run."""

    def __init__(
        self,
        world: World,
        hosts: tuple[Host, Host],
        net: Network,
        checker: Checker,
        *,
        pair: Pair,
        operator: Operator,
    ) -> None:
        self._begin(world, hosts, net, checker)
        self.pair = pair
        self.typist = operator
        self.arbiter = pair.arbiter
        self.start = pair.boot
        self.kinds = [
            self.kill, self.power, self.power_both, self.cut, self.cut_one_way, self.flap,
            self.reset, self.pause, self.slow_net, self.slow_disk, self.held_write, self.sync_error,
            self.write_error, self.no_space, self.full_disk, self.bad_disk, self.meta_error,
            self.drain, self.compare_all, self.arbiter_down, self.slow_disk_power,
            self.kill_controller, self.kill_controller, self.controller_stays_away,
            self.pause_controller, self.pause_node, self.kill_node, self.kill_node,
            self.beats_one_way, self.beats_one_way, self.one_network, self.bad_air,
            self.router_cut, self.switch_down, self.switch_down, self.isolate, self.isolate,
            self.half_cut, self.checker_fails, self.order, self.order, self.order,
            self.arbiter_lost, self.kill_and_cut, self.force_in_a_cut,
        ]  # fmt: skip
        self.weights = [self.rng.choice(RARE) for _ in self.kinds]
        if not sum(self.weights):
            self.weights = [1] * len(self.kinds)
        self.gap_ms = self.rng.choice((200, 700, 2_000))

    def _node(self) -> NodeSide:
        return self.rng.choice(self.pair.nodes)

    def _boot_later(self, node: NodeSide, low_ms: int = 50, high_ms: int = 3_000) -> None:
        self.world.at(self.rng.randrange(low_ms, high_ms), self.world.life, node.boot)

    # --- processes --------------------------------------------------------------------------------

    def kill(self) -> None:
        """An engine is killed; its controller sees to it."""
        host = self._host()
        if host.life is not None:
            host.crash(power=False)

    def kill_controller(self) -> None:
        """A controller is killed; the service manager starts it again."""
        node = self._node()
        node.kill()
        self._boot_later(node)

    def controller_stays_away(self) -> None:
        """A controller is killed, and comes late."""
        node = self._node()
        node.kill()
        self._boot_later(node, 5_000, 16_000)

    def kill_node(self) -> None:
        """Both processes of a node die, in either order."""
        node = self._node()
        if self.rng.random() < 0.5:
            node.kill()
        self.world.at(self.rng.choice((0, 0, 5, 300)), self.world.life, self._kill_both, node)

    def _kill_both(self, node: NodeSide) -> None:
        if node.host.life is not None:
            node.host.crash(power=False)
        node.kill()
        self._boot_later(node, 50, 8_000)

    def pause_controller(self) -> None:
        """A controller stands still; its engine does not."""
        self._pause_life(self._node(), self.rng.choice((300, 1_400, 2_500, 6_000)))

    def _pause_life(self, node: NodeSide, duration_ms: int) -> None:
        c = node.controller
        if c is not None:
            self.world.note(f"{node.host.name} controller pauses for {duration_ms} ms")
            c.life.paused_until_ms = self.world.now_ms + duration_ms

    def pause_node(self) -> None:
        """Nothing runs on a host for a while."""
        node, duration_ms = self._node(), self.rng.choice((300, 1_400, 2_500, 6_000, 12_000))
        self._pause_life(node, duration_ms)
        node.host.pause(duration_ms)
        script = node.application.script
        if script is not None:
            script.paused_until_ms = self.world.now_ms + duration_ms

    # --- networks ---------------------------------------------------------------------------------

    def _gap(self) -> int:
        return self.rng.choice((300, 1_200, 2_500, 5_000, 9_000))

    def beats_one_way(self) -> Path:
        """What one controller says is not heard by the other one."""
        sender = self.rng.randrange(2)
        for network in self.pair.air.cut:
            network[sender] = True
        yield (sleep, self._gap())
        self.pair.air.heal()

    def one_network(self) -> Path:
        """One of two networks is gone."""
        network = self.rng.choice(self.pair.air.cut)
        network[0] = network[1] = True
        yield (sleep, self._gap())
        self.pair.air.heal()

    def bad_air(self) -> Path:
        """Many heartbeats get lost, late or doubled for a while."""
        air = self.pair.air
        before = air.loss, air.late, air.twice
        air.loss, air.late, air.twice = self.rng.choice((0.3, 0.7)), 0.2, 0.1
        yield (sleep, self._gap())
        air.loss, air.late, air.twice = before

    def _cut_everything(self) -> None:
        self.net.cut(0)
        self.net.cut(1)
        for network in self.pair.air.cut:
            network[0] = network[1] = True

    def _heal_everything(self) -> None:
        self.net.heal()
        self.pair.air.heal()
        for node in self.pair.nodes:
            node.router_cut = False
        self.pair.cut_off = [False, False]
        self.world.note("all cables are there again")

    def router_cut(self) -> Path:
        """One node does not see the router."""
        node = self._node()
        node.router_cut = True
        yield (sleep, self._gap())
        node.router_cut = False

    def switch_down(self) -> Path:
        """A switch goes, with everything that hangs on it, and comes back for both at once."""
        self._cut_everything()
        for node in self.pair.nodes:
            node.router_cut = True
        yield (sleep, self._gap())
        self._heal_everything()

    def isolate(self) -> Path:
        """One node reaches nobody: neither peer nor router nor arbiter."""
        self._cut_everything()
        self.pair.cut_off[self.rng.randrange(2)] = True
        yield (sleep, self._gap())
        self._heal_everything()

    def half_cut(self) -> Path:
        """The two do not reach each other; both reach the rest."""
        self._cut_everything()
        yield (sleep, self._gap())
        self._heal_everything()

    def force_in_a_cut(self) -> Path:
        """The two do not reach each other, and an operator forces the one that does not serve."""
        self._cut_everything()
        yield (sleep, 2_500 + self._gap())
        for node in self.pair.nodes:
            v = node.controller.view if node.controller is not None else None
            if v is not None and v.engine is not None and not v.engine.primary and v.wanted:
                self.typist.order("prim --force", node)
                break
        yield (sleep, self._gap())
        self._heal_everything()

    def kill_and_cut(self) -> Path:
        """A controller dies while the two lose each other, and comes back in the middle."""
        node = self._node()
        node.kill()
        self._cut_everything()
        self._boot_later(node, 50, 2_500)
        yield (sleep, self._gap())
        self._heal_everything()

    # --- what controllers look after --------------------------------------------------------------

    def checker_fails(self) -> Path:
        """A checker of one node is down for a while."""
        node = self._node()
        node.checker_down = True
        c = node.controller
        if c is not None:
            c.wake()
        yield (sleep, self.rng.choice((200, 1_500, 4_000)))
        node.checker_down = False

    def order(self) -> None:
        """An operator types something, at either node."""
        name, node = self.rng.choice(ORDERS), self._node()
        self.typist.order(name, node)
        if name.startswith("stop"):
            for each in self.pair.nodes:
                after_ms = self.rng.randrange(500, 8_000)
                self.world.at(after_ms, self.world.life, self.typist.order, "start", each)

    def arbiter_lost(self) -> None:
        """The arbiter is started again, empty, while the pair is in sync."""
        if self.arbiter is not None and self.checker.both_synced():
            self.arbiter.lose()
