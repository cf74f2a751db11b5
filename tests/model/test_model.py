"""The model keeps every promise within its bounds, and breaks one as soon as a rule is missing."""

from collections.abc import Iterator

import pytest

from nbdmirror.core.decide import TABLE
from tests.model.__main__ import main, run
from tests.model.explore import DEAD_END, explore
from tests.model.protocol import TWO_LINES, Model
from tests.model.rules import ALL_RULES, Rule
from tests.model.state import State, canonical, start

Bounds = tuple[int, int, int, int]

MEMORY, NO_MEMORY = True, False


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("memory", "bounds", "states_min"),
    [
        (MEMORY, (1, 1, 1, 1), 70_000),
        (MEMORY, (2, 1, 1, 0), 50_000),
        (MEMORY, (1, 2, 0, 1), 15_000),
        (NO_MEMORY, (1, 2, 1, 1), 50_000),
        (NO_MEMORY, (2, 2, 0, 1), 15_000),
    ],
)
def test_no_order_of_events_breaks_a_promise(
    *, memory: bool, bounds: Bounds, states_min: int
) -> None:
    """If it fails, some order of cuts, crashes and leavings loses data or leaves nobody serving."""
    report = run(bounds, memory=memory)
    assert report.violations == {}
    assert report.states >= states_min
    assert report.goals > 0


LOSS = "a node serves without a write that both had acknowledged"
OTHERS_LOSS = "a node serves without what its peer acknowledged alone"
OVERWRITTEN = "a resync overwrites an acknowledged write"
NO_WAY = "the table has no way on"
LOPSIDED = "a pair in sync of which the record lets one node or none take over"
STRANDED = "the only good copy may not go on, though its peer is outdated"

# Without an arbiter that has a memory only some rules have work to do.
ABLATIONS = [
    (Rule.JOINT_STEP, MEMORY, (1, 1, 1, 0), NO_WAY),
    (Rule.JOINT_STEP, NO_MEMORY, (1, 1, 1, 0), NO_WAY),
    (Rule.RESEED, MEMORY, (1, 1, 1, 0), DEAD_END),
    (Rule.ASKED_SINCE, MEMORY, (1, 1, 1, 0), OTHERS_LOSS),
    (Rule.PENDING_IS_MINE, MEMORY, (1, 1, 1, 0), LOPSIDED),
    (Rule.PENDING_IS_MINE, NO_MEMORY, (1, 1, 1, 0), NO_WAY),
    (Rule.SAME_JOINT, MEMORY, (1, 1, 1, 1), NO_WAY),
    (Rule.KEEP_JOINT, MEMORY, (1, 1, 1, 0), NO_WAY),
    (Rule.FLUSH_FIRST, MEMORY, (1, 1, 1, 0), LOSS),
    (Rule.FLUSH_FIRST, NO_MEMORY, (1, 1, 1, 0), LOSS),
    (Rule.PENDING_FIRST, MEMORY, (1, 1, 1, 0), LOPSIDED),
    (Rule.NAMED_HAS_WON, MEMORY, (1, 1, 1, 0), LOPSIDED),
    (Rule.FENCE, MEMORY, (1, 1, 1, 0), LOPSIDED),
    (Rule.RESOLVE_FIRST, MEMORY, (1, 1, 1, 0), LOPSIDED),
    (Rule.REBOOT, MEMORY, (1, 1, 1, 0), LOSS),
    (Rule.REBOOT, NO_MEMORY, (1, 1, 1, 0), LOSS),
    (Rule.SOURCE_FLUSH, MEMORY, (1, 1, 1, 0), OVERWRITTEN),
    (Rule.SOURCE_FLUSH, NO_MEMORY, (1, 1, 1, 0), OVERWRITTEN),
    (Rule.QUESTION, MEMORY, (1, 1, 0, 1), NO_WAY),
    (Rule.QUESTION, NO_MEMORY, (1, 1, 0, 1), NO_WAY),
    (Rule.SINCE, MEMORY, (1, 0, 2, 1), LOSS),
    (Rule.SINCE, NO_MEMORY, (1, 0, 2, 1), LOSS),
    (Rule.MAKE_GOOD, MEMORY, (1, 1, 1, 1), STRANDED),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("rule", "memory", "bounds", "broken"),
    ABLATIONS,
    ids=lambda value: value.name.lower() if isinstance(value, Rule) else None,
)
def test_without_a_rule_a_promise_breaks(
    rule: Rule, bounds: Bounds, broken: str, *, memory: bool
) -> None:
    """If it fails, the model no longer sees what the rule is for, and would not see it missing."""
    report = run(bounds, ALL_RULES - {rule}, memory=memory, stop_at_first=True)
    assert any(what.startswith(broken) for what in report.violations), report


def walk(model: Model, state: State, labels: list[str]) -> State | str:
    """Follow the labels; the last state, or the promise that the last step breaks."""
    after: State | str = canonical(state)
    for label in labels:
        assert isinstance(after, State), f"{after} before {label}"
        offered = dict(model.steps(after))
        assert label in offered, f"{label} is not offered, only {sorted(offered)}"
        after = offered[label]
    return after


def test_the_toy_machine_has_its_dead_end_and_its_shortest_paths() -> None:
    """If it fails, the search itself is blind and every clean walk proves nothing."""

    def steps(state: int) -> Iterator[tuple[str, int | str]]:
        if state < 4:
            yield "one", state + 1
            yield "two", state + 2
        if state == 3:
            yield "three", "broken"

    report = explore(0, steps, lambda state: state == 4)
    assert report.states == 6
    assert report.violations == {"broken": ("one", "two", "three"), DEAD_END: ("one", "two", "two")}
    assert explore(0, steps, lambda state: state >= 4).violations.keys() == {"broken"}


def test_split_brain_happens_without_a_memory_and_is_seen() -> None:
    """If it fails, two nodes that both went on alone are merged, and one side's writes vanish."""
    model = Model(ALL_RULES, memory=False)
    both_wrote = ["cut", "go alone 0", "go alone 1", "write 0", "write 1", "heal"]
    met = walk(model, start(2, 1, 0, 0), [*both_wrote, "contact"])
    assert isinstance(met, State)
    assert met.split


def test_the_model_asks_production() -> None:
    """If it fails, the table can change without the model noticing."""
    report = run((1, 1, 1, 0), ALL_RULES - {Rule.JOINT_STEP}, memory=MEMORY, stop_at_first=True)
    rows = {row.name for row in TABLE}
    assert {what.rpartition(", ")[2] for what in report.violations} <= rows


FORGOTTEN = (
    "cut / claim 0 / heal / power 0 / boot 0 / apply 0 / settle 0 / contact / session: copied"
    " / session: given_up / apply joint 0 / session: given_up / session: recorded / kill 1"
    " / claim 0 / settle 0 / boot 1 / contact"
    " / session: copied / cut / claim 0 / settle 0 / claim 1 / heal / apply 1 / settle 1 / write 1"
    " / contact"
)


def test_a_claim_forgets_a_joint_generation_that_was_not_recorded() -> None:
    """If it fails, a node that never wrote alone is reported as one side of a split brain.

    Two crashes and two cuts: too far for a search of seconds, so the path is given.
    """
    path = FORGOTTEN.split(" / ")
    without = Model(ALL_RULES - {Rule.ONLY_RECORDED}, memory=MEMORY)
    # The one that wrote nothing serves, so it is stopped first, at the contact before.
    again = [*path, "contact"]
    assert walk(without, start(1, 2, 2, 0), again) == f"{NO_WAY}: COPY_BY_MAP, {TWO_LINES}"
    assert isinstance(walk(Model(ALL_RULES, memory=MEMORY), start(1, 2, 2, 0), path), State)


def test_every_rule_has_its_ablation() -> None:
    """If it fails, a rule is in the model that nobody has shown to be needed."""
    assert {rule for rule, *_ in ABLATIONS} | {Rule.ONLY_RECORDED} == ALL_RULES


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (["--writes", "1", "--cuts", "1", "--crashes", "0", "--leaves", "0"], 0, "states"),
        (
            ["--writes", "1", "--cuts", "1", "--crashes", "1", "--arbiter", "none",
             "--without", "REBOOT", "--leaves", "0"],
            1, LOSS,
        ),
    ],
)  # fmt: skip
def test_the_documented_command_reports(
    arguments: list[str], code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, the full run of the release checklist says nothing, or says yes to anything."""
    assert main(arguments) == code
    assert printed in capsys.readouterr().out
