"""From measured runs to figures: medians, ratios, the table, the verdict.

Owns what a ratio is: two systems' runs of the *same round* are divided, then the median of the
rounds is taken, because a busy machine slows neighbours in time alike. Not alike enough where one
write is in flight at a time: there a neighbour's burst can make the faster system the slower one.
So a floor has to be kept twice, in writes per second and in median latency (inverted, so
that more is better): noise can fail the bench, it cannot easily pass it. It starts nothing and
reads no clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one load on one system. CPU is user + system time of each process, per write."""

    medium: str
    load: str
    system: str
    round: int
    writes_per_s: float
    bytes_per_s: float
    latency_mean_us: float
    latency_p50_us: float
    latency_p99_us: float
    cpu_us_per_write: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Floor:
    """The mirror divided by `system` on `load`, on tmpfs: what is held, and what is wanted.

    Below `at_least` the bench fails: a later change made it slower. None: only told.
    """

    load: str
    system: str
    at_least: float | None
    aim: float


FLOORS: Final = (
    Floor("4k QD1", "sketch", 0.55, aim=0.8),
    Floor("4k QD16", "sketch", 0.4, aim=0.8),
    Floor("1M QD4", "sketch", 0.7, aim=0.8),
    Floor("4k QD16 cold", "sketch", 0.25, aim=0.8),
    Floor("4k QD1", "chain", None, aim=0.7),
    Floor("4k QD16", "chain", None, aim=0.35),
    Floor("1M QD4", "chain", None, aim=0.7),
)
FLOOR_MEDIUM: Final = "tmpfs"
PEERS: Final = ("sketch", "chain", "file")


@dataclass(frozen=True, slots=True)
class Judgement:
    """A floor and what was measured for it: ratios of each round."""

    floor: Floor
    rate: Sequence[float]
    quick: Sequence[float]

    @property
    def kept(self) -> bool:
        """Whether the medians are at or above the floor; no figure is no proof."""
        floor = self.floor.at_least
        return floor is None or self._reaches(floor)

    def _reaches(self, wanted: float) -> bool:
        return all(ratios and median(ratios) >= wanted for ratios in (self.rate, self.quick))

    def line(self) -> str:
        """The floor, what was measured, and what that means."""
        floor = self.floor
        held = "no floor"
        if floor.at_least is not None:
            held = f"floor {floor.at_least:.2f} {'kept' if self.kept else 'BROKEN'}"
        reached = "reached" if self._reaches(floor.aim) else "not reached"
        return (
            f"{FLOOR_MEDIUM}, {floor.load}: mirror/{floor.system} {spread(self.rate)} in writes/s, "
            f"{spread(self.quick)} in median latency; {held}; aim {floor.aim:.2f} {reached}"
        )


class Figures:
    """All runs of one bench, by medium, load and system."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = tuple(runs)
        self.media = tuple(dict.fromkeys(run.medium for run in self.runs))
        self.loads = tuple(dict.fromkeys(run.load for run in self.runs))
        self.systems = tuple(dict.fromkeys(run.system for run in self.runs))

    def of(self, medium: str, load: str, system: str) -> list[Run]:
        """The runs of one cell, by round."""
        key = (medium, load, system)
        found = [run for run in self.runs if (run.medium, run.load, run.system) == key]
        return sorted(found, key=lambda run: run.round)

    def pairs(self, medium: str, load: str, system: str) -> list[tuple[Run, Run]]:
        """(mirror, `system`) of each round that has both."""
        mirror = {run.round: run for run in self.of(medium, load, "mirror")}
        theirs = self.of(medium, load, system)
        return [(mirror[run.round], run) for run in theirs if run.round in mirror]

    def ratios(self, medium: str, load: str, system: str) -> list[float]:
        """The mirror's writes per second divided by `system`'s, round by round."""
        pairs = self.pairs(medium, load, system)
        return [mirror.writes_per_s / other.writes_per_s for mirror, other in pairs]

    def quickness(self, medium: str, load: str, system: str) -> list[float]:
        """`system`'s median latency divided by the mirror's, round by round: 1 is equally quick."""
        pairs = self.pairs(medium, load, system)
        return [other.latency_p50_us / mirror.latency_p50_us for mirror, other in pairs]

    def judged(self) -> list[Judgement]:
        """Every floor that was measured at all; a floor whose medium was left out is not."""
        if FLOOR_MEDIUM not in self.media:
            return []
        found = []
        for floor in FLOORS:
            rate = self.ratios(FLOOR_MEDIUM, floor.load, floor.system)
            quick = self.quickness(FLOOR_MEDIUM, floor.load, floor.system)
            found.append(Judgement(floor, rate, quick))
        return found

    def below_floor(self) -> bool:
        """Whether a floor is broken."""
        return not all(each.kept for each in self.judged())

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every run, the ratios with their spread, the floors."""
        return {
            "runs": [asdict(run) for run in self.runs],
            "ratios": [
                {
                    "medium": medium,
                    "load": load,
                    "system": system,
                    "median": median(found),
                    "min": min(found),
                    "max": max(found),
                }
                for medium in self.media
                for load in self.loads
                for system in PEERS
                if (found := self.ratios(medium, load, system))
            ],
            "floors": [
                {
                    **asdict(each.floor),
                    "writes_per_s": each.rate,
                    "median_latency": each.quick,
                    "kept": each.kept,
                }
                for each in self.judged()
            ],
        }

    def table(self) -> str:
        """Throughput and ratios, then CPU time, one block for each medium."""
        lines: list[str] = []
        for medium in self.media:
            lines += [*self._speeds(medium), "", *self._latency(medium), "", *self._cpu(medium), ""]
        return "\n".join([*lines, *(each.line() for each in self.judged())])

    def _speeds(self, medium: str) -> list[str]:
        head = [f"{medium}: k writes/s", *self.systems, *(f"mirror/{peer}" for peer in PEERS)]
        rows = [head]
        for load in self.loads:
            speeds = [speed(self.of(medium, load, system)) for system in self.systems]
            rows.append([load, *speeds, *(spread(self.ratios(medium, load, p)) for p in PEERS)])
        return aligned(rows)

    def _latency(self, medium: str) -> list[str]:
        rows = [[f"{medium}: latency us p50 / p99", *self.systems]]
        rows += [
            [load, *(latency(self.of(medium, load, system)) for system in self.systems)]
            for load in self.loads
        ]
        return aligned(rows)

    def _cpu(self, medium: str) -> list[str]:
        rows = [[f"{medium}: CPU us/write", *self.systems]]
        rows += [
            [load, *(cpu(self.of(medium, load, system)) for system in self.systems)]
            for load in self.loads
        ]
        return aligned(rows)


def speed(runs: Sequence[Run]) -> str:
    """The median of a cell, in thousand writes per second."""
    return f"{median(run.writes_per_s for run in runs) / 1000:.2f}" if runs else "-"


def spread(ratios: Sequence[float]) -> str:
    """Median, lowest and highest."""
    if not ratios:
        return "-"
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def latency(runs: Sequence[Run]) -> str:
    """The medians of a cell's median and 99th percentile."""
    if not runs:
        return "-"
    p50 = median(run.latency_p50_us for run in runs)
    return f"{p50:.0f} / {median(run.latency_p99_us for run in runs):.0f}"


def cpu(runs: Sequence[Run]) -> str:
    """The median CPU time per write of each process of a system, in microseconds."""
    if not runs:
        return "-"
    parts = runs[0].cpu_us_per_write
    return " + ".join(f"{median(run.cpu_us_per_write[part] for run in runs):.0f}" for part in parts)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
