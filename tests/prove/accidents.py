"""Accidents to real engines, one or two a run, each drawn from a seed; tests/campaign does it."""

import secrets
from typing import Final

from tests.campaign.runs import Runs
from tests.prove.campaign import Outcome

RUNS_MAX: Final = 1 << 30
HERE: Final = {"runs": "runs of accidents", "seconds": ""}


class Accidents:
    """The campaign."""

    name = "accidents"
    share = 15

    def run(self, seconds: float) -> Outcome:
        """As many runs as fit."""
        seed = secrets.randbelow(1 << 32)
        found = Runs(seed, say=lambda _: None).run(RUNS_MAX, seconds)
        outcome = Outcome(notes=[f"accidents: from seed {seed} on"])
        for name, count in found.figures.items():
            if told := HERE.get(name, name):
                outcome.figures[told] += count
        outcome.violation, outcome.replay = found.violation, found.replay
        return outcome
