"""What the tests of scripts, application and attachment share: scripts, waits, file systems.

Owns: executables made of a few lines of shell, waits for the end of a process with a bound, and a
tmpfs that goes with its test. Must never: end a process that its test did not start.
"""

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nbdmirror.controller.mounts import mounts
from nbdmirror.controller.processes import process

BOUND_S = 60.0


def script(path: Path, body: str) -> Path:
    """An executable shell script; `$D` is its directory."""
    path.write_text(f"#!/bin/sh\nD={path.parent}\n{body}\n")
    path.chmod(0o700)
    return path


def pid_in(path: Path) -> int:
    """The number in a file that a script has written before it returned."""
    return int(path.read_text())


def alive(pid: int) -> bool:
    """Whether the process is there, and not only waits to be reaped."""
    return process(pid) is not None


def wait_for_end(pid: int) -> None:
    """Until the process has ended, with a bound."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], BOUND_S)[0], f"pid {pid} has not ended"
    finally:
        os.close(descriptor)


def end(pid: int) -> None:
    """End a process that a script of this test left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


@contextlib.contextmanager
def tmpfs(point: Path, size: str = "4m") -> Iterator[Path]:
    """A small file system in memory."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)], check=True)
    try:
        yield point
    finally:
        unmount_below(point)


def unmount_below(directory: Path) -> None:
    """Whatever a test left mounted in its directory."""
    for mount in reversed(mounts()):
        if directory in {mount.point, *mount.point.parents}:
            subprocess.run(
                ["umount", "-c", "-i", "-l", str(mount.point)], check=False, timeout=BOUND_S
            )


@contextlib.contextmanager
def running(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that says "ready" on a line, and is ended with the block."""
    started = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n", words
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait(BOUND_S)
        for stream in (started.stdin, started.stdout):
            if stream is not None:
                stream.close()
