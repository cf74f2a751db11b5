"""Device and mount over a real NBD server: made, refused, in use, taken away."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdmirror.controller import devices
from nbdmirror.controller.attachment import Attachment
from nbdmirror.controller.traces import FUSE, NONE
from nbdmirror.errors import RefusedError
from tests.controller.attaching import (
    CONTROLLER,
    SERVERS,
    attachment,
    helpers,
    loops,
    made,
    make_one,
    mounted,
    nothing_left,
    run,
    server,
)
from tests.controller.doing import BOUND_S, alive, running, tmpfs

pytestmark = [pytest.mark.nbdkit, pytest.mark.usefixtures("require_root")]

# What the operator may be told without there being anything to do.
PROTECTION = "is not protected from a full memory"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A run directory with a server, and the mount point in it."""
    with server(tmp_path):
        yield tmp_path
    assert nothing_left(tmp_path)


# --- in order -------------------------------------------------------------------------------------


def test_from_attach_to_detach(place: Path) -> None:
    """Breaks in the field: the application's data is not there after a change of roles, or the
    device of the earlier term is still there.
    """
    told: list[str] = []

    async def main() -> None:
        it = await made(place, told)
        device = it.facts()["device"]
        assert it.facts() == {"kind": FUSE, "device": device, "point": str(place / "mnt"),
                              "attached": True, "mounted": True}  # fmt: skip
        assert [device] == loops(place)
        assert await it.attach() == device
        await it.mount()
        assert mounted(place) == [str(place / "fuse"), str(place / "mnt")]
        (place / "mnt" / "file").write_text("kept")
        assert await it.unmount(force=False) == []
        assert await it.unmount(force=True) == []
        assert await it.detach(force=False) == []
        assert await it.detach(force=True) == []
        assert nothing_left(place)
        assert await it.leftovers() == []
        assert it.facts()["device"] == ""
        await it.attach()
        await it.mount()
        assert (place / "mnt" / "file").read_text() == "kept"
        assert await it.unmount(force=True) == []
        assert await it.detach(force=True) == []

    uvloop.run(main())
    assert nothing_left(place)
    assert not (place / "attachment.json").exists()
    said = [each for each in told if PROTECTION not in each]
    assert len(said) == 4, said


@pytest.mark.parametrize("keys", [{"attach": "none"}, {"point": None}])
def test_nothing_is_attached_where_nothing_is_wanted(place: Path, keys: dict[str, Any]) -> None:
    """Breaks in the field: the export is used over the network, and a device is made here, too."""

    async def main() -> None:
        it = attachment(place, **keys)
        assert it.kind == NONE
        assert await it.attach() == ""
        await it.mount()
        assert not await it.adopt()
        assert await it.unmount(force=True) == []
        assert await it.detach(force=True) == []
        assert await it.clean() == []

    uvloop.run(main())
    assert nothing_left(place)


def test_the_helper_outlives_its_loop(place: Path) -> None:
    """Breaks in the field: a controller that is updated takes the device away under a running
    application.
    """
    make_one(place)
    with running(*CONTROLLER, str(place)) as controller:
        assert controller.stdin is not None
        controller.stdin.close()
        assert controller.wait(BOUND_S) == 0
    (helper,) = helpers(place)
    assert alive(helper)
    assert os.getsid(helper) == helper
    (place / "mnt" / "file").write_text("written")
    assert uvloop.run(attachment(place).clean()) == []


# --- refused --------------------------------------------------------------------------------------


def test_another_mount_is_not_covered(place: Path) -> None:
    """Breaks in the field: what somebody mounted at the mount point is hidden, or unmounted."""

    async def main(point: Path) -> None:
        it = attachment(place)
        await it.attach()
        with pytest.raises(RefusedError, match=r"tmpfs \(tmpfs\) is mounted there; unmount it"):
            await it.mount()
        assert await it.clean() == []
        assert mounted(place) == [str(point)]

    with tmpfs(place / "mnt") as point:
        uvloop.run(main(point))


def test_files_are_not_hidden(place: Path) -> None:
    """Breaks in the field: files in the mount point vanish, and are looked for for days."""

    async def main() -> None:
        it = attachment(place)
        await it.attach()
        (place / "mnt").mkdir()
        (place / "mnt" / "file").touch()
        with pytest.raises(RefusedError, match=r"is not empty, .* move that away"):
            await it.mount()
        (place / "mnt" / "file").unlink()
        (place / "mnt").rmdir()
        (place / "mnt").symlink_to(place)
        with pytest.raises(RefusedError, match="is a symbolic link; name the directory itself"):
            await it.mount()
        (place / "mnt").unlink()
        (place / "mnt").touch()
        with pytest.raises(RefusedError, match="File exists"):
            await it.mount()
        assert await it.clean() == []

    uvloop.run(main())


def test_a_device_without_a_file_system_is_told(place: Path) -> None:
    """Breaks in the field: the first start fails, and the operator sees not what is missing."""

    async def main() -> None:
        it = attachment(place)
        with pytest.raises(RefusedError, match="nothing is attached"):
            await it.mount()
        device = await it.attach()
        with pytest.raises(RefusedError, match=f"first: mkfs.ext4 {device}"):
            await it.mount()
        assert await it.clean() == []

    uvloop.run(main())


@pytest.mark.parametrize("state", ["dead", "frozen"])
def test_an_attach_that_fails_leaves_nothing(
    place: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: an engine that does not answer costs the node more than this attempt."""
    monkeypatch.setattr(devices, "ATTACH_S", 2.0)
    if state == "dead":
        SERVERS[place].kill()
    else:
        SERVERS[place].freeze()
    said = "ended before the device was there; it said: .*" if state == "dead" else "not within 2 s"
    with pytest.raises(RefusedError, match=said):
        uvloop.run(attachment(place).attach())
    assert nothing_left(place)


def test_a_kernel_without_nbd_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: attach = "kernel" fails, and nobody thinks of the module."""
    monkeypatch.setattr(devices, "BLOCK", place / "none")
    with pytest.raises(RefusedError, match="modprobe nbd"):
        uvloop.run(attachment(place, attach="kernel").attach())


def test_a_missing_program_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: the package with nbdfuse was not installed, and nothing says so."""
    monkeypatch.setattr(devices, "PATH", str(place))
    with pytest.raises(RefusedError, match="nbdfuse is not installed: apt-get install"):
        uvloop.run(attachment(place).attach())


# --- in use ---------------------------------------------------------------------------------------


def test_who_uses_it_is_named_and_ended(place: Path) -> None:
    """Breaks in the field: a forgotten shell in the mount point keeps a node from leaving, or an
    orderly unmount kills the application.
    """

    async def main() -> None:
        it = await made(place)
        with running("sh", "-c", f"cd {place}/mnt; echo ready; read line") as user:
            said = await it.unmount(force=False)
            assert said[-1] == f"it is used by sh (pid {user.pid})"
            assert it.facts()["mounted"]
            assert await it.detach(force=False) == [
                f"{place}/mnt is still mounted: the device stays attached"
            ]
            assert alive(user.pid)
            assert await it.unmount(force=True) == [
                f"sh (pid {user.pid}) used the device of demo and was ended"
            ]
        assert not it.facts()["mounted"]
        assert await it.detach(force=False) == []

    uvloop.run(main())
    assert nothing_left(place)


def test_mounts_below_and_beside_are_removed(place: Path) -> None:
    """Breaks in the field: the application mounts something inside the mirror, or a part of the
    mirror elsewhere, and the device cannot be given up.
    """

    async def main() -> None:
        it = await made(place)
        for name in ("below", "beside"):
            (place / "mnt" / name).mkdir()
        run("mount", "-t", "tmpfs", "tmpfs", str(place / "mnt" / "below"))
        (place / "other").mkdir()
        run("mount", "--bind", str(place / "mnt" / "beside"), str(place / "other"))
        assert await it.unmount(force=True) == []
        assert await it.detach(force=True) == []

    uvloop.run(main())
    assert nothing_left(place)


@pytest.mark.parametrize("more", [(), ("--pid", "--fork", "--mount-proc")], ids=["plain", "pid"])
@pytest.mark.parametrize("how", ["in order", "by force", "clean"])
def test_copies_in_other_namespaces_are_removed(
    place: Path, how: str, more: tuple[str, ...]
) -> None:
    """Breaks in the field: a service with a view of its own of the mounts was started meanwhile;
    the mount is gone here, the device stays in use, what was written is not flushed, and nobody
    is to be found who has a file there.
    """

    async def main() -> None:
        it = await made(place)
        enter = ("unshare", "--mount", "--propagation", "private", *more)
        with running(*enter, "sh", "-c", "echo ready; read line") as other:
            copy = rf"is mounted at {place}/mnt for \w+ \(pid {other.pid}\)"
            assert re.search(copy, "\n".join(await it.leftovers()))
            if how == "clean":
                assert await it.clean() == []
            else:
                assert await it.unmount(force=how == "by force") == []
                assert await it.detach(force=how == "by force") == []
            assert await it.leftovers() == []
            assert alive(other.pid)

    uvloop.run(main())
    assert nothing_left(place)


@pytest.mark.slow
def test_what_cannot_be_unmounted_is_detached(place: Path) -> None:
    """Breaks in the field: something that is no process keeps the mount busy, and the node cannot
    leave; here a loop device over a file on it.
    """

    async def main() -> None:
        it = await made(place)
        image = place / "mnt" / "image"
        image.write_bytes(bytes(1 << 20))
        device = run("losetup", "--find", "--show", str(image))
        try:
            said = await it.unmount(force=True)
            assert f"{place}/mnt was detached while it was in use" in said
            assert not it.facts()["mounted"]
            assert str(place / "mnt") not in mounted(place)
            said = await it.detach(force=True)
            assert said[-1:] == [f"{(await left(it)).split()[0]} is still in use"]
            assert await it.leftovers() != [], "the node is not ready for another term"
        finally:
            run("losetup", "--detach", device)
        assert await it.clean() == []

    async def left(it: Attachment) -> str:
        return (await it.leftovers())[0]

    uvloop.run(main())
    assert nothing_left(place)
