"""The operator of a conducted pair: orders at random moments, and what `status` asks for.

Owns what is typed, and that production's refusals count (nbdmirror/controller/api.py). Remedies are
taken from the sentences of the decisions and from the engine's own facts, after a while without
change. Must never do what no command does.
"""

from collections.abc import Callable
from typing import Final

from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.view import OrderKind, Verdict, View
from nbdmirror.core.decide import DecisionKind, decide
from nbdmirror.core.node import Role
from nbdmirror.core.ports import Path
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.core.view import node_view, state_message
from nbdmirror.errors import NbdMirrorError, RefusedError
from nbdmirror.limits import MIB
from tests.sim.arbiter import LOST
from tests.sim.checks import Checker
from tests.sim.conducted import Controller, NodeSide, Pair
from tests.sim.world import World, sleep

LOOK_MS: Final = 500
PATIENCE_MS: Final = 4_000
# How long nobody serves before somebody is forced to.
DARK_MS: Final = 12_000
WHY: Final = "an operator asked for it"
STOPPED: Final = "stopped by an operator"


class Operator:
    """One for both nodes."""

    def __init__(self, world: World, pair: Pair, checker: Checker) -> None:
        self.world = world
        self.pair = pair
        self.checker = checker
        self.rng = world.rng["operator"]
        self.sane = False
        self.counts = {"orders": 0, "remedies": 0, "forced": 0}
        self._since: dict[str, int] = {}

    # --- orders, as the api takes them ------------------------------------------------------------

    def order(self, name: str, node: NodeSide) -> None:
        """Type one command at a node; a refusal changes nothing."""
        c = node.controller
        if c is None or c.life.paused_until_ms > self.world.now_ms:
            return
        orders: dict[str, Callable[[Controller, View], None]] = {
            "start": self._start,
            "stop": self._stop,
            "stop --both": self._stop_both,
            "swap": self._swap,
            "prim": self._prim,
            "prim --force": self._force,
            "restart": self._restart,
            "failover off": lambda c, _v: c.switches.change(failover=False),
            "failover on": lambda c, _v: c.switches.change(failover=True),
        }
        try:
            orders[name](c, c.observer.view())
        except RefusedError as error:
            self.world.note(f"operator: {name} at {node.host.name}: refused: {error}")
            return
        self.counts["orders"] += 1
        self.world.note(f"operator: {name} at {node.host.name}")
        c.wake()

    def _start(self, c: Controller, _v: View) -> None:
        c.hand.forgive()
        c.orders.start()

    def _stop(self, c: Controller, _v: View) -> None:
        c.orders.stop(STOPPED)

    def _stop_both(self, c: Controller, v: View) -> None:
        if not policy.is_primary(v) and v.peer.heard and v.peer.wanted:
            raise RefusedError("type it on the primary")
        c.orders.stop(STOPPED, both=policy.is_primary(v))

    def _swap(self, c: Controller, v: View) -> None:
        if policy.is_primary(v):
            if not c.orders.can_swap(v):
                raise RefusedError("the other node cannot take over")
            c.orders.swap(v.settings.peer_id, WHY)
            return
        synced = v.engine is not None and v.engine.synced and v.engine.peer_primary
        if not synced or not policy.promotable(v):
            raise RefusedError("this node cannot serve now")
        c.orders.swap(v.settings.node_id, WHY)

    def _prim(self, c: Controller, v: View, *, force: bool = False) -> None:
        if policy.is_primary(v):
            raise RefusedError("primary already")
        if policy.peer_serves(v):
            raise RefusedError("the other node serves")
        if v.engine is not None and v.engine.promote_refusal and not force:
            raise RefusedError(v.engine.promote_refusal)
        c.give(OrderKind.PRIM, WHY, force=force)
        c.orders.start()

    def _force(self, c: Controller, v: View) -> None:
        self._prim(c, v, force=True)
        self.counts["forced"] += 1

    def _restart(self, c: Controller, v: View) -> None:
        if not policy.is_primary(v):
            raise RefusedError("the application does not run here")
        c.give(OrderKind.RESTART, WHY)

    # --- remedies ---------------------------------------------------------------------------------

    def run(self) -> Path:
        """Look at `status` of both nodes now and then, and type what it says."""
        while True:
            yield (sleep, LOOK_MS)
            for node in self.pair.nodes:
                yield from self._see(node)
            yield from self._see_both()

    def _lasts(self, what: str, now: bool, for_ms: int = PATIENCE_MS) -> bool:
        """Whether this has been so for a while; then the while begins anew."""
        if not now:
            self._since.pop(what, None)
            return False
        since_ms = self._since.setdefault(what, self.world.now_ms)
        if self.world.now_ms - since_ms < for_ms:
            return False
        del self._since[what]
        self.counts["remedies"] += 1
        return True

    def _see(self, node: NodeSide) -> Path:
        """What one node's status asks for."""
        c, name = node.controller, node.host.name
        if c is None or c.life.paused_until_ms > self.world.now_ms:
            return
        v, engine = c.view, c.view.engine
        given_up = self._lasts(f"{name} given up", bool(v.engine_given_up))
        if given_up or self._lasts(f"{name} stopped", self.sane and not v.wanted):
            self.order("start", node)
        if self.sane and not v.settings.failover:
            self.order("failover on", node)
        full = node.host.node is not None and bool(node.host.node.keep.hold)
        if self._lasts(f"{name} full", full):
            yield from self._make_room(c)
        waits = engine is not None and engine.split and not engine.primary and v.wanted
        if self._lasts(f"{name} waits", waits):
            yield from self._second(node)
        failed = engine is not None and bool(engine.failed) and v.wanted
        if self._lasts(f"{name} failed", failed):
            # "look at it, then stop and start"
            self.order("stop", node)
            yield (sleep, self.rng.randrange(500, 3_000))
            self.order("start", node)

    def _see_both(self) -> Path:
        """What neither node can say alone."""
        controllers = [node.controller for node in self.pair.nodes]
        engines = [host.node for host in self.pair.hosts]
        serves = any(n is not None and n.role is Role.PRIMARY and not n.frozen for n in engines)
        up = all(c is not None for c in controllers) and all(n is not None for n in engines)
        arbiter = self.pair.arbiter
        lost = arbiter is not None and arbiter.held is LOST and self.checker.both_synced()
        if self._lasts("record lost", lost and serves):
            yield from self._resync()
        wanted = self.pair.engines_wanted
        if self._lasts("asks", up and wanted and not self._will_meet(), DARK_MS):
            yield from self._choose()
        if self._lasts("dark", up and wanted and not serves, DARK_MS if self.sane else 2 * DARK_MS):
            yield from self._light()

    def _resync(self) -> Path:
        """The record is made again by the next joint step."""
        for node in self.pair.nodes:
            c = node.controller
            if c is not None and policy.is_primary(c.view):
                self.world.note(f"operator: resync at {node.host.name}")
                yield from self._typed(c, "resync")

    def _make_room(self, c: Controller) -> Path:
        """A resync waits because what it overwrites cannot be kept."""
        if self.rng.random() < 0.5:
            yield from self._typed(c, "kept-limit", limit=64 * MIB)
        else:
            yield from self._typed(c, "kept-discard")

    def _typed(self, c: Controller, name: str, **args: object) -> Path:
        """A command that goes through to the engine; returns whether it was done."""
        try:
            yield from c.command(name, **args)
        except NbdMirrorError as error:
            self.world.note(f"operator: {name}: refused: {error}")
            return False
        return True

    def _second(self, node: NodeSide) -> Path:
        """`second --force`: this copy is given up and filled from the other node."""
        c = node.controller
        if c is None or policy.is_primary(c.observer.view()):
            return
        body = c.peer_body
        state = body.data_state if body is not None else ""
        if not c.observer.peer_heard() or state not in ("uptodate", "outdated"):
            return
        if node.host.sb.data_state in (DataState.BLANK, DataState.INCONSISTENT):
            return
        engine = c.observer.view().engine
        if engine is not None and engine.claim_unsettled:
            verdict, _ = yield from c.scribe.settle()
            if verdict is Verdict.UNKNOWN:
                return
        self.world.note(f"operator: second --force at {node.host.name}")
        self.checker.forced, self.checker.gives_up = True, node.host.index
        done = yield from self._typed(c, "give-up", keep=self.rng.random() < 0.8)
        if not done and c.host.node is not None and c.host.node.keep.kept is not None:
            yield from self._typed(c, "kept-discard")
        self.checker.gives_up = None
        if done:
            self.counts["forced"] += 1
            # One at a time: what the other one says of its copy may be older than this.
            self._since.clear()
            c.orders.start()
            c.wake()

    def _choose(self) -> Path:
        """Neither copy is the other one's source: an operator declares one good."""
        keeper, loser = sorted(self.pair.nodes, key=self._worth, reverse=True)
        if loser.controller is not None and policy.is_primary(loser.controller.view):
            self.order("stop", loser)
            yield (sleep, PATIENCE_MS)
            yield from self._reboot_failed(keeper)
            self.order("prim --force", keeper)
            yield (sleep, PATIENCE_MS)
            self.order("start", loser)
            return
        yield from self._second(loser)

    def _light(self) -> Path:
        """Nobody serves, and nobody will by itself: somebody is told to, by force where needed."""
        nodes = sorted(self.pair.nodes, key=self._worth, reverse=True)
        for node in nodes:
            c = node.controller
            if c is None:
                continue
            v = c.observer.view()
            engine = v.engine
            if engine is None or engine.failed or engine.primary or policy.peer_serves(v):
                continue
            asked = policy.by_operator(v) if not engine.promote_refusal else "force"
            force = self.sane and bool(engine.promote_refusal) and not self._will_meet()
            if asked == "force" and not force:
                continue
            if force:
                yield from self._reboot_failed(node)
            self.order("prim --force" if force else "prim", node)
            return

    def _reboot_failed(self, node: NodeSide) -> Path:
        """Before a copy is declared good whose sync failed: its page cache shows what is not there.

        Without it the copy looks complete, until that cache is gone, and nobody compares it again.
        """
        if Flags.FAILED in node.host.sb.flags:
            self.world.note(f"operator: reboots {node.host.name}, whose disk failed")
            node.host.crash(power=True)
            yield (sleep, 2 * PATIENCE_MS)

    def _will_meet(self) -> bool:
        """Whether the two engines find out by themselves who has what."""
        first, second = (host.node for host in self.pair.hosts)
        if first is None or second is None:
            return True
        views = [node_view(state_message(n), n.sb.mirror_id, n.sb.node_id) for n in (first, second)]
        kind = decide(views[0], views[1]).kind
        return kind not in (DecisionKind.ASK, DecisionKind.UNRELATED, DecisionKind.REFUSE)

    def _worth(self, node: NodeSide) -> tuple[bool, ...]:
        """How much an operator would want to keep a copy."""
        sb = node.host.sb
        engine = node.host.node
        return (
            sb.data_state is not DataState.BLANK,
            sb.data_state is not DataState.INCONSISTENT,
            engine is not None and not engine.failed and Flags.FAILED not in sb.flags,
            self.checker.holders[node.host.index],
            sb.data_state is DataState.UPTODATE,
        )
