"""A stage for directed sequences with production's controllers: two nodes, no faults by chance.

A sequence says what happens and runs virtual time until something is the case; all checks of
conducted runs watch it. Owns no expectation beyond these.
"""

from collections.abc import Callable
from dataclasses import replace

from nbdmirror.core.node import Node, Role
from tests.sim.conducted import NodeSide
from tests.sim.run import Conducted
from tests.sim.sequences_scene import Steady

LIMIT_MS = 20_000
REST_MS = 1_500
FREEZE_MS = 4_000


class Stage:
    """Two nodes, A and B, and hands to move them."""

    def __init__(self, arbiter: str = "none", seed: int = 1) -> None:
        self.sim = sim = Conducted(seed, arbiter, keep_trace=True)
        self.world = sim.world
        self.checker = sim.checker
        self.pair = sim.pair
        self.net, self.air, self.operator = sim.net, sim.pair.air, sim.operator
        self.world.rng["net"] = Steady(0.5)
        self.world.rng["disk"] = Steady(0.7)
        self.a, self.b = sim.pair.nodes
        self.pair.takeover, self.pair.preferred, self.pair.slow = True, 0, 0.0
        self.air.networks_count = 2
        self.air.calm()
        sim.client.think_ms = 60
        for node in self.pair.nodes:
            node.host.settings = replace(
                node.host.settings, freeze_limit_ms=FREEZE_MS, hand_over=True, read_lease_ms=1_000
            )
            app = node.application
            app.fails = app.hangs = app.sticks = 0.0
        if sim.arbiter is not None:
            sim.arbiter.unreliable = False
        sim.watch.tick()

    # --- time -------------------------------------------------------------------------------------

    def run(self, duration_ms: int) -> None:
        """Let time pass."""
        self.world.run(self.world.now_ms + duration_ms)

    def until(self, holds: Callable[[], object], limit_ms: int = LIMIT_MS) -> int:
        """Run until it is so; returns how long it took. Raises AssertionError when it is too late.

        It has to be so for some moments: what is on its way may end it.
        """
        began_ms = self.world.now_ms
        if not holds():
            reached = self.world.run(began_ms + limit_ms, lambda: bool(holds()))
            assert reached, f"never: {self.sim.describe()}"
        return self.world.now_ms - began_ms

    # --- nodes ------------------------------------------------------------------------------------

    def serving(self, load: int = 1) -> None:
        """Both in sync, A serves with its application, and clients write."""
        for node in self.pair.nodes:
            node.boot()
        self.until(lambda: self.checker.both_synced() and self.serves(self.a), 60_000)
        self.sim.client.start(load)
        self.run(REST_MS)
        assert not self.sim.unrest(), self.sim.unrest()

    def node(self, node: NodeSide) -> Node:
        """The core that runs there now."""
        assert node.host.node is not None, f"{node.host.name} is down"
        return node.host.node

    def is_primary(self, node: NodeSide) -> bool:
        """Whether its engine has the role."""
        return node.host.node is not None and node.host.node.role is Role.PRIMARY

    def serves(self, node: NodeSide) -> bool:
        """Whether its application runs on an engine that answers."""
        return node.application.running and node.application.serves()

    def kill(self, node: NodeSide) -> None:
        """Both processes, and they stay away."""
        node.kill()
        if node.host.life is not None:
            node.host.crash(power=False)

    def power(self, node: NodeSide) -> None:
        """The host loses power, and stays off until it is booted."""
        node.host.on_power = lambda: None
        node.kill()
        node.application.kill()
        node.host.end(power=True)

    def together(self, limit_ms: int = 60_000) -> None:
        """Everything works again: the pair comes together, and one node serves."""
        for node in self.pair.nodes:
            node.boot()
        self.heal()
        self.until(lambda: self.checker.both_synced() and not self.sim.unrest(), limit_ms)
        self.run(REST_MS)
        assert self.checker.both_synced(), "did not stay in sync"
        assert not self.sim.unrest(), self.sim.unrest()

    # --- networks ---------------------------------------------------------------------------------

    def cut_channel(self) -> None:
        """The engines' link, and the heartbeats on its cable; those on the other one go on."""
        self.net.cut(0)
        self.net.cut(1)

    def cut(self) -> None:
        """The two do not reach each other at all."""
        self.cut_channel()
        for network in self.air.cut:
            network[0] = network[1] = True

    def heal(self) -> None:
        """They do again."""
        self.net.heal()
        self.air.heal()
        for node in self.pair.nodes:
            node.router_cut = False
