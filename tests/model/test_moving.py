"""The move of a running mirror to another store of its record."""

import pytest

from tests.model.explore import DEAD_END
from tests.model.moving import ALL, Rule, walk


def test_no_order_of_events_lets_both_go_on_while_a_mirror_is_moved() -> None:
    """Breaks in the field: an operator moves a mirror to another arbiter, a cable is pulled in the
    middle, and each node is let go on by a store of its own; or neither can ever again.
    """
    report = walk(stop_at_first=False)
    assert report.violations == {}
    assert report.goals


@pytest.mark.parametrize(
    "rules",
    # Each of the two guards the same: alone its absence changes nothing.
    [{Rule.MOVED_IS_NO}, {Rule.IN_SYNC}, {Rule.AWAY_FIRST, Rule.ADOPT_MOVED}],
    ids=["moved-is-no", "in-sync", "away-first"],
)
def test_each_rule_of_the_move_is_needed(rules: set[Rule]) -> None:
    """Breaks in the field: a rule that the model does not need is left out one day."""
    report = walk(ALL - rules)
    assert any("acknowledge" in each for each in report.violations)


def test_a_move_of_a_pair_that_is_apart_locks_it() -> None:
    """Breaks in the field: the record says "moved" while one node is alone; it has lost the right
    that it serves under, and nobody could give it back.
    """
    assert DEAD_END in walk(ALL - {Rule.IN_SYNC}, stop_at_first=False).violations
