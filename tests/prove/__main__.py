"""`python -m tests.prove`: every campaign in turn, one table; exit code 1 at the first violation.

Owns the order, the shares of the time and the table. `packaging/prove.sh` makes everything ready
for it and keeps what it starts in a process tree of its own.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any, Final

from tests.prove.accidents import Accidents
from tests.prove.campaign import Campaign, Outcome
from tests.prove.mutants import Mutants
from tests.prove.parsers import Parsers
from tests.prove.powercuts import PowerCuts
from tests.prove.simulator import Simulator
from tests.prove.syscalls import Syscalls

CAMPAIGNS: Final[tuple[Campaign, ...]] = (
    Simulator(), Mutants(), Syscalls(), PowerCuts(), Accidents(), Parsers(),
)  # fmt: skip
# What is published, in this order; the rest follows.
FIGURES: Final = (
    *("simulator seeds", "simulator faults", "acknowledged operations checked", "power cuts"),
    *("points hit", "accidents", "mutants killed", "parser inputs"),
)
assert sum(campaign.share for campaign in CAMPAIGNS) == 100


def say(text: str) -> None:
    """At once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def carried_out(campaign: Campaign, seconds: float) -> Outcome:
    """One campaign; what it cannot bear itself is a violation, too."""
    say(f"prove: {campaign.name}, {seconds / 60:.1f} minutes")
    began = monotonic()
    outcome = campaign.run(seconds)
    for line in outcome.notes:
        say(f"prove:   {line}")
    told = ", ".join(f"{count} {name}" for name, count in outcome.figures.items())
    say(f"prove:   {monotonic() - began:.0f} s: {told}")
    return outcome


def table(figures: Counter[str], hours: float) -> list[str]:
    """The figures, those that are published first."""
    names = [*FIGURES, *sorted(set(figures) - set(FIGURES))]
    rows = [f"{name:<36} {figures[name]:>14,}" for name in names]
    return [*rows, f"{'hours':<36} {hours:>14.2f}"]


def main() -> int:
    """Run them; 0 when everything held."""
    parser = argparse.ArgumentParser(prog="packaging/prove.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all campaigns together")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--commit", default="", help="what was checked; prove.sh knows it")
    parser.add_argument("--only", choices=[each.name for each in CAMPAIGNS], help="one campaign")
    asked = parser.parse_args()
    chosen = [each for each in CAMPAIGNS if asked.only in (None, each.name)]
    shares = sum(each.share for each in chosen)
    began = monotonic()
    figures: Counter[str] = Counter()
    broken: Outcome | None = None
    for campaign in chosen:
        outcome = carried_out(campaign, asked.minutes * 60 * campaign.share / shares)
        figures.update(outcome.figures)
        if outcome.violation:
            broken = outcome
            break
    hours = (monotonic() - began) / 3600
    say("\n".join(table(figures, hours)))
    if asked.json:
        facts: dict[str, Any] = {"commit": asked.commit, "hours": round(hours, 3), **figures}
        facts["violation"] = broken.violation if broken else ""
        facts["replay"] = broken.replay if broken else ""
        asked.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if broken is None:
        say("prove: everything held")
        return 0
    say(f"VIOLATION {broken.violation}\nreplay: {broken.replay}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
