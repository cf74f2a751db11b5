"""Virtual time, the scheduler, and the driver of the core's paths.

Owns the one heap of events, the trace and its hash, and the rule that a path runs alone between
two yields. Every choice comes from seeded generators, one per concern, so that another draw of one
does not move the others. Must never look at a clock, a set's order, `id()` or `hash()`.

A path yields `(callable, *arguments)`. The driver calls it; what comes back decides what happens
next: an `Op` takes simulated time, a generator is run inside the path, anything else is the
answer, given at the next event, so that every other path may run in between.
"""

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from types import GeneratorType
from typing import Any

from nbdmirror.core.ports import Path
from nbdmirror.errors import NbdMirrorError

TRACE_TAIL_COUNT = 400
CONCERNS = (
    "net", "disk", "client", "faults", "schedule", "shell", "command", "setup", "lease",
    "integrity", "beats", "conduct", "operator", "service",
)  # fmt: skip


class ViolationError(Exception):
    """An invariant does not hold. The text names it and the facts."""


class Op:
    """Something that takes simulated time; `start` must lead to exactly one `task.resume`."""

    def start(self, task: "Task") -> None:
        """Begin it for `task`."""
        raise NotImplementedError


class Life:
    """One run of something that can die at once: an engine, or the world itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused_until_ms = 0


class Task:
    """One path being driven."""

    def __init__(
        self,
        world: "World",
        life: Life,
        name: str,
        path: Path,
        done: Callable[[Any, Exception | None], None] | None = None,
    ) -> None:
        self.world = world
        self.life = life
        self.name = name
        self.stack: list[Any] = [path]
        self.done = done
        self.ended = False
        self.waits_for = ""

    def resume(self, value: Any = None, error: NbdMirrorError | None = None) -> None:
        """Go on at this instant of virtual time, whenever the scheduler picks it."""
        self.world.at(0, self.life, self._step, value, error)

    def _step(self, value: Any, error: NbdMirrorError | None) -> None:
        self.world.running = self
        while True:
            try:
                generator = self.stack[-1]
                call = generator.throw(error) if error is not None else generator.send(value)
            except StopIteration as stop:
                self.stack.pop()
                value, error = stop.value, None
            except NbdMirrorError as raised:
                self.stack.pop()
                value, error = None, raised
            else:
                value, error, waits = self._perform(call)
                if waits:
                    return
                continue
            if not self.stack:
                self.finish(value, error)
                return

    def _perform(self, call: tuple[Any, ...]) -> tuple[Any, NbdMirrorError | None, bool]:
        """Make the call; returns (value, error, whether the path waits for an event now)."""
        try:
            result = call[0](*call[1:])
        except NbdMirrorError as raised:
            return None, raised, False
        if isinstance(result, Op):
            self.waits_for = getattr(call[0], "__qualname__", "?")
            result.start(self)
            return None, None, True
        if isinstance(result, GeneratorType):
            self.stack.append(result)
            return None, None, False
        self.resume(result)
        return None, None, True

    def finish(self, value: Any, error: Exception | None) -> None:
        """Report the end to whoever started it."""
        self.ended = True
        if self.done is not None:
            self.done(value, error)
        elif error is not None:
            self.world.note(f"{self.life.name} {self.name}: {type(error).__name__}: {error}")


class Sleep(Op):
    """Wait for virtual time to pass."""

    def __init__(self, delay_ms: int) -> None:
        self.delay_ms = delay_ms

    def start(self, task: Task) -> None:
        """Resume after the delay."""
        task.world.at(self.delay_ms, task.life, task._step, None, None)


def sleep(delay_ms: int) -> Sleep:
    """Yielded by a script of the simulator."""
    return Sleep(delay_ms)


class WaitOp(Op):
    """Wait for one waiter, perhaps with a bound."""

    def __init__(self, waiter: "SimWaiter", timeout_s: float | None) -> None:
        self.waiter = waiter
        self.timeout_s = timeout_s

    def start(self, task: Task) -> None:
        """Park, or go on if it was woken before."""
        waiter = self.waiter
        if waiter.woken:
            task.resume(True)
            return
        waiter.task = task
        if self.timeout_s is not None:
            task.world.at(max(1, round(self.timeout_s * 1000)), task.life, waiter.expire, task)


class SimWaiter:
    """The waiter port."""

    __slots__ = ("result", "task", "woken")

    def __init__(self) -> None:
        self.result: Any = None
        self.woken = False
        self.task: Task | None = None

    def wait(self, timeout_s: float | None = None) -> Any:
        """Yielded; the path gets True when woken, False when the time ran out."""
        return WaitOp(self, timeout_s)

    def wake(self, result: Any = None) -> None:
        """Direct. The first call counts."""
        if self.woken:
            return
        self.woken = True
        self.result = result
        if self.task is not None:
            task, self.task = self.task, None
            task.resume(True)

    def expire(self, task: Task) -> None:
        """The time ran out for `task`, unless it went on before."""
        if self.task is task:
            self.task = None
            task.resume(False)


class World:
    """Time and events."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.seed = seed
        self.rng = {name: random.Random(f"{seed}/{name}") for name in CONCERNS}
        self._tie = self.rng["schedule"].getrandbits
        self.now_ms = 0
        self.steps = 0
        self._count = 0
        self._heap: list[tuple[int, int, int, Life, Callable[..., None], tuple[Any, ...]]] = []
        self.life = Life("world")
        self.running: Task | None = None
        self.after_step: Callable[[], None] | None = None
        self._sha = hashlib.sha256()
        self.tail: deque[str] | list[str] = [] if keep_trace else deque(maxlen=TRACE_TAIL_COUNT)

    # --- events -------------------------------------------------------------------------------

    def at(self, delay_ms: int, life: Life, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` after `delay_ms`, if `life` still lives; ties are broken by the seed."""
        self._count += 1
        event = (self.now_ms + delay_ms, self._tie(16), self._count, life, function, arguments)
        heapq.heappush(self._heap, event)

    def spawn(
        self,
        life: Life,
        name: str,
        path: Path,
        done: Callable[[Any, Exception | None], None] | None = None,
    ) -> Task:
        """Drive `path` beside everything else."""
        task = Task(self, life, name, path, done)
        task.resume()
        return task

    def run(self, until_ms: int, stop: Callable[[], bool] | None = None) -> bool:
        """Run events up to a time; True as soon as `stop` says so (asked after each event)."""
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            when, _, _, life, function, arguments = heapq.heappop(heap)
            self.now_ms = max(self.now_ms, when)
            if not life.alive:
                continue
            if life.paused_until_ms > self.now_ms:
                self._count += 1
                late = (life.paused_until_ms, self._tie(16), self._count, life, function, arguments)
                heapq.heappush(heap, late)
                continue
            self.steps += 1
            function(*arguments)
            if self.after_step is not None:
                self.after_step()
            if stop is not None and stop():
                return True
        self.now_ms = max(self.now_ms, until_ms)
        return False

    # --- trace --------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Add one line to the trace."""
        line = f"{self.now_ms:>7} {text}"
        self._sha.update(line.encode())
        self._sha.update(b"\n")
        self.tail.append(line)

    def digest(self) -> str:
        """The hash of the whole trace so far."""
        return self._sha.hexdigest()
