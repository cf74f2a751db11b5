"""Changed inputs for every parser of bytes from outside; tests/fuzz does it."""

import os
import secrets

from tests.fuzz.drive import PARSERS
from tests.fuzz.jobs import run
from tests.prove.campaign import Outcome


class Parsers:
    """The campaign."""

    name = "parsers"
    share = 15

    def run(self, seconds: float) -> Outcome:
        """As many inputs as fit, over all parsers."""
        seed = secrets.randbelow(1 << 32)
        report = run(sorted(PARSERS), seed, seconds, os.cpu_count() or 1)
        outcome = Outcome(notes=[f"parsers: from seed {seed} on"])
        outcome.figures["parsers"] = len(report.tallies)
        outcome.figures["parser inputs"] = sum(t.inputs for t in report.tallies.values())
        outcome.figures["parser inputs refused"] = sum(t.refused for t in report.tallies.values())
        if report.finding is not None:
            outcome.violation, outcome.replay = str(report.finding), report.finding.replay
        return outcome
