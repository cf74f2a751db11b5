"""Looks once at a file system: a program of its own, started by `checks` for each look.

    file_system_look.py PATH FILE-NAME FREE-BYTES-MIN

Exit code 0: something is mounted at PATH, takes a write, and has so much free; 1: not, with the
reason on standard output. Owns the file that it makes there and removes. Must never import the
package, or run inside the controller: a thread that hangs in a file system whose device is frozen
keeps the whole process from ending, with its lock; the next controller could not start, and it is
the one that would end the freeze.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TEXT = b"nbdmirror looks whether this file system takes writes\n"


def mount_points() -> Iterator[Path]:
    """All of this mount namespace. A bind mount is one, though its device is its parent's."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        escaped = line.split(b" ")[4]
        plain = re.sub(rb"\\([0-7]{3})", lambda match: bytes((int(match[1], 8),)), escaped)
        yield Path(os.fsdecode(plain))


def write(path: Path) -> None:
    """Make a file, have it on the medium, remove it. Raises OSError."""
    # What an earlier look left that was killed; and nothing of somebody else's is opened.
    path.unlink(missing_ok=True)
    made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.write(made, TEXT)
            os.fsync(made)
        finally:
            os.close(made)
    finally:
        path.unlink(missing_ok=True)


def look(given: str, name: str, free_bytes_min: int) -> str:
    """Why it is not good, or ""."""
    try:
        path = Path(given).resolve()
        if path not in mount_points():
            return f"nothing is mounted at {given}"
        try:
            write(path / name)
        except OSError as error:
            return f"{given} cannot be written: {error.strerror}"
        usage = os.statvfs(path)
    except OSError as error:
        return f"filesystem: {error.strerror}"
    free_bytes = usage.f_bavail * usage.f_frsize
    if free_bytes < free_bytes_min:
        return f"{given} has {free_bytes} bytes free"
    return ""


def main(words: list[str]) -> int:
    """One look."""
    reason = look(words[0], words[1], int(words[2]))
    os.write(1, os.fsencode(reason))
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
