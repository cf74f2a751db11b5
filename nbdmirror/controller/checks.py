"""Looks once at what a checker watches, and says in one sentence what is wrong.

Owns the nine kinds of checks (`[[checker]]` in docs/checkers.md), the threads and processes that
they need, and the bound of each. Must never block the loop, raise, keep a state between two checks
of what was seen, or act on it: `checkers.py` counts, the controller acts.

Whatever may hang in the kernel runs elsewhere. System calls run on a daemon thread, at most one for
each checker: a thread that hangs stays until the kernel lets it go, and a second one would hang
beside it. It is not a thread of the loop's pool, which others need and which an end of the process
waits for. Programs are their own processes, killed with all they started; so is the look at a file
system, because a thread that hangs in one would keep a controller that was killed from ending.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Final

import aiohttp
import psutil

from nbdmirror.config_cluster import INTERFACE_CHARS_MAX, CheckerSection
from nbdmirror.config_fields import format_size
from nbdmirror.controller.ping import ping_any
from nbdmirror.limits import KIB

# What a check may take beyond its time-out.
PING_MARGIN_MS: Final = 250  # ping ends itself, with a better reason
KILL_WAIT_S: Final = 0.25
OUTPUT_BYTES_MAX: Final = 4 * KIB
OUTPUT_READ_BYTES: Final = 64 * KIB
REASON_CHARS_MAX: Final = 1024
# Long enough for the class name at the end of Java's command lines, short enough for an expression.
COMMAND_LINE_CHARS_MAX: Final = 64 * KIB
FILE_SYSTEM_LOOK: Final = str(Path(__file__).with_name("file_system_look.py"))
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER_AGENT: Final = "nbdmirror-checker"
RESET: Final = struct.pack("ii", 1, 0)  # struct linger: on, 0 s

# linux/sockios.h and net/if.h; RUNNING is the kernel's word for an operational state that is "up",
# or "unknown" for devices without one (lo, tun). Asked by ioctl, not in /sys, because /sys may show
# the interfaces of another network namespace than the one that this process is in.
SIOCGIFFLAGS: Final = 0x8913
IFF_UP: Final = 0x1
IFF_RUNNING: Final = 0x40


async def check(section: CheckerSection) -> str:
    """Look once: "" when it is good, else the reason in one sentence.

    Ends within `timeout_ms`, and half a second more where a process has to be killed. Raises
    nothing but CancelledError.
    """
    bound_ms = section.timeout_ms + (PING_MARGIN_MS if section.kind == "ping" else 0)
    try:
        async with asyncio.timeout(bound_ms / 1000):
            return await _LOOKS[section.kind](section)
    except TimeoutError:
        return f"no answer within {section.timeout_ms} ms"
    except Exception as error:  # noqa: BLE001 - a checker that dies watches nothing any more
        return _printable(f"the check itself failed: {type(error).__name__}: {error}")


def _said(error: OSError) -> str:
    """What the system said, without the decorations of a library."""
    # Name servers and TLS have numbers of their own.
    if isinstance(error, socket.gaierror | ssl.SSLError) or error.errno is None:
        return _printable(error.strerror or str(error))
    return os.strerror(error.errno)


def _printable(text: str) -> str:
    """Text from outside as a part of one line: no control characters, and not too long."""
    return _one_line(text)[:REASON_CHARS_MAX]


def _one_line(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


# --- on a thread --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """One check on its thread."""

    since_s: float = field(default_factory=monotonic)
    done: "concurrent.futures.Future[str]" = field(default_factory=concurrent.futures.Future)


# By the name of the checker; an entry goes when its thread ends.
_runs: dict[str, _Run] = {}


def _aside(look: Callable[[CheckerSection], str]) -> Callable[[CheckerSection], Awaitable[str]]:
    """`look`, on a daemon thread."""

    async def looked(section: CheckerSection) -> str:
        before = _runs.get(section.name)
        # The thread of a check that was cancelled is about to end; one that hangs is not.
        if before is not None and not await _ends(before, section.timeout_ms / 2000):
            return f"the last check has not returned for {monotonic() - before.since_s:.0f} s"
        return await asyncio.wrap_future(_started(look, section).done)

    return looked


async def _ends(run: _Run, wait_s: float) -> bool:
    done, _ = await asyncio.wait((asyncio.wrap_future(run.done),), timeout=wait_s)
    return bool(done)


def _started(look: Callable[[CheckerSection], str], section: CheckerSection) -> _Run:
    run = _Run()
    # From here on a waiter that is cancelled does not cancel it.
    run.done.set_running_or_notify_cancel()

    def work() -> None:
        try:
            reason = look(section)
        except OSError as error:
            reason = f"{section.kind}: {_said(error)}"
        except Exception as error:  # noqa: BLE001 - the waiter has to hear of it
            reason = _printable(f"the check itself failed: {type(error).__name__}: {error}")
        _runs.pop(section.name, None)
        run.done.set_result(reason)

    _runs[section.name] = run
    try:
        threading.Thread(target=work, name=f"check {section.name}", daemon=True).start()
    except RuntimeError:
        _runs.pop(section.name, None)
        raise
    return run


def _process(section: CheckerSection) -> str:
    assert section.pattern is not None, "the configuration requires it"
    pattern = re.compile(section.pattern)
    # The controller's own command line may well hold the pattern: as an argument, or by its path.
    own = {os.getpid(), *(each.pid for each in psutil.Process().parents())}
    count = 0
    for pid in psutil.pids():
        count += pid not in own and _matches(pid, pattern)
        if count >= section.count_min and not section.count_max:
            return ""
    wanted = f'match "{_printable(section.pattern)}"'
    if count < section.count_min:
        return f"{count} processes {wanted}, at least {section.count_min} expected"
    if section.count_max and count > section.count_max:
        return f"{count} processes {wanted}, at most {section.count_max} expected"
    return ""


def _matches(pid: int, pattern: re.Pattern[str]) -> bool:
    """Whether a process that lives has the pattern in its name or its command line."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            # What has ended and waits for its parent does no work any more.
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            command_line = " ".join(process.cmdline())[:COMMAND_LINE_CHARS_MAX]
            return bool(pattern.search(process.name()) or pattern.search(command_line))
    except psutil.Error:
        return False  # it has ended meanwhile


def _interface(section: CheckerSection) -> str:
    assert section.interface is not None, "the configuration requires it"
    name = os.fsencode(section.interface)
    missing = f"there is no interface {section.interface}"
    if len(name) > INTERFACE_CHARS_MAX:
        return missing
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            answer = fcntl.ioctl(asked, SIOCGIFFLAGS, struct.pack("16sH14x", name, 0))
    except OSError as error:
        return missing if error.errno == errno.ENODEV else f"{section.interface}: {_said(error)}"
    (flags,) = struct.unpack("16xH14x", answer)
    if not flags & IFF_UP:
        return f"{section.interface} is switched off"
    return "" if flags & IFF_RUNNING else f"{section.interface} has no carrier"


def _address(section: CheckerSection) -> str:
    assert section.held is not None, "the configuration requires it"
    wanted = ipaddress.ip_interface(section.held).ip
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family in {socket.AF_INET, socket.AF_INET6} and wanted == ipaddress.ip_address(
                each.address.partition("%")[0]
            ):
                return ""
    return f"{wanted} is on no interface of this node"


# --- as a process -------------------------------------------------------------------------------

# Processes that were started and are not reaped, by the name of the checker. After a check is over,
# that is one which SIGKILL does not end.
_processes: dict[str, "subprocess.Popen[bytes]"] = {}


async def _hangs(name: str) -> str:
    before = _processes.get(name)
    if before is None or before.poll() is not None:
        return ""
    # One of a check that was cancelled just now is about to end.
    descriptor = _pidfd(before)
    try:
        await _ended(descriptor, KILL_WAIT_S)
    finally:
        os.close(descriptor)
    if before.poll() is not None:
        return ""
    return f"the last run, process {before.pid}, hangs and cannot be killed"


class _Output:
    """A pipe for both outputs of a process; keeps the end of what it said."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # The reader is this process; to the program it is a pipe like any other.
        os.set_blocking(self.write, True)
        self._said = bytearray()
        asyncio.get_running_loop().add_reader(self._read, self._take)

    def _take(self) -> None:
        """Read what is there; at most what a pipe holds. This end of it hides the end of file."""
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._read, OUTPUT_READ_BYTES)
            del self._said[:-OUTPUT_BYTES_MAX]

    def text(self) -> str:
        """The last of what the process said, in one line."""
        self._take()
        # Programs say last what was wrong.
        return _one_line(self._said.decode("utf-8", "replace"))[-REASON_CHARS_MAX:]

    def close(self) -> None:
        """Give the pipe back."""
        asyncio.get_running_loop().remove_reader(self._read)
        os.close(self._read)
        os.close(self.write)


async def _run(name: str, words: Sequence[str]) -> tuple[int, str]:
    """Run a program to its end: its exit code (below 0: the signal) and what it said.

    However it ends, no process of its group is left, if the kernel lets them go. Raises OSError.

    Not the loop's own way to run programs: uvloop does not close while one that it started hangs,
    and both loops reap a process before they tell, so its number could be another's when its group
    is killed. Here it is killed first.
    """
    output = _Output()
    try:
        process = _spawn(words, output.write)
        _processes[name] = process
        descriptor = _pidfd(process)
        try:
            await _ended(descriptor, None)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            try:
                await _ended(descriptor, KILL_WAIT_S)
            finally:
                os.close(descriptor)
            if process.poll() is not None:
                _processes.pop(name, None)
        return process.returncode, output.text()
    finally:
        output.close()


def _spawn(words: Sequence[str], output: int) -> "subprocess.Popen[bytes]":
    """Start a program, as the leader of a session. Takes some milliseconds of the loop."""
    return subprocess.Popen(  # noqa: S603 - words of the configuration; no shell
        words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        cwd="/",
        env=_environment(),
    )


def _pidfd(process: "subprocess.Popen[bytes]") -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError:  # there are no descriptors left; the next check reaps it
        process.kill()
        raise


async def _ended(descriptor: int, wait_s: float | None) -> None:
    """Until a process has ended, or the time is over; it is not reaped."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _settle, ended)
    try:
        # Not asyncio.timeout: within one that has run out it raises CancelledError (Python 3.11.2).
        await asyncio.wait((ended,), timeout=wait_s)
    finally:
        loop.remove_reader(descriptor)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _environment() -> Mapping[str, str]:
    mirror = os.environ.get("NBDMIRROR_MIRROR")
    more = {} if mirror is None else {"NBDMIRROR_MIRROR": mirror}
    return {"PATH": PATH, "LANG": "C.UTF-8", **more}


async def _command(section: CheckerSection) -> str:
    if hangs := await _hangs(section.name):
        return hangs
    # The loop waits until the new process has become its program, and a program on a file system
    # that hangs is not read: so it is `nice`, from the system's own disk, that becomes the program.
    nice = shutil.which("nice", path=PATH)
    if nice is None:
        return f"nice (coreutils) is in none of {PATH}"
    code, said = await _run(section.name, (nice, "-n", "0", *section.command))
    if not code:
        return ""
    what = f"signal {-code} ended it" if code < 0 else f"exit code {code}"
    return f"{what}: {said}" if said else what


async def _filesystem(section: CheckerSection) -> str:
    assert section.path is not None, "the configuration requires it"
    if hangs := await _hangs(section.name):
        return hangs
    name = f".nbdmirror-{os.getpid()}-{section.name}"
    looks = (sys.executable, "-I", "-S", FILE_SYSTEM_LOOK)
    least = str(section.free_min)
    code, said = await _run(section.name, (*looks, str(section.path), name, least))
    if code == 1 and said.endswith(" bytes free"):
        return f"{said}, {format_size(section.free_min)} expected"
    return said or (f"the check itself failed: exit code {code}" if code else "")


async def _unit(section: CheckerSection) -> str:
    assert section.unit is not None, "the configuration requires it"
    if hangs := await _hangs(section.name):
        return hangs
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return "systemd does not run here: there is no systemctl"
    code, said = await _run(section.name, (systemctl, "is-active", "--", section.unit))
    return f"{section.unit} is not active: {said or f'exit code {code}'}" if code else ""


# --- over the network ---------------------------------------------------------------------------


async def _tcp(section: CheckerSection) -> str:
    assert section.address is not None, "the configuration requires it"
    address = section.address
    try:
        _, writer = await asyncio.open_connection(address.host, address.port)
    except OSError as error:
        return f"{address} takes no connection: {_said(error)}"
    mine, theirs = (writer.get_extra_info(each) for each in ("sockname", "peername"))
    if mine == theirs:
        # Without a listener a connection to one of this node's short-lived ports can be given that
        # very port as its own, and TCP lets it meet itself. Closed in the usual way it would keep
        # the port from the application for a minute.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return f"{address} takes no connection: nobody listens" if mine == theirs else ""


async def _http(section: CheckerSection) -> str:
    assert section.url is not None, "the configuration requires it"
    try:
        status = await _status(section.url)
    except aiohttp.ClientError as error:
        return _printable(_without_url(error))
    return "" if status == section.status else f"answers {status}, {section.status} expected"


def _without_url(error: aiohttp.ClientError) -> str:
    """What went wrong. The URL may hold a password, and the texts of some errors hold the URL."""
    if isinstance(error, aiohttp.InvalidURL):
        return "url is not the address of a page"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"no answer of HTTP: {error.message}"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"the certificate is not trusted: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"takes no connection: {_said(error.os_error)}"
    return f"no answer: {_said(error) if isinstance(error, OSError) else error}"


async def _status(url: str) -> int:
    """The status of the page at `url`; its body is not asked for. Raises aiohttp.ClientError."""
    connector = aiohttp.TCPConnector(force_close=True, use_dns_cache=False)
    async with (
        aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": USER_AGENT},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # check() has the bound
            auto_decompress=False,
        ) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        response.close()
        return response.status


async def _ping(section: CheckerSection) -> str:
    return await ping_any(section.hosts, section.timeout_ms)


_LOOKS: Final[dict[str, Callable[[CheckerSection], Awaitable[str]]]] = {
    "process": _aside(_process),
    "unit": _unit,
    "tcp": _tcp,
    "http": _http,
    "ping": _ping,
    "interface": _aside(_interface),
    "address": _aside(_address),
    "filesystem": _filesystem,
    "command": _command,
}
