"""What checks mean: when a checker is up or down, and which of those that are down decides.

Owns the counting of results in a row and the order of the actions. Must never look at the machine,
read a clock or act: the shell hands in results and times, and asks.

One result is noise. A checker that has decided keeps its state until `rise` successes, or `fall`
failures, came in a row; one result of the other kind begins the count anew. A checker that has not
decided yet is `unknown`: neither an application's start nor an action may hang on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Decided: TypeAlias = Literal["unknown", "up", "down"]
State: TypeAlias = Literal["off", "unknown", "up", "down"]

# The strongest first. What ends more comes before what ends less: after a stop no swap is of use,
# and a swap makes it pointless to start the application here once more.
STRENGTH: Final = ("stop", "swap", "wait", "stopstart", "restart", "tell")


@dataclass(frozen=True, slots=True)
class CheckerFacts:
    """One checker, as status, log and decision see it."""

    name: str
    kind: str
    action: str
    when: str
    state: State
    """`off`: not running now."""
    reason: str
    """Of the last failure, one sentence; "" when up, off, or when nothing has failed yet."""
    since_ms: int
    """Since when the state is what it is, on the caller's monotonic clock."""
    checks_count: int
    """Results since the checker last began or was reset."""


class RiseFall:
    """The state of one checker, by its results in a row.

    `rise` successes in a row make it up, `fall` failures in a row make it down; at least 1 each.
    """

    def __init__(self, rise: int, fall: int) -> None:
        assert rise >= 1, "a checker rises after at least one success"
        assert fall >= 1, "a checker falls after at least one failure"
        self._rise = rise
        self._fall = fall
        self.state: Decided = "unknown"
        self.reason = ""
        self.since_ms = 0
        self.checks_count = 0
        self._in_a_row = 0
        self._last_ok = False

    def reset(self, now_ms: int = 0) -> None:
        """As if nothing had ever been checked; `now_ms` is when that began."""
        self.state = "unknown"
        self.reason = ""
        self.since_ms = now_ms
        self.checks_count = 0
        self._in_a_row = 0

    def result(self, ok: bool, reason: str, now_ms: int) -> bool:  # noqa: FBT001 - it is the result
        """Take one result; `reason` says why it is a failure. True when the state changed."""
        self.checks_count += 1
        self._in_a_row = self._in_a_row + 1 if ok == self._last_ok else 1
        self._last_ok = ok
        became = self._became()
        changed = became != self.state
        if changed:
            self.state = became
            self.since_ms = now_ms
        if self.state == "up":
            self.reason = ""
        elif not ok:
            self.reason = reason
        return changed

    def _became(self) -> Decided:
        if self._last_ok:
            return "up" if self._in_a_row >= self._rise else self.state
        return "down" if self._in_a_row >= self._fall else self.state


def demanded(facts: Sequence[CheckerFacts]) -> CheckerFacts | None:
    """The checker whose action is to be taken now; None when none is down.

    Of all that are down it is the one with the strongest action (`STRENGTH`); of several with the
    same action, the first in the order given, which is the order of the configuration file.
    """
    down = [each for each in facts if each.state == "down"]
    return min(down, key=lambda each: STRENGTH.index(each.action), default=None)
