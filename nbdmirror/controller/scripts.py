"""Runs one script of the operator: bounded, without a shell, its output in a file.

Owns: the start of the script in a session of its own, the log file with its rotation, and the end
of everything that a script started when it does not end in time. Must never: wait for what a
script leaves behind (a daemon that it started lives on, whatever becomes of this program), or let
a log file that cannot be written decide about the application.

The output goes straight into the log file, not through a pipe: a daemon that a start script leaves
behind keeps its output for longer than this program lives, and a pipe without a reader would end
it with SIGPIPE. Where the log file cannot be had, or its file system is nearly full, the output is
dropped. Only a disk that fills while the script runs is its own affair (ENOSPC).
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from nbdmirror.controller.bounded import PATH, ended, in_thread, start
from nbdmirror.controller.processes import (
    SCAN_S,
    Ending,
    Process,
    end,
    process,
    processes,
)
from nbdmirror.files import FILE_MODE
from nbdmirror.limits import KIB, MIB

RUN_VARIABLE: Final = "NBDMIRROR_RUN"  # marks all that descends from one run
TAIL_BYTES: Final = 2 * KIB
LOG_BYTES_MAX: Final = 1 * MIB
ROOM_BYTES_MIN: Final = 1 * MIB  # with less free space a script's own echo could make it fail
TERM_S: Final = 2.0
REAP_S: Final = 1.0
LOG_S: Final = 2.0  # bound for opening and for reading the log file
ENDING_S: Final = 15.0  # upper bound of what a time-out costs on top of it


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    `code`: the exit code, minus the number of a signal that ended it, or None when it was not
    started or did not end in time. `tail`: the last printable 2 KiB of what it said.
    """

    code: int | None
    timed_out: bool
    took_s: float
    tail: str

    @property
    def ok(self) -> bool:
        """Exit code 0."""
        return self.code == 0

    def __str__(self) -> str:
        said = f"; it said: {self.tail}" if self.tail else ""
        if self.timed_out:
            return f"no end within {self.took_s:.0f} s{said}"
        if self.code is None:
            return f"not started: {self.tail}"
        how = f"exit code {self.code}" if self.code >= 0 else _signal_name(-self.code)
        return f"{how} after {self.took_s:.1f} s{said}"


@dataclass(frozen=True, slots=True)
class _Sink:
    """Where the output goes. `start`: the log's size before; `lost`: why nothing is kept."""

    descriptor: int
    start: int = 0
    lost: str = ""


async def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str],
    log: Path,
    name: str,
) -> Outcome:
    """Run a script until its own process has ended; daemons that it left behind stay.

    Its output is appended to `log`. At the time-out, or when this is cancelled, everything that
    descends from the script is ended, at most ENDING_S later. Raises nothing of its own.
    """
    began = time.monotonic()
    # Not the arguments: a file that others may read is no place for what they may hold.
    marked = {**environment, RUN_VARIABLE: f"{_family(log)}{secrets.token_hex(16)}"}
    sink = await _open(log, f"--- {name}: {command[0]}\n")
    try:
        code, timed_out, why = await _run(command, timeout_s, marked, sink)
        took_s = time.monotonic() - began
        outcome = Outcome(code, timed_out, took_s, why or await _tail(sink))
        _note(sink, f"--- {name}: {str(outcome).partition(';')[0]}\n")
        return outcome
    finally:
        os.close(sink.descriptor)


async def _run(
    command: Sequence[str], timeout_s: float, marked: Mapping[str, str], sink: _Sink
) -> tuple[int | None, bool, str]:
    """Exit code, whether it timed out, and why it did not start."""
    try:
        pid = start(_as_others(command), marked, sink.descriptor, sink.descriptor)
    except OSError as error:
        return None, False, f"{command[0]}: {error.strerror}"
    root = process(pid)
    try:
        return await asyncio.wait_for(ended(pid), timeout_s), False, ""
    except TimeoutError:
        await _end_run(pid, root, marked[RUN_VARIABLE])
        return None, True, ""
    except asyncio.CancelledError:
        await asyncio.shield(_end_run(pid, root, marked[RUN_VARIABLE]))
        raise


def _as_others(command: Sequence[str]) -> list[str]:
    """Without the protection from the OOM killer that the service manager gives this program.

    An application that inherits it would make the kernel kill everybody else.
    """
    choom = shutil.which("choom", path=PATH)
    if choom is None or int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii")) >= 0:
        return list(command)
    return [choom, "-n", "0", "--", *command]


# --- the end of what was started -------------------------------------------------------------


async def _end_run(pid: int, root: Process | None, marker: str) -> None:
    """End a script and all that descends from it: SIGTERM, two seconds, SIGKILL."""
    await end(lambda: _tree(root, marker), grace_s=TERM_S)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ended(pid), REAP_S)


async def end_marked(log: Path, *, grace_s: float) -> Ending:
    """End everything that any run with this log file left behind, also one of an earlier life."""
    return await end(lambda: _tree(None, _family(log)), grace_s=grace_s)


async def end_unfinished(log: Path, command: Sequence[str], *, grace_s: float) -> Ending:
    """End the runs of a script that go on although the controller that began them was killed.

    With all that descends from such a run; what a run that has ended left behind stays.
    """
    try:
        marks = await in_thread(lambda: _unfinished(_family(log), command), SCAN_S)
    except TimeoutError:
        return Ending(blind=True)
    if not marks:
        return Ending()
    return await end(lambda: [e for mark in marks for e in _tree(None, mark)], grace_s=grace_s)


def _unfinished(family: str, command: Sequence[str]) -> list[str]:
    """The marks of the runs whose own process is there: a session's leader, with these words."""
    words = [os.fsencode(each) for each in command]
    leaders = [each.pid for each in processes() if each.pid == each.session]
    marks = {pid: mark for pid in leaders if (mark := _mark(pid)).startswith(family)}
    # Before them stands an interpreter, if it is a script.
    return [mark for pid, mark in marks.items() if _strings(pid, "cmdline")[-len(words) :] == words]


def _family(log: Path) -> str:
    """How the marks of all runs with this log file begin.

    Two mirrors, and two nodes that share a machine, have different ones, whatever their names.
    """
    return f"{sha256(os.fsencode(log)).hexdigest()[:16]}-"


def _tree(root: Process | None, mark: str) -> list[Process]:
    """The script, its session, its descendants, and whoever carries a mark that begins so.

    A daemon that forked twice into a session of its own has lost every tie but its environment.
    """
    everyone = processes()
    found = {
        each.pid
        for each in everyone
        if each == root or (root and each.session == root.pid) or _mark(each.pid).startswith(mark)
    }
    while more := {e.pid for e in everyone if e.parent in found and e.pid not in found}:
        found |= more
    return [each for each in everyone if each.pid in found]


def _mark(pid: int) -> str:
    """The mark that a process carries, or ""."""
    name = os.fsencode(f"{RUN_VARIABLE}=")
    marks = [each for each in _strings(pid, "environ") if each.startswith(name)]
    return os.fsdecode(marks[0].removeprefix(name)) if marks else ""


def _strings(pid: int, name: str) -> list[bytes]:
    """What a file of /proc/PID holds; [] when the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


# --- the log file -----------------------------------------------------------------------------


async def _open(log: Path, heading: str) -> _Sink:
    """The log file, rotated when it is long; /dev/null where it cannot be had."""
    try:
        return await in_thread(lambda: _open_log(log, heading), LOG_S)
    except TimeoutError:
        why = f"the log file {log} does not answer"
    except OSError as error:
        why = f"the log file {log} cannot be written: {error.strerror}"
    return _Sink(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), lost=why)


def _open_log(log: Path, heading: str) -> _Sink:
    """Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if log.lstat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_name(log.name + ".1"))
    # Opening a FIFO by mistake must not wait, and a link must not lead elsewhere.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(log, flags, FILE_MODE)
    try:
        _require_room(descriptor)
        os.set_blocking(descriptor, True)
        os.write(descriptor, heading.encode(errors="replace"))
        return _Sink(descriptor, os.fstat(descriptor).st_size)
    except OSError:
        os.close(descriptor)
        raise


def _require_room(descriptor: int) -> None:
    """Raises OSError."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(0, "it is no regular file")
    room = os.fstatvfs(descriptor)
    if room.f_bavail * room.f_frsize < ROOM_BYTES_MIN:
        raise OSError(0, "no room there")


def _note(sink: _Sink, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sink.descriptor, line.encode(errors="replace"))


async def _tail(sink: _Sink) -> str:
    """The end of what this run said. Reads no further back than its own beginning."""
    if sink.lost:
        return f"(not kept: {sink.lost})"

    def read() -> bytes:
        size = os.fstat(sink.descriptor).st_size
        start = max(sink.start, size - TAIL_BYTES)
        return os.pread(sink.descriptor, TAIL_BYTES, start)

    try:
        text = (await in_thread(read, LOG_S)).decode(errors="replace")
    except OSError:  # TimeoutError is one
        return ""
    lines = ("".join(filter(str.isprintable, each)) for each in text.splitlines())
    return "\n".join(lines).strip()


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(number).name}"
    return f"ended by signal {number}"
