"""The export of the engine as a block device of this machine.

Owns: the choice between the kernel's NBD client and nbdfuse with a loop device, the start of the
helper process, and its protection. Must never: start the helper so that it ends with this program
(a device that vanishes under a mounted file system is a crash of the application), or clean up:
what is left after an error is `attachment`'s to remove.

The loop device is kept open here and detached at once, so the kernel frees it by itself when
neither this program nor a mount uses it any more, however this program ends. No --nooverlap: that
asks for the file behind every loop device of the machine, and waits for ever where that is on a
file system of somebody else whose server is stuck.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdmirror.controller.bounded import ENVIRONMENT, PATH, command, in_thread, start
from nbdmirror.controller.mounts import at, mounts
from nbdmirror.controller.processes import Process, process, reap
from nbdmirror.controller.traces import BLOCK, FUSE, KERNEL, Places, Record, write_record
from nbdmirror.errors import RefusedError
from nbdmirror.files import FILE_MODE
from nbdmirror.limits import KIB
from nbdmirror.memory import OOM_SCORE_ADJ, PR_SET_IO_FLUSHER

ATTACH_S: Final = 10.0
COMMAND_S: Final = 10.0
SPAWN_S: Final = 5.0
POLL_S: Final = 0.02
# A request of the kernel's client fails after this. Twice what a freeze may take by default: an
# engine that waits for a verdict must not cost the file system. Measured with Linux 6.1: while a
# frozen engine takes no more bytes, nothing but its death frees the device any sooner.
NBD_TIMEOUT_S: Final = 60
TAIL_BYTES: Final = 1 * KIB
PACKAGES: Final = {"nbd-client": "nbd-client", "nbdfuse": "libnbd-bin or nbdfuse"}


@dataclass(slots=True)
class Attached:
    """A device. `held`: the descriptor that keeps a loop device, or -1."""

    kind: str
    device: str
    helper: Process
    held: int = -1


def choice(wanted: str) -> str:
    """KERNEL or FUSE, for a value of `mount.attach`."""
    if wanted == "kernel" or (wanted == "auto" and has_kernel_client()):
        return KERNEL
    return FUSE


def has_kernel_client() -> bool:
    """Whether the kernel has NBD devices, and the program that connects them is there."""
    return (BLOCK / "nbd0").exists() and shutil.which("nbd-client", path=PATH) is not None


async def attach(
    kind: str, places: Places, timeout_s: int, tell: Callable[[str], None]
) -> Attached:
    """Make the device. `timeout_s`: bound of one request, of the kernel's client alone.

    Raises:
        RefusedError: it cannot be made; parts of it may be there.
    """
    try:
        if kind == KERNEL:
            made = await _kernel(places, timeout_s, tell)
        else:
            made = await _fuse(places, tell)
    except TimeoutError as error:
        raise RefusedError(f"the device of {places.mirror}: the system does not answer") from error
    except OSError as error:
        raise RefusedError(
            f"the device of {places.mirror} cannot be made: {error}; see {places.log}"
        ) from error
    _note(places, made, tell)
    return made


def _note(places: Places, made: Attached, tell: Callable[[str], None]) -> None:
    """A full disk under run_dir costs the adoption by the next controller, and nothing else."""
    record = Record(made.kind, made.device, made.helper.pid, made.helper.started)
    try:
        write_record(places.record, record)
    except OSError as error:
        tell(f"{places.record} cannot be written ({error.strerror}): a controller that is started "
             "again does not adopt the device, and restarts the application")  # fmt: skip


# --- the kernel's client --------------------------------------------------------------------------


async def _kernel(places: Places, timeout_s: int, tell: Callable[[str], None]) -> Attached:
    if not (BLOCK / "nbd0").exists():
        raise RefusedError(
            'attach = "kernel": this kernel has no NBD devices; `modprobe nbd`, or attach = "fuse"'
        )
    tried: list[str] = []
    while name := _free_device(tried):
        tried.append(name)
        device = f"/dev/{name}"
        # Without netlink: that family exists only in the first network namespace, and with the
        # client as a process of ours the device ends with it.
        words = ["nbd-client", "-unix", str(places.export), device, "-nonetlink", "-nofork",
                 "-timeout", str(timeout_s)]  # fmt: skip
        helper = await _start(words, places, tell)
        made = Attached(KERNEL, device, helper)
        _note(places, made, tell)
        pid, size = BLOCK / name / "pid", BLOCK / name / "size"

        def connected(pid: Path = pid, size: Path = size, helper: Process = helper) -> bool:
            return (
                pid.exists() and pid.read_text() == f"{helper.pid}\n" and size.read_text() != "0\n"
            )

        try:
            await _until(connected, helper, f"nbd-client connects {device}", places)
        except RefusedError:
            if process(helper.pid) == helper or not pid.exists():
                raise
            continue  # another program was quicker with this device
        return made
    raise RefusedError("all NBD devices of this machine are in use; raise nbds_max of the module")


def _free_device(tried: Sequence[str]) -> str:
    names = sorted((each.name for each in BLOCK.glob("nbd*")), key=lambda n: (len(n), n))
    free = (n for n in names if n not in tried and not (BLOCK / n / "pid").exists())
    return next(free, "")


# --- nbdfuse and a loop device --------------------------------------------------------------------


async def _fuse(places: Places, tell: Callable[[str], None]) -> Attached:
    places.fuse.mkdir(mode=0o700, exist_ok=True)
    words = ["nbdfuse", str(places.file), "--unix", str(places.export)]
    helper = await _start(words, places, tell)
    made = Attached(FUSE, "", helper)
    _note(places, made, tell)
    await _until(
        lambda: at(places.fuse, mounts()) is not None, helper, "nbdfuse has mounted", places
    )
    options = ["losetup", "--find", "--show", str(places.file)]
    done = await command([*options, "--direct-io=on"], COMMAND_S)
    if not done.ok:
        done = await command(options, COMMAND_S)
    if not done.ok:
        raise RefusedError(f"no loop device over {places.file}: {done.error}")
    made.device = done.out
    made.held = await hold(made.device)
    return made


async def hold(device: str) -> int:
    """A descriptor that keeps a loop device, which ends by itself from now on.

    Raises:
        OSError (TimeoutError): the device does not open.
    """
    abandoned = threading.Event()

    def opened() -> int:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        if abandoned.is_set():
            os.close(descriptor)
        return descriptor

    try:
        held = await in_thread(opened, COMMAND_S)
    except BaseException:
        abandoned.set()  # nobody else would close it
        raise
    await command(["losetup", "--detach", device], COMMAND_S)
    return held


# --- the helper -----------------------------------------------------------------------------------


async def _start(words: list[str], places: Places, tell: Callable[[str], None]) -> Process:
    """Start nbdfuse or nbd-client so that it lives on without this program.

    Raises:
        RefusedError: it is not installed, or ended at once. OSError: the system refuses.
    """
    if shutil.which(words[0], path=PATH) is None:
        raise RefusedError(f"{words[0]} is not installed: apt-get install {PACKAGES[words[0]]}")
    helper, refused = await in_thread(lambda: _spawn(words, places.log), SPAWN_S)
    for each in refused:
        tell(f"{words[0]} is not protected from a full memory: {each}")
    if helper is None:
        raise _ended(words[0], places)
    return replace(helper, name=words[0])  # it may be read before exec has changed it


def _spawn(words: list[str], log: Path) -> tuple[Process | None, list[str]]:
    """In a thread of its own: what is declared here is the thread's, and inherited."""
    refused: list[str] = []
    libc = ctypes.CDLL(None, use_errno=True)
    # It must not wait for dirty pages of the device that it serves.
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        refused.append(f"declaring an I/O flusher: {os.strerror(ctypes.get_errno())}")
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(log.name + ".1"))  # what the last one said in the end
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        out = os.open(log, flags, FILE_MODE)
    except OSError:
        out = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = start(words, ENVIRONMENT, out, out)
    finally:
        os.close(out)
    try:
        adjust = Path(f"/proc/{pid}/oom_score_adj")
        adjust.write_text(f"{OOM_SCORE_ADJ}\n", encoding="ascii")
    except OSError as error:
        refused.append(f"lowering oom_score_adj: {error.strerror}; let the service manager do it")
    helper = process(pid)
    if helper is None:
        os.waitpid(pid, os.WNOHANG)
    return helper, refused


def _ended(name: str, places: Places) -> RefusedError:
    return RefusedError(f"{name} ended before the device was there; it said: {_tail(places.log)}")


async def _until(ready: Callable[[], bool], helper: Process, what: str, places: Places) -> None:
    """Wait for the text of /proc or /sys to say so.

    Raises:
        RefusedError: the helper ended, or it took longer than ATTACH_S.
    """
    until = time.monotonic() + ATTACH_S
    while not ready():
        if process(helper.pid) != helper:
            reap(helper.pid, helper.started)
            raise _ended(helper.name, places)
        if time.monotonic() > until:
            raise RefusedError(f"not within {ATTACH_S:g} s: {what}; does the engine answer?")
        await asyncio.sleep(POLL_S)


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return ""
