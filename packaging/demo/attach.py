"""The mirror's device as the operating system of a node sees it: attached, made, mounted, checked.

Owns the attachment: kernel NBD where the kernel has it, else nbdfuse and a loop device. Everything
here ends with its processes: a loop device is kept open and cleared at once, so the kernel frees it
with its last user, however the demo ends.
"""

# ruff: noqa: INP001, S603 - a directory that is run; commands of ours, found on PATH

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Final

from nodes import command
from progress import DemoError, wait_until

ATTACH_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 10.0
NBD_TIMEOUT_S: Final = 10  # a request of the kernel client fails after this, instead of never


def kernel_has_nbd() -> bool:
    """Whether the kernel has an NBD client."""
    return Path("/sys/block/nbd0").exists() and Path("/dev/nbd0").exists()


class Attachment:
    """One device on one node, from attach to detach."""

    def __init__(self, directory: Path, socket: Path, loops: Path) -> None:
        self.mount_point = directory / "mnt"
        self.device = ""
        self.kind = "kernel NBD" if kernel_has_nbd() else "nbdfuse and a loop device"
        self._fuse = directory / "fuse"
        self._socket = socket
        self._loops = loops
        self._log = directory / "attach.log"
        self._helper: subprocess.Popen[bytes] | None = None
        self._held = -1
        self._mounted = False
        self._fuse_mounted = False

    def attach(self) -> None:
        """Make the device."""
        if kernel_has_nbd():
            self._attach_kernel()
        else:
            self._attach_fuse()

    def _attach_kernel(self) -> None:
        for number in range(16):
            if not Path(f"/sys/block/nbd{number}/pid").exists():
                break
        else:
            raise DemoError("all NBD devices of this machine are in use")
        self.device = f"/dev/nbd{number}"
        # Without netlink: that family exists only in the first network namespace, and with the
        # client as a process of ours the device ends with it.
        self._start("nbd-client", "-unix", str(self._socket), self.device, "-nonetlink", "-nofork",
                    "-timeout", str(NBD_TIMEOUT_S))  # fmt: skip
        size = Path(f"/sys/block/nbd{number}/size")
        self._wait(lambda: int(size.read_text()) > 0, f"{self.device} has a size")

    def _attach_fuse(self) -> None:
        self._fuse.mkdir(exist_ok=True)
        file = self._fuse / self._loops.parent.name  # of this run only: demo.sh looks for it
        self._fuse_mounted = True
        self._start("nbdfuse", str(file), "--unix", str(self._socket))
        self._wait(file.exists, f"{file} is there")
        # No --nooverlap: it asks for the file behind every loop device of the machine, and waits
        # for ever where that is on a file system of somebody else whose server is stuck.
        options = ["losetup", "--find", "--show", str(file)]
        try:
            self.device = command(*options, "--direct-io=on").strip()
        except DemoError:
            self.device = command(*options).strip()
        self._held = os.open(self.device, os.O_RDONLY | os.O_CLOEXEC)
        command("losetup", "--detach", self.device)
        with self._loops.open("a") as loops:
            loops.write(f"{self.device}\n")

    def _start(self, *arguments: str) -> None:
        with self._log.open("ab") as log:
            self._helper = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, condition: object, what: str) -> None:
        helper = self._helper
        assert helper is not None
        assert callable(condition)

        def ready() -> bool:
            if helper.poll() is not None:
                said = self._log.read_text().strip()
                raise DemoError(f"{helper.args!r} ended: {said}")
            return bool(condition())

        wait_until(ready, what, ATTACH_TIMEOUT_S)

    def make_file_system(self) -> None:
        """ext4. All of it is written now, so that later figures hold no background work of mkfs."""
        command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.device)

    def mount(self) -> None:
        """Mount it; a journal that a crash left is replayed here."""
        self.mount_point.mkdir(exist_ok=True)
        command("mount", "-t", "ext4", "-o", "noatime", self.device, str(self.mount_point))
        self._mounted = True

    def unmount(self) -> None:
        """Unmount in order; everything written is on the device when it returns."""
        command("umount", str(self.mount_point))
        self._mounted = False

    def check(self) -> str:
        """`e2fsck -fn` of the unmounted device: returns its last line.

        Raises:
            DemoError: it is not clean.
        """
        return command("e2fsck", "-fn", self.device).strip().splitlines()[-1]

    def detach(self) -> None:
        """Give the device up, in order: flushed, then disconnected."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
            command("umount", str(self._fuse))
            self._fuse_mounted = False
        else:
            command("nbd-client", "-d", self.device)
        self._reap()

    def clean_away(self) -> None:
        """Remove what is left of a device whose engine is dead, or of a demo that ends early."""
        if self._mounted:
            self._run("umount", str(self.mount_point))
            self._run("umount", "--lazy", str(self.mount_point))
            self._mounted = False
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        elif self.device and self._helper is not None:
            self._run("nbd-client", "-d", self.device)
        if self._helper is not None and self._helper.poll() is None:
            self._helper.terminate()
        self._reap()
        if self._fuse_mounted:
            self._run("umount", "--lazy", str(self._fuse))
            self._fuse_mounted = False

    def _run(self, *arguments: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(arguments, capture_output=True, timeout=END_TIMEOUT_S, check=False)

    def _reap(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        try:
            helper.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()
