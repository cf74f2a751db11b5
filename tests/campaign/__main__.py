"""`python -m tests.campaign`: accidents to real engines, until told to stop or something broke.

Owns the command line. Ends with 1 at the first violation, and with the one command that does
exactly that run again. Needs root (loop devices, mounts, strace) and Debian's package `etcd`.
"""

import argparse
import json
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

from tests.campaign.plan import ENGINES, drawn
from tests.campaign.runs import Runs, table


def say(text: str) -> None:
    """At once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run what was asked for; 0 when all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--runs", type=int, default=1 << 30, help="no more than these")
    parser.add_argument("--minutes", type=float, default=60.0, help="no longer than this")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; fresh if not")
    parser.add_argument("--only", choices=tuple(ENGINES), default="", help="nothing but this")
    parser.add_argument("--list", action="store_true", help="print what would happen, do nothing")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    asked = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if asked.seed is None else asked.seed
    if asked.list:
        for number in range(min(asked.runs, 1000)):
            say(f"{seed + number}  {drawn(seed + number, asked.only)}")
        return 0
    # Told to end, it takes down what it made.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    say(f"from seed {seed} on")
    outcome = Runs(seed, only=asked.only, say=say).run(asked.runs, asked.minutes * 60)
    say("\n".join(table(outcome.figures)))
    if asked.json:
        facts: dict[str, Any] = {"seed": seed, **outcome.figures}
        facts |= {"violation": outcome.violation, "replay": outcome.replay}
        asked.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if outcome.violation:
        say(f"VIOLATION {outcome.violation}\nreplay: {outcome.replay}")
    return 1 if outcome.violation else 0


if __name__ == "__main__":
    sys.exit(main())
