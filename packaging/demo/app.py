"""The application as the controller knows it: start, stop, check.

    app.py start|stop|check MOUNT_POINT LEDGER [force]

Starts and ends writer.py, whose process id is in a file on the mirror. An example of what an
application's scripts have to do: return when it is up, or down, and say so by the exit code.
"""

# ruff: noqa: INP001, S603 - a directory that is run; a program of ours

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

STOP_S: Final = 20.0
WRITER: Final = Path(__file__).resolve().parent / "writer.py"


def running(mount_point: Path) -> int:
    """The pid of the writer that works on this mirror, on this host; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((mount_point / "writer.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        here = Path(f"/proc/{pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
        if here and os.fsencode(WRITER) in words:
            return pid
    return 0


def start(mount_point: Path, ledger: Path) -> int:
    """Start the writer; returns when it has its database open."""
    if running(mount_point):
        return 0
    writer = subprocess.Popen(
        [sys.executable, str(WRITER), str(mount_point / "rows.db"), str(ledger)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert writer.stdout is not None
    if writer.stdout.readline() != b"open\n":
        return 1
    (mount_point / "writer.pid").write_text(f"{writer.pid}\n")
    return 0


def stop(mount_point: Path, *, force: bool) -> int:
    """End the writer in order, or at once; 1 when it does not end in time."""
    pid = running(mount_point)
    if not pid:
        return 0
    watched = os.pidfd_open(pid)
    signal.pidfd_send_signal(watched, signal.SIGKILL if force else signal.SIGTERM)
    ended, _, _ = select.select([watched], [], [], STOP_S)
    return 0 if ended else 1


def main(words: list[str]) -> int:
    """One verb."""
    verb, mount_point, ledger = words[0], Path(words[1]), Path(words[2])
    if verb == "start":
        return start(mount_point, ledger)
    if verb == "stop":
        return stop(mount_point, force="force" in words)
    return 0 if running(mount_point) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
