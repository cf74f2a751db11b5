"""`python -m tests.sim.mutants`: which rule, taken away, is noticed by what, and how soon."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.sim.mutants.arbiter import ARBITER
from tests.sim.mutants.data import DATA
from tests.sim.mutants.mutant import Mutant, OutOfDateError
from tests.sim.mutants.policy import POLICY
from tests.sim.mutants.reads import READS
from tests.sim.mutants.rights import RIGHTS
from tests.sim.mutants.runner import Outcome, try_mutant
from tests.sim.sequences import SEQUENCES

MUTANTS = DATA + RIGHTS + ARBITER + READS + POLICY


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__)
    parser.add_argument("--name", action="append", help="only this mutant (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="only those that the tests run")
    parser.add_argument("--all", action="store_true", help="seeds only, and all sequences after")
    parser.add_argument("--budget", type=int, default=0, help="seeds at most (0: each mutant's)")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once")
    return parser.parse_args()


def tried(mutant: Mutant, asked: argparse.Namespace) -> Outcome:
    """One mutant; with --all every sequence is asked, whether it is named for it or not."""
    count = asked.budget or mutant.budget_count
    names = tuple(SEQUENCES) if asked.all else None
    try:
        return try_mutant(mutant, count, start=asked.start, sequences=names)
    except (OutOfDateError, RuntimeError) as error:
        return Outcome(mutant, "", 0, f"NOT TRIED: {error}", 0.0)


def tell(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run them; 0 when each was noticed."""
    asked = arguments()
    chosen = [m for m in MUTANTS if not asked.name or m.name in asked.name]
    chosen = [m for m in chosen if m.quick or not asked.quick]
    survivors = 0
    with ThreadPoolExecutor(asked.jobs) as pool:
        for outcome in pool.map(lambda mutant: tried(mutant, asked), chosen):
            mutant = outcome.mutant
            survivors += not outcome.witness
            told = outcome.violation.splitlines()[0][:90] if outcome.violation else "NOT NOTICED"
            tell(
                f"{mutant.rule:>3} {mutant.name:<27} {outcome.witness or '-':<27}"
                f" {outcome.seeds_count:>4} {outcome.took_s:6.1f} s  {told}"
            )
    tell(f"{len(chosen)} mutants, {survivors} not noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
