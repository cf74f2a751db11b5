"""The simulator over both kinds of arbiters, from a fresh random seed on each time."""

import multiprocessing
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from time import monotonic
from typing import Final

from tests.prove.campaign import Outcome
from tests.sim.run import KNOWN, Job, Result, run_job

SEED_MAX: Final = 1 << 40
# Of the counts of a run: answers to clients that were judged.
ANSWERS: Final = ("acked", "flushes", "reads")
TRACE_LINES: Final = 20


def jobs(start: int, until: float) -> Iterator[Job]:
    """Seeds as long as there is time, each under every arbiter and kind of controllers."""
    for seed in count(start):
        for controllers, arbiters in KNOWN.items():
            for arbiter in arbiters:
                if monotonic() > until:
                    return
                yield seed, arbiter, controllers, False


class Simulator:
    """The campaign."""

    name = "simulator"
    share = 25

    def run(self, seconds: float) -> Outcome:
        """As many seeds as fit."""
        start = secrets.randbelow(SEED_MAX)
        outcome = Outcome(notes=[f"simulator: from seed {start} on"])
        until = monotonic() + seconds
        processes = os.cpu_count() or 1
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            given = jobs(start, until)
            waiting = [pool.apply_async(run_job, (job,)) for job in islice(given, 2 * processes)]
            while waiting and not outcome.violation:
                result = waiting.pop(0).get()
                note(outcome.figures, result)
                if result.violation:
                    blame(outcome, result)
                waiting += [pool.apply_async(run_job, (job,)) for job in islice(given, 1)]
        return outcome


def blame(outcome: Outcome, result: Result) -> None:
    """What did not hold, and how to see it again."""
    tail = "\n".join(result.trace[-TRACE_LINES:])
    which = f"seed {result.seed}, arbiter {result.arbiter}"
    outcome.violation = f"{tail}\n{which}: {result.violation}"
    outcome.replay = (
        f"python -m tests.sim --start {result.seed} --seeds 1 --arbiter {result.arbiter}"
        f" --controllers {result.controllers} --trace"
    )


def note(figures: Counter[str], result: Result) -> None:
    """What one run adds."""
    figures["simulator seeds"] += 1
    figures["simulator faults"] += result.faults
    figures["simulated seconds"] += result.virtual_ms // 1000
    figures["acknowledged operations checked"] += sum(
        result.counts.get(name, 0) for name in ANSWERS
    )
    figures["power cuts (simulated)"] += result.counts.get("power_cuts", 0)
