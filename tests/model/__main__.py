"""Walk through every order of events within one bound, and print each kind of violation with its
shortest path.

    python -m tests.model --writes 2 --cuts 2 --crashes 2
"""

import argparse
import sys

from tests.model.explore import Report, explore
from tests.model.protocol import Model
from tests.model.rules import ALL_RULES, Rule
from tests.model.state import NOBODY, Stage, State, connected, start


def is_protected(s: State) -> bool:
    """What every state must be able to reach: a pair in sync, or a split brain that is seen."""
    return s.split or (connected(s) and s.source != NOBODY and s.stage is Stage.SETTLED)


def run(
    bounds: tuple[int, int, int, int],
    rules: frozenset[Rule] = ALL_RULES,
    *,
    memory: bool = True,
    stop_at_first: bool = False,
) -> Report[State]:
    """Walk through everything within (writes, cuts, crashes, leavings)."""
    model = Model(rules, memory=memory, no_false_alarm=bounds[2] == 0)
    first = model.initial(start(*bounds))
    return explore(first, model.steps, is_protected, stop_at_first=stop_at_first)


def main(arguments: list[str]) -> int:
    """The documented command; returns 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("writes", 2), ("cuts", 2), ("crashes", 2), ("leaves", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arbiter", choices=("memory", "none"), default="memory")
    parser.add_argument("--without", choices=[rule.name for rule in Rule], action="append")
    given = parser.parse_args(arguments)
    rules = ALL_RULES - {Rule[name] for name in given.without or ()}
    bounds = (given.writes, given.cuts, given.crashes, given.leaves)
    report = run(bounds, rules, memory=given.arbiter == "memory")
    sys.stdout.write(str(report))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
