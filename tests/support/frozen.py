"""A disk that hangs: ext4 in a loop device, frozen, so whoever writes there waits in the kernel.

Owns the disk and the thaw. No signal ends who waits, not even the test itself; so the thaw is the
work of a process of its own, done when it is told, when the test is gone, or when the time is over.
Root only. Must never: freeze a file system that it did not make.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.powercut import PowerDisk, run

DISK_BYTES = 16 << 20
THAW = 'echo ready; timeout 60 cat > /dev/null; exec fsfreeze --unfreeze "$0"'


@contextmanager
def disk(directory: Path) -> Iterator[Path]:
    """An ext4 of its own; where it is mounted."""
    made = PowerDisk(directory, DISK_BYTES)
    try:
        yield made.mountpoint
    finally:
        made.close()


@contextmanager
def frozen(mount: Path) -> Iterator[None]:
    """What is written there hangs until the end of the block."""
    command = ("sh", "-c", THAW, str(mount))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as thaw:
        assert thaw.stdout is not None
        assert thaw.stdout.readline() == b"ready\n"
        run("fsfreeze", "--freeze", str(mount))
        try:
            yield
        finally:
            thaw.communicate()
    assert thaw.returncode == 0, "thawed before its time"
