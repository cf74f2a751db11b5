"""What the tests of the attachment share: a server, an attachment, and a look of their own.

Owns: a plain nbdkit as the export, and what is on the machine of it, found without the code under
test. Must never: leave a mount, a loop device or a process behind, whatever the test did.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from nbdmirror.config_cluster import MountSection
from nbdmirror.controller.attachment import Attachment
from tests.controller.doing import BOUND_S, running, unmount_below

SIZE = "64M"
REQUEST_TIMEOUT_S = 20
CONTROLLER = (sys.executable, "-m", "tests.controller.inside_controller")


def attachment(directory: Path, told: list[str] | None = None, **keys: Any) -> Attachment:
    """One whose export is the server of that directory; what it tells is appended to `told`."""
    section = MountSection(**{"point": str(directory / "mnt"), **keys})
    tell = (told if told is not None else []).append
    return Attachment(
        section,
        export=directory / "s",
        run_dir=directory,
        mirror="demo",
        tell=tell,
        request_timeout_s=REQUEST_TIMEOUT_S,
    )


class Server:
    """An nbdkit that exports some memory at DIRECTORY/s."""

    def __init__(self, directory: Path) -> None:
        ready = directory / "nbdkit.pid"
        os.mkfifo(ready)
        words = ["nbdkit", "-f", "-U", str(directory / "s"), "-P", str(ready), "memory", SIZE]
        self._process = subprocess.Popen(words)
        ready.read_text()  # written when it listens

    def freeze(self) -> None:
        """It answers nothing any more."""
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """It is gone without a word."""
        self._process.kill()
        self._process.wait(BOUND_S)


SERVERS: dict[Path, Server] = {}


@contextlib.contextmanager
def server(directory: Path) -> Iterator[Server]:
    """A server; with the block all that hangs on it goes, too."""
    made = SERVERS[directory] = Server(directory)
    try:
        yield made
    finally:
        made.kill()
        remove(directory)


def remove(directory: Path) -> None:
    """All of it, without the code under test; the server is dead."""
    for pid in helpers(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for device in loops(directory):
        subprocess.run(["losetup", "--detach", device], check=False, timeout=BOUND_S)
    unmount_below(directory)


def helpers(directory: Path) -> list[int]:
    """The processes of nbdfuse and nbd-client that have the directory in their arguments."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = cmdline.read_bytes().split(b"\0")
            program = words[0].rpartition(b"/")[2]
            if program in {b"nbdfuse", b"nbd-client"} and any(
                word.startswith(bytes(directory) + b"/") for word in words
            ):
                found.append(int(cmdline.parent.name))
    return found


def loops(directory: Path) -> list[str]:
    """The loop devices over a file of the directory."""
    return [
        f"/dev/{backing.parts[3]}"
        for backing in Path("/sys/block").glob("loop*/loop/backing_file")
        if backing.read_text().startswith(f"{directory}/")
    ]


def mounted(directory: Path) -> list[str]:
    """What is mounted below the directory."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{directory}/")]


def nothing_left(directory: Path) -> bool:
    """Whether the machine is as before."""
    return (helpers(directory), loops(directory), mounted(directory)) == ([], [], [])


def make_file_system(device: str) -> None:
    """ext4; all of it is written now."""
    options = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", *options, device], check=True, timeout=BOUND_S)


async def made(place: Path, told: list[str] | None = None) -> Attachment:
    """Attached, with a file system, mounted."""
    it = attachment(place, told)
    make_file_system(await it.attach())
    await it.mount()
    return it


@contextlib.contextmanager
def writer(point: Path, *before: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that writes and syncs without a pause, and does not end at SIGTERM."""
    once = "dd if=/dev/zero of=data bs=1M count=8 conv=fsync 2>/dev/null"
    loop = f"trap '' TERM; cd {point} && {once} && echo ready; while :; do {once}; done"
    with running(*before, "sh", "-c", loop) as process:
        yield process


def run(*words: str) -> str:
    """One command; what it said."""
    done = subprocess.run(words, check=True, timeout=BOUND_S, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def make_one(place: Path) -> None:
    """A file system on the device."""

    async def main() -> None:
        it = attachment(place)
        make_file_system(await it.attach())
        assert await it.detach(force=False) == []

    uvloop.run(main())


def killed_controller(place: Path) -> None:
    """Attached and mounted by a controller that is dead."""
    make_one(place)
    with running(*CONTROLLER, str(place)) as controller:
        os.kill(controller.pid, signal.SIGKILL)
        controller.wait(BOUND_S)
