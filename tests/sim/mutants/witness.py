"""Runs inside a copy of the sources that one mutant has changed: is anything noticed?

Tries the directed sequences it is given, then seeds, and prints one line of JSON about the first
violation. It is started by the runner with the copy first on the path; it knows nothing of mutants.
"""

import json
import signal
import sys
from typing import Any

from tests.sim.run import run_seed
from tests.sim.sequences import SEQUENCES, play

RUN_BOUND_CPU_S = 30


class NoEndError(Exception):
    """One run took far longer than any should: it goes round in circles."""


def expired(_number: int, _frame: object) -> None:
    """The bound of one run was reached."""
    raise NoEndError(f"no end within {RUN_BOUND_CPU_S} s of work")


def bound() -> None:
    """Begin to count for the next run."""
    signal.setitimer(signal.ITIMER_VIRTUAL, RUN_BOUND_CPU_S)


def by_sequences(names: list[str]) -> dict[str, Any] | None:
    """The first of these sequences that does not end as it must."""
    for name in names:
        bound()
        problem = play(SEQUENCES[name])
        if problem:
            return {"by": name, "violation": problem}
    return None


def by_seeds(asked: dict[str, Any]) -> dict[str, Any] | None:
    """The first seed with a violation, over all the arbiters asked for."""
    for seed in range(asked["start"], asked["start"] + asked["count"]):
        for arbiter in asked["arbiters"]:
            if [seed, arbiter] in asked["skip"]:
                continue
            bound()
            result = run_seed(seed, arbiter, asked["controllers"])
            if result.violation:
                return {"seed": seed, "arbiter": arbiter, "violation": result.violation}
    return None


def main() -> None:
    """One request, one answer."""
    signal.signal(signal.SIGVTALRM, expired)
    asked = json.loads(sys.argv[1])
    found = by_sequences(asked["sequences"]) or by_seeds(asked) or {}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
