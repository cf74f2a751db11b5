"""The application of a mirror: started on the primary, stopped before the node gives the role up.

Owns: the order of start script, units and stop script, their bounds, and what is done when they do
not stop. Must never: let a stop take longer than its bounds or fail for good reasons of its own, or
know what the application is. The device and its mount are `attachment`'s.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from nbdmirror.config_cluster import ApplicationSection
from nbdmirror.controller.bounded import ENVIRONMENT
from nbdmirror.controller.holders import end_holders, sentences
from nbdmirror.controller.scripts import Outcome, end_marked, end_unfinished, run
from nbdmirror.errors import RefusedError

SYSTEMCTL: Final = "systemctl"
FORCE: Final = "force"
NOT_LOADED: Final = 5  # of systemctl stop: no such unit, so nothing of it runs
HOLDERS_S: Final = 2.0
LEFT_S: Final = 2.0  # what a run left behind gets between SIGTERM and SIGKILL in the end
ACTIVE_S: Final = 5.0  # bound of a question to the service manager
LAST_S: Final = 0.1  # what a step gets at least when those before it took the whole bound


class Application:
    """What `[application]` names, on this node."""

    def __init__(
        self,
        section: ApplicationSection,
        *,
        mirror: str,
        node: str,
        mount_point: Path | None,
        log: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.state = "stopped"
        self._section = section
        self._names = {"NBDMIRROR_MIRROR": mirror, "NBDMIRROR_NODE": node}
        self._mount_point = mount_point
        self._log = log
        self._tell = tell
        self._lock = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None
        # A new controller does not know what an earlier one left: the first stop always acts.
        self._surely_stopped = False
        self._reason = ""

    def reconfigure(self, section: ApplicationSection) -> None:
        """Use other scripts, units and bounds from the next start or stop on."""
        self._section = section

    def facts(self) -> dict[str, Any]:
        """For status: `state`, what is configured, and the reason of the last failure."""
        return {
            "state": self.state,
            "start": list(self._section.start),
            "stop": list(self._section.stop),
            "units": list(self._section.units),
            "reason": self._reason,
        }

    def adopt(self) -> None:
        """An earlier controller started it, and it runs."""
        self.state = "running"

    # --- start ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run the start script, then start the units in their order, within `start_timeout_s`.

        Does nothing when it runs already. A stop() meanwhile ends the start.

        Raises:
            RefusedError: it did not start; the text has the reason, `state` is "failed", and
            whatever did start is still there until stop().
        """
        async with self._lock:
            if self.state == "running":
                return
            self.state, self._reason, self._surely_stopped = "starting", "", False
            self._starting = asyncio.create_task(self._bring_up())
            try:
                await asyncio.wait({self._starting})
                why = await self._outcome_of(self._starting)
            finally:
                await self._interrupt()  # this start itself was cancelled
                self._starting = None
                self.state = "failed" if self.state == "starting" else self.state
            if why:
                self._reason = why
                self._tell(why)
                raise RefusedError(why)

    async def _outcome_of(self, start: asyncio.Task[None]) -> str:
        """Why it did not start, or ""."""
        try:
            await start
        except asyncio.CancelledError:
            return "the application was told to stop while it started"
        except RefusedError as error:
            return str(error)
        self.state = "running"
        return ""

    async def _interrupt(self) -> None:
        """End a start that is going on, with all that descends from its script."""
        task = self._starting
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})

    async def _bring_up(self) -> None:
        bound_s = self._section.start_timeout_s
        until = time.monotonic() + bound_s
        if self._section.start:
            outcome = await self._run("start", self._section.start, bound_s)
            self._require(outcome, f"the start script {self._section.start[0]}")
        for unit in self._section.units:
            outcome = await self._systemctl("start", unit, _left_s(until))
            self._require(outcome, f"the unit {unit}")

    def _require(self, outcome: Outcome, what: str) -> None:
        """Raises RefusedError."""
        if not outcome.ok:
            raise RefusedError(
                f"the application did not start: {what}: {outcome}; "
                f"see {self._log}, and put right what it names"
            )

    # --- stop -----------------------------------------------------------------------------------

    async def stop(self) -> list[str]:
        """Stop it: the units in reverse order, then the stop script, within `stop_timeout_s`.

        Where that fails, again by force within `force_timeout_s`; where that fails too, what uses
        the mount and what the scripts left behind is killed. A start that is going on is ended,
        also that of a controller that was killed.
        Returns a sentence for everything that went wrong; raises nothing. Does nothing when this
        controller has stopped it already.
        """
        await self._interrupt()
        async with self._lock:
            if self._surely_stopped:
                return []
            self.state = "stopping"
            said: list[str] = []
            done = await self._graceful(said) or await self._forced(said)
            done = done and await self._end_unfinished_start(said)
            done = done or await self._last_resort(said)
            self._surely_stopped = done
            self.state, self._reason = "stopped" if done else "failed", "; ".join(said)
            for each in said:
                self._tell(each)
            return said

    async def _graceful(self, said: list[str]) -> bool:
        until = time.monotonic() + self._section.stop_timeout_s
        done = True
        for unit in reversed(self._section.units):
            outcome = await self._systemctl("stop", unit, _left_s(until))
            done &= self._stopped(outcome, f"the unit {unit}", said)
        return await self._stop_script("stop", self._section.stop, until, said) and done

    async def _forced(self, said: list[str]) -> bool:
        until = time.monotonic() + self._section.force_timeout_s
        done = True
        for unit in reversed(self._section.units):
            await self._systemctl("kill", unit, _left_s(until), "--signal=SIGKILL")
            outcome = await self._systemctl("stop", unit, _left_s(until))
            done &= self._stopped(outcome, f"the unit {unit}, killed", said)
        return await self._stop_script(FORCE, [*self._section.stop, FORCE], until, said) and done

    async def _stop_script(
        self, action: str, words: Sequence[str], until: float, said: list[str]
    ) -> bool:
        if self._section.stop:
            outcome = await self._run(action, words, _left_s(until))
            return self._stopped(outcome, f"the stop script, called for {action},", said)
        if not self._section.start:
            return True
        # Nobody else stops what the start script left behind.
        ending = await end_marked(self._log, grace_s=_left_s(until))
        said += [f"{each} did not end at SIGTERM and was killed" for each in ending.killed]
        return not ending.left and not ending.blind

    async def _end_unfinished_start(self, said: list[str]) -> bool:
        """End a start script that a killed controller left: it would start it after this stop."""
        if not self._section.start:
            return True
        ending = await end_unfinished(self._log, self._section.start, grace_s=LEFT_S)
        said += sentences(ending, "was started by a start script that a killed controller left")
        return not ending.left and not ending.blind

    async def _last_resort(self, said: list[str]) -> bool:
        """Kill what uses the mount, and what descends from any script of this mirror."""
        if self._mount_point is not None:
            with contextlib.suppress(OSError):  # of reading /proc
                said += await end_holders(self._mount_point, HOLDERS_S)
        ending = await end_marked(self._log, grace_s=LEFT_S)
        said += sentences(ending, "was started by a script of this mirror")
        done = not ending.left and not ending.blind
        for unit in self._section.units:
            if (await self._systemctl("is-active", unit, ACTIVE_S)).ok:
                said.append(f"the unit {unit} is still active; stop it by hand")
                done = False
        return done

    def _stopped(self, outcome: Outcome, what: str, said: list[str]) -> bool:
        if not outcome.ok:
            said.append(f"{what} did not stop the application: {outcome}")
        return outcome.ok

    # --- running --------------------------------------------------------------------------------

    async def _run(self, action: str, command: Sequence[str], bound_s: float) -> Outcome:
        mount = {} if self._mount_point is None else {"NBDMIRROR_MOUNT": str(self._mount_point)}
        return await run(
            command,
            timeout_s=bound_s,
            environment={**ENVIRONMENT, **self._names, **mount, "NBDMIRROR_ACTION": action},
            log=self._log,
            name=action,
        )

    async def _systemctl(self, verb: str, unit: str, bound_s: float, *options: str) -> Outcome:
        outcome = await run(
            [SYSTEMCTL, verb, "--no-ask-password", *options, "--", unit],
            timeout_s=bound_s,
            environment=ENVIRONMENT,
            log=self._log,
            name=f"{verb} {unit}",
        )
        if verb == "stop" and outcome.code == NOT_LOADED:
            return Outcome(0, False, outcome.took_s, outcome.tail)
        return outcome


def _left_s(until: float) -> float:
    """What is left of a bound; each step gets a little."""
    return max(until - time.monotonic(), LAST_S)
