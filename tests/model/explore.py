"""Walk through a finite machine: every state once, the shortest path to each.

Owns the search and the question of dead ends. Knows nothing of the protocol.
"""

from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
DEAD_END = "a state from which no goal can be reached"
STATES_MAX = 20_000_000


@dataclass
class Report(Generic[S]):
    """What was found: the number of states, and per kind of violation the labels that lead to
    it."""

    states: int = 0
    goals: int = 0
    violations: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.states} states, {self.goals} of them goals"]
        for what, path in self.violations.items():
            lines += [f"VIOLATION: {what}", "  " + " / ".join(path)]
        return "\n".join(lines) + "\n"


class Search(Generic[S]):
    """The states found so far, numbered in the order of their distance from the first."""

    def __init__(self, first: S) -> None:
        self.numbers: dict[S, int] = {first: 0}
        self.order: list[S] = [first]
        self.parents = array("q", [-1])
        self.labels: list[str] = [""]
        self.edges_from, self.edges_to = array("q"), array("q")

    def path(self, number: int) -> tuple[str, ...]:
        """The labels of the shortest path to a state."""
        found = []
        while number > 0:
            found.append(self.labels[number])
            number = self.parents[number]
        return tuple(reversed(found))

    def add(self, current: int, label: str, after: S) -> None:
        """A step from a known state to one that may be new."""
        number = self.numbers.setdefault(after, len(self.order))
        if number == len(self.order):
            self.order.append(after)
            self.parents.append(current)
            self.labels.append(label)
        self.edges_from.append(current)
        self.edges_to.append(number)


def explore(
    first: S,
    steps: Callable[[S], Iterable[tuple[str, S | str]]],
    is_goal: Callable[[S], bool],
    *,
    stop_at_first: bool = False,
) -> Report[S]:
    """Breadth first from `first`. A step is a label and the next state, or a broken promise (str).

    With `stop_at_first` the search ends at the first violation; dead ends are then looked for only
    when there was none.
    """
    report: Report[S] = Report()
    search = Search(first)
    current = 0
    while current < len(search.order) <= STATES_MAX:
        for label, after in steps(search.order[current]):
            if isinstance(after, str):
                report.violations.setdefault(after, (*search.path(current), label))
            else:
                search.add(current, label, after)
        current += 1
        if stop_at_first and report.violations:
            break
    report.states = len(search.order)
    if report.states > STATES_MAX:
        raise MemoryError(f"more than {STATES_MAX} states: lower the bounds")
    goals = [number for number, state in enumerate(search.order) if is_goal(state)]
    report.goals = len(goals)
    if not (stop_at_first and report.violations):
        stuck = dead_ends(report.states, goals, search.edges_from, search.edges_to)
        if stuck >= 0:
            report.violations[DEAD_END] = search.path(stuck)
    return report


def dead_ends(
    count: int, goals: list[int], edges_from: "array[int]", edges_to: "array[int]"
) -> int:
    """The first state (the nearest to the start) that cannot reach a goal, or -1."""
    before: list[list[int]] = [[] for _ in range(count)]
    for one, two in zip(edges_from, edges_to, strict=True):
        before[two].append(one)
    reaches = bytearray(count)
    todo = list(goals)
    for number in goals:
        reaches[number] = 1
    while todo:
        for number in before[todo.pop()]:
            if not reaches[number]:
                reaches[number] = 1
                todo.append(number)
    return reaches.find(0)
