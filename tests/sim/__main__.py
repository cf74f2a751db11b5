"""`python -m tests.sim`: many seeds, one line at the end; exit code 1 when an invariant was broken.

Owns the command line. A violation prints the seed, the end of its trace, and the command that
replays exactly that run.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator

from tests.sim.run import ALL_ARBITERS, KNOWN, SIMPLE, Job, Result, run_job

TAIL_LINES = 60
LINE_CHARS = 240


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--arbiter", choices=(*ALL_ARBITERS, "all"), default="all")
    parser.add_argument(
        "--controllers", choices=(*KNOWN, "both"), default=SIMPLE, help="who commands the engines"
    )
    parser.add_argument("--minutes", type=float, default=0, help="stop after that long (0: never)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a violation")
    parser.add_argument("--trace", action="store_true", help="print the whole trace of each seed")
    return parser.parse_args()


def say(text: str) -> None:
    """One line, or several, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def results(jobs: list[Job], processes: int) -> Iterator[Result]:
    """All of them, in order."""
    if processes <= 1:
        yield from map(run_job, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(run_job, jobs)


def report(result: Result) -> None:
    """A violation, with what is needed to see it again."""
    for line in result.trace[-TAIL_LINES:]:
        say(line[:LINE_CHARS])
    say(
        f"VIOLATION seed {result.seed}, arbiter {result.arbiter}, {result.controllers}:"
        f" {result.violation}"
    )
    say(
        f"replay: python -m tests.sim --start {result.seed} --seeds 1"
        f" --arbiter {result.arbiter} --controllers {result.controllers} --trace"
    )


def main() -> int:
    """Run them; 0 when nothing was found."""
    asked = arguments()
    kinds = tuple(KNOWN) if asked.controllers == "both" else (asked.controllers,)
    pairs = [(arbiter, kind) for kind in kinds for arbiter in KNOWN[kind]]
    pairs = [each for each in pairs if asked.arbiter in ("all", each[0])]
    seeds = range(asked.start, asked.start + asked.seeds)
    jobs = [(seed, arbiter, kind, asked.trace) for seed in seeds for arbiter, kind in pairs]
    began_s = time.monotonic()
    count = found = faults = virtual_ms = 0
    totals: dict[str, int] = {}
    for result in results(jobs, asked.jobs):
        count += 1
        faults += result.faults
        virtual_ms += result.virtual_ms
        for name, value in result.counts.items():
            most = max if name.endswith("_max_ms") else int.__add__
            totals[name] = most(totals.get(name, 0), value)
        if asked.trace:
            say("\n".join(result.trace))
        if result.violation:
            found += 1
            report(result)
            if not asked.keep_going:
                break
        if asked.minutes and time.monotonic() - began_s > asked.minutes * 60:
            break
    took_s = time.monotonic() - began_s
    say(
        f"{count} runs in {took_s:.0f} s ({count / took_s:.1f}/s), {faults} faults,"
        f" {virtual_ms // 1000} s of virtual time, {found} violations; "
        + ", ".join(f"{name} {value}" for name, value in totals.items())
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
