"""Production's controllers in the simulator: one for each node, with a life of its own.

Observe, decide, act, as `nbdmirror/controller/conductor.py` does it: the view, the orders, what was
asked, the table and what heartbeats say are production's code (core/cluster). Owns what stands for
the shell: the loop, one step at a time, and what outlives a controller (switches, the count of
starts). A controller is killed, paused and started again apart from its engine. Must never decide.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbdmirror.core.cluster import body as bodies
from nbdmirror.core.cluster import observing, policy, standing
from nbdmirror.core.cluster.asking import Questions
from nbdmirror.core.cluster.body import Body
from nbdmirror.core.cluster.checking import CheckerFacts
from nbdmirror.core.cluster.heartbeat import NONCE_BYTES
from nbdmirror.core.cluster.observing import Observer
from nbdmirror.core.cluster.ordering import Orders
from nbdmirror.core.cluster.policy import Decision, Step
from nbdmirror.core.cluster.saying import said_of
from nbdmirror.core.cluster.view import OrderKind, Settings, Verdict, View
from nbdmirror.core.ports import Path
from nbdmirror.errors import ArbiterError, NbdMirrorError, StaleCommandError
from nbdmirror.limits import PING_TIMEOUT_MS, SILENCE_MS
from tests.sim.application import Application, Service
from tests.sim.arbiter import Arbiter
from tests.sim.beats import Air, Heart
from tests.sim.controls import Done, EngineHand, take_lock
from tests.sim.dialogs import Dialogs
from tests.sim.host import Host
from tests.sim.scribe import Scribe
from tests.sim.world import Life, SimWaiter, World, sleep

LOOK_MS = 200
AGAIN_MS = 1_000
FRESH_MS = 1_000
HOUR_MS = 3_600_000
BOOT_MS = (300, 4_000)
ROUTER = ("the router",)


@dataclass(frozen=True)
class Switched:
    """What an operator switched; outlives controllers and power cuts."""

    wanted: bool = True
    stop_reason: str = ""
    stop_both: bool = False
    failover: bool = True
    checkers: bool = True
    served: bool = False


class Switches:
    """The file of these, and of what was done by itself."""

    def __init__(self, world: World) -> None:
        self.now = Switched()
        self._world = world
        self._actions: list[tuple[int, str]] = []

    def change(self, **fields: Any) -> None:
        """From now on."""
        if "actions" in fields:
            self._actions = []
            del fields["actions"]
        self.now = replace(self.now, **fields)

    def actions_within(self, hours: int) -> list[str]:
        """What was done by itself within so many hours."""
        since_ms = self._world.now_ms - hours * HOUR_MS
        return [what for at_ms, what in self._actions if at_ms >= since_ms]

    def count_action(self, what: str) -> None:
        """One more."""
        self._actions.append((self._world.now_ms, what))


@dataclass(frozen=True)
class Limits:
    """How often a node acts by itself."""

    actions_max: int = 4
    actions_window_h: int = 24


class Checkers:
    """One checker of the host, which faults make fail; counted by nobody, it is down at once."""

    def __init__(self, node: "NodeSide") -> None:
        self._node = node

    def facts(self) -> Sequence[CheckerFacts]:
        """It."""
        down, pair = self._node.checker_down, self._node.pair
        return (
            CheckerFacts(
                "host", "script", pair.checker_action, pair.checker_when,
                "down" if down else "up", "it fails" if down else "", 0, 1,
            ),
        )  # fmt: skip

    def reset(self, _name: str) -> None:
        """It finds the same again."""


class NodeSide:
    """What of one node's controllers outlives them."""

    def __init__(self, pair: "Pair", host: Host) -> None:
        self.pair = pair
        self.host = host
        self.switches = Switches(pair.world)
        self.starts: deque[int] = deque()
        self.application = Application(pair.world, host)
        self.controller: Controller | None = None
        self.checker_down = False
        self.router_cut = False
        self.on_promoted: Callable[[], None] = lambda: None
        host.on_power = self.power_lost

    def boot(self) -> None:
        """Start a controller, unless one runs."""
        if self.controller is None:
            self.controller = Controller(self)
            self.controller.start()

    def kill(self) -> None:
        """The controller's process is gone; its engine, application and scripts go on."""
        c, self.controller = self.controller, None
        if c is None:
            return
        self.host.world.note(f"{self.host.name} controller is killed")
        c.life.alive = False
        self.pair.air.hearts[self.host.index] = None
        c.hand.let_go()
        if self.host.speaker is not None:
            # It was speaking for a dead engine, and may have been writing.
            self.host.end(power=False)

    def power_lost(self) -> None:
        """Nothing runs here any more; later the host boots."""
        self.kill()
        self.application.kill()
        self.host.world.at(self.pair.rng.randrange(*BOOT_MS), self.host.world.life, self.boot)


class Pair:
    """Both nodes' controllers, and what is between them."""

    def __init__(
        self, world: World, hosts: tuple[Host, Host], arbiter: Arbiter | None, kind: str
    ) -> None:
        self.world = world
        self.hosts = hosts
        self.arbiter = arbiter
        self.kind = kind
        self.rng = rng = world.rng["conduct"]
        self.air = Air(world, hosts[0].net)
        self.sane = False
        self.slow = rng.choice((0.0, 0.0, 0.1))
        self.cut_off = [False, False]
        self.takeover = rng.random() < 0.85
        self.preferred = rng.choice((0, 0, 0, 1, 2, -1))
        self.checker_action = rng.choice(("restart", "stopstart", "swap", "wait"))
        self.checker_when = rng.choice(("always", "primary", "before"))
        self.limits = Limits(actions_max=rng.choice((4, 24)))
        self.on_stay: Callable[[int], None] = lambda _asker: None
        # An operator's force is about to be carried out.
        self.on_force: Callable[[], None] = lambda: None
        self.counts = {"spoken": 0, "told": 0, "decisions": 0, "roles": 0, "entered": 0}
        self.rows: dict[str, int] = {}
        self.nodes = (NodeSide(self, hosts[0]), NodeSide(self, hosts[1]))
        for host in hosts:
            host.settings = replace(
                host.settings,
                freeze_limit_ms=rng.choice((4_000, 30_000)),
                hand_over=self.takeover,
            )

    def boot(self, host: Host) -> None:
        """Start a host's controller, which starts the rest."""
        self.nodes[host.index].boot()

    def slowly(self) -> Path:
        """The way to the arbiter takes its time."""
        if not self.sane and self.rng.random() < self.slow:
            yield (sleep, self.rng.randrange(100, 2_500))

    def is_far(self, index: int) -> bool:
        """Whether this node reaches neither the arbiter nor a router."""
        return self.cut_off[index] or self.nodes[index].router_cut

    @property
    def engines_wanted(self) -> bool:
        """Whether both nodes shall run."""
        return all(node.switches.now.wanted for node in self.nodes)


class Controller:
    """One life of one controller. The attributes that views are made from are `observing.Parts`."""

    def __init__(self, node: NodeSide) -> None:
        self.node = node
        self.pair = node.pair
        self.host = node.host
        self.index = node.host.index
        self.world = world = node.host.world
        self.rng = world.rng["conduct"]
        self.life = Life(f"{self.host.name} controller")
        self.switches = node.switches
        self.orders = Orders(
            self.index + 1,
            limits=self.pair.limits,
            switches=self.switches,
            tell=self.note,
            clock_ms=self.clock_ms,
        )
        self.questions = Questions(self.clock_ms)
        self.service = Service(node.application, self.life, self.wake)
        self.checkers = Checkers(node)
        self.hand = EngineHand(self.host, self.life, self._engine_ended, node.starts)
        self.supervisor = self.hand
        nonce = self.rng.randbytes(NONCE_BYTES)
        self.heart = Heart(self.pair.air, self.life, self.index, nonce, self._heard)
        self.dialogs = Dialogs(self)
        self.scribe = Scribe(self, self.pair.arbiter)
        self.observer = Observer(self, clock_ms=self.clock_ms, random_hex=self.random_hex)
        self.silence_ms = SILENCE_MS
        self.peer_body: Body | None = None
        self.gave_way = False
        self.died_serving = False
        self.spoken = True
        self.cleaned = False
        self.cleaned_s = 0.0
        self.decision = Decision("start", Step.NOTHING, "the controller is starting")
        self.view = View(self.settings)
        self._promoting = False
        self._said = Body()
        self._heard_last = b""
        self._waiter: SimWaiter | None = None
        self._woken = False

    # --- small things -----------------------------------------------------------------------------

    def clock_ms(self) -> float:
        """The world's."""
        return self.world.now_ms

    def random_hex(self, count: int) -> str:
        """Seeded."""
        return self.rng.randbytes(count).hex()

    def note(self, sentence: str) -> None:
        """Into the trace."""
        self.world.note(f"{self.host.name} controller: {sentence}")

    def spawn(self, name: str, path: Path) -> None:
        """Work beside the loop."""
        self.world.spawn(self.life, name, path)

    def wake(self) -> None:
        """Look again now."""
        self._woken = True
        if self._waiter is not None:
            self._waiter.wake()

    @property
    def engine_state(self) -> dict[str, Any] | None:
        """What the engine said of itself last."""
        return self.hand.state

    @property
    def settings(self) -> Settings:
        """What the configuration and the switches say."""
        pair, me = self.pair, self.index + 1
        return Settings(
            node_id=me,
            peer_id=3 - me,
            peer_name="BA"[self.index],
            preferred_id=max(pair.preferred, 0),
            preferred_last=pair.preferred < 0,
            takeover=pair.takeover,
            failover=self.switches.now.failover,
            memory=pair.arbiter is not None,
        )

    def serving(self) -> bool:
        """What the health probe asks: from what was seen within the last second, or not at all."""
        fresh = self.world.now_ms - self.hand.looked_ms <= FRESH_MS
        return fresh and standing.serves(self.view)

    # --- observe ----------------------------------------------------------------------------------

    def _engine_ended(self) -> None:
        observing.engine_ended(self, self.view)
        self.note("its engine ended")
        self.wake()

    def _heard(self, data: bytes) -> None:
        if data == self._heard_last:
            # Production looks again all the same; nothing is new, and it costs time here.
            return
        self._heard_last = data
        self.peer_body = body = bodies.decode(data)
        self.dialogs.take(body)
        self.wake()

    def _look(self) -> Path:
        relayed = yield from self.hand.look(self.heart.extra_packet)
        if relayed:
            self.heart.take_extra(relayed)

    # --- the loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Adopt what is here, then look, decide and act for ever."""
        self.note("starts")
        world, life, hand, host = self.world, self.life, self.hand, self.host
        host.on_end = lambda: world.at(1, life, hand.ended)
        host.on_event = lambda: world.at(0, life, self.wake)
        self.heart.start()
        self.spawn("conductor", self._run())
        if self.pair.arbiter is not None:
            self.spawn("scribe", self.scribe.run())

    def _run(self) -> Path:
        yield from self._look()
        state = self.engine_state
        if state is not None and state["role"] == "primary":
            self.cleaned = self.service.adopt(term_of(state))
        while True:
            yield from self._look()
            self.view = self.observer.view()
            observing.settle(self, self.view)
            self.view = self.observer.view()
            self._note(policy.decide(self.view))
            self.say()
            if self.decision.step is not Step.NOTHING:
                yield from self._act()
                continue
            yield from self._rest(LOOK_MS)

    def _rest(self, bound_ms: int) -> Path:
        if not self._woken:
            self._waiter = SimWaiter()
            yield (self._waiter.wait, bound_ms / 1000)
            self._waiter = None
        self._woken = False

    def _note(self, decision: Decision) -> None:
        if (decision.row, decision.reason) != (self.decision.row, self.decision.reason):
            self.note(f"[{decision.row}] {decision.step.value}: {decision.reason}")
            self.pair.counts["decisions"] += 1
            self.pair.rows[decision.row] = self.pair.rows.get(decision.row, 0) + 1
        self.decision = decision

    def say(self) -> None:
        """Put the present into the heartbeats; what is new goes out at once."""
        more = {"reason": bodies.short(self.decision.reason), **self.dialogs.said.all()}
        body = said_of(self.view, names=not self._promoting).model_copy(update=more)
        if body != self._said:
            self._said = body
            self.heart.say(bodies.encode(body))

    def say_now(self) -> None:
        """The same, in the middle of a step."""
        self.view = self.observer.view()
        self.say()

    # --- act --------------------------------------------------------------------------------------

    def _act(self) -> Path:
        steps: dict[Step, Callable[[], Path]] = {
            Step.CLEAN: self._clean,
            Step.SPEAK: self._speak,
            Step.START_ENGINE: self.hand.start,
            Step.STOP_ENGINE: self._stop_engine,
            Step.ENTER: self._enter,
            Step.LEAVE: self._leave,
            Step.PROMOTE: self._promote,
            Step.DEMOTE: self._demote,
            Step.ALONE: lambda: self._on_engine("alone"),
            Step.ASK_PEER: self._ask_peer,
            Step.ASK_ARBITER: self._ask_arbiter,
            Step.SETTLE: self._settle_claim,
        }
        try:
            yield from steps[self.decision.step]()
        except NbdMirrorError as error:
            self.note(f"{self.decision.step.value}: refused: {error}")
            self.orders.failed(str(error))
            self._woken = False
            yield from self._rest(AGAIN_MS)

    def command(self, name: str, **args: Any) -> Path:
        """A command for the engine as it was seen last. Raises NbdMirrorError."""
        return (yield from self.hand.command(name, **args))

    def word(self, name: str, **args: Any) -> Path:
        """A word of leaving, for the engine as it is now. Raises NbdMirrorError."""
        return (yield from self.hand.word(name, **args))

    def take_lock(self) -> Path:
        """The dead engine's metadata; None: it runs again. Raises NbdMirrorError."""
        return (yield from take_lock(self.hand))

    def _meanwhile(self, name: str, path: Path) -> Path:
        """Its result; an engine that hangs meanwhile is found as at any other time."""
        done = Done()
        self.world.spawn(self.life, name, path, done)
        while not (yield from done.wait(LOOK_MS)):
            yield from self._look()
        return done.result()

    def _on_engine(self, name: str, **args: Any) -> Path:
        return (yield from self._meanwhile(name, self.command(name, **args)))

    def _clean(self) -> Path:
        yield from ()
        self.cleaned = True
        self.cleaned_s = self.clock_ms() / 1000
        self.service.leave()

    def _stop_engine(self) -> Path:
        self.switches.change(served=False)
        try:
            yield from self._on_engine("stop")
        except StaleCommandError:
            return
        except NbdMirrorError as error:
            self.note(f"the engine did not leave in order: {error}")
            if self.host.life is not None:
                self.host.crash(power=False)
        yield from self.hand.gone()
        self.died_serving = False
        self.hand.note_success()

    def _enter(self) -> Path:
        yield from ()
        assert self.engine_state is not None
        self.pair.counts["entered"] += 1
        self.service.enter(term_of(self.engine_state))

    def _leave(self) -> Path:
        yield from ()
        self.service.leave()

    def _promote(self) -> Path:
        self._promoting = True
        if self.orders.force:
            self.pair.on_force()
        try:
            yield from self._on_engine("promote", force=self.orders.force)
        finally:
            self._promoting = False
        self.node.on_promoted()
        if self.orders.force:
            yield from self._look()
            yield from self._meanwhile("force", self.scribe.force())
        self.orders.promoted()
        self.switches.change(served=True)

    def _demote(self) -> Path:
        yield from self._on_engine("demote")
        self.gave_way = policy.gives_way(self.view)
        if self.orders.order is not None:
            self.switches.change(served=False)

    def _ask_arbiter(self) -> Path:
        if self.pair.arbiter is not None:
            self.questions.answered(*(yield from self._meanwhile("claim", self.scribe.claim())))
        elif self.pair.kind == "none":
            self.questions.answered(Verdict.YES, 'arbiter = "none" lets every node go on')
        else:
            self.questions.answered(*(yield from self._ping()))
        self.note(f"arbiter: {self.questions.verdict.value}: {self.questions.reason}")

    def _ping(self) -> Path:
        asked_ms = self.world.now_ms
        yield (sleep, self.rng.randrange(1, 20))
        no_echo = ""
        if self.pair.is_far(self.index):
            yield (sleep, PING_TIMEOUT_MS)
            no_echo = "no echo" if self.pair.is_far(self.index) else ""
        return self.questions.patience.verdict(no_echo, ROUTER, SILENCE_MS, asked_ms)

    def _settle_claim(self) -> Path:
        verdict, reason = yield from self._meanwhile("settle", self.scribe.settle())
        if verdict is Verdict.UNKNOWN:
            raise ArbiterError(reason)

    def _ask_peer(self) -> Path:
        self.questions.peer_is_asked()
        yield from self.dialogs.ask_peer()

    def _speak(self) -> Path:
        self.spoken = True
        yield from self.dialogs.speak()

    def give(self, kind: OrderKind, reason: str, *, force: bool = False) -> None:
        """An order of the operator's. Raises RefusedError."""
        self.orders.give(kind, reason, force=force)
        self.wake()


def term_of(state: dict[str, Any]) -> str:
    """What names one term of one engine as primary (rule 22)."""
    return f"{state['instance']}/{state['epoch']}"
