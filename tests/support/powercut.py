"""A file system whose power can be cut: ext4 in a loop device, ended by EXT4_IOC_SHUTDOWN.

Owns the image file, the loop device and the mount. After `cut` what was not flushed is gone and
every call fails; `restore` mounts what the platter has. Root only. Must never: touch a device it
did not make.
"""

import fcntl
import os
import struct
import subprocess
from pathlib import Path

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = struct.pack("I", 2)


class PowerDisk:
    """One mounted file system of `size` bytes at `mountpoint`."""

    def __init__(self, directory: Path, size: int) -> None:
        self.image = directory / "disk.img"
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", str(self.image))
        self.device = run("losetup", "--find", "--show", str(self.image))
        self.mounted = False
        self.mount()

    def mount(self) -> None:
        """Mount what is there; ext4 replays its journal."""
        run("mount", "-t", "ext4", "-o", "noatime", self.device, str(self.mountpoint))
        self.mounted = True

    def cut(self) -> None:
        """Power off: nothing that was not on the platter will ever be."""
        descriptor = os.open(self.mountpoint, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(descriptor)

    def restore(self) -> None:
        """Power on again: whoever had files open has to be dead."""
        self.unmount()
        self.mount()

    def unmount(self) -> None:
        """Unmount, if it is mounted."""
        if self.mounted:
            run("umount", str(self.mountpoint))
            self.mounted = False

    def close(self) -> None:
        """Give everything back."""
        self.unmount()
        run("losetup", "--detach", self.device)
        self.image.unlink()


def run(*command: str) -> str:
    """Run one command; its output, or an error with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
