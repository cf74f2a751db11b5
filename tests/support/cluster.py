"""Two real nodes with their controllers: nbdmirrord, engine, and whatever they start.

They meet on loopback addresses, or each on a host of its own (network.py).

Owns the directories, the one configuration, every controller that it started, and every engine that
these started. Must never: sleep, end a process that is not of its own nodes, or hide what a
controller wrote: `close` fails when a log holds what no log may hold, or when something is left.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import nbd

from nbdmirror import admin
from nbdmirror.config import Config, load
from nbdmirror.control_client import ControlClient
from nbdmirror.errors import NbdMirrorError, UnreachableError
from tests.support.network import ADDRESSES, Network
from tests.support.pair import (
    FORBIDDEN,
    PEER_PORT,
    ROOT,
    Follower,
    first_difference,
    processes_of,
)

WAIT_S = 60.0
POLL_S = 0.02
PROBE_PORT = 9010
Status = dict[str, Any]


class ClusterNode:
    """One node. `daemon` is its controller's process."""

    def __init__(self, name: str, config_path: Path, logs: Path) -> None:
        self.name = name
        self.enter: tuple[str, ...] = ()
        self.config_path = config_path
        self.log_path = logs / f"{name}.log"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.followers: list[Follower] = []
        self.allowed: set[str] = set()

    @property
    def config(self) -> Config:
        """As the controller reads it."""
        return load(self.config_path, self.name)

    @property
    def data(self) -> Path:
        """The backing file."""
        return self.config.data_file

    # --- life -------------------------------------------------------------------------------

    def up(self) -> Self:
        """Start the controller and wait until it answers."""
        assert self.daemon is None, "one at a time"
        with self.log_path.open("ab") as log:
            self.daemon = subprocess.Popen(
                [*self.enter, *self.command()], env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.wait(lambda _: True, "the controller answers")
        self.followers.append(Follower(self.config.controller_socket))
        return self

    def command(self, *more: str) -> list[str]:
        """The command line of the controller."""
        module = "nbdmirror.controller.daemon"
        where = ["-c", str(self.config_path), "--node", self.name]
        return [sys.executable, "-m", module, *where, *more]

    def kill(self) -> None:
        """SIGKILL the controller; engine and application go on."""
        self.signal(signal.SIGKILL)
        self.ended()

    def signal(self, number: int) -> None:
        """Send the controller a signal."""
        assert self.daemon is not None
        self.daemon.send_signal(number)

    def ended(self) -> int:
        """Wait for the controller's end; returns its exit code."""
        assert self.daemon is not None
        code = self.daemon.wait(WAIT_S)
        self.daemon = None
        return code

    def kill_engine(self) -> int:
        """SIGKILL the engine; returns the pid it had."""
        pid = self.engine_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def lose(self) -> None:
        """The whole node at once: engine and controller."""
        pid = self.engine_pid()
        self.signal(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        self.ended()

    def engine_pid(self) -> int:
        """Of the engine that runs; fails if there is none."""
        engine = self.status()["engine"]
        assert engine is not None, self.log()
        return int(engine["pid"])

    # --- questions and orders -----------------------------------------------------------------

    def client(self) -> ControlClient:
        """A connection to the controller."""
        return ControlClient(self.config.controller_socket, WAIT_S)

    def status(self) -> Status:
        """Everything."""
        with self.client() as client:
            return client.call("status")

    def order(self, command: str, **args: Any) -> Status:
        """One command."""
        with self.client() as client:
            return client.call(command, **args)

    def wait(self, wanted: Callable[[Status], bool], what: str, bound_s: float = WAIT_S) -> Status:
        """Wait until the status is as wanted.

        Raises:
            TimeoutError: with the last status and the log. RuntimeError: the controller ended.
        """
        until = monotonic() + bound_s
        status: Status = {}
        while monotonic() < until:
            with contextlib.suppress(UnreachableError):
                status = self.status()
                if wanted(status):
                    return status
            if self.daemon is None or self.daemon.poll() is not None:
                raise RuntimeError(f"{self.name} ended while waiting for: {what}\n{self.log()}")
            self._wait_a_moment()
        raise TimeoutError(f"{self.name}: not within {bound_s} s: {what}\n{status}\n{self.log()}")

    def _wait_a_moment(self) -> None:
        if self.followers:
            with self.followers[-1].changed:
                self.followers[-1].changed.wait(POLL_S)
        elif self.daemon is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemon.wait(POLL_S)

    def is_now(self, *roles: str, bound_s: float = WAIT_S) -> Status:
        """Wait until the node has one of these roles, and is ready in it."""
        return self.wait(
            lambda s: s["role"] in roles and s["readiness"] == "ready",
            f"{' or '.join(roles)}, ready",
            bound_s,
        )

    def rests(self, role: str, row: str) -> Status:
        """Wait until the node stays in a role for that reason."""
        return self.wait(lambda s: s["role"] == role and s["row"] == row, f"{role}: {row}")

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of that kind, over all lives of the controller."""
        return [e for life in self.followers for e in list(life.events) if e["event"] == kind]

    def connect(self) -> nbd.NBD:
        """An NBD client of this node."""
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///?socket={self.config.export_unix}")
        return handle

    def log(self) -> str:
        """Standard error of all lives."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # --- end ----------------------------------------------------------------------------------

    def destroy(self) -> None:
        """End whatever still runs, and take down what it left."""
        pid = 0
        control = ControlClient(self.config.control_socket, 2.0)
        with contextlib.suppress(NbdMirrorError, OSError), control as client:
            pid = int(client.call("state")["pid"])
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(WAIT_S)
            self.daemon = None
        for each in {pid, *processes_of(self.config_path.parent / self.name)} - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        subprocess.run(
            [*self.enter, *self.command("--clean")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, timeout=WAIT_S, check=False,
        )  # fmt: skip

    def complaints(self) -> list[str]:
        """Lines that no log may hold."""
        engine_log = self.config.me.run_dir / "engine.log"
        texts = [self.log()]
        with contextlib.suppress(OSError):
            texts.append(engine_log.read_text(errors="replace"))
        return [
            f"{self.name}: log: {word}\n{text[-4000:]}"
            for text in texts
            for word in FORBIDDEN
            if word in text and word not in self.allowed
        ]


class Cluster:
    """Nodes alpha (id 1) and beta (id 2), and the way between them."""

    def __init__(
        self,
        *,
        size: int = 16 << 20,
        more: str = "",
        top: str = "",
        arbiter: str = "none",
        network: Network | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nm"))
        self.size = size
        self.closed = False
        self.network = network
        loopback = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(254) + 1}"
        self.hosts = {"alpha": f"{loopback}.1", "beta": f"{loopback}.2"}
        if network is not None:
            self.hosts = dict(ADDRESSES)
        key = self.root / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(32))
        self.top, self.arbiter = top, arbiter
        self.alpha = self._node("alpha", more)
        self.beta = self._node("beta", more)
        if network is not None:
            for node in self.both:
                node.enter = network.enter(node.name)

    def _node(self, name: str, more: str) -> ClusterNode:
        (self.root / name).mkdir(mode=0o700)
        path = self.root / f"{name}.toml"
        path.write_text(self.config_text(name, more))
        return ClusterNode(name, path, self.root)

    def config_text(self, name: str, more: str) -> str:
        """The configuration, the same for both."""
        lines = [
            'mirror = "demo"',
            f'key_file = "{self.root / "key"}"',
            f'arbiter = "{self.arbiter}"',
            self.top,
        ]
        for number, (node, host) in enumerate(self.hosts.items(), 1):
            lines += [
                f"[node.{node}]",
                f"id = {number}",
                f'address = "{host}:{PEER_PORT}"',
                f'data_dir = "{self.root / node / "data"}"',
                f'run_dir = "{self.root / node / "run"}"',
                f'probe = "{host}:{PROBE_PORT}"',
            ]
        return "\n".join(lines) + "\n" + more.replace("{root}", str(self.root)) + "\n"

    @property
    def both(self) -> tuple[ClusterNode, ClusterNode]:
        """Alpha and beta."""
        return self.alpha, self.beta

    def create(self, *, sparse: bool = False) -> Self:
        """Make the files: alpha creates, beta joins."""
        admin.create(self.alpha.config, self.size, join=False, adopt=False, sparse=sparse)
        admin.create(self.beta.config, self.size, join=True, adopt=False, sparse=sparse)
        return self

    def start(self) -> Self:
        """Create, start both controllers and both nodes; returns when alpha is PRIM."""
        self.create()
        for node in self.both:
            node.up()
        self.alpha.order("start")
        self.alpha.is_now("ALONE", "PRIM")
        self.beta.order("start")
        self.in_sync(self.alpha)
        return self

    def in_sync(self, primary: ClusterNode) -> None:
        """Wait until `primary` is PRIM and the other one SECOND, both ready."""
        primary.is_now("PRIM")
        (self.beta if primary is self.alpha else self.alpha).is_now("SECOND")

    def assert_equal(self) -> None:
        """Both images hold the same bytes. Idle or stopped, or the answer means nothing."""
        difference = first_difference(self.alpha.data, self.beta.data, self.size)
        assert difference is None, f"the images differ from byte {difference} on"

    def close(self) -> None:
        """End everything and remove it; fails on what no log may hold and on leftovers."""
        if self.closed:
            return
        self.closed = True
        for node in self.both:
            node.destroy()
        complaints = [line for node in self.both for line in node.complaints()]
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
        """What both controllers told, for whoever has to find out why a test failed."""
        lines = []
        for node in self.both:
            lines.append(f"--- {node.name}, log:\n{node.log()[-5000:]}")
            with contextlib.suppress(NbdMirrorError):
                lines.append(f"--- {node.name}, status: {node.status()}")
        return "\n".join(lines)
