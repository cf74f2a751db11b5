"""Who uses a mounted file system: found by every way of using it, ended, and nobody else."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from nbdmirror.controller.holders import Holder, end_holders, end_users, holders, using
from nbdmirror.controller.mounts import at, mounts, parse, under
from tests.controller.doing import alive, running, tmpfs

pytestmark = pytest.mark.usefixtures("require_root")

READY = "print('ready', flush=True); import sys; sys.stdin.read()"
WAYS = {
    "cwd": "import os; os.chdir(POINT)",
    "root": "import os; os.chroot(POINT)",
    "file": "file = open(POINT + '/file')",
    "deleted file": "import os; file = open(POINT + '/gone', 'w'); os.unlink(POINT + '/gone')",
    "library": "import ctypes; ctypes.CDLL(POINT + '/library')",
}


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system with a file."""
    with tmpfs(tmp_path / "mnt", "32m") as place:
        (place / "file").write_text("content")
        maps = Path("/proc/self/maps").read_text()
        libc = next(line.split()[-1] for line in maps.splitlines() if "/libc.so" in line)
        shutil.copy(Path(libc).with_name("libm.so.6"), place / "library")
        yield place


@contextlib.contextmanager
def user(point: Path, how: str, *before: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that uses the file system in one way."""
    code = f"POINT = {str(point)!r}\n{WAYS[how]}\n{READY}"
    with running(*before, sys.executable, "-I", "-S", "-c", code) as process:
        yield process


@pytest.mark.parametrize("how", WAYS)
def test_each_way_of_using_is_found(point: Path, how: str) -> None:
    """Breaks in the field: umount says "busy", nobody is named, and the node does not give its role
    up.
    """
    with user(point, how) as process:
        name = Path(sys.executable).name
        assert holders(point) == [Holder(process.pid, name)]


def test_a_program_on_it_is_found(point: Path) -> None:
    """Breaks in the field: as above, for an application that is installed on the mirror."""
    program = point / "held"
    shutil.copy("/bin/cat", program)
    with subprocess.Popen([str(program)], stdin=subprocess.PIPE) as process:
        assert holders(point) == [Holder(process.pid, "held")]
        assert process.stdin is not None
        process.stdin.close()


def test_nobody_else_is_found(point: Path, tmp_path: Path) -> None:
    """Breaks in the field: a container has its own file system at a path of the same name, and is
    killed when the mirror is stopped.
    """
    enter = ("unshare", "--mount", "sh", "-c",
             f'mount -t tmpfs tmpfs {point}; touch {point}/file; exec "$@"', "sh")  # fmt: skip
    with user(point, "cwd", *enter), user(tmp_path, "cwd"):
        assert holders(point) == []
        assert holders(tmp_path) == [], "not a mount point"


def test_a_path_is_not_believed(point: Path, tmp_path: Path) -> None:
    """Breaks in the field: somebody works in a file system that was detached, where the path of his
    directory is by chance that of the mount point, and is killed.
    """
    with tmpfs(tmp_path / "other") as other:
        inside = Path(f"{other}{point}")
        inside.mkdir(parents=True)
        with user(inside, "cwd") as process:
            subprocess.run(["umount", "-l", str(other)], check=True)
            assert Path(f"/proc/{process.pid}/cwd").readlink() == point
            assert holders(point) == []


def test_a_user_in_another_namespace_is_found(point: Path) -> None:
    """Breaks in the field: a service with a private view of the mounts keeps the device busy, and
    nobody can say who.
    """
    with user(point, "file", "unshare", "--mount", "--propagation", "private") as process:
        assert [each.pid for each in holders(point)] == [process.pid]


def test_a_detached_file_system_has_users_too(point: Path) -> None:
    """Breaks in the field: after a lazy unmount the device stays in use, and nobody is found."""
    mount = at(point, mounts())
    assert mount is not None
    with user(point, "cwd") as process:
        subprocess.run(["umount", "-l", str(point)], check=True)
        assert holders(point) == []
        assert [each.pid for each in using(mount.device)] == [process.pid]
        ending = uvloop.run(end_users(mount.device, 30, frozenset()))
        assert [each.pid for each in ending.asked] == [process.pid]
        assert not alive(process.pid)


def test_users_are_ended(point: Path) -> None:
    """Breaks in the field: a process that ignores SIGTERM keeps the mount for ever, or one that
    would end in order is not given the time.
    """
    stubborn = f"trap '' TERM; cd {point}; echo ready; cat; cat"
    with user(point, "library") as gentle, running("sh", "-c", stubborn) as other:
        said = uvloop.run(end_holders(point, 3))
        assert not alive(gentle.pid)
        assert not alive(other.pid)
    text = "\n".join(said)
    assert f"(pid {gentle.pid}) used {point} and was ended" in text
    assert f"sh (pid {other.pid}) used {point} and was killed" in text
    assert holders(point) == []
    subprocess.run(["umount", str(point)], check=True)


def test_some_are_spared(point: Path) -> None:
    """Breaks in the field: the node ends its own controller, the shell or service that started it,
    or the process that serves the device.
    """
    with user(point, "cwd") as process, (point / "file").open():
        assert uvloop.run(end_holders(point, 3, frozenset({process.pid}))) == []
        assert alive(process.pid)
        # A controller that works there, below a shell that works there.
        code = (
            "import asyncio, os, sys; from pathlib import Path\n"
            "from nbdmirror.controller.holders import end_holders\n"
            "asyncio.run(end_holders(Path(os.getcwd()), 3))\n"
            "print('alive')\n"
        )
        done = subprocess.run(
            ["sh", "-c", 'cd "$1" && "$2" -c "$3"; echo shell', "sh", point, sys.executable, code],
            capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert done.stdout == "alive\nshell\n", done.stderr
        assert not alive(process.pid)


def test_the_loop_goes_on(point: Path) -> None:
    """Breaks in the field: the look at some thousand processes stops the heartbeats."""

    async def main() -> int:
        ticks, stop = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not stop.is_set():
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        await end_holders(point, 0)
        stop.set()
        await ticking
        return ticks

    assert uvloop.run(main()) > 5


MOUNTINFO = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 7:1 / /srv/a\040b rw,noatime shared:5 master:1 - ext4 /dev/loop1 rw,errors=remount-ro
31 22 7:1 / /srv/ab ro - ext4 /dev/loop1 ro,shutdown
32 22 0:50 / /srv/a\040b rw - tmpfs tmp\134fs rw
""".strip()


def test_mountinfo_is_understood() -> None:
    """Breaks in the field: a mount point with a blank, or one that was mounted over, is not found;
    a file system that an error made read-only is taken over as if it were well.
    """
    found = parse(MOUNTINFO)
    assert [str(each.point) for each in found] == ["/", "/srv/a b", "/srv/ab", "/srv/a b"]
    assert [each.read_only for each in found] == [False, False, True, False]
    top = at(Path("/srv/a b"), found)
    assert top is not None
    assert (top.type, top.source) == ("tmpfs", "tmp\\fs")
    assert at(Path("/srv"), found) is None
    assert under("/srv/ab/x", found) == found[2]
    assert under("/srv/abc", found) == found[0]
    assert under("/srv/a b", found) == found[3]
