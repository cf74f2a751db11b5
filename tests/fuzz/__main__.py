"""`python -m tests.fuzz`: mutated inputs for every parser; exit code 1 at the first finding.

Owns the command line. A finding prints the input and the command that feeds its batch again.
"""

import argparse
import secrets
import sys
import time

from tests.fuzz import corpus
from tests.fuzz.drive import (
    PARSERS,
    Finding,
    bound_memory,
    clean_up,
    inputs,
    pool_of,
    run_batch,
)  # fmt: skip
from tests.fuzz.jobs import run
from tests.fuzz.parser import Parser


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--parser", choices=sorted(PARSERS), action="append", help="only this one")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long")
    parser.add_argument("--seed", type=int, default=-1, help="of the inputs (default: fresh)")
    parser.add_argument("--batch", type=int, default=-1, help="only this batch: a replay")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own seed")
    parser.add_argument("--collect", action="store_true", help="make the corpus anew")
    return parser.parse_args()


def say(text: str) -> None:
    """At once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def replay(parser: Parser, seed: int, batch: int) -> Finding | None:
    """One batch again."""
    bound_memory()
    try:
        tally, finding = run_batch(parser, pool_of(parser), seed, batch)
    finally:
        clean_up()
    say(f"{parser.name}: {tally.inputs} inputs, {tally.refused} refused")
    return finding


def collect(parser: Parser, seed: int, seconds: float) -> None:
    """Keep the inputs that reach what the seeds do not."""
    covered: corpus.Lines = frozenset()
    for each in parser.seeds():
        covered |= corpus.lines_of(lambda each=each: parser.refused(each))  # type: ignore[misc]
    known = covered
    found: dict[bytes, corpus.Lines] = {}
    pool = pool_of(parser)
    until, batch = time.monotonic() + seconds, 0
    kept = corpus.stored_inputs(parser.name)
    while time.monotonic() < until:
        drawn = kept if not batch else list(inputs(parser, pool, seed, batch))
        for data in drawn:
            lines = corpus.lines_of(lambda data=data: parser.refused(data))  # type: ignore[misc]
            if not lines <= known:
                known |= lines
                found[data] = lines
        batch += 1
    chosen = corpus.smallest_cover(found, covered) if found else []
    corpus.write(parser.name, chosen)
    say(f"{parser.name}: {len(known)} lines, {len(known - covered)} by {len(chosen)} inputs")


def main() -> int:
    """Feed them; 0 when nothing was found."""
    asked = arguments()
    names = asked.parser or sorted(PARSERS)
    seed = asked.seed if asked.seed >= 0 else secrets.randbelow(1 << 32)
    began = time.monotonic()
    if asked.collect:
        for name in names:
            collect(PARSERS[name], seed, asked.minutes * 60 / len(names))
        clean_up()
        return 0
    if asked.batch >= 0:
        finding = replay(PARSERS[names[0]], seed, asked.batch)
        say(str(finding or "nothing found"))
        return 1 if finding else 0
    say(f"seed {seed}")
    report = run(names, seed, asked.minutes * 60, asked.jobs)
    took = time.monotonic() - began
    for name, tally in sorted(report.tallies.items()):
        say(f"{name:<16} {tally.inputs:>10} inputs, {tally.refused:>10} refused")
    total = sum(tally.inputs for tally in report.tallies.values())
    say(f"{total} inputs in {took:.0f} s ({total / took:.0f}/s), seed {seed}")
    if report.finding is not None:
        say(f"VIOLATION {report.finding}")
    return 1 if report.finding else 0


if __name__ == "__main__":
    sys.exit(main())
