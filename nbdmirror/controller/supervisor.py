"""The engine's process: started, adopted, watched through its pidfd, ended.

Owns the listening NBD sockets, which outlive every engine (a client that connects during a restart
waits instead of failing), the lock that keeps a second controller or launcher away, and the bound
on restarts. The engine is no child in death: it goes on when this process ends, and the next
controller adopts it with its sockets. Must never: decide when an engine is started or ended.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Final

from nbdmirror import launcher
from nbdmirror.becoming import LISTEN_FDS_START
from nbdmirror.config import Config
from nbdmirror.errors import RefusedError, UnreachableError
from nbdmirror.files import require_socket_path
from nbdmirror.jsonlines import PEERCRED
from nbdmirror.limits import ENGINE_RESTART_WINDOW_MS, ENGINE_RESTARTS_MAX, MIB

START_S: Final = 20.0
LOOK_S: Final = 0.02
KILL_S: Final = 5.0
LOG_BYTES_MAX: Final = MIB
PACKAGE_ROOT: Final = str(Path(__file__).resolve().parents[2])
SYS_PIDFD_GETFD: Final = 438  # x86_64 and aarch64, Linux 5.6; Python has no name for it
# Runs between fork and nbdkit. An nbdkit that is started by socket activation ends with its parent
# (PR_SET_PDEATHSIG, seen in 1.32.5), so the parent has to be the first process of the machine.
# Tells its pid on standard output.
SHIM: Final = """
import os, sys
sys.path.append(sys.argv[1])
from nbdmirror.becoming import become
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    os.sched_yield()
os.setsid()
os.write(1, str(os.getpid()).encode())
os.dup2(2, 1)
places = dict(map(int, each.split("=")) for each in sys.argv[2].split(","))
become(places, sys.argv[4:], dict(os.environ), prepare=sys.argv[3] == "prepare")
"""


class Supervisor:
    """One engine at a time. `on_end` is called once for each that ended, with a sentence."""

    def __init__(
        self, config: Config, on_end: Callable[[str], None], tell: Callable[[str], None]
    ) -> None:
        self._config = config
        self._on_end = on_end
        self._tell = tell
        self._lock = -1
        self._sockets: list[socket.socket] = []
        self._pidfd = -1
        self._starts: deque[float] = deque()
        self._gone = asyncio.Event()
        self._gone.set()
        self.pid = 0

    @property
    def alive(self) -> bool:
        """Whether there is an engine's process."""
        return self.pid != 0

    def open(self) -> None:
        """Take the lock of this mirror on this node.

        Raises:
            RefusedError: another controller or launcher has it. ConfigError: no place for it.
        """
        run_dir = self._config.me.run_dir
        for path in (self._config.control_socket, self._config.controller_socket):
            require_socket_path(path)
        require_socket_path(self._config.export_unix)
        launcher.make_directory(run_dir, "run_dir")
        self._lock = launcher.take_lock(run_dir / "launcher.lock")

    def adopt(self, pid: int) -> None:
        """Watch an engine that an earlier controller left, and take its sockets over.

        Raises:
            RefusedError: there is no such process any more.
        """
        try:
            self._watch(pid)
        except OSError as error:
            raise RefusedError(f"the engine {pid} cannot be watched: {error.strerror}") from error
        self._sockets = list(sockets_of(self._pidfd, str(self._config.export_unix)))
        if not self._sockets:
            self._tell(
                "the sockets of the adopted engine cannot be had; the next one gets new ones"
            )

    # --- start ----------------------------------------------------------------------------------

    def given_up(self) -> str:
        """Why no further engine is started; "" while one may be."""
        self._forget_old_starts()
        if len(self._starts) <= ENGINE_RESTARTS_MAX:
            return ""
        minutes = ENGINE_RESTART_WINDOW_MS // 60_000
        return (
            f"the engine was started {len(self._starts)} times within {minutes} minutes and ended "
            f"each time; its log is {self.log_path}; `nbdmirror start` tries again"
        )

    def forgive(self) -> None:
        """An operator asked for a start: count anew."""
        self._starts.clear()

    def note_success(self) -> None:
        """What ended on purpose was no failure."""
        if self._starts:
            self._starts.pop()

    def _forget_old_starts(self) -> None:
        while self._starts and monotonic() - self._starts[0] > ENGINE_RESTART_WINDOW_MS / 1000:
            self._starts.popleft()

    @property
    def log_path(self) -> Path:
        """Standard error of the engines: a file, so that it outlives this process, too."""
        return self._config.me.run_dir / "engine.log"

    async def start(self) -> None:
        """Start an engine and wait until its control socket answers.

        Raises:
            NbdMirrorError: it did not come up; the text has the end of its log.
        """
        assert not self.alive, "one at a time"
        if not self._sockets:
            launcher.require_no_engine(self._config.control_socket)
            self._sockets = launcher.listening_sockets(self._config)
        made = await asyncio.to_thread(launcher.prepared, self._config, self._sockets)
        log = self._open_log()
        try:
            pid = await asyncio.to_thread(spawn, made, log)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise UnreachableError(f"{made.command[0]}: cannot be started: {error}") from error
        finally:
            made.close()
            os.close(log)
        self._starts.append(monotonic())
        try:
            self._watch(pid)
        except OSError as error:
            raise UnreachableError(
                f"the engine ended at its start: {self._last_words()}"
            ) from error
        await self._answering()

    def _open_log(self) -> int:
        path = self.log_path
        with contextlib.suppress(OSError):
            if path.stat().st_size > LOG_BYTES_MAX:
                shutil.move(path, path.with_suffix(".log.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except OSError:
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    async def _answering(self) -> None:
        until = monotonic() + START_S
        while monotonic() < until:
            if not self.alive:
                raise UnreachableError(f"the engine ended at its start: {self._last_words()}")
            try:
                _, writer = await asyncio.open_unix_connection(str(self._config.control_socket))
            except OSError:
                await asyncio.sleep(LOOK_S)
                continue
            writer.close()
            return
        self.kill()
        raise UnreachableError(f"the engine did not answer within {START_S:g} s of its start")

    def _last_words(self) -> str:
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return f"see {self.log_path}"
        return lines[-1] if lines else "it said nothing"

    # --- end ------------------------------------------------------------------------------------

    def _watch(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        self.pid = pid
        self._gone.clear()
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd, self.pid = -1, 0
        self._gone.set()
        self._on_end("the engine ended")

    def kill(self) -> None:
        """SIGKILL; its end is told like any other."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def gone(self, bound_s: float) -> bool:
        """Wait for the engine's end; False when the time ran out."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), bound_s)
        return not self.alive

    def close(self) -> None:
        """Let go of everything; an engine that runs goes on."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        for each in self._sockets:
            each.close()
        self._sockets = []
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def spawn(made: launcher.Prepared, log: int) -> int:
    """The pid of an nbdkit that is nobody's child here.

    Raises:
        OSError, ValueError, SubprocessError: there is none.
    """
    places = ",".join(f"{to}={each}" for to, each in made.places.items())
    how = (PACKAGE_ROOT, places, "prepare" if made.prepare else "")
    shim = subprocess.run(  # noqa: S603 - a fixed command
        [sys.executable, "-I", "-S", "-c", SHIM, *how, *made.command],
        pass_fds=tuple(made.places.values()), env=launcher.environment(), timeout=START_S,
        check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
    )  # fmt: skip
    return int(shim.stdout)


def sockets_of(pidfd: int, export: str) -> "list[socket.socket]":
    """The listening sockets of another process, duplicated; none where the kernel refuses.

    They are the first descriptors of an engine; the first one has to be bound to `export`.
    """
    found: list[socket.socket] = []
    for number in range(LISTEN_FDS_START, LISTEN_FDS_START + 2):
        made = duplicate(pidfd, number)
        if made is None:
            break
        found.append(made)
    if not found or found[0].family != socket.AF_UNIX or found[0].getsockname() != export:
        for each in found:
            each.close()
        return []
    return found


def listener_of(path: Path) -> int:
    """The process that listens at a Unix socket, by the kernel's word; 0 if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size)
        except OSError:
            return 0
    pid, _, _ = PEERCRED.unpack(credentials)
    return int(pid)


def duplicate(pidfd: int, number: int) -> "socket.socket | None":
    """A listening socket of another process as one of ours (pidfd_getfd(2)), or None."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0))
    if descriptor < 0:
        return None
    os.set_inheritable(descriptor, False)
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            made = socket.socket(fileno=descriptor)
            if made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return made
            made.close()
            return None
    os.close(descriptor)
    return None
