"""What every campaign is to whoever runs them all: a share of the time, figures, a violation."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Outcome:
    """What a campaign did. `violation`: what did not hold, "" if everything did.

    `replay`: the one command that shows it again. `notes`: what a replay of the whole needs.
    """

    figures: Counter[str] = field(default_factory=Counter)
    violation: str = ""
    replay: str = ""
    notes: list[str] = field(default_factory=list)


class Campaign(Protocol):
    """One way to look for what does not hold. `share`: its part of the time, in hundredths."""

    name: str
    share: int

    def run(self, seconds: float) -> Outcome:
        """Look for so long, or a little longer; end at the first violation."""
        ...
