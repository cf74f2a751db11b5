"""What the tests of the kernel's NBD client run in a guest: `python -m ... ` without arguments.

Owns the attachment over a plain nbdkit in the guest, through its ends: in order, taken over, under
a server that is dead or frozen. Prints what it saw as lines of JSON, which the test outside judges.
Must never: run on the host.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from nbdmirror.controller.scripts import run
from tests.controller.attaching import (
    CONTROLLER,
    Server,
    attachment,
    helpers,
    made,
    mounted,
    writer,
)
from tests.controller.doing import BOUND_S, alive, running, script
from tests.guest.guest import DISK, MODULES

PLACE = Path("/run/place")
NBD = Path("/sys/block/nbd0")


def tell(what: str, **facts: Any) -> None:
    """One line for the test outside."""
    sys.stdout.write(json.dumps({what: facts}) + "\n")
    sys.stdout.flush()


def left() -> list[str]:
    """What is on this machine of the attachment, found without the code under test."""
    found = [*map(str, helpers(PLACE)), *mounted(PLACE)]
    return [*found, *(str(pid) for pid in Path("/sys/block").glob("nbd*/pid"))]


def client() -> int:
    """The pid of nbd-client. It also forks a child, which ends when it has read the partitions."""
    return int((NBD / "pid").read_text())


def flags_of(pid: int) -> int:
    """The flags of a process: field 9 of proc_pid_stat(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])


def adjust(value: str) -> None:
    """How the OOM killer sees this process."""
    Path("/proc/self/oom_score_adj").write_text(value)


def adjustment_of(pid: int) -> str:
    """How the OOM killer sees a process."""
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()


async def in_order(_server: Server) -> None:
    """From attach to detach, twice: what was written is there."""
    told: list[str] = []
    it = await made(PLACE, told)
    facts = it.facts()
    flags = flags_of(client())
    (PLACE / "mnt" / "file").write_text("kept")
    said = [*await it.unmount(force=False), *await it.detach(force=False)]
    between = left()
    await it.attach()
    await it.mount()
    kept = (PLACE / "mnt" / "file").read_text()
    said += [*await it.unmount(force=True), *await it.detach(force=True)]
    adjust("-1000")
    # What protects the controller is not for the application.
    does = script(PLACE / "does", "cat /proc/self/oom_score_adj")
    environment = {"PATH": "/usr/bin:/bin"}
    outcome = await run(
        [str(does)], timeout_s=60, environment=environment, log=PLACE / "log", name="test"
    )
    adjust("0")
    tell("in_order", facts=facts, said=said, between=between, kept=kept, left=left(), told=told,
         flags=flags, of_script=outcome.tail)  # fmt: skip


async def taken_over(_server: Server) -> None:
    """A controller is killed, the next one goes on."""
    first = await made(PLACE)
    said = [*await first.unmount(force=False), *await first.detach(force=False)]
    with running(*CONTROLLER, str(PLACE)) as controller:
        os.kill(controller.pid, signal.SIGKILL)
        controller.wait(BOUND_S)
    before = client()
    adjusted = adjustment_of(before)
    it = attachment(PLACE)
    with writer(PLACE / "mnt") as application:
        leftovers = await it.leftovers()
        adopted = await it.adopt()
        device = await it.attach()
        await it.mount()
        still = alive(application.pid) and alive(before) and client() == before
        await it.unmount(force=True)
    said += await it.detach(force=False)
    tell("taken_over", leftovers=leftovers, adopted=adopted, device=device, still=still,
         said=said, left=left(), helper_adjusted=adjusted)  # fmt: skip


async def dead(server: Server) -> None:
    """The server dies under the mounted file system."""
    await ends("dead", server.kill)


async def frozen(server: Server) -> None:
    """The server hangs under the mounted file system."""
    await ends("frozen", server.freeze)


async def ends(what: str, how: Callable[[], None]) -> None:
    """What clean() says and leaves when the server ends so."""
    it = await made(PLACE)
    with writer(PLACE / "mnt") as application:
        how()
        began = time.monotonic()
        said = await it.clean()
        took_s = time.monotonic() - began
        tell(what, said=said, took_s=took_s, left=left(), user=alive(application.pid))


async def refused(server: Server) -> None:
    """No server: nothing is left, and the device is free for the next one."""
    server.kill()
    it = attachment(PLACE)
    try:
        await it.attach()
    except Exception as error:  # noqa: BLE001 - the test outside judges it
        tell("refused", kind=type(error).__name__, text=str(error), left=left())


def main() -> None:
    """One after the other, each with a server of its own."""
    module = f"{MODULES}/{os.uname().release}/kernel/drivers/block/nbd.ko"
    subprocess.run(["insmod", module], check=True, timeout=BOUND_S)
    PLACE.mkdir()
    programs: tuple[Callable[[Server], Awaitable[None]], ...]
    programs = (in_order, taken_over, dead, frozen, refused)
    for program in programs:
        server = Server(PLACE)

        async def one(
            program: Callable[[Server], Awaitable[None]] = program, server: Server = server
        ) -> None:
            await program(server)

        uvloop.run(one())
        server.kill()
        for name in ("nbdkit.pid", "s"):
            (PLACE / name).unlink(missing_ok=True)


if __name__ == "__main__":
    # A disk of the host has another name; this stops a hand that forgot where it is.
    assert Path(DISK).is_block_device(), "this runs in a guest"
    main()
