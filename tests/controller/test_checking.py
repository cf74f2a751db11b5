"""How results become states, and which checker that is down decides."""

from dataclasses import replace
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.cluster.checking import STRENGTH, CheckerFacts, RiseFall, demanded

DOWN = CheckerFacts(
    name="a",
    kind="tcp",
    action="restart",
    when="primary",
    state="down",
    reason="it is dead",
    since_ms=7,
    checks_count=3,
)


def fed(counted: RiseFall, results: str) -> list[bool]:
    """Feed results, "+" for each success; which of them changed the state."""
    return [counted.result(each == "+", f"failure {at}", at) for at, each in enumerate(results)]


@pytest.mark.parametrize(
    ("rise", "fall", "results", "state"),
    [
        (1, 2, "", "unknown"),
        (1, 2, "+", "up"),
        (1, 2, "-", "unknown"),
        (1, 2, "--", "down"),
        (2, 2, "+-+-+-", "unknown"),
        (1, 2, "+-", "up"),
        (1, 2, "+-+-+-", "up"),
        (1, 2, "+--", "down"),
        (1, 2, "+--+", "up"),
        (3, 1, "-++", "down"),
        (3, 1, "-++-+++", "up"),
    ],
)
def test_results_in_a_row_decide(rise: int, fall: int, results: str, state: str) -> None:
    """Breaks in the field: one lost answer restarts the application, or a dead one stays."""
    counted = RiseFall(rise, fall)
    fed(counted, results)
    assert counted.state == state
    assert counted.checks_count == len(results)


def expected(rise: int, fall: int, results: list[bool]) -> list[str]:
    """The state after each result, from the results alone."""
    states, state = [], "unknown"
    for end in range(1, len(results) + 1):
        if end >= rise and all(results[end - rise : end]):
            state = "up"
        if end >= fall and not any(results[end - fall : end]):
            state = "down"
        states.append(state)
    return states


@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.booleans(), max_size=40))
def test_every_sequence_ends_where_the_rule_says(rise: int, fall: int, results: list[bool]) -> None:
    """Breaks in the field: a rare order of results leaves a checker up over a dead application."""
    counted = RiseFall(rise, fall)
    before = "unknown"
    for at, (ok, state) in enumerate(zip(results, expected(rise, fall, results), strict=True)):
        assert counted.result(ok, f"failure {at}", at) == (state != before)
        assert counted.state == state
        assert state == before or counted.since_ms == at
        assert (state == "up") <= (counted.reason == "")
        assert ok or state == "up" or counted.reason == f"failure {at}"
        before = state


def test_the_reason_is_of_the_last_failure() -> None:
    """Breaks in the field: status shows an old reason, or none for what is down."""
    counted = RiseFall(2, 2)
    fed(counted, "--+")
    assert (counted.state, counted.reason) == ("down", "failure 1")
    counted.result(True, "", 9)
    assert (counted.state, counted.reason, counted.since_ms) == ("up", "", 9)


def test_a_reset_forgets_what_was_counted() -> None:
    """Breaks in the field: right after a restart one failure is enough to restart again."""
    counted = RiseFall(1, 2)
    fed(counted, "+-")
    counted.reset(50)
    assert (counted.state, counted.reason, counted.since_ms) == ("unknown", "", 50)
    assert counted.checks_count == 0
    assert not counted.result(False, "still starting", 51)
    assert counted.result(False, "still starting", 52)


def test_the_strongest_action_wins_in_any_order() -> None:
    """Breaks in the field: a node restarts its application for ever where it should hand over."""
    assert STRENGTH == ("stop", "swap", "wait", "stopstart", "restart", "tell")
    for stronger, weaker in pairwise(STRENGTH):
        facts = [replace(DOWN, action=stronger), replace(DOWN, action=weaker)]
        for order in permutations(facts):
            assert demanded(order) == facts[0]


def test_of_the_same_action_the_first_in_the_file_wins() -> None:
    """Breaks in the field: the reason in status and log jumps from one checker to the other."""
    facts = [replace(DOWN, name=each) for each in "bac"]
    assert demanded([replace(DOWN, action="tell"), *facts]) == facts[0]


@pytest.mark.parametrize("state", ["off", "unknown", "up"])
def test_only_what_is_down_demands(state: str) -> None:
    """Breaks in the field: the application is restarted before it was looked at even once."""
    calm = replace(DOWN, action="stop", state=state)  # type: ignore[arg-type] # one of its words
    assert demanded([calm]) is None
    assert demanded([]) is None
    assert demanded([calm, DOWN]) == DOWN
