"""A few runs of the campaign with every run of the tests; and whether it would see anything."""

from collections import Counter

import pytest

from tests.campaign.accidents import ACCIDENTS
from tests.campaign.plan import ANSWERS, CLUSTER, ENGINES, ROLES, Plan, drawn
from tests.campaign.runs import CHECKED, LINE_EVERY_COUNT, Runs, replay, table

SEED = 3
MANY = 3000


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.usefixtures("require_root")
@pytest.mark.parametrize("name", ["reset", "crash in a resync"])
def test_a_few_accidents(name: str) -> None:
    """Breaks in the field: a link that is reset, or an engine that dies in a resync, takes what was
    acknowledged along.
    """
    outcome = Runs(SEED, only=name, say=lambda _: None).run(1, float("inf"))
    assert not outcome.violation, f"{outcome.violation}\nreplay: {outcome.replay}"
    assert outcome.figures["runs"] == 1
    assert outcome.figures[CHECKED] > 100


def test_every_accident_is_drawn_and_can_be_carried_out() -> None:
    """Breaks in the field: a kind of accident has a name in the table and never happens."""
    plans = [drawn(seed) for seed in range(MANY)]
    engines = [plan for plan in plans if not plan.controllers]
    assert {each.name for plan in engines for each in plan.accidents} == set(ENGINES)
    others = [plan for plan in plans if plan.controllers]
    assert {each.name for plan in others for each in plan.accidents} == set(CLUSTER)
    assert 0 < len(others) < len(engines) // 5
    assert set(ACCIDENTS) == set(ENGINES)
    seen = {(each.role, each.answer) for plan in plans for each in plan.accidents}
    assert len(seen) == len(ROLES) * len(ANSWERS)


def test_a_run_is_replayed_by_its_seed() -> None:
    """Breaks in the field: a violation that cannot be replayed is not mended."""
    assert [drawn(seed) for seed in range(50)] == [drawn(seed) for seed in range(50)]
    assert len({str(drawn(seed)) for seed in range(50)}) > 20
    assert replay(7) == "python -m tests.campaign --runs 1 --seed 7"
    assert replay(7, "old copy").endswith('--only "old copy"')
    assert {each.name for each in drawn(9, "hang").accidents} == {"hang"}


class Broken(Runs):
    """Runs of which one, by its seed, ends badly."""

    def carried_out(self, plan: Plan) -> int:
        """Nothing happens."""
        if plan.seed == SEED + LINE_EVERY_COUNT:
            raise AssertionError("lost")
        return 5


def test_the_first_violation_ends_it_and_says_how_to_see_it_again() -> None:
    """Breaks in the field: a violation is one line among many, or names another run."""
    lines: list[str] = []
    outcome = Broken(SEED, say=lines.append).run(100, float("inf"))
    assert outcome.figures["runs"] == LINE_EVERY_COUNT
    assert outcome.figures[CHECKED] == 5 * LINE_EVERY_COUNT
    assert "lost" in outcome.violation
    assert outcome.replay == replay(SEED + LINE_EVERY_COUNT)
    assert len(lines) == 1
    assert f"{LINE_EVERY_COUNT} runs" in lines[0]
    assert any(line.endswith("  accidents") for line in table(outcome.figures))
    assert table(Counter())
