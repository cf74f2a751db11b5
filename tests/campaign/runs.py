"""One run by its seed, and many of them with a table of what was tried."""

import contextlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from typing import Final

from tests.campaign.accidents import strike
from tests.campaign.cluster import Mirror
from tests.campaign.plan import Plan, drawn
from tests.campaign.world import World
from tests.prove.campaign import Outcome
from tests.support.stores import Etcd

LINE_EVERY_COUNT: Final = 10
CHECKED: Final = "acknowledged operations checked"


class Runs:
    """Runs in turn, up to the first violation. `say` is told a line for every ten of them."""

    def __init__(self, seed: int, *, only: str = "", say: Callable[[str], None]) -> None:
        self.seed = seed
        self.only = only
        self.outcome = Outcome()
        self._say = say
        self._stack = ExitStack()
        self._etcd: Etcd | None = None

    def run(self, runs: int, seconds: float) -> Outcome:
        """So many, and not longer than that."""
        began = monotonic()
        figures = self.outcome.figures
        with self._stack:
            for number in range(runs):
                over = monotonic() - began > seconds
                if over or not self.one(drawn(self.seed + number, self.only)):
                    break
                if figures["runs"] % LINE_EVERY_COUNT == 0:
                    self._say(
                        f"{figures['runs']:>6} runs  {monotonic() - began:8.0f} s  seed "
                        f"{self.seed + number}  {figures[CHECKED]:>9,} operations checked"
                    )
        figures["seconds"] = round(monotonic() - began)
        return self.outcome

    def one(self, plan: Plan) -> bool:
        """One run, and its figures; whether everything held."""
        figures = self.outcome.figures
        try:
            figures[CHECKED] += self.carried_out(plan)
        except Exception as error:  # noqa: BLE001 - whatever it is, it did not hold
            notes = "\n".join(getattr(error, "__notes__", []))
            which = f"seed {plan.seed}, {plan.integrity}: {plan}"
            self.outcome.violation = f"{which}: {type(error).__name__}: {error}\n{notes}"
            self.outcome.replay = replay(plan.seed, self.only)
            return False
        figures["runs"] += 1
        figures["runs with controllers and an etcd"] += plan.controllers
        for accident in plan.accidents:
            figures["accidents"] += 1
            figures[f"accidents: {accident.name}"] += 1
        return True

    def carried_out(self, plan: Plan) -> int:
        """Returns how many acknowledged operations were judged."""
        if plan.controllers:
            return self.with_controllers(plan)
        with World(plan.integrity) as world:
            world.judge()
            for accident in plan.accidents:
                strike(world, accident)
                if plan.heal:
                    world.heal()
            world.heal()
            world.judge()
            self.outcome.figures["power cuts"] += world.power_cuts
            return world.history.checked

    def with_controllers(self, plan: Plan) -> int:
        """One with an etcd, which serves all of them."""
        if self._etcd is None:
            self._etcd = self._stack.enter_context(Etcd())
        mirror = Mirror(self._etcd)
        with mirror.cluster:
            mirror.run(plan)
        return mirror.history.checked


def replay(seed: int, only: str = "") -> str:
    """The command that does exactly that run."""
    more = f' --only "{only}"' if only else ""
    return f"python -m tests.campaign --runs 1 --seed {seed}{more}"


def table(figures: Counter[str]) -> list[str]:
    """Runs, accidents by name, what was checked."""
    first = ("runs", "runs with controllers and an etcd", "accidents", CHECKED, "seconds")
    names = [*first, *sorted(set(figures) - set(first))]
    with contextlib.suppress(ZeroDivisionError):
        rate = figures["seconds"] / figures["runs"]
        return [*(f"{figures[name]:>10,}  {name}" for name in names), f"{rate:>10.1f}  s a run"]
    return [f"{figures[name]:>10,}  {name}" for name in names]
