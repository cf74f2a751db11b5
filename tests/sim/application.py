"""The simulated application of one server, and a controller's hand on it.

Owns the scripts: they take time, fail, or hang until their bound, and a script outlives the
controller that started it. `Application` is what runs on the server; `Service` is one controller's
view of it, with the states of production (nbdmirror/controller/service.py). Nothing is decided
here, and a stop always ends it: the bounds are production's promise.
"""

from collections.abc import Callable
from functools import partial

from nbdmirror.core.cluster.view import Service as State
from nbdmirror.core.node import Role
from nbdmirror.core.ports import Path
from tests.sim.host import Host
from tests.sim.world import Life, SimWaiter, World, sleep

START_MS = 3_000
STOP_MS = 2_000
FORCE_MS = 1_000
# Looking for what is left over, and telling the loop.
REST_MS = 500
STOPPED_MS = STOP_MS + FORCE_MS + REST_MS
LOOK_MS = 50


class Application:
    """What runs on one server, whatever controller there is."""

    def __init__(self, world: World, host: Host) -> None:
        self.world = world
        self.host = host
        self.rng = world.rng["service"]
        self.running = False
        self.mark = ""
        self.fails = self.rng.choice((0.0, 0.0, 0.1, 0.3))
        self.hangs = self.rng.choice((0.0, 0.0, 0.1))
        self.sticks = self.rng.choice((0.0, 0.0, 0.1))
        self.script: Life | None = None

    def serves(self) -> bool:
        """Whether the device under it answers."""
        life = self.host.life
        return life is not None and life.node.role is Role.PRIMARY and not life.node.frozen

    def kill(self) -> None:
        """The power is gone."""
        self.end_script()
        self.running, self.mark = False, ""

    def end_script(self) -> None:
        """The start script that is at work, with all that descends from it."""
        if self.script is not None:
            self.script.alive = False
            self.script = None

    def start(self, done: Callable[[str], None]) -> None:
        """Run the start script; `done` gets why it failed, or ""."""
        self.script = script = Life(f"{self.host.name} start script")
        self.world.spawn(script, "start", self._start(script, done))

    def _start(self, script: Life, done: Callable[[str], None]) -> Path:
        until_ms = self.world.now_ms + START_MS
        yield (sleep, self.rng.randrange(20, 700))
        hangs = self.rng.random() < self.hangs
        while hangs or not self.serves():
            if self.world.now_ms >= until_ms:
                break
            yield (sleep, LOOK_MS)
        else:
            # A script that fails may have started it all the same.
            failed = self.rng.random() < self.fails
            self.running = not failed or self.rng.random() < 0.5
            if not failed:
                self.end(script)
                done("")
                return
        self.end(script)
        done("the start script did not start it")

    def end(self, script: Life) -> None:
        """That script is over."""
        if self.script is script:
            self.script = None

    def stop(self) -> Path:
        """The stop script, by force where it hangs. Takes at most STOP_MS + FORCE_MS."""
        self.end_script()
        if self.rng.random() < self.hangs or (self.running and self._is_stuck()):
            yield (sleep, STOP_MS + self.rng.randrange(FORCE_MS))
        else:
            yield (sleep, self.rng.randrange(10, 500))
        self.running = False

    def _is_stuck(self) -> bool:
        """Its device answers nothing: what it still has to write hangs."""
        life = self.host.life
        return life is not None and life.node.frozen


class Service:
    """One controller's; the methods are those of production's `Service`."""

    def __init__(self, application: Application, life: Life, on_change: Callable[[], None]) -> None:
        self.state = State.DOWN
        self.reason = ""
        self.leftovers: list[str] = []
        self._app = application
        self._life = life
        self._on_change = on_change
        self._turn = 0

    def enter(self, term: str) -> None:
        """Begin to bring it up for this primary term."""
        self._turn += 1
        self._change(State.ENTERING)
        self._begin(self._enter(term, self._turn))

    def _enter(self, term: str, turn: int) -> Path:
        yield (sleep, self._app.rng.randrange(5, 150))
        if self._turn != turn:
            return
        ended = SimWaiter()
        result: list[str] = []

        def done(why: str) -> None:
            result.append(why)
            ended.wake()

        self._app.start(done)
        yield (ended.wait, START_MS / 1000 + 1)
        if self._turn != turn:
            return
        why = result[0] if result else "the start script did not end"
        if why:
            self._change(State.FAILED, why)
            return
        self._app.mark = term
        self._change(State.UP)

    def leave(self) -> None:
        """Begin to take it down; what is being brought up is broken off."""
        if self.state is State.LEAVING:
            return
        self._turn += 1
        self._app.mark = ""
        self._change(State.LEAVING)
        self._begin(self._leave())

    def _leave(self) -> Path:
        yield from self._app.stop()
        yield (sleep, self._app.rng.randrange(1, 100))
        stuck = self._app.rng.random() < self._app.sticks
        self.leftovers = ["a device of an earlier term"] if stuck else []
        self._change(State.DOWN)

    def adopt(self, term: str) -> bool:
        """Go on with what an earlier controller brought up in this very term (rule 22)."""
        if self._app.mark != term or not self._app.running or self._app.script is not None:
            return False
        self._change(State.UP)
        return True

    def _begin(self, work: Path) -> None:
        self._app.world.spawn(self._life, "service", work)

    def _change(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        host = self._app.host.name
        self._app.world.note(f"{host} service {state.value}{': ' + reason if reason else ''}")
        self._app.world.at(0, self._life, partial(self._on_change))
