"""What must hold of applications, probes and controllers, whoever decides.

Owns these checks of conducted runs: no application without a serving engine under it for longer
than it takes to notice and stop it, never two of them where the arbiter has a memory, a probe that
says yes only for a ready primary, and rest after calm.
"""

from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.view import Service
from nbdmirror.core.node import Role
from tests.sim.application import STOPPED_MS
from tests.sim.checks import Checker
from tests.sim.conducted import FRESH_MS, NodeSide, Pair
from tests.sim.host import Host
from tests.sim.world import World

TICK_MS = 200
# The step under way when it happened, all of a dialog of leaving, and a look.
NOTICE_MS = 11_000
DOWN_MS = NOTICE_MS + STOPPED_MS
# One that froze asks peer and arbiter, may be refused a few times, steps back, and stops it.
DEPOSED_MS = 15_000 + STOPPED_MS
PROMOTIONS_MAX = 6
# What a controller says is heard long before.
HEARS_MS = 1_000


class Watch:
    """Looks at both nodes five times a second."""

    def __init__(self, world: World, pair: Pair, checker: Checker) -> None:
        self.world = world
        self.pair = pair
        self.checker = checker
        self.counts = {"probed": 0, "promoted": 0, "down_max_ms": 0, "deposed_max_ms": 0}
        self._down_ms = [0, 0]
        self._served_ms = [0, 0]
        self._deposed_ms = [0, 0]
        self._ready_ms = [-FRESH_MS * 10] * 2
        # Per node: since when it hears the other one without a break.
        self._hears_since_ms: list[int | None] = [None, None]
        checker.on_serving = self._serving
        self.promotions_after_calm: int | None = None
        for node in pair.nodes:
            node.on_promoted = self._promoted

    def tick(self) -> None:
        """Now, and again."""
        for node in self.pair.nodes:
            self._application(node)
            self._hearing(node)
        self._probes()
        self.world.at(TICK_MS, self.world.life, self.tick)

    def _promoted(self) -> None:
        """A node became primary."""
        self.counts["promoted"] += 1
        if self.promotions_after_calm is not None:
            self.promotions_after_calm += 1
            if self.promotions_after_calm > PROMOTIONS_MAX:
                self.checker.fail(f"E7: {PROMOTIONS_MAX} changes of the primary after the calm")

    # --- applications -----------------------------------------------------------------------------

    def _application(self, node: NodeSide) -> None:
        host, index = node.host, node.host.index
        self._served_ms[index] = self._served_ms[index] + TICK_MS if is_primary(host) else 0
        if not node.application.running:
            self._down_ms[index] = self._deposed_ms[index] = 0
            return
        awake = is_awake(node)
        if is_primary(host):
            self._down_ms[index] = 0
        elif awake:
            self._down_ms[index] += TICK_MS
        if not self._is_second(node):
            self._deposed_ms[index] = 0
        elif awake and not self._in_the_dark(index):
            self._deposed_ms[index] += TICK_MS
        self._judge(host)

    def _judge(self, host: Host) -> None:
        index, counts = host.index, self.counts
        counts["down_max_ms"] = max(counts["down_max_ms"], self._down_ms[index])
        counts["deposed_max_ms"] = max(counts["deposed_max_ms"], self._deposed_ms[index])
        if self._down_ms[index] > DOWN_MS:
            self.checker.fail(
                f"B7: the application of {host.name} runs {DOWN_MS} ms after it lost the role"
            )
        if self._deposed_ms[index] > DEPOSED_MS:
            self.checker.fail(
                f"B7: two applications; that of {host.name} for {DEPOSED_MS} ms without the right"
            )

    def _is_second(self, node: NodeSide) -> bool:
        """With a memory: both applications run, and this is the one without the right."""
        index, arbiter = node.host.index, self.pair.arbiter
        other = self.pair.nodes[1 - index]
        if arbiter is None or not other.application.running:
            return False
        named = arbiter.held.owner == other.host.index
        return named or (not node.application.serves() and other.application.serves())

    def _in_the_dark(self, index: int) -> bool:
        """Whether nothing can tell this node that it lost the right."""
        arbiter = self.pair.arbiter
        return arbiter is None or arbiter.down or self.pair.is_far(index)

    # --- who may serve ----------------------------------------------------------------------------

    def _hearing(self, node: NodeSide) -> None:
        """Whether this node's controller hears the other one's now, and both run."""
        index = node.host.index
        other = self.pair.nodes[1 - index]
        hears = self.pair.air.carries(1 - index) and self.pair.air.carries(index)
        if not (hears and is_awake(node) and is_awake(other)):
            self._hears_since_ms[index] = None
        elif self._hears_since_ms[index] is None:
            self._hears_since_ms[index] = self.world.now_ms

    def _serving(self, host: Host) -> None:
        """A node begins to serve: never beside one that it hears serving, whatever the arbiter."""
        since_ms = self._hears_since_ms[host.index]
        if self.checker.split or self.checker.forced or since_ms is None:
            return
        other = self.pair.hosts[1 - host.index]
        both = is_primary(host) and is_primary(other)
        if (
            both
            and self.world.now_ms - since_ms > HEARS_MS
            and self._served_ms[other.index] > HEARS_MS
        ):
            self.checker.fail(f"11: {host.name} serves, and hears that {other.name} does")

    # --- probes -----------------------------------------------------------------------------------

    def _probes(self) -> None:
        """What load balancers would be told at this moment."""
        said: list[str] = []
        for node in self.pair.nodes:
            index = node.host.index
            if is_primary(node.host) and node.application.running:
                self._ready_ms[index] = self.world.now_ms
            c = node.controller
            if c is None or not is_awake(node) or not c.serving():
                continue
            self.counts["probed"] += 1
            said.append(node.host.name)
            late_ms = self.world.now_ms - self._ready_ms[index]
            if late_ms > FRESH_MS + TICK_MS:
                self.checker.fail(f"B7: the probe of {node.host.name} says yes {late_ms} ms late")
        if len(said) > 1 and self.checker.memory and not self.checker.forced:
            self.checker.fail("B7: both probes say yes")

    # --- at the end -------------------------------------------------------------------------------

    def unrest(self) -> str:
        """Why this is not exactly one node that serves with its application, and a ready second."""
        serving = [node for node in self.pair.nodes if is_primary(node.host)]
        if len(serving) != 1:
            return f"{len(serving)} primaries"
        node = serving[0]
        other = self.pair.nodes[1 - node.host.index]
        c = node.controller
        if c is None or other.controller is None:
            return "a controller is not there"
        facts = (
            (node.application.running and c.service.state is Service.UP, "no application"),
            (not other.application.running, "an application on the second"),
            (c.serving(), "the probe says no"),
            (not other.controller.serving(), "both probes say yes"),
            (not policy.swap_back(c.view), "the preferred node takes its role back"),
        )
        return next((reason for holds, reason in facts if not holds), "")


def is_primary(host: Host) -> bool:
    """Whether its engine has the role."""
    return host.node is not None and host.node.role is Role.PRIMARY


def is_awake(node: NodeSide) -> bool:
    """Whether its controller runs, and its engine answers."""
    now_ms = node.host.world.now_ms
    c, life = node.controller, node.host.life
    engine = life is None or life.paused_until_ms <= now_ms
    return c is not None and c.life.paused_until_ms <= now_ms and engine
