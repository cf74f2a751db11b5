"""Runs the checkers of one mirror: which ones, how often, and what their results make of them.

Owns one task for each checker that runs, and the state of all. Must never act on a state: it tells
the controller, which decides. `checks.py` looks, `core/cluster/checking.py` counts.
"""

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Final

from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checks import check
from nbdmirror.core.cluster.checking import CheckerFacts, RiseFall

# A cancelled check has to kill a process at most (KILL_WAIT_S of checks.py).
CLOSE_TIMEOUT_S: Final = 5.0


def _now_ms() -> int:
    return monotonic_ns() // 1_000_000


class Checkers:
    """All checkers of one mirror, in the order of the configuration file. Runs on the loop."""

    def __init__(
        self, sections: Sequence[CheckerSection], on_change: Callable[[CheckerFacts], None]
    ) -> None:
        """Nothing runs before the first `active()`.

        `on_change` hears each change to up or down, on the loop, never from within a call of these
        methods; it returns at once. What it raises goes to the loop's exception handler.
        """
        self._checkers = {each.name: _Checker(each, on_change) for each in sections}
        assert len(self._checkers) == len(sections), "the names of checkers differ"
        self._wanted: frozenset[str] = frozenset()
        self._paused = False
        self._closed = False

    def active(self, *, before: bool, primary: bool, secondary: bool) -> None:
        """Say which `when`s run from now on; those with "always" run always.

        Those that stop are off. Those that begin are unknown and check at once. The others go on.
        """
        said = {"always": True, "before": before, "primary": primary, "secondary": secondary}
        self._wanted = frozenset(when for when, wanted in said.items() if wanted)
        self._apply()

    def pause(self, paused: bool) -> None:  # noqa: FBT001 - the switch is the argument
        """Maintenance: while paused none runs, whatever `active()` says."""
        self._paused = paused
        self._apply()

    def facts(self) -> list[CheckerFacts]:
        """All checkers as they are now."""
        return [each.facts() for each in self._checkers.values()]

    def reset(self, name: str) -> None:
        """After an action: what was found before it says nothing about now.

        One that runs is unknown, what it is about to find is dropped, and it checks at once.
        """
        checker = self._checkers[name]
        if checker.running:
            checker.end()
            checker.begin()

    async def close(self) -> None:
        """End all for good; their processes are killed. Takes at most CLOSE_TIMEOUT_S."""
        self._closed = True
        self._apply()
        ending = [task for each in self._checkers.values() for task in each.ending]
        if ending:
            await asyncio.wait(ending, timeout=CLOSE_TIMEOUT_S)

    def _apply(self) -> None:
        nothing = self._paused or self._closed
        for each in self._checkers.values():
            wanted = not nothing and each.when in self._wanted
            if wanted and not each.running:
                each.begin()
            elif each.running and not wanted:
                each.end()


class _Checker:
    """One checker: off, or a task that checks again and again."""

    def __init__(self, section: CheckerSection, on_change: Callable[[CheckerFacts], None]) -> None:
        self.when = section.when
        # Tasks that were told to end and have not yet, for example because they kill a process.
        self.ending: set[asyncio.Task[None]] = set()
        self._section = section
        self._on_change = on_change
        self._state = RiseFall(section.rise, section.fall)
        self._state.reset(_now_ms())
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether it checks."""
        return self._task is not None

    def begin(self) -> None:
        """Unknown, and checking."""
        assert self._task is None, "a checker has one task"
        self._state.reset(_now_ms())
        self._task = asyncio.create_task(self._watch(), name=f"checker {self._section.name}")

    def end(self) -> None:
        """Off. Nothing that a check under way finds counts any more."""
        assert self._task is not None, "only what runs is ended"
        self.ending.add(self._task)
        self._task.add_done_callback(self.ending.discard)
        self._task.cancel()
        self._task = None
        self._state.reset(_now_ms())

    def facts(self) -> CheckerFacts:
        """As status shows it."""
        return CheckerFacts(
            name=self._section.name,
            kind=self._section.kind,
            action=self._section.action,
            when=self._section.when,
            state=self._state.state if self.running else "off",
            reason=self._state.reason,
            since_ms=self._state.since_ms,
            checks_count=self._state.checks_count,
        )

    async def _watch(self) -> None:
        if self.ending:  # never two checks of one checker at once
            await asyncio.wait(self.ending)
        loop = asyncio.get_running_loop()
        while True:
            next_s = loop.time() + self._section.interval_ms / 1000
            reason = await check(self._section)
            # A library may swallow the cancellation; the result of a task that was ended is void.
            if asyncio.current_task() is not self._task:
                return
            if self._state.result(not reason, reason, _now_ms()):
                self._tell()
            await asyncio.sleep(max(0.0, next_s - loop.time()))

    def _tell(self) -> None:
        try:
            self._on_change(self.facts())
        except Exception as error:  # noqa: BLE001 - a mistake of the listener must not end the watch
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"checker {self._section.name}: on_change", "exception": error}
            )
