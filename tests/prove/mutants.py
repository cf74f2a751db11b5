"""Each rule of docs/safety.md taken out of a copy of the code: whether the simulator notices.

The quick ones first, which the tests try, too; then the others in random order, as time allows.
"""

import secrets
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from random import Random
from time import monotonic
from typing import Final

from tests.prove.campaign import Outcome
from tests.sim.mutants.__main__ import MUTANTS
from tests.sim.mutants.mutant import Mutant, OutOfDateError
from tests.sim.mutants.runner import Outcome as Tried
from tests.sim.mutants.runner import try_mutant

JOBS: Final = 2


def tried(mutant: Mutant) -> Tried:
    """One mutant; one that could not be tried was not noticed."""
    try:
        return try_mutant(mutant, mutant.budget_count)
    except (OutOfDateError, RuntimeError) as error:
        return Tried(mutant, "", 0, f"not tried: {error}", 0.0)


def in_turn(seed: int, until: float) -> Iterator[Mutant]:
    """Quick ones first, as long as there is time."""
    dice = Random(seed)
    order = [m for m in MUTANTS if m.quick], [m for m in MUTANTS if not m.quick]
    for group in order:
        for mutant in dice.sample(group, len(group)):
            if monotonic() > until:
                return
            yield mutant


class Mutants:
    """The campaign."""

    name = "mutants"
    share = 15

    def run(self, seconds: float) -> Outcome:
        """As many as fit."""
        outcome = Outcome()
        outcome.figures["mutants there are"] = len(MUTANTS)
        given = in_turn(secrets.randbelow(1 << 32), monotonic() + seconds)
        with ThreadPoolExecutor(JOBS) as pool:
            flying: set[Future[Tried]] = set()
            while True:
                while len(flying) < JOBS and not outcome.violation:
                    mutant = next(given, None)
                    if mutant is None:
                        break
                    flying.add(pool.submit(tried, mutant))
                if not flying:
                    return outcome
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for each in done:
                    self.judge(outcome, each.result())

    def judge(self, outcome: Outcome, done: Tried) -> None:
        """A mutant that lives is a rule that nobody guards."""
        outcome.figures["mutants tried"] += 1
        outcome.figures["mutants killed"] += bool(done.witness)
        if not done.witness:
            mutant = done.mutant
            outcome.violation = (
                f"rule {mutant.rule} taken away ({mutant.name}), and nothing noticed it:"
                f" {mutant.why}; {done.violation}"
            )
            outcome.replay = f"python -m tests.sim.mutants --name {mutant.name}"
