"""What the person in front of the demo sees: numbered steps, checks, the table of figures.

Owns the elapsed time and the verdict. Must never decide by itself that something held: each check
is handed in by the step that made it.
"""

# ruff: noqa: INP001, T201 - a directory that is run, whose job is to print

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

POLL_S: Final = 0.05
MB: Final = 1_000_000
Found = TypeVar("Found")


class DemoError(Exception):
    """A step could not be done; the text says which and why."""


@dataclass
class Report:
    """The steps so far, the figures and the checks."""

    steps_count: int
    began_s: float = field(default_factory=time.monotonic)
    step_number: int = 0
    figures: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        """One line with the elapsed time."""
        print(f"[{time.monotonic() - self.began_s:6.1f} s] {text}", flush=True)

    def step(self, text: str) -> None:
        """The next numbered step begins."""
        self.step_number += 1
        self.line(f"{self.step_number:2}/{self.steps_count} {text}")

    def note(self, text: str) -> None:
        """What came of a step."""
        self.line(f"      {text}")

    def figure(self, name: str, value: str) -> None:
        """A row of the table at the end."""
        self.figures.append((name, value))

    def check(self, text: str, *, held: bool) -> None:
        """Something that has to hold; the exit code says whether all of it did."""
        self.note(f"{'ok    ' if held else 'FAILED'}  {text}")
        if not held:
            self.failures.append(text)

    def table(self) -> None:
        """Print the figures and the verdict."""
        width = max(len(name) for name, _ in self.figures)
        print()
        for name, value in self.figures:
            print(f"  {name:<{width}}  {value}")
        print()
        for failure in self.failures:
            print(f"  did not hold: {failure}")
        self.line("all of it held" if not self.failures else "NOT all of it held")


def wait_until(condition: Callable[[], Found | None], what: str, timeout_s: float) -> Found:
    """Poll until `condition` gives something; returns it.

    Raises:
        DemoError: it did not in time.
    """
    until_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > until_s:
            raise DemoError(f"not within {timeout_s:g} s: {what}")
        pause.wait(POLL_S)


def megabytes(count: float) -> str:
    """Bytes as MB with one digit."""
    return f"{count / MB:,.1f} MB"
