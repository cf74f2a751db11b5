"""Stores what was switched, in a thread of its own, whatever the disk does meanwhile.

The loop of a controller never waits for a disk: heartbeats, probe and decisions would wait with it,
and what it decides on would be as old as the disk is slow. Who typed a switch waits, bounded, and
is told. Owns the thread, when it tries again, and that a problem is told once. The thread is a
daemon: a disk that hangs does not keep the process from ending.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from nbdmirror.controller.switches import Switches

STORE_S: Final = 5.0
AGAIN_S: Final = 60.0


class Keeper:
    """Keeps one file of switches."""

    def __init__(self, switches: Switches, tell: Callable[[str], None]) -> None:
        self._switches = switches
        self._tell = tell
        self._changed = threading.Condition()
        self._asked: list[Future[str]] = []
        self._problem = ""
        switches.on_change = self._wake

    def begin(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="switches", daemon=True).start()

    async def kept(self) -> str:
        """Wait until what is in force now is stored; returns why it is not, "" if it is.

        Waits `STORE_S` seconds at the most; the store goes on all the same.
        """
        asked: Future[str] = Future()
        with self._changed:
            self._asked.append(asked)
            self._changed.notify()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(asked), STORE_S)
        except TimeoutError:
            return f"it is in force, but was not stored within {STORE_S:g} s: the disk is slow"

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                again_s = AGAIN_S if self._problem else None
                self._changed.wait_for(lambda: self._asked or self._switches.untried, again_s)
                # Before the store: it takes what is in force then, or something newer.
                asked, self._asked = self._asked, []
            problem = self._store()
            if problem and problem != self._problem:
                self._tell(problem)
            self._problem = problem
            for each in asked:
                if each.set_running_or_notify_cancel():
                    each.set_result(problem)

    def _store(self) -> str:
        try:
            self._switches.store()
        except Exception as error:  # noqa: BLE001 - whatever it was, the next one may succeed
            return f"it is in force, but could not be stored: {error}"
        return ""
