"""What is mounted here, from the text of mountinfo.

Owns the parsing of proc_pid_mountinfo(5). Must never: call stat, statvfs or listdir on a mount
point; on a device whose server is dead or frozen such a call hangs, and the caller with it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line. `device`: "major:minor", as st_dev has it for the usual file systems.

    `read_only`: the file system itself is, whatever the mount says; ext4 ends so after an error.
    """

    device: str
    point: Path
    type: str
    source: str
    read_only: bool


def parse(text: str) -> list[Mount]:
    """The mounts in their order: the last one of a mount point is the one that is seen."""
    found = []
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, device, _, point, *_ = fields.split(" ")
        kind, source, options = (*rest.split(" "), "", "", "")[:3]
        read_only = "ro" in options.split(",")
        found.append(Mount(device, Path(_plain(point)), kind, _plain(source), read_only))
    return found


def mounts(pid: int | None = None) -> list[Mount]:
    """What is mounted in the mount namespace of a process, by default this one.

    Raises:
        OSError: it has ended.
    """
    path = Path("/proc", "self" if pid is None else str(pid), "mountinfo")
    return parse(path.read_text(encoding="utf-8", errors="surrogateescape"))


def at(point: Path, among: Sequence[Mount]) -> Mount | None:
    """What is seen at a mount point, or None."""
    return next((each for each in reversed(among) if each.point == point), None)


def under(path: str, among: Sequence[Mount]) -> Mount | None:
    """The mount that an absolute path lies on, by its text alone."""
    best: Mount | None = None
    for each in among:
        point = str(each.point)
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(str(best.point))):
            best = each
    return best


def _plain(text: str) -> str:
    """Space, tab, newline and backslash are written as octal numbers."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
