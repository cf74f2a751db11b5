"""Runs a parser over seeded inputs, in bounded memory and time, and says what it found.

Owns the batches: inputs come in batches, and the seed of a batch is made from
the parser's name, the run's seed and the batch's number, so that each batch is a replay of itself.
Must never let one input depend on what an earlier batch did.
"""

import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Final

from tests.fuzz import channel, dispatched, outside, stored
from tests.fuzz.corpus import stored_inputs
from tests.fuzz.parser import Parser

PARSERS: Final = {
    parser.name: parser
    for parser in (*channel.PARSERS, *stored.PARSERS, *outside.PARSERS, *dispatched.PARSERS)
}
INPUT_BYTES_MAX: Final = 256 * 1024
# No parser needs a tenth of it; one that takes a length from outside for granted needs more.
MEMORY_BYTES: Final = 256 << 20
INPUT_CPU_S: Final = 5.0
BATCH_CPU_S: Final = 60.0
SHOWN_BYTES: Final = 400


class SlowError(Exception):
    """An input used more processor time than any may."""


@dataclass
class Finding:
    """An input after which something did not hold."""

    parser: str
    seed: int
    batch: int
    data: bytes
    problem: str

    def __str__(self) -> str:
        shown = self.data[:SHOWN_BYTES]
        more = "" if len(self.data) <= SHOWN_BYTES else f"... ({len(self.data)} bytes)"
        return f"{self.parser}: {self.problem}\ninput: {shown!r}{more}\nreplay: {self.replay}"

    @property
    def replay(self) -> str:
        """The command that shows it again."""
        return (
            f"python -m tests.fuzz --parser {self.parser} --seed {self.seed} --batch {self.batch}"
        )


@dataclass
class Tally:
    """What was fed to one parser."""

    inputs: int = 0
    refused: int = 0

    def add(self, other: "Tally") -> None:
        """Sum up."""
        self.inputs += other.inputs
        self.refused += other.refused


def bound_memory() -> None:
    """From now on this process may take so much more, and no core is written."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGVTALRM, _too_slow)


def _too_slow(_number: int, _frame: FrameType | None) -> None:
    raise SlowError(f"a batch of inputs took more than {BATCH_CPU_S} s")


def pool_of(parser: Parser) -> Sequence[bytes]:
    """Where inputs begin: what is valid, and what was worth keeping."""
    return [*parser.seeds(), *stored_inputs(parser.name)]


def inputs(parser: Parser, pool: Sequence[bytes], seed: int, batch: int) -> Iterator[bytes]:
    """The inputs of one batch: one to a few changes, sealed or not."""
    rng = Random(f"{parser.name}/{seed}/{batch}")
    for _ in range(parser.batch):
        data = rng.choice(pool)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            data = parser.mutate(rng, data, pool)
        if rng.random() < 0.8:
            data = parser.seal(data)
        yield data[:INPUT_BYTES_MAX]


def feed(parser: Parser, data: bytes) -> tuple[bool, str]:
    """Whether an input was refused, and what did not hold."""
    began = time.thread_time()
    try:
        refused = parser.refused(data)
    except Exception as error:  # noqa: BLE001 - whatever a parser lets out is a finding
        where = "".join(traceback.format_exception(error, limit=-4))
        return False, f"{type(error).__name__}: {error}"[:500] + f"\n{where[-1500:]}"
    took = time.thread_time() - began
    if took > INPUT_CPU_S:
        return refused, f"one input took {took:.1f} s"
    return refused, ""


def run_batch(
    parser: Parser, pool: Sequence[bytes], seed: int, batch: int
) -> tuple[Tally, Finding | None]:
    """One batch; ends at the first finding."""
    tally = Tally()
    data = b""
    signal.setitimer(signal.ITIMER_VIRTUAL, BATCH_CPU_S)
    try:
        for data in inputs(parser, pool, seed, batch):
            refused, problem = feed(parser, data)
            tally.inputs += 1
            tally.refused += refused
            if problem:
                return tally, Finding(parser.name, seed, batch, data, problem)
    except SlowError as error:
        return tally, Finding(parser.name, seed, batch, data, str(error))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return tally, None


def batches(
    parsers: Sequence[Parser], seed: int, seconds: float
) -> Iterator[tuple[str, Tally, Finding | None]]:
    """Batches of all parsers in turn, by weight, for so long. Each parser has one at least."""
    sys.setrecursionlimit(1000)
    pools = {parser.name: pool_of(parser) for parser in parsers}
    spent = dict.fromkeys(pools, 0.0)
    numbers = dict.fromkeys(pools, 0)
    until = time.monotonic() + seconds
    while time.monotonic() < until or not all(numbers.values()):
        parser = min(parsers, key=lambda each: (spent[each.name] / each.weight, each.name))
        began = time.monotonic()
        tally, finding = run_batch(parser, pools[parser.name], seed, numbers[parser.name])
        spent[parser.name] += time.monotonic() - began
        numbers[parser.name] += 1
        yield parser.name, tally, finding
        if finding is not None:
            return


def clean_up() -> None:
    """Give back what parsers took of this machine."""
    for each in outside.CLEAN_UP:
        each()
