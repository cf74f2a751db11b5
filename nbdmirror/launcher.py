"""Starts one engine and stays beside it, until there is a controller that does more.

Owns the listening NBD sockets (made here with their modes, passed to nbdkit by socket activation,
so they outlive the engine), the engine's environment, its orderly end on SIGTERM, SIGINT and
SIGHUP, and one answer: where the configuration says `on_freeze = "alone"`, it answers a
freeze so. It decides nothing else.

A launcher that is killed takes its engine with it: an nbdkit started by socket activation asks the
kernel for SIGTERM at its parent's end (PR_SET_PDEATHSIG, seen in 1.32.5). For the peer that is a
crash of the engine, not a stop. Only an engine that hangs outlives its launcher.
"""

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from nbdmirror import engine_user, handing, ownership
from nbdmirror.becoming import CONTROL_FD, HANDED_FD, LISTEN_FDS_START, become
from nbdmirror.config import Address, Config, of_text, read_text, user_now
from nbdmirror.config_files import TlsFiles, read_tls_files
from nbdmirror.control_client import ControlClient
from nbdmirror.errors import ConfigError, NbdMirrorError, RefusedError, StaleCommandError
from nbdmirror.files import path_error, remove_socket, require_socket_path
from nbdmirror.journal import STDERR, Journal

SOCKET_MODE: Final = 0o600
LISTEN_BACKLOG: Final = 64
POLL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 30.0
STOP_TRIES_COUNT: Final = 10
KILL_AFTER_S: Final = 1.0
# From this nbdkit on a connection may have several threads, and how many it gets by default.
BEARS_THREADS: Final = (1, 34, 0)
THREADS_DEFAULT: Final = 4
VERSION_TIMEOUT_S: Final = 10.0
PLUGIN_NAME: Final = "nbdmirror_plugin.py"
# The witness of a test, and what fits the C library and OpenSSL to the machine.
HANDED_ON: Final = frozenset({"NBDMIRROR_BOOT_ID_FILE", "GLIBC_TUNABLES", "OPENSSL_ia32cap"})


def run(config: Config) -> int:
    """Run the engine in the foreground; returns its exit code.

    Raises:
        RefusedError: another launcher serves this mirror here. ConfigError: nbdkit or plugin
        missing, or a place that the configuration names does not serve.
    """
    run_dir = config.me.run_dir
    for path in (config.control_socket, config.export_unix):
        require_socket_path(path)
    make_directory(run_dir, "run_dir")
    lock = take_lock(run_dir / "launcher.lock")
    require_no_engine(config.control_socket)
    sockets = listening_sockets(config)
    journal = Journal()
    try:
        pid = start(config, sockets, journal)
        journal.start()
        return Watcher(config, pid, journal).watch()
    finally:
        journal.close()
        for each in sockets:
            each.close()
        with contextlib.suppress(OSError, RefusedError):
            remove_socket(config.export_unix)
        os.close(lock)


def make_directory(path: Path, key: str) -> None:
    """The directory that a key of the configuration names.

    Raises:
        ConfigError, OutOfSpaceError: it cannot be had.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        remedy = "it has to be a directory that this user may write to"
        raise path_error(error, f"{key} = {path}", remedy) from error


def take_lock(path: Path) -> int:
    """One launcher per mirror and node; returns the descriptor that holds the lock.

    Raises:
        RefusedError: another one has it. ConfigError, OutOfSpaceError: it cannot be had.
    """
    remedy = "it has to be a plain file of the launcher's own; remove what is there"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise path_error(error, str(path), remedy) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RefusedError(
            f"{path}: a controller (or `nbdmirror engine run`) of this mirror runs on this node "
            "already; `nbdmirror status` shows what it does, and end that one first"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise path_error(error, str(path), remedy) from error
    return descriptor


def require_no_engine(path: Path) -> None:
    """An engine that hangs outlives a launcher that was killed; its sockets stay its own.

    Raises:
        RefusedError: one listens at `path`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        # A full backlog is a listener, too.
        try:
            probe.connect(str(path))
        except BlockingIOError:
            pass
        except OSError:
            return
    raise RefusedError(
        f"{path}: an engine whose launcher was killed still has this mirror; wait for its end"
    )


def listening_sockets(config: Config) -> list[socket.socket]:
    """The Unix socket always, TCP where configured. The launcher's lock is held, so an old one is
    dead.

    Raises:
        ConfigError: the address cannot be had. RefusedError: a file that is no socket has it.
    """
    sockets: list[socket.socket] = []
    path = config.export_unix
    what = f"export.unix = {path}"
    make_directory(path.parent, "the directory of export.unix")
    clear(path, what)
    sockets.append(listening(bound(socket.AF_UNIX, str(path), what), what))
    if config.export_tcp is not None:
        sockets.append(tcp_socket(config.export_tcp))
    return sockets


def tcp_socket(address: Address) -> socket.socket:
    """The listening TCP socket of the export."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    what = f"export.tcp = {address}"
    return listening(bound(family, (address.host, address.port), what), what)


def clear(path: Path, what: str) -> None:
    """Remove the socket of a dead process. Raises ConfigError, RefusedError."""
    try:
        remove_socket(path)
    except OSError as error:
        raise path_error(error, what, "this user has to own what is there") from error


def bound(family: int, address: Any, what: str) -> socket.socket:
    """A socket at `address`, for its owner alone where that is a path. It does not listen yet."""
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_UNIX:
            os.fchmod(made.fileno(), SOCKET_MODE)  # so the path is born with it (unix(7))
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise path_error(error, what, "name an address that is free here") from error
    return made


def listening(made: socket.socket, what: str) -> socket.socket:
    """The same, and clients may come."""
    try:
        made.listen(LISTEN_BACKLOG)
    except OSError as error:
        made.close()
        raise path_error(error, what, "name an address that is free here") from error
    return made


def command_line(config: Config) -> list[str]:
    """nbdkit's arguments."""
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise ConfigError("nbdkit is not installed: apt-get install nbdkit nbdkit-plugin-python")
    return [
        nbdkit,
        "--foreground",
        "--threads",
        str(threads(config.engine.threads, nbdkit)),
        "--filter=limit",
        "python",
        str(plugin_file()),
        f"configuration={config.source.resolve()}",
        f"node={config.me.name}",
        f"limit={config.engine.connections_max}",
    ]


def threads(wanted: int, nbdkit: str) -> int:
    """nbdkit's threads for each connection: as configured, or with 0 as many as this nbdkit bears.

    Before 1.34.0 a connection of several threads ends the whole nbdkit, by an assertion, when its
    client dies with requests in flight: one thread closes the socket, another one answers (docs/adr
    0014). A version that cannot be read counts as such a one.

    Raises:
        ConfigError: several threads were asked for, and this nbdkit would not survive its clients.
    """
    version = version_of(nbdkit)
    if version >= BEARS_THREADS:
        return wanted or THREADS_DEFAULT
    if wanted > 1:
        shown = ".".join(map(str, version)) or "an unknown version"
        raise ConfigError(
            f"engine.threads = {wanted}: {nbdkit} is {shown}, and before"
            f" {'.'.join(map(str, BEARS_THREADS))} a client that dies with requests in flight ends"
            " an engine with more than one thread for each connection; remove the line, or set 1"
        )
    return 1


def version_of(nbdkit: str) -> tuple[int, ...]:
    """What `nbdkit --version` says; () if it says nothing that can be read."""
    try:
        said = subprocess.run(  # noqa: S603 - the nbdkit that is to be started
            [nbdkit, "--version"], capture_output=True, check=False, timeout=VERSION_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    match = re.match(rb"nbdkit (\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, match.groups())) if match else ()


def plugin_file() -> Path:
    """The plugin: beside the package in a checkout, in share/ when installed.

    Raises:
        ConfigError: it is in neither place.
    """
    checkout = Path(__file__).resolve().parent.parent / "plugin" / PLUGIN_NAME
    installed = Path(sysconfig.get_path("data")) / "share" / "nbdmirror" / PLUGIN_NAME
    for candidate in (checkout, installed):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{PLUGIN_NAME} is missing: looked at {checkout} and {installed}")


def environment() -> dict[str, str]:
    """What the engine sees: nbdkit's Python takes its prefix from the first python3 on PATH."""
    own = Path(sys.prefix) / "bin"
    package_root = Path(__file__).resolve().parent.parent
    return {
        "PATH": f"{own}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(package_root),
        "PYTHONNOUSERSITE": "1",
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        **{k: v for k, v in os.environ.items() if k in HANDED_ON},
    }


class Closes(Protocol):
    """A socket, or a file."""

    def close(self) -> None:
        """Give the descriptor back."""
        ...


@dataclass(slots=True)
class Prepared:
    """One start of an engine. `places`: see becoming.py; what is `owned` here is closed here."""

    command: list[str]
    places: dict[int, int]
    prepare: bool = False
    owned: list[Closes] = field(default_factory=list)

    def close(self) -> None:
        """The engine has its own."""
        for each in self.owned:
            each.close()


def prepared(config: Config, sockets: list[socket.socket]) -> Prepared:
    """Everything that root has to do for an engine of another user; without one, next to nothing.

    The user is the one that the file names by now, as everything else that an engine reads. Blocks.

    Raises:
        ConfigError, RefusedError, MetadataError, StoreError: it cannot be; nothing was changed.
    """
    text = b""
    now = replace(config, engine=config.engine.model_copy(update={"user": user_now(config)}))
    if now.engine.user:
        text = read_text(config.source)
        now = of_text(text, config.source, config.me.name)
    user = engine_user.another(now.engine.user)
    made = Prepared(command_line(config), places_of(sockets))
    if user is not None:
        program = (Path(made.command[0]), plugin_file(), Path(__file__).resolve())
        engine_user.require_reach(user, read=(*program, Path(sys.executable)))
    ownership.settle(now, user)
    if user is None:
        return made
    control = control_place(now.control_socket)
    made.owned = [control]
    handed = handing.hand(text, now.key, named_for_tls(now))
    made.owned.append(handed)
    made.places |= {CONTROL_FD: control.fileno(), HANDED_FD: handed.fileno()}
    made.command += [f"control={CONTROL_FD}", f"handed={HANDED_FD}"]
    made.command[:0] = engine_user.becoming(user)
    made.prepare = now.engine.lock_memory
    return made


def named_for_tls(config: Config) -> TlsFiles | None:
    """What the files hold that the configuration names for TLS; its own one the engine reads."""
    settings = config.engine
    if settings.tls == "off" or settings.tls_certificate is None or settings.tls_key is None:
        return None
    return read_tls_files(settings.tls_certificate, settings.tls_key, settings.tls_ca)


def places_of(sockets: list[socket.socket]) -> dict[int, int]:
    """Where nbdkit looks for its sockets."""
    return {LISTEN_FDS_START + index: each.fileno() for index, each in enumerate(sockets)}


def control_place(path: Path) -> socket.socket:
    """The control socket of an engine that may make none: bound, and nobody's before it listens.

    Raises:
        ConfigError: it cannot be made. RefusedError: a file that is no socket has its name.
    """
    clear(path, str(path))
    return bound(socket.AF_UNIX, str(path), str(path))


def start(config: Config, sockets: list[socket.socket], journal: Journal) -> int:
    """Fork and become nbdkit, with the sockets from descriptor 3 on; returns its pid."""
    made = prepared(config, sockets)
    variables = environment()
    pid = os.fork()
    if pid:
        made.close()
        return pid
    try:
        # What the terminal or the service manager sends to the launcher's group is the launcher's
        # to answer: it stops the engine in order. nbdkit by itself would only end.
        os.setsid()
        os.dup2(journal.write_end, STDERR)
        become(made.places, made.command, variables, prepare=made.prepare)
    except OSError as error:
        sys.stderr.write(f"nbdmirror: {made.command[0]}: {error.strerror}\n")
    finally:
        os._exit(127)


class Watcher:
    """Waits for the engine's end, for signals, and answers freezes where it may."""

    def __init__(self, config: Config, pid: int, journal: Journal) -> None:
        self._config = config
        self._journal = journal
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._signals_read, signals_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals_write = signals_write
        self._answers = config.engine.on_freeze == "alone"
        self._client = ControlClient(config.control_socket, STOP_TIMEOUT_S)

    def watch(self) -> int:
        """Until the engine is dead; returns its exit code (128 + signal if one ended it)."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)
        signal.set_wakeup_fd(self._signals_write)
        while True:
            readable, _, _ = select.select([self._pidfd, self._signals_read], [], [], POLL_S)
            if self._pidfd in readable:
                _, status = os.waitpid(self._pid, 0)
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            if self._signals_read in readable:
                os.read(self._signals_read, 64)
                self._stop()
            elif self._answers:
                self._answer()

    def _note(self, _number: int, _frame: Any) -> None:
        """The wake-up descriptor carries it."""

    def _stop(self) -> None:
        """Ask the engine to leave in order; end it if it cannot.

        Whose role changes meanwhile can, and is asked again.
        """
        for left in reversed(range(STOP_TRIES_COUNT)):
            try:
                state = self._client.call("state")
                self._client.call("stop", instance=state["instance"], epoch=state["epoch"])
            except NbdMirrorError as error:
                self._journal.say(f"stop: {error}")
                if isinstance(error, StaleCommandError) and left:
                    continue
                self._end()
            return

    def _end(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        readable, _, _ = select.select([self._pidfd], [], [], KILL_AFTER_S)
        if not readable:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _answer(self) -> None:
        """Arbiter `none` answers a freeze at once: alone."""
        try:
            state = self._client.call("state")
            if state["question"] == "frozen":
                self._client.call("alone", instance=state["instance"], epoch=state["epoch"])
                self._journal.say(f"alone: {state['frozen_reason']}")
        except NbdMirrorError:
            # Whatever it is, the question stays in the state, and is seen again.
            return
