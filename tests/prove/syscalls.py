"""Kill, fail or cut the power of an engine at each system call of a run, one call after the other.

    python -m tests.prove.syscalls --minutes 10       # as many points as fit, in random order
    python -m tests.prove.syscalls --all              # each of them
    python -m tests.prove.syscalls --points primary:work:pwrite64:data:7:kill

A run is about 120 operations on two connections against a real pair. Where it can be hit is counted
first, by strace over a run that nothing happens to. A point names the role of the engine that is
hit, the moment (`work`; `return`: it, or its peer, comes back from a kill), the call, the file,
which call of a thread it is, and what happens. A violation prints the points since its pair was
made: given again in this order they are its replay.
"""

import argparse
import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from time import monotonic
from typing import Final

from tests.prove.campaign import Outcome
from tests.prove.faults import (
    DISK_CALLS,
    ERRORS,
    MOMENTS,
    ROLES,
    SOCKET_CALLS,
    Point,
    counted,
)
from tests.prove.history import OPERATIONS_COUNT
from tests.prove.rig import AFTER_COUNT, Rig

FILES: Final = {"data": DISK_CALLS, "meta": DISK_CALLS, "any": SOCKET_CALLS}
POINTS_PER_PAIR_COUNT: Final = 20
# Of the calls on sockets and of reads so many places of a run are drawn; of the others, all.
SPREAD_COUNT: Final = 25


def most_calls(rig: Rig, role: str, moment: str, file: str) -> Counter[str]:
    """How many calls the busiest thread of an engine makes on a file in a run without a fault."""
    primary, secondary = rig.primary, rig.pair.other(rig.primary)
    victim = primary if role == "primary" else secondary
    if moment == "work":
        with counted(victim, FILES[file], file) as found:
            rig.operate(primary, OPERATIONS_COUNT)
    else:
        rig.lose(secondary, power=False)
        rig.operate(primary, AFTER_COUNT)
        if victim is secondary:
            found = rig.counted_start(victim, FILES[file], file)
        else:
            with counted(victim, FILES[file], file) as found:
                secondary.start()
                rig.watch(secondary)
    rig.recover(victim)
    rig.judge()
    return found


def all_points(rig: Rig) -> list[Point]:
    """Every place that a run without faults passes, with everything that can happen there."""
    points = []
    for role in ROLES:
        for moment in MOMENTS:
            for file in FILES:
                for call, count in most_calls(rig, role, moment, file).items():
                    for k in places(call, count):
                        points += [
                            Point(role, moment, call, file, k, f) for f in faults(call, file)
                        ]
    return points


def faults(call: str, file: str) -> tuple[str, ...]:
    """What can happen at a call."""
    if file == "any":
        return ("kill", *(ERRORS.get(call, ()) if call == "sendmsg" else ()))
    ends = ("kill", "power", "power-both") if call not in ("preadv", "pread64") else ("kill",)
    return ends + ERRORS.get(call, ())


def places(call: str, count: int) -> Sequence[int]:
    """Which calls of a run are points."""
    every = range(1, count + 1)
    if call in SOCKET_CALLS or call in ("preadv", "pread64"):
        return sorted({1 + n * count // SPREAD_COUNT for n in range(min(SPREAD_COUNT, count))})
    return every


class Runner:
    """Points in turn, on a pair that is made anew now and then."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.trail: list[Point] = []

    def run(self, points: Iterator[Point]) -> Outcome:
        """All of them, or up to the first violation."""
        point = next(points, None)
        while point is not None and not self.outcome.violation:
            self.trail = []
            try:
                with Rig() as rig:
                    while point is not None and len(self.trail) < POINTS_PER_PAIR_COUNT:
                        self.one(rig, point)
                        point = next(points, None)
            except Exception as error:  # noqa: BLE001 - whatever it is, it did not hold
                self.violated(error)
        return self.outcome

    def one(self, rig: Rig, point: Point) -> None:
        """One point, and its figures."""
        self.trail.append(point)
        figures, checked, cuts = self.outcome.figures, rig.history.checked, rig.power_cuts
        hit = rig.point(point)
        figures["points"] += 1
        figures["points hit"] += hit
        figures[f"points hit: {point.fault}"] += hit
        figures["acknowledged operations checked"] += rig.history.checked - checked
        figures["power cuts"] += rig.power_cuts - cuts

    def violated(self, error: Exception) -> None:
        """What did not hold, and how to see it again."""
        notes = "\n".join(getattr(error, "__notes__", []))
        last = f"at {self.trail[-1]}" if self.trail else "while the pair was made"
        self.outcome.violation = f"{last}: {type(error).__name__}: {error}\n{notes}"
        self.outcome.replay = replay(self.trail)


def replay(points: Sequence[Point]) -> str:
    """The command that takes a fresh pair the same way."""
    return "python -m tests.prove.syscalls --points " + ",".join(map(str, points))


class Shared:
    """Points for several pairs at once: each is given to one of them, until the time is over."""

    def __init__(self, points: Sequence[Point], seconds: float) -> None:
        self.stopped = False
        self._points = iter(points)
        self._until = monotonic() + seconds
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Point]:
        while True:
            with self._lock:
                point = next(self._points, None)
            if point is None or self.stopped or monotonic() > self._until:
                return
            yield point


def together(points: Sequence[Point], seconds: float) -> Outcome:
    """As many as begin within that time, on a pair for each processor; the first violation."""
    shared = Shared(points, seconds)
    total = Outcome()

    def work(runner: Runner) -> Outcome:
        outcome = runner.run(iter(shared))
        shared.stopped = shared.stopped or bool(outcome.violation)
        return outcome

    count = os.cpu_count() or 1
    with ThreadPoolExecutor(count) as pool:
        for outcome in pool.map(work, [Runner() for _ in range(count)]):
            total.figures.update(outcome.figures)
            if outcome.violation and not total.violation:
                total.violation, total.replay = outcome.violation, outcome.replay
    return total


class Syscalls:
    """The campaign: points in random order for so long."""

    name = "system calls"
    share = 20

    def run(self, seconds: float) -> Outcome:
        """A fresh order each time."""
        began, seed = monotonic(), secrets.randbelow(1 << 32)
        runner = Runner()
        try:
            with Rig() as rig:
                points = all_points(rig)
        except Exception as error:  # noqa: BLE001 - nothing happened to them, and yet
            runner.violated(error)
            return runner.outcome
        Random(seed).shuffle(points)
        # Counting takes half a minute, more on a busy machine: a short run goes on a little longer.
        outcome = together(points, max(seconds - (monotonic() - began), seconds / 2))
        outcome.figures["points there are"] = len(points)
        outcome.notes.append(f"system calls: seed {seed}, {len(points)} points")
        return outcome


def main() -> int:
    """Run what was asked for; 0 when all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove.syscalls")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--all", action="store_true", help="every point, however long it takes")
    parser.add_argument("--points", default="", help="these, with commas between them")
    parser.add_argument("--list", action="store_true", help="print the points and do nothing")
    asked = parser.parse_args()
    runner = Runner()
    if asked.points:
        runner.run(iter([Point.of(text) for text in asked.points.split(",")]))
    elif asked.list:
        with Rig() as rig:
            sys.stdout.write("\n".join(map(str, all_points(rig))) + "\n")
        return 0
    else:
        runner.outcome = Syscalls().run(1e9 if asked.all else asked.minutes * 60)
    outcome = runner.outcome
    for name, count in sorted(outcome.figures.items()):
        sys.stdout.write(f"{count:>8}  {name}\n")
    if outcome.violation:
        sys.stdout.write(f"VIOLATION {outcome.violation}\nreplay: {outcome.replay}\n")
    return 1 if outcome.violation else 0


if __name__ == "__main__":
    sys.exit(main())
