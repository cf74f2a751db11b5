"""The power of one node, or of both, cut at a random moment under load, again and again.

    python -m tests.prove.powercuts --seed 7 --rounds 20

Where the points of `syscalls.py` lie at calls, these lie anywhere. A seed draws the same cuts, and
the machine's scheduling does the rest.
"""

import argparse
import secrets
import sys
from random import Random
from time import monotonic
from typing import Final

from tests.prove.campaign import Outcome
from tests.prove.history import OPERATIONS_COUNT
from tests.prove.rig import Rig

WHO: Final = ("primary", "secondary", "both")
ROUNDS_PER_PAIR_COUNT: Final = 20


class PowerCuts:
    """The campaign. `rounds`: no more than so many; 0: as many as fit."""

    name = "power cuts"
    share = 10

    def __init__(self, seed: int | None = None, rounds: int = 0) -> None:
        self.seed = secrets.randbelow(1 << 32) if seed is None else seed
        self.rounds = rounds

    def run(self, seconds: float) -> Outcome:
        """Rounds for so long."""
        outcome = Outcome(notes=[f"power cuts: seed {self.seed}"])
        figures, dice, number = outcome.figures, Random(self.seed), 0
        until = monotonic() + seconds
        try:
            while self.goes_on(number, until):
                with Rig() as rig:
                    for _ in range(ROUNDS_PER_PAIR_COUNT):
                        if not self.goes_on(number, until):
                            break
                        number += 1
                        checked, cuts = rig.history.checked, rig.power_cuts
                        rig.power_cut(dice.choice(WHO), dice.randrange(OPERATIONS_COUNT))
                        figures["acknowledged operations checked"] += rig.history.checked - checked
                        figures["power cuts"] += rig.power_cuts - cuts
                        figures["rounds of power cuts"] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it did not hold
            notes = "\n".join(getattr(error, "__notes__", []))
            outcome.violation = f"round {number}: {type(error).__name__}: {error}\n{notes}"
            outcome.replay = f"python -m tests.prove.powercuts --seed {self.seed} --rounds {number}"
        return outcome

    def goes_on(self, number: int, until: float) -> bool:
        """Whether there is one more."""
        return monotonic() < until and (not self.rounds or number < self.rounds)


def main() -> int:
    """Run what was asked for; 0 when all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove.powercuts")
    parser.add_argument("--minutes", type=float, default=60.0, help="no longer than this")
    parser.add_argument("--rounds", type=int, default=0, help="no more than these (0: as fit)")
    parser.add_argument("--seed", type=int, default=None, help="of the cuts (default: fresh)")
    asked = parser.parse_args()
    outcome = PowerCuts(asked.seed, asked.rounds).run(asked.minutes * 60)
    for name, count in sorted(outcome.figures.items()):
        sys.stdout.write(f"{count:>8}  {name}\n")
    if outcome.violation:
        sys.stdout.write(f"VIOLATION {outcome.violation}\nreplay: {outcome.replay}\n")
    return 1 if outcome.violation else 0


if __name__ == "__main__":
    sys.exit(main())
