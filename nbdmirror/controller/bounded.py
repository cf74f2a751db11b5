"""Calls and commands of the system that may never return: each gets a bound here.

Owns the thread of its own for a call that may hang, and the short command of the system whose
answer is wanted (mount, losetup). Must never: block the loop, use a shell, wait longer than the
bound for anything, or keep the program from ending because something hangs. The scripts of an
operator are run by `scripts`.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

Result = TypeVar("Result")

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT: Final = {"PATH": PATH, "LANG": "C.UTF-8"}
SAID_BYTES_MAX: Final = 64 * 1024
KILLED_S: Final = 1.0  # so long a killed command may take to be gone; a hung one is left behind


async def in_thread(call: Callable[[], Result], bound_s: float) -> Result:
    """What `call` returns or raises, from a thread of its own.

    The thread is a daemon: one that hangs in the kernel is left behind, takes no place in a pool,
    and is not waited for at the end of the program.

    Raises:
        TimeoutError: no answer within `bound_s`; the call may still be going on.
    """
    promise: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        if promise.set_running_or_notify_cancel():
            try:
                promise.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                promise.set_exception(error)

    threading.Thread(target=work, name=getattr(call, "__name__", "call"), daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(promise), bound_s)


# --- processes ------------------------------------------------------------------------------------


def start(words: Sequence[str], environment: Mapping[str, str], out: int, error: int) -> int:
    """Start a program in a session of its own; returns its pid, to be given to ended().

    It gets these descriptors and no other one of this program. Not by the loop: uvloop hands on
    what is inheritable, and copies of this program's own output, which a daemon would keep for
    ever; and asyncio kills its children when the loop is closed.

    Raises:
        OSError: it cannot be started.
    """
    child = subprocess.Popen(  # noqa: S603 - no shell; the words are the operator's or ours
        words,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=error,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    # Its end is not Popen's to wait for, and not its to complain about.
    child.returncode = 0
    return child.pid


async def ended(pid: int) -> int:
    """Wait for the end of a child; returns its exit code, or minus the signal that ended it.

    Cancelled, it can be called again.
    """
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    end: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _settle, end)
    try:
        await end
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222 - it has ended


def _settle(end: "asyncio.Future[None]") -> None:
    if not end.done():
        end.set_result(None)


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended. `code`: None when it did not start or not end within its bound."""

    code: int | None
    out: str
    error: str

    @property
    def ok(self) -> bool:
        """Exit code 0."""
        return self.code == 0


async def command(words: Sequence[str], bound_s: float) -> Done:
    """Run one command of the system to its end.

    One that does not end within `bound_s` is killed; one that the kernel holds is left behind.
    Never raises for what the command does; `error` says what went wrong, on one line.
    """
    out, err = os.memfd_create("out"), os.memfd_create("err")
    try:
        code, why = await _to_its_end(words, bound_s, (out, err))
        error = why or " ".join(_said(err).split()) or ("" if code == 0 else f"exit code {code}")
        return Done(code, _said(out), error)
    finally:
        os.close(out)
        os.close(err)


async def _to_its_end(
    words: Sequence[str], bound_s: float, streams: tuple[int, int]
) -> tuple[int | None, str]:
    try:
        pid = start(words, ENVIRONMENT, *streams)
    except OSError as error:
        return None, f"{words[0]}: {error.strerror}"
    code: int | None = None
    try:
        code = await asyncio.wait_for(ended(pid), bound_s)
    except TimeoutError:
        return None, f"no end within {bound_s:g} s"
    finally:
        if code is None:
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended(pid), KILLED_S)
    return code, ""


def _said(descriptor: int) -> str:
    return os.pread(descriptor, SAID_BYTES_MAX, 0).decode(errors="replace").strip()
