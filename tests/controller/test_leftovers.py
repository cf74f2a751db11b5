"""What an earlier life left, and what is left under a server that is dead or frozen.

Taken over where it is well, removed where it is not, whatever became of controller and server.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from nbdmirror.controller.bounded import in_thread
from nbdmirror.controller.holders import using
from nbdmirror.controller.traces import Record, read_record, write_record
from nbdmirror.errors import RefusedError
from tests.controller.attaching import (
    SERVERS,
    attachment,
    helpers,
    killed_controller,
    loops,
    made,
    mounted,
    nothing_left,
    remove,
    run,
    server,
    writer,
)
from tests.controller.doing import alive, running, wait_for_end

pytestmark = [pytest.mark.nbdkit, pytest.mark.usefixtures("require_root")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A run directory with a server, and the mount point in it."""
    with server(tmp_path):
        yield tmp_path
    assert nothing_left(tmp_path)


def test_a_healthy_attachment_is_taken_over(place: Path) -> None:
    """Breaks in the field: a controller that dies takes the application with it, at once or when
    the next one begins.
    """
    killed_controller(place)
    before = (helpers(place), loops(place))

    async def main() -> None:
        it = attachment(place)
        with writer(place / "mnt") as application:
            assert len(await it.leftovers()) >= 4
            with pytest.raises(RefusedError, match="left by an earlier life of demo"):
                await it.attach()
            assert await it.adopt()
            assert it.facts()["attached"]
            assert it.facts()["mounted"]
            assert [await it.attach()] == before[1]
            await it.mount()
            assert (helpers(place), loops(place)) == before
            assert alive(application.pid)
            assert len(await it.unmount(force=True)) >= 1
        assert await it.detach(force=False) == []

    uvloop.run(main())
    assert nothing_left(place)


@pytest.mark.parametrize(
    "broken", ["no record", "torn record", "another pid", "no helper", "not mounted", "read-only"]
)
def test_what_is_not_well_is_removed(place: Path, broken: str) -> None:
    """Breaks in the field: a controller believes its record, and the application writes to a device
    that serves nobody; or it believes nothing, and cannot remove what is there.
    """
    killed_controller(place)
    record = read_record(place / "attachment.json")
    assert record is not None
    if broken == "no record":
        (place / "attachment.json").unlink()
    elif broken == "torn record":
        (place / "attachment.json").write_bytes((place / "attachment.json").read_bytes()[:20])
    elif broken == "another pid":
        false = Record(record.kind, record.device, os.getpid(), record.started)
        write_record(place / "attachment.json", false)
    elif broken == "no helper":
        os.kill(record.helper, signal.SIGKILL)
        wait_for_end(record.helper)
    elif broken == "not mounted":
        # The loop device is freed with it: nbdfuse alone is left.
        run("umount", str(place / "mnt"))
        assert loops(place) == []
        assert helpers(place) == [record.helper]
    else:
        run("mount", "-o", "remount,ro", str(place / "mnt"))

    async def main() -> None:
        it = attachment(place)
        assert not await it.adopt()
        assert await it.leftovers() != []
        assert await it.clean() == []
        assert await it.leftovers() == []
        await it.attach()
        await it.mount()
        assert await it.clean() == []

    uvloop.run(main())
    assert nothing_left(place)


def test_a_read_only_mirror_is_well(place: Path) -> None:
    """Breaks in the field: a mirror that is mounted read-only on purpose is never taken over."""
    killed_controller(place)
    run("mount", "-o", "remount,ro", str(place / "mnt"))

    async def main() -> None:
        it = attachment(place, options=["ro"])
        assert await it.adopt()
        assert await it.clean() == []

    uvloop.run(main())


def test_only_the_own_mirror_is_touched(place: Path) -> None:
    """Breaks in the field: the end of one mirror of a server takes the other one with it."""
    other = place / "other"
    other.mkdir()

    async def main() -> None:
        it = attachment(place)
        theirs = await made(other)
        with running("sh", "-c", f"cd {other}/mnt; echo ready; read line") as user:
            assert await it.leftovers() == []
            assert await it.clean() == []
            assert not await it.adopt()
            await it.attach()
            assert await it.clean() == []
            assert alive(user.pid)
            assert mounted(other) == [str(other / "fuse"), str(other / "mnt")]
        assert await theirs.clean() == []

    with server(other):
        uvloop.run(main())


# --- under a server that is dead or frozen --------------------------------------------------------

CLEAN_S = 60.0
HUNG_S = 20.0


async def gaps_during(doing: "asyncio.Task[list[str]]") -> float:
    """The longest time that the loop did not go on while something was done, in seconds."""
    longest, last = 0.0, time.monotonic()
    while not doing.done():
        await asyncio.wait({doing}, timeout=0.01)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.slow
@pytest.mark.parametrize("state", ["dead", "frozen"])
@pytest.mark.parametrize("whose", ["own", "earlier"])
def test_clean_leaves_nothing(place: Path, state: str, whose: str) -> None:
    """Breaks in the field: the engine dies or hangs under the mounted file system, and mount,
    device and processes stay until the machine is reset; or the controller hangs with them, and
    its peer takes it for dead.
    """
    if whose == "earlier":
        killed_controller(place)

    async def main() -> None:
        it = attachment(place) if whose == "earlier" else await made(place)
        with writer(place / "mnt") as application:
            if state == "dead":
                SERVERS[place].kill()
            else:
                SERVERS[place].freeze()
            began = time.monotonic()
            cleaning = asyncio.create_task(it.clean())
            gap = await gaps_during(cleaning)
            assert time.monotonic() - began < CLEAN_S
            assert gap < 2, "the loop stood still"
            text = "\n".join(cleaning.result())
            assert "used the device of demo" in text
            assert "still there" not in text
            assert not alive(application.pid)
            assert nothing_left(place)
        assert await it.leftovers() == []
        assert not it.facts()["mounted"]

    uvloop.run(main())


@pytest.mark.slow
def test_an_orderly_stop_under_a_frozen_server_ends(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: umount waits for an engine that hangs, and the whole node with it."""
    monkeypatch.setattr("nbdmirror.controller.attachment.UNMOUNT_S", 2.0)

    async def main() -> None:
        it = await made(place)
        (place / "mnt" / "dirty").write_bytes(b"x" * (8 << 20))
        SERVERS[place].freeze()
        began = time.monotonic()
        said = await it.unmount(force=False)
        assert said[:1] == [f"{place}/mnt cannot be unmounted: no end within 2 s"]
        assert await it.clean() == []
        assert time.monotonic() - began < CLEAN_S

    uvloop.run(main())
    assert nothing_left(place)


@pytest.mark.slow
def test_a_hung_fuse_file_holds_nobody_up(place: Path) -> None:
    """Breaks in the field: a process has a file of a hung FUSE file system open, and whoever looks
    for the users of the mirror hangs with it.
    """

    async def main() -> None:
        it = await made(place)
        (fuse_file,) = [each for each in (place / "fuse").iterdir() if each.is_file()]
        with running("sh", "-c", f"exec 3<{fuse_file}; echo ready; read line") as user:
            (helper,) = helpers(place)
            os.kill(helper, signal.SIGSTOP)
            number = (await asyncio.to_thread(os.stat, it.facts()["device"])).st_rdev
            device = f"{os.major(number)}:{os.minor(number)}"
            # For a second the kernel answers from what it remembers.
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                found = await in_thread(lambda: using(device), HUNG_S)
                assert user.pid not in [each.pid for each in found]
            os.kill(helper, signal.SIGCONT)
        assert await it.clean() == []

    try:
        uvloop.run(main())
    finally:
        for pid in helpers(place):
            os.kill(pid, signal.SIGCONT)
        remove(place)
