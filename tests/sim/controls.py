"""A simulated controller's hand on its engine: looks, commands, starts, ends, the dead one's lock.

Owns what `engine_link.py`, `supervisor.py`, `dead_engine.py` and the engine's own `control.py` do
in production: a command names the engine and the epoch that it was decided under, an engine that
hangs is killed after two looks, starts are bounded. Must never decide anything.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbdmirror.core import claims, giveup, joint, roles
from nbdmirror.core.describe import describe
from nbdmirror.core.leave import Word, left, reason_not_to_speak
from nbdmirror.core.messages import Relay
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path
from nbdmirror.core.superblock import Superblock, choose
from nbdmirror.errors import NbdMirrorError, RefusedError, StaleCommandError, UnreachableError
from nbdmirror.limits import ENGINE_PING_TIMEOUT_MS, ENGINE_RESTART_WINDOW_MS, ENGINE_RESTARTS_MAX
from tests.sim.disk import SimMeta
from tests.sim.host import GEOMETRY, EngineLife, Host
from tests.sim.world import Life, SimWaiter, World, sleep

COMMAND_MS = 65_000
LOOK_MS = 200
EXIT_MS = 50
POLLS_LOST_MAX = 2
WORD_TRIES = 5


class Done:
    """The end of something that goes on beside the caller."""

    def __init__(self) -> None:
        self.ended = False
        self.value: Any = None
        self.error: Exception | None = None
        self._waiter: SimWaiter | None = None

    def __call__(self, value: Any, error: Exception | None) -> None:
        """It ended."""
        self.ended, self.value, self.error = True, value, error
        if self._waiter is not None:
            self._waiter.wake()

    def wait(self, bound_ms: int) -> Path:
        """Until it ended, or so long; returns whether it did."""
        if not self.ended:
            self._waiter = SimWaiter()
            yield (self._waiter.wait, bound_ms / 1000)
        return self.ended

    def result(self) -> Any:
        """What it gave. Raises what it failed with."""
        if self.error is not None:
            raise self.error
        return self.value


def at_once(function: Callable[..., Any], *arguments: Any) -> Path:
    """A plain function of the core, as a path of one step."""
    yield from ()
    return function(*arguments)


def path_of(node: Node, name: str, args: dict[str, Any]) -> Path:
    """What a command of the control socket does."""
    if "counter" in args:
        node.note_counter(args["counter"])
    generation = bytes.fromhex(args.get("generation", ""))
    word = Word(generation, int(args.get("session") or "0", 16))
    paths: dict[str, Callable[[], Path]] = {
        "promote": lambda: roles.promote(node, force=args["force"]),
        "demote": lambda: roles.demote(node),
        "alone": lambda: roles.alone(node),
        "stop": lambda: roles.stop(node),
        "claim": lambda: _claim(node, generation),
        "claimed": lambda: roles.claimed(node, generation, won=args["won"]),
        "confirm-joint": lambda: joint.confirm(node, generation),
        "recorded": lambda: at_once(roles.recorded, node, generation),
        "named": lambda: claims.named(node, generation),
        "seen": lambda: roles.seen(node, reachable=args["reachable"]),
        "stay": lambda: at_once(roles.stay_word, node, generation),
        "leave": lambda: roles.leave_for_peer(node, word),
        "peer-left": lambda: roles.peer_has_left(node, word),
        "give-up": lambda: giveup.give_up(node, keep=args["keep"]),
        "discard": lambda: roles.discard(node),
        "kept-discard": lambda: giveup.discard_kept(node),
        "kept-limit": lambda: giveup.give_space(node, args["limit"]),
        "resync": lambda: roles.resync_full(node),
    }
    return paths[name]()


def _claim(node: Node, record: bytes) -> Path:
    prepared = yield from roles.claim(node, record or bytes(16))
    return {
        "generation": prepared["generation"].hex(),
        "record_holds": [each.hex() for each in prepared["record_holds"]],
    }


class EngineHand:
    """One life of a controller, and the engines that it sees."""

    def __init__(
        self, host: Host, life: Life, on_end: Callable[[], None], starts: deque[int]
    ) -> None:
        self.host = host
        self.world: World = host.world
        self.state: dict[str, Any] | None = None
        self.looked_ms = -(10**9)
        self.attached: EngineLife | None = None
        self._rng = host.world.rng["conduct"]
        self._life = life
        self._on_end = on_end
        self._polls_lost = 0
        self._starts = starts
        # Production's lock of "whoever starts an engine, or speaks for the dead one".
        self.busy = False

    # --- looking ----------------------------------------------------------------------------------

    def look(self, packet: Callable[[], bytes]) -> Path:
        """See the engine as it is now; returns what the peer's controller sent over the link."""
        if self.host.life is None:
            self.state, self.attached = None, None
            self.looked_ms = self.world.now_ms
            return b""
        yield (sleep, self._rng.randrange(3))
        life = engine_of(self.host)
        if life is None:
            return b""
        if life.paused_until_ms > self.world.now_ms:
            wait_ms = min(life.paused_until_ms - self.world.now_ms, ENGINE_PING_TIMEOUT_MS)
            yield (sleep, wait_ms)
            if is_running(life) and life.paused_until_ms > self.world.now_ms:
                self._hangs(life)
                return b""
        if not is_running(life):
            return b""
        self._polls_lost = 0
        return self._seen(life, packet)

    def _hangs(self, life: EngineLife) -> None:
        self._polls_lost += 1
        if self._polls_lost >= POLLS_LOST_MAX:
            self.world.note(f"{self.host.name} controller: the engine hangs and is killed")
            self._polls_lost = 0
            life.host.crash(power=False)

    def _seen(self, life: EngineLife, packet: Callable[[], bytes]) -> bytes:
        node = life.node
        if self.attached is not life:
            self.attached = life
            node.commanded = node.polled = node.attended = node.was_attended = True
        node.polled = True
        session = node.session
        if session is not None and session.live:
            session.tell(Relay(attended=node.attended, payload=packet()))
            session.link.kick()
        self.state = state_of(life)
        self.looked_ms = self.world.now_ms
        return bytes(node.relayed)

    def ended(self) -> None:
        """The kernel tells that the engine's process is gone."""
        self.state, self.attached = None, None
        self._polls_lost = 0
        self._on_end()

    def let_go(self) -> None:
        """This controller is dead: its connection to the engine ends."""
        life = self.attached
        if life is not None and life.alive:
            self.world.at(0, life, detach, life)

    # --- commands ---------------------------------------------------------------------------------

    def command(self, name: str, **args: Any) -> Path:
        """A command for the engine as it was seen last; returns what the engine says.

        Raises:
            NbdMirrorError: there is none, it refuses, or it died meanwhile.
        """
        if self.state is None:
            raise UnreachableError("the engine of this node is not running")
        return (yield from self._command(name, self.state, args))

    def word(self, name: str, **args: Any) -> Path:
        """A word of leaving, for the engine as it is now. Raises NbdMirrorError."""
        for _ in range(WORD_TRIES):
            life = engine_of(self.host)
            if life is None:
                raise UnreachableError("the engine of this node is not running")
            try:
                return (yield from self._command(name, state_of(life), args))
            except StaleCommandError:
                continue
        raise StaleCommandError(f"{name}: the engine changes its role again and again")

    def _command(self, name: str, state: dict[str, Any], args: dict[str, Any]) -> Path:
        life = engine_of(self.host)
        if life is None:
            raise UnreachableError("the engine cannot be reached")
        if (state["instance"], state["epoch"]) != (life.node.instance.hex(), life.node.epoch):
            raise StaleCommandError("decided under another engine or epoch: look again")
        node, done = life.node, Done()
        path = roles.decided_under(node, state["epoch"], path_of(node, name, args))
        life.command(name, path, done)
        until_ms = self.world.now_ms + COMMAND_MS
        while not (yield from done.wait(LOOK_MS)):
            if not life.alive:
                raise UnreachableError(f"{name}: the engine ended meanwhile")
            if self.world.now_ms > until_ms:
                raise UnreachableError(f"{name}: the engine did not answer")
        if name == "stop":
            self.world.at(EXIT_MS, self.world.life, end_of, life)
        return done.result()

    # --- the process ------------------------------------------------------------------------------

    def given_up(self) -> str:
        """Why no further engine is started; "" while one may be."""
        now_ms, starts = self.world.now_ms, self._starts
        while starts and now_ms - starts[0] > ENGINE_RESTART_WINDOW_MS:
            starts.popleft()
        return "it ended too often" if len(starts) > ENGINE_RESTARTS_MAX else ""

    def forgive(self) -> None:
        """An operator asked for a start: count anew."""
        self._starts.clear()

    def note_success(self) -> None:
        """What ended on purpose was no failure."""
        if self._starts:
            self._starts.pop()

    def start(self) -> Path:
        """Start an engine and wait until it answers. Raises UnreachableError."""
        while self.busy:
            yield (sleep, 20)
        if self.host.life is not None:
            return
        self.busy = True
        try:
            yield (sleep, self._rng.randrange(20, 200))
            self._starts.append(self.world.now_ms)
            self.host.start()
            while is_opening(self.host):
                yield (sleep, 10)
        finally:
            self.busy = False
        if engine_of(self.host) is None:
            raise UnreachableError("the engine ended at its start")

    def gone(self) -> Path:
        """Wait for the engine's end, bounded; then kill it."""
        for _ in range(50):
            if self.host.life is None:
                return
            yield (sleep, 100)
        self.host.crash(power=False)


def engine_of(host: Host) -> EngineLife | None:
    """The engine of a host, if it serves commands."""
    life = host.life
    return life if life is not None and life.ready else None


def is_running(life: EngineLife) -> bool:
    """Whether it is still the engine of its host."""
    return life.alive and life.host.life is life


def is_opening(host: Host) -> bool:
    """Whether an engine is about to serve."""
    return host.life is not None and not host.life.ready


def state_of(life: EngineLife) -> dict[str, Any]:
    """What the control socket answers to `state`."""
    node = life.node
    return {"instance": node.instance.hex(), "epoch": node.epoch, **describe(node)}


def detach(life: EngineLife) -> None:
    """The commanding connection is gone."""
    node = life.node
    node.commanded = node.polled = node.attended = False
    session = node.session
    if session is not None and session.live:
        session.tell(Relay(attended=False, payload=b""))
        session.link.kick()


def end_of(life: EngineLife) -> None:
    """An engine that was told to stop ends."""
    if life.alive:
        life.host.end(power=False)


@dataclass
class DeadEngine:
    """The metadata of an engine that is dead, under its lock: no engine starts meanwhile."""

    hand: EngineHand
    speaker: Life
    superblock: Superblock
    fell_back: bool

    @property
    def generation(self) -> str:
        """The line of writes that this copy belongs to."""
        return self.superblock.generation.hex()

    def refusal(self) -> str:
        """Why it may not be spoken for, or ""."""
        return reason_not_to_speak(self.superblock, fell_back=self.fell_back)

    def mark(self, _session: str) -> Path:
        """Durably outdated, in both slots. Raises NbdMirrorError."""
        host, done = self.hand.host, Done()
        sb = replace(left(self.superblock), sequence=self.superblock.sequence + 1)
        meta = SimMeta(host.meta, GEOMETRY.metadata_bytes)
        meta.on_begin, meta.on_store = host.store_begins, host.stored
        host.world.spawn(self.speaker, "mark", meta.write_superblock(sb), done)
        while not (yield from done.wait(LOOK_MS)):
            if not self.speaker.alive:
                raise RefusedError("the lock is gone")
        done.result()

    def close(self) -> None:
        """Give the lock back."""
        self.hand.busy = False
        if self.hand.host.speaker is self.speaker:
            self.hand.host.speaker = None


def take_lock(hand: EngineHand) -> Path:
    """The metadata under its lock; None where an engine has it. Raises NbdMirrorError."""
    host = hand.host
    while hand.busy:
        yield (sleep, 20)
    if not host.is_silent:
        return None
    hand.busy = True
    host.speaker = speaker = Life(f"{host.name} speaks")
    try:
        meta = SimMeta(host.meta, GEOMETRY.metadata_bytes)
        chosen = choose(*meta.read_slots())
    except NbdMirrorError:
        host.speaker, hand.busy = None, False
        raise
    return DeadEngine(hand, speaker, chosen.superblock, chosen.fell_back)
