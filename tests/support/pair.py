"""A pair of real engines for tests: two launchers, two nbdkits, one mirror.

They meet on loopback addresses, or each on a host of its own (network.py).

Owns the directories, the configuration of each node, every process that it started, and the
record of what the engines said (events, standard error). Must never: sleep (it waits for the
next event, or for the end of a process, with a bound), end a process that it did not start, or
hide what an engine wrote: `close` fails when a log holds what no log may hold, or when something
was left behind.
"""

import contextlib
import errno
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import nbd

from nbdmirror import admin
from nbdmirror.config import Config, load
from nbdmirror.control_client import ControlClient
from nbdmirror.errors import (
    NbdMirrorError,
    RefusedError,
    StaleCommandError,
    UnreachableError,
)
from tests.support.network import ADDRESSES, Network

ROOT = Path(__file__).resolve().parents[2]
PEER_PORT = 7789
# Whatever is waited for comes within a second or two; this is for machines that are far slower.
WAIT_S = 60.0
POLL_S = 0.03
# What no engine may write, whatever is done to it from outside.
FORBIDDEN = ("Traceback", "AssertionError", "was never retrieved", "Fatal Python", "double free")
LAUNCH = """
import sys
from pathlib import Path
from nbdmirror.config import load
from nbdmirror.errors import NbdMirrorError
from nbdmirror.launcher import run
try:
    sys.exit(run(load(Path(sys.argv[1]), sys.argv[2])))
except NbdMirrorError as error:
    sys.stderr.write(f"nbdmirror: {error}\\n")
    sys.exit(error.exit_code)
"""

State = dict[str, Any]
Event = dict[str, Any]


class Follower:
    """Collects the events of one life of an engine; wakes whoever waits for one."""

    def __init__(self, socket_path: Path) -> None:
        self.events: list[Event] = []
        self.changed = threading.Condition()
        self._client = ControlClient(socket_path, WAIT_S)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(NbdMirrorError, OSError, ValueError):
            for event in self._client.events():
                with self.changed:
                    self.events.append(event)
                    self.changed.notify_all()

    def join(self) -> None:
        """After the engine's end: everything it told is there."""
        self._thread.join(WAIT_S)


class Engine:
    """One node: its files and its processes. `pid` is nbdkit's, `launcher` the parent's process."""

    def __init__(self, name: str, config_path: Path, logs: Path) -> None:
        self.name = name
        self.enter: tuple[str, ...] = ()  # stands before the command: where it runs
        self.program = ROOT  # where the package and the plugin are
        self.config_path = config_path
        self.log_path = logs / f"{name}.log"
        self.launcher: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.lives: list[Follower] = []
        self.allowed: set[str] = set()
        self._log_read = 0

    @property
    def config(self) -> Config:
        """As the engine reads it."""
        return load(self.config_path, self.name)

    @property
    def uri(self) -> str:
        """Where NBD clients connect."""
        return f"nbd+unix:///?socket={self.config.export_unix}"

    @property
    def data(self) -> Path:
        """The backing file."""
        return self.config.data_file

    # --- life -------------------------------------------------------------------------------

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the launcher and return without waiting for the engine."""
        assert self.launcher is None, "one at a time"
        with self.log_path.open("ab") as log:
            self.launcher = subprocess.Popen(
                [*self.enter, sys.executable, "-c", LAUNCH, str(self.config_path), self.name],
                env={**os.environ, "PYTHONPATH": str(self.program)},
                cwd=self.program,  # before PYTHONPATH, with -c
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        return self.launcher

    def start(self) -> Self:
        """Start and wait until it answers."""
        process = self.launch()
        state = self.wait_state(lambda _: True, "the engine answers")
        self.pid = int(state["pid"])
        assert process.poll() is None
        self.lives.append(Follower(self.config.control_socket))
        return self

    def start_refused(self) -> int:
        """Start an engine that has to refuse; returns its exit code."""
        code = self.launch().wait(WAIT_S)
        self.launcher = None
        return code

    def signal(self, number: int) -> None:
        """Send a signal to nbdkit."""
        assert self.pid
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.ended()

    def freeze(self) -> None:
        """SIGSTOP: alive, and silent."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def ended(self) -> int:
        """Wait for the launcher's end, which follows the engine's; returns its exit code."""
        assert self.launcher is not None
        code = self.launcher.wait(WAIT_S)
        self.launcher = None
        self.pid = 0
        if self.lives:
            self.lives[-1].join()
        return code

    def stop(self) -> None:
        """Leave in order."""
        self.command("stop")
        assert self.ended() == 0, self.log()

    # --- questions and commands ---------------------------------------------------------------

    def client(self) -> ControlClient:
        """A connection to the control socket."""
        return ControlClient(self.config.control_socket, WAIT_S)

    def state(self) -> State:
        """The full state."""
        with self.client() as client:
            return client.call("state")

    def command(self, name: str, **args: object) -> State:
        """A command for the engine as it is now; given again while that changes."""
        until = monotonic() + WAIT_S
        while True:
            try:
                with self.client() as client:
                    now = client.call("state")
                    return client.call(name, instance=now["instance"], epoch=now["epoch"], **args)
            except RefusedError as error:
                again = isinstance(error, StaleCommandError) or "under way" in str(error)
                if not again or monotonic() > until:
                    raise
            self._wait_a_moment()

    def wait_state(
        self, wanted: Callable[[State], bool], what: str, bound_s: float = WAIT_S
    ) -> State:
        """Wait until the state is as wanted.

        Raises:
            TimeoutError: with the last state and the log. RuntimeError: the engine ended.
        """
        until = monotonic() + bound_s
        state: State = {}
        while monotonic() < until:
            with contextlib.suppress(UnreachableError):
                state = self.state()
                if wanted(state):
                    return state
            if self.launcher is None or self.launcher.poll() is not None:
                raise RuntimeError(f"{self.name} ended while waiting for: {what}\n{self.log()}")
            self._wait_a_moment()
        raise TimeoutError(f"{self.name}: not within {bound_s} s: {what}\n{state}\n{self.log()}")

    def _wait_a_moment(self) -> None:
        """Until the next event, the end of the process, or a bound."""
        if self.lives and self.pid:
            with self.lives[-1].changed:
                self.lives[-1].changed.wait(POLL_S)
        elif self.launcher is not None:
            descriptor = os.pidfd_open(self.launcher.pid)
            try:
                select.select([descriptor], [], [], POLL_S)
            finally:
                os.close(descriptor)

    @property
    def events(self) -> list[Event]:
        """What this life of the engine told."""
        return self.lives[-1].events if self.lives else []

    def wait_event(self, kind: str, *, after: int = 0, bound_s: float = WAIT_S) -> Event:
        """The first event of that kind with a number above `after`."""
        follower = self.lives[-1]
        until = monotonic() + bound_s
        with follower.changed:
            while True:
                for event in follower.events:
                    if event["event"] == kind and event["number"] > after:
                        return event
                left = until - monotonic()
                if left <= 0:
                    tail = "\n".join(map(str, follower.events[-15:]))
                    raise TimeoutError(
                        f"{self.name}: no {kind} after {after}\n{tail}\n{self.log()}"
                    )
                follower.changed.wait(left)

    def last_event(self) -> int:
        """The number of the newest event."""
        return self.events[-1]["number"] if self.events else 0

    def log(self) -> str:
        """Standard error of all lives."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def connect(self) -> nbd.NBD:
        """An NBD client of this node."""
        handle = nbd.NBD()
        handle.connect_uri(self.uri)
        return handle

    # --- end --------------------------------------------------------------------------------

    def destroy(self) -> None:
        """End whatever still runs."""
        if self.launcher is None:
            return
        if not self.pid:
            self.pid = child_of(self.launcher.pid)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
        try:
            self.launcher.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait(WAIT_S)
        self.launcher = None

    def complaints(self) -> list[str]:
        """Lines that no log may hold, and events that no engine may have to tell."""
        found = [
            f"{self.name}: log: {word}\n{self.log()[-4000:]}"
            for word in FORBIDDEN
            if word in self.log() and word not in self.allowed
        ]
        return found + [
            f"{self.name}: {event}"
            for life in self.lives
            for event in list(life.events)
            if event["event"] in ("background-error", "fatal")
            and not any(word in str(event) for word in self.allowed)
        ]


class Pair:
    """Two nodes, alpha (id 1, dials) and beta (id 2, listens), and the way between them."""

    def __init__(
        self,
        *,
        size: int = 16 << 20,
        engine: dict[str, object] | None = None,
        dial: tuple[str, int] | None = None,
        tcp: bool = False,
        data_dirs: dict[str, Path] | None = None,
        network: Network | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nm"))
        self.size = size
        self.closed = False
        loopback = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(254) + 1}"
        self.hosts = {"alpha": f"{loopback}.1", "beta": f"{loopback}.2"}
        if network is not None:
            self.hosts = dict(ADDRESSES)
        self.dial = dial
        self.tcp = tcp
        self.engine_keys: dict[str, object] = {"on_freeze": "ask", **(engine or {})}
        self.data_dirs = data_dirs or {}
        key = self.root / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(32))
        self.alpha = self._engine("alpha")
        self.beta = self._engine("beta")
        if network is not None:
            for node in self.both:
                node.enter = network.enter(node.name)

    def _engine(self, name: str) -> Engine:
        (self.root / name).mkdir(mode=0o700)
        path = self.root / name / "demo.toml"
        engine = Engine(name, path, self.root)
        path.write_text(self.config_text(name))
        return engine

    def config_text(self, name: str, **changes: str) -> str:
        """The configuration as `name` has it; `changes` replaces whole values."""
        facts = {"mirror": "demo", "key": str(self.root / "key"), "alpha_id": "1", "beta_id": "2"}
        facts |= changes
        lines = [
            f'mirror = "{facts["mirror"]}"',
            f'key_file = "{facts["key"]}"',
            'arbiter = "none"',
        ]
        for node in ("alpha", "beta"):
            host, port = self.hosts[node], PEER_PORT
            if node == "beta" and name == "alpha" and self.dial is not None:
                host, port = self.dial
            data = self.data_dirs.get(node, self.root / node / "data")
            lines += [
                f"[node.{node}]",
                f"id = {facts[f'{node}_id']}",
                f'address = "{host}:{port}"',
                f'data_dir = "{data}"',
                f'run_dir = "{self.root / node / "run"}"',
            ]
        lines.append("[engine]")
        lines += [
            f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {str(value).lower()}"
            for key, value in self.engine_keys.items()
        ]
        if self.tcp:
            lines += ["[export]", f'tcp = "{self.hosts[name]}:10809"']
        return "\n".join(lines) + "\n"

    # --- common ways ---------------------------------------------------------------------------

    @property
    def both(self) -> tuple[Engine, Engine]:
        """Alpha and beta."""
        return self.alpha, self.beta

    def other(self, engine: Engine) -> Engine:
        """The peer of `engine`."""
        return self.beta if engine is self.alpha else self.alpha

    def create(self, *, sparse: bool = False, adopt: bool = False) -> Self:
        """Make the files: alpha creates, beta joins."""
        admin.create(self.alpha.config, self.size, join=False, adopt=adopt, sparse=sparse)
        admin.create(self.beta.config, self.size, join=True, adopt=False, sparse=sparse)
        return self

    def up(self, *, sparse: bool = False) -> Self:
        """Create, start both, promote alpha, and wait until the two are in sync."""
        self.create(sparse=sparse)
        for engine in self.both:
            engine.start()
        self.alpha.command("promote")
        self.synced()
        return self

    def synced(self, bound_s: float = WAIT_S) -> None:
        """Wait until both say that they are in sync in one session."""

        def in_one_session(alpha: State) -> bool:
            beta = self.beta.state()
            synced = is_synced(alpha) and is_synced(beta)
            return synced and bool(alpha["session"]["number"] == beta["session"]["number"])

        self.alpha.wait_state(in_one_session, "in sync", bound_s)

    def stop(self) -> None:
        """Stop both in order: the secondary first, so that nobody is outdated without need."""
        for engine in sorted(self.both, key=lambda e: e.state()["role"] == "primary"):
            engine.stop()

    def assert_equal(self) -> None:
        """Both images hold the same bytes. Idle or stopped, or the answer means nothing."""
        difference = first_difference(self.alpha.data, self.beta.data, self.size)
        assert difference is None, f"the images differ from byte {difference} on"

    def close(self) -> None:
        """End everything and remove it; fails on what no log may hold and on leftovers."""
        if self.closed:
            return
        self.closed = True
        for engine in self.both:
            engine.destroy()
        complaints = [line for engine in self.both for line in engine.complaints()]
        left = list(processes_of(self.root))
        shutil.rmtree(self.root, ignore_errors=True)
        assert not complaints, "\n".join(complaints)
        assert not left, f"left behind: {left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.story())
            with contextlib.suppress(AssertionError):
                self.close()
        self.close()

    def story(self) -> str:
        """What both engines told, for whoever has to find out why a test failed."""
        lines = []
        for engine in self.both:
            lines.append(f"--- {engine.name}, log:\n{engine.log()[-3000:]}")
            for number, life in enumerate(engine.lives):
                lines.append(f"--- {engine.name}, life {number}:")
                lines += [str(event) for event in life.events[-25:]]
            with contextlib.suppress(NbdMirrorError):
                lines.append(f"--- {engine.name}, state: {engine.state()}")
        return "\n".join(lines)


def is_synced(state: State) -> bool:
    """Whether a node says that it is in sync with its peer."""
    session = state["session"]
    return bool(session and session["phase"] == "synced" and state["data_state"] == "uptodate")


def first_difference(one: Path, other: Path, size: int) -> int | None:
    """The offset of the first chunk in which two files differ within `size` bytes, or None."""
    with one.open("rb") as first, other.open("rb") as second:
        files = (first.fileno(), second.fileno())
        offset = 0
        while (offset := min(next_data(each, offset, size) for each in files)) < size:
            count = min(1 << 20, size - offset)
            first.seek(offset)
            second.seek(offset)
            left, right = first.read(count), second.read(count)
            assert len(left) == len(right) == count, "an image is shorter than its device"
            if left != right:
                return offset + next(i for i in range(count) if left[i] != right[i])
            offset += count
    return None


def next_data(descriptor: int, offset: int, size: int) -> int:
    """Where the next bytes that are not in a hole begin, or `size`."""
    try:
        return min(os.lseek(descriptor, offset, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size


def child_of(parent: int) -> int:
    """The pid of the only child of a process, 0 if it has none."""
    with contextlib.suppress(OSError, ValueError):
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[0]) if children else 0
    return 0


def processes_of(root: Path) -> Iterator[int]:
    """Processes whose command line names something under `root`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if os.fsencode(root) in (entry / "cmdline").read_bytes():
                    yield int(entry.name)
