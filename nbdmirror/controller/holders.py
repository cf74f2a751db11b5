"""Who uses a mounted file system, and how they are ended.

Owns the search for processes whose working directory, root, program, open files or mapped files
lie on it. Must never: wait for ever for a process or a file system that hangs (all of it happens in
a thread with a bound), or end this program, what it descends from, or a process that it is told to
spare, such as the one that serves the device.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdmirror.controller.mounts import Mount, at, mounts, under
from nbdmirror.controller.processes import Ending, Process, end, lineage, process, processes

# A stat of a file there asks a server that may be dead: such files are told by their path.
_ASKS_A_SERVER: Final = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "afs", "gluster", "virtiofs")
_OWN_NUMBERS: Final = ("btrfs",)  # st_dev of a file there is not the number of the device


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses the file system."""

    pid: int
    name: str


def holders(mount_point: Path) -> list[Holder]:
    """The processes that use the file system mounted at `mount_point`, without this one.

    Takes milliseconds and may hang with a process that hangs: call it in a thread, with a bound.
    """
    mount = at(mount_point, mounts())
    if mount is None:
        return []
    spared = lineage()
    return [Holder(e.pid, e.name) for e in using(mount.device) if e.pid not in spared]


async def end_holders(
    mount_point: Path, grace_s: float, spare: frozenset[int] = frozenset()
) -> list[str]:
    """End who uses the file system mounted there: SIGTERM, `grace_s`, SIGKILL.

    Never this process, what it descends from, init, or a pid of `spare`. Returns a sentence for
    each that was ended, and for each that could not be.
    """
    mount = at(mount_point, mounts())
    if mount is None:
        return []
    ending = await end_users(mount.device, grace_s, spare)
    return sentences(ending, f"used {mount_point}")


async def end_users(
    device: str, grace_s: float, spare: frozenset[int], *, opened: bool = False
) -> Ending:
    """End who uses the file system on a device ("major:minor"), mounted or detached lazily.

    `opened`: also who has the device itself open.
    """
    return await end(
        lambda: [e for e in using(device, opened=opened) if e.pid not in spare], grace_s=grace_s
    )


def sentences(ending: Ending, what: str) -> list[str]:
    """What became of the processes that `what`."""
    left = {each.pid for each in ending.left}
    killed = {each.pid for each in ending.killed} - left
    said = [f"{e} {what} and was ended" for e in ending.asked if e.pid not in killed | left]
    said += [f"{e} {what} and was killed" for e in ending.killed if e.pid not in left]
    said += [f"{e} {what} and cannot be killed: the kernel holds it" for e in ending.left]
    if ending.blind:
        said.append(f"who {what} cannot be told: a process hangs, and whoever looks at it with it")
    return said


def using(device: str, *, opened: bool = False) -> list[Process]:
    """Every process with a file on the device; with `opened` also one that has the device open."""
    search = _Search(device, opened=opened)
    return [each for each in processes() if search.uses(each.pid) and process(each.pid) == each]


class _Search:
    """One look at all processes for the users of one device."""

    def __init__(self, device: str, *, opened: bool) -> None:
        self._device = device
        self._number = os.makedev(*map(int, device.split(":")))
        self._opened = opened
        self._mounts: dict[str, list[Mount]] = {}

    def uses(self, pid: int) -> bool:
        """Whether a process has a file there. It may end meanwhile."""
        try:
            mounted = self._seen_by(pid)
            links = [f"/proc/{pid}/fd/{n}" for n in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH208
            links += [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
            return any(self._lies_here(link, mounted) for link in links) or self._maps(pid)
        except OSError:
            return False

    def _seen_by(self, pid: int) -> list[Mount]:
        """The mounts of a process: in another mount namespace a path means another file."""
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115 - its text is wanted
        if namespace not in self._mounts:
            self._mounts[namespace] = mounts(pid)
        return self._mounts[namespace]

    def _lies_here(self, link: str, mounted: Sequence[Mount]) -> bool:
        """Whether a link of /proc leads to a file on the device.

        The file is asked, not its path: a path of another namespace, or of a detached file system,
        is the same text for another file. A local file system answers from memory, also when its
        device is dead. One with a server may not answer at all: that is told by the path.
        """
        try:
            path = os.readlink(link)  # noqa: PTH115 - its text is wanted
            if not path.startswith("/"):
                return False  # a pipe, a socket
            mount = under(path, mounted)
            if mount is not None and mount.type.startswith(_ASKS_A_SERVER):
                return False
            if mount is not None and mount.type in _OWN_NUMBERS and mount.device == self._device:
                return True
            status = os.stat(link)  # noqa: PTH116 - a link of /proc: it leads to what is open
        except OSError:
            return False
        return status.st_dev == self._number or (
            self._opened and stat.S_ISBLK(status.st_mode) and status.st_rdev == self._number
        )

    def _maps(self, pid: int) -> bool:
        """Whether it has mapped a file of the device: the field is hexadecimal there."""
        text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        field = f"{os.major(self._number):02x}:{os.minor(self._number):02x}"
        return any(fields[3:4] == [field] for fields in map(str.split, text.splitlines()))
