"""Two nodes on one machine: a network namespace each, one configuration file, one engine each.

Owns the engines' processes. Uses what an operator uses: the command line for every command; only
polling asks the control socket directly. Must never touch a node's files behind its engine's back.
"""

# ruff: noqa: INP001, S603, S607 - a directory that is run; commands of ours, found on PATH

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from progress import DemoError, wait_until

from nbdmirror.config import load
from nbdmirror.control_client import ControlClient
from nbdmirror.errors import NbdMirrorError

CLI: Final = str(Path(sys.executable).parent / "nbdmirror")
NETWORK: Final = "192.0.2"  # RFC 5737; it exists in namespaces of ours only
PORT: Final = 7789
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 40.0
COMMAND_TIMEOUT_S: Final = 70.0
ANSWER_TIMEOUT_S: Final = 10.0
LOG_TAIL_LINES: Final = 15

CONFIG: Final = """\
mirror = "demo"
key_file = "{directory}/key"
arbiter = "none"

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

[engine]
on_freeze = "alone"
"""


def command(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a command to its end; returns what it printed.

    Raises:
        DemoError: it failed; the text holds what it said.
    """
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise DemoError(f"{' '.join(arguments)}: not done in {timeout_s:g} s") from None
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        raise DemoError(f"{' '.join(arguments)}: exit code {done.returncode}: {said}")
    return done.stdout


def make_hosts(names: tuple[str, str]) -> None:
    """Two network namespaces, joined by a cable."""
    for name in names:
        command("ip", "netns", "add", name)
    left, right = names
    command("ip", "link", "add", left, "netns", left, "type", "veth", "peer",
            "name", right, "netns", right)  # fmt: skip
    for number, name in enumerate(names, 1):
        command("ip", "-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", name)
        command("ip", "-n", name, "link", "set", name, "up")
        command("ip", "-n", name, "link", "set", "lo", "up")


def write_config(directory: Path) -> Path:
    """The one configuration file of both nodes, and their key."""
    key = directory / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    path = directory / "demo.toml"
    path.write_text(CONFIG.format(directory=directory, network=NETWORK, port=PORT))
    return path


class Node:
    """One node: its host, its files, its engine."""

    def __init__(self, config_path: Path, name: str, host: str) -> None:
        self.config = load(config_path, name)
        self.name = name
        self.host = host
        self.directory = config_path.parent / name
        self.directory.mkdir()
        self.log_path = self.directory / "log"
        self.launcher: subprocess.Popen[bytes] | None = None

    def cli(self, *words: str) -> str:
        """`nbdmirror WORDS` as this node."""
        return command(CLI, *words, "-c", str(self.config.source), "--node", self.name)

    def engine(self, name: str) -> dict[str, Any]:
        """`nbdmirror engine NAME --json` as this node."""
        answer = json.loads(self.cli("engine", name, "--json"))
        assert isinstance(answer, dict)
        return answer

    def start(self) -> None:
        """`nbdmirror engine run` on this node's host; returns when it answers."""
        # `ip netns exec` would make a mount namespace each time: to the engine that is another
        # mount under its files, and after a crash it could not trust its page cache.
        with self.log_path.open("ab") as log:
            self.launcher = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.host}", CLI, "engine", "run",
                 "-c", str(self.config.source), "--node", self.name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(self.answers, f"engine of node {self.name} answers", START_TIMEOUT_S)

    def answers(self) -> dict[str, Any] | None:
        """The state, or None while there is no engine.

        Raises:
            DemoError: it will never answer, because it has ended.
        """
        if self.launcher is not None and self.launcher.poll() is not None:
            raise DemoError(f"the engine of node {self.name} ended: {self.launcher.returncode}")
        try:
            return self.state()
        except NbdMirrorError:
            return None

    def state(self) -> dict[str, Any]:
        """The engine's state, asked directly: cheap enough to poll."""
        with ControlClient(self.config.control_socket, ANSWER_TIMEOUT_S) as client:
            return client.call("state")

    def events(self) -> list[dict[str, Any]]:
        """What the engine remembers."""
        found = []
        with ControlClient(self.config.control_socket, ANSWER_TIMEOUT_S) as client:
            try:
                for event in client.events(timeout_s=0.5):
                    found.append(event)  # noqa: PERF402 - kept when the wait for the next ends
            except NbdMirrorError:
                pass  # no further event in time: that is all of them
        return found

    def kill(self) -> None:
        """SIGKILL the engine: the pid is the one that it tells. Its launcher ends by itself."""
        os.kill(int(self.engine("state")["pid"]), signal.SIGKILL)

    def ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for the launcher's end; returns its exit code."""
        assert self.launcher is not None
        try:
            code = self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the engine of node {self.name} does not end") from None
        self.launcher = None
        return code

    def log_tail(self) -> str:
        """The end of the engine's log and its state, for whoever looks for the reason."""
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        try:
            state = json.dumps(self.state(), indent=1)
        except NbdMirrorError as error:
            state = str(error)
        return "\n".join([f"--- node {self.name}", *lines[-LOG_TAIL_LINES:], state])

    def end_now(self) -> None:
        """The end without order, for when the demo itself ends early."""
        if self.launcher is None:
            return
        try:
            os.kill(int(self.state()["pid"]), signal.SIGKILL)
        except (NbdMirrorError, OSError):
            self.launcher.kill()
        self.launcher.wait()
        self.launcher = None


def in_sync(primary: Node, secondary: Node) -> bool:
    """Whether a write to `primary` is acknowledged by both and `secondary` may take over."""
    mine, theirs = primary.state(), secondary.state()
    session = mine["session"] or {}
    return bool(
        session.get("phase") == "synced"
        and session.get("sending")
        and theirs["data_state"] == "uptodate"
        and theirs["role"] == "secondary"
        and not mine["frozen"]
        and not mine["right_alone"]
    )
