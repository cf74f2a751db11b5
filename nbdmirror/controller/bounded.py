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
import threading
from collections.abc import Callable, Sequence
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
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=streams[0],
            stderr=streams[1],
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        return None, f"{words[0]}: {error.strerror}"
    try:
        return await asyncio.wait_for(process.wait(), bound_s), ""
    except TimeoutError:
        return None, f"no end within {bound_s:g} s"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILLED_S)


def _said(descriptor: int) -> str:
    return os.pread(descriptor, SAID_BYTES_MAX, 0).decode(errors="replace").strip()
