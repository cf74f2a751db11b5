"""The two nodes of the demo: one configuration file, one controller each.

Owns the controllers' processes. Uses what an operator uses: the command line for every order; only
polling asks the controller's socket directly. Must never touch a node's files while it runs.
"""

# ruff: noqa: INP001, S603 - a directory that is run; commands of ours

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from hosts import NETWORK, Hosts, command
from progress import DemoError, wait_until

from nbdmirror.config import load
from nbdmirror.control_client import ControlClient
from nbdmirror.errors import NbdMirrorError

BIN: Final = Path(sys.executable).parent
CLI: Final = str(BIN / "nbdmirror")
DAEMON: Final = str(BIN / "nbdmirrord")
HERE: Final = Path(__file__).resolve().parent
PORT: Final = 7789
ANSWER_S: Final = 20.0
ASK_S: Final = 10.0
LOG_TAIL_LINES: Final = 25

CONFIG: Final = """\
mirror = "demo"
key_file = "{directory}/key"
arbiter = "ping"

[ping]
addresses = ["{network}.254"]

[node.one]
id = 1
address = "{network}.1:{port}"
data_dir = "{directory}/one/data"
run_dir = "{directory}/one/run"

[node.two]
id = 2
address = "{network}.2:{port}"
data_dir = "{directory}/two/data"
run_dir = "{directory}/two/run"

[probe]
address = "0.0.0.0:9010"

[mount]
point = "{directory}/mnt"

[application]
start = ["{python}", "{here}/app.py", "start", "{directory}/mnt", "{directory}/commits"]
stop = ["{python}", "{here}/app.py", "stop", "{directory}/mnt", "{directory}/commits"]

[[virtual_address]]
address = "{network}.100/24"

[[checker]]
name = "writer"
kind = "command"
command = ["{python}", "{here}/app.py", "check", "{directory}/mnt", "{directory}/commits"]
interval_ms = 1000
timeout_ms = 2000
"""


def write_config(directory: Path) -> Path:
    """The one configuration file of both nodes, and their key."""
    key = directory / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    path = directory / "demo.toml"
    path.write_text(
        CONFIG.format(
            directory=directory, network=NETWORK, port=PORT, here=HERE, python=sys.executable
        )
    )
    return path


class Node:
    """One node: its host, its files, its controller."""

    def __init__(self, config_path: Path, name: str, hosts: Hosts) -> None:
        self.config = load(config_path, name)
        self.name = name
        self.mount_point = config_path.parent / "mnt"
        self._hosts = hosts
        self._log_path = config_path.parent / f"{name}.log"
        self._daemon: subprocess.Popen[bytes] | None = None

    def cli(self, *words: str) -> str:
        """`nbdmirror WORDS` on this node's host."""
        where = ("-c", str(self.config.source), "--node", self.name)
        return command(*self._hosts.enter(self.name), CLI, *words, *where)

    def up(self) -> None:
        """`nbdmirrord`; returns when it answers."""
        with self._log_path.open("ab") as log:
            self._daemon = subprocess.Popen(
                [*self._hosts.enter(self.name), DAEMON, "-c", str(self.config.source),
                 "--node", self.name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(self.answers, f"the controller of node {self.name} answers", ANSWER_S)

    def answers(self) -> dict[str, Any] | None:
        """The status, or None while nobody answers.

        Raises:
            DemoError: nobody will, because the controller has ended.
        """
        if self._daemon is not None and self._daemon.poll() is not None:
            raise DemoError(f"the controller of node {self.name} ended: {self._daemon.returncode}")
        try:
            return self.status()
        except NbdMirrorError:
            return None

    def status(self) -> dict[str, Any]:
        """Asked directly: cheap enough to poll."""
        with ControlClient(self.config.controller_socket, ASK_S) as client:
            return client.call("status")

    def has_role(self, *roles: str) -> bool:
        """Whether the node is ready in one of these roles."""
        status = self.answers()
        return status is not None and status["role"] in roles and status["readiness"] == "ready"

    def events(self) -> list[dict[str, Any]]:
        """What the engine remembers."""
        found = []
        with ControlClient(self.config.control_socket, ASK_S) as client:
            try:
                for event in client.events(timeout_s=0.5):
                    found.append(event)  # noqa: PERF402 - kept when the wait for the next ends
            except NbdMirrorError:
                pass  # no further event in time: that is all of them
        return found

    def engine_pid(self) -> int:
        """The engine's process, as it tells."""
        return int(self.status()["engine"]["pid"])

    def kill_engine(self) -> None:
        """SIGKILL the engine."""
        os.kill(self.engine_pid(), signal.SIGKILL)

    def kill_both(self) -> None:
        """SIGKILL engine and controller: what the loss of a host does to them."""
        assert self._daemon is not None
        pid = self.engine_pid()
        self._daemon.kill()
        os.kill(pid, signal.SIGKILL)
        self._daemon.wait()
        self._daemon = None

    def end_controller(self) -> int:
        """SIGTERM the controller; returns its exit code."""
        assert self._daemon is not None
        self._daemon.terminate()
        code = self._daemon.wait(ASK_S)
        self._daemon = None
        return code

    def log_tail(self) -> str:
        """The end of the controller's log and its status, for whoever looks for the reason."""
        lines = self._log_path.read_text().splitlines() if self._log_path.exists() else []
        try:
            status = json.dumps(self.status(), indent=1)
        except NbdMirrorError as error:
            status = str(error)
        return "\n".join([f"--- node {self.name}", *lines[-LOG_TAIL_LINES:], status])

    def end_now(self) -> None:
        """The end without order, for when the demo itself ends early."""
        with contextlib.suppress(NbdMirrorError, OSError), self._engine() as client:
            os.kill(int(client.call("state")["pid"]), signal.SIGKILL)
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def _engine(self) -> ControlClient:
        return ControlClient(self.config.control_socket, 2.0)
