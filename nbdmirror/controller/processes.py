"""Processes of this machine, read from /proc, and how some of them are ended.

Owns: the reading of /proc/PID/stat, and the one way in which this program ends what it did not
start itself: SIGTERM, a grace, SIGKILL until nobody is found any more. Must never: signal a process
by a number that may belong to another one by now, signal this process or what it descends from, or
read anything of a process on the loop (a process that hangs in a page fault holds up who reads it).
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdmirror.controller.bounded import in_thread

SCAN_S: Final = 5.0  # bound of one look at all processes
KILL_S: Final = 5.0  # how long killed processes may take to be gone
ROUND_S: Final = 1.0
INIT: Final = 1

Find = Callable[[], "Sequence[Process]"]


@dataclass(frozen=True, slots=True)
class Process:
    """One living process. `started`: in ticks since the boot; with the pid it names one process."""

    pid: int
    started: int
    name: str = field(compare=False)  # exec changes it
    parent: int = field(compare=False)  # the parent's death changes it
    session: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of the processes that were to end.

    `blind`: they could not be looked at within the bound, so there may be more.
    """

    asked: tuple[Process, ...] = ()
    killed: tuple[Process, ...] = ()
    left: tuple[Process, ...] = ()
    blind: bool = False


def process(pid: int) -> Process | None:
    """The living process of that number; None when there is none, or it only waits for its parent.

    /proc/PID/stat takes no lock that a process in a page fault could hold.
    """
    found = _read(pid)
    return None if found is None or found[1] else found[0]


def reap(pid: int, started: int) -> None:
    """Take the end of a child of this program that has ended, so that no zombie stays.

    Nothing happens if it is not that very process, or no child, or alive.
    """
    found = _read(pid)
    if found is not None and found[1] and found[0].started == started:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _read(pid: int) -> tuple[Process, bool] | None:
    """The process, and whether it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    head, _, tail = text.rpartition(b")")  # the name may hold anything
    fields = tail.split()  # proc_pid_stat(5), counted from field 3
    name = head.partition(b"(")[2].decode(errors="replace")
    # A zombie may have threads that live on.
    ended = fields[0] in {b"Z", b"X"} and int(fields[17]) <= 1
    parent, session = int(fields[1]), int(fields[3])
    return Process(pid, int(fields[19]), name, parent, session), ended


def processes() -> list[Process]:
    """All living processes."""
    numbers = [int(each) for each in os.listdir("/proc") if each.isdigit()]  # noqa: PTH208 - /proc
    return [found for pid in numbers if (found := process(pid)) is not None]


def lineage() -> frozenset[int]:
    """What may never be ended: this process, those that it descends from, and init."""
    pids = {INIT}
    pid = os.getpid()
    while pid and pid not in pids:
        pids.add(pid)
        found = process(pid)
        pid = found.parent if found else 0
    return frozenset(pids)


async def end(find: Find, *, grace_s: float, kill_s: float = KILL_S) -> Ending:
    """End what `find` finds: SIGTERM, then SIGKILL to what is there after `grace_s`.

    `find` runs in a thread and is asked again until it finds nobody, at most for `kill_s`.
    """
    asked: tuple[Process, ...] = ()
    killed: dict[int, Process] = {}
    try:
        if grace_s > 0:
            asked = tuple(await _look(find))
            await _signal(asked, signal.SIGTERM, grace_s)
        until = time.monotonic() + kill_s
        while found := await _look(find):
            killed |= {each.pid: each for each in found}
            await _signal(found, signal.SIGKILL, ROUND_S)
            if time.monotonic() > until:
                return Ending(asked, tuple(killed.values()), tuple(await _look(find)))
    except TimeoutError:
        return Ending(asked, tuple(killed.values()), blind=True)
    return Ending(asked, tuple(killed.values()))


async def _look(find: Find) -> list[Process]:
    def look() -> list[Process]:
        spared = lineage()
        return [each for each in find() if each.pid not in spared]

    return await in_thread(look, SCAN_S)


async def _signal(found: Sequence[Process], number: signal.Signals, bound_s: float) -> None:
    """Signal all of them, and wait until they have ended, at most for `bound_s`."""

    def act() -> None:
        with contextlib.ExitStack() as stack:
            descriptors = [fd for each in found for fd in _opened(each, stack)]
            for descriptor in descriptors:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(descriptor, number)
            _wait(descriptors, time.monotonic() + bound_s)

    await in_thread(act, bound_s + SCAN_S)


def _opened(found: Process, stack: contextlib.ExitStack) -> Iterator[int]:
    """A descriptor of that very process, if it is still there."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(found.pid)
        stack.callback(os.close, descriptor)
        now = process(found.pid)
        if now is not None and now.started == found.started:
            yield descriptor


def _wait(descriptors: Sequence[int], until: float) -> None:
    """Until all of these processes have ended. A pidfd is readable from the end on."""
    poll = select.poll()
    waiting = set(descriptors)
    for each in waiting:
        poll.register(each, select.POLLIN)
    while waiting and (left_s := until - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left_s * 1000):
            poll.unregister(descriptor)
            waiting.discard(descriptor)
