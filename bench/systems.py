"""What is measured: the mirror and the systems it is compared with, each started for real.

Owns how each system is started on images of one size in one directory, which of its processes
count, and that all of them end. It measures nothing. Nothing here may give one system what another
lacks: same size of images, each client comes over a Unix socket. The mirror has as many threads for
each connection as it gives itself, and so has the sketch, which shares its nbdkit and its Python;
the systems in C have THREADS: nothing but their clients holds them back.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self

from nbdmirror.control_client import ControlClient
from nbdmirror.errors import NbdMirrorError
from nbdmirror.launcher import environment, threads

HERE: Final = Path(__file__).resolve().parent
THREADS: Final = 4
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.02


class BenchError(Exception):
    """A system did not start, or ended in the middle; the text has the end of its log."""


def wait_until(what: str, ready: Callable[[], bool]) -> None:
    """Poll until `ready()`. Raises BenchError when START_TIMEOUT_S has passed."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)  # noqa: TID251 - other programs' start has no event to wait for


def accepts(path: Path) -> bool:
    """Whether somebody listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def listens(port: int) -> bool:
    """Whether somebody listens on a TCP port; asked without connecting, a sketch takes only one."""
    wanted = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return any(line.split()[1].endswith(wanted) and line.split()[3] == "0A" for line in lines)


def free_port() -> int:
    """A TCP port of this host that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child_named(parent: int, name: str) -> int:
    """The pid of the child of `parent` that runs `name`, 0 if there is none yet."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = status.read_text(encoding="ascii").rpartition(")")
            pid, _, command = head.partition(" (")
            if command == name and int(tail.split()[1]) == parent:
                return int(pid)
    return 0


class System(ABC):
    """One system under test on images in `images`; sockets and logs are in `run` (a short path)."""

    name: str
    what: str

    def __init__(self, images: Path, run: Path, device_bytes: int) -> None:
        self.images = images / self.name
        self.run = run / self.name
        self.device_bytes = device_bytes
        self.socket = self.run / "nbd.sock"
        self.processes: dict[str, int] = {}
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def uri(self) -> str:
        """Where fio connects."""
        return f"nbd+unix:///?socket={self.socket}"

    def __enter__(self) -> Self:
        self.images.mkdir()
        self.run.mkdir()
        try:
            self.start()
            wait_until(self.name, lambda: accepts(self.socket))
        except (BenchError, NbdMirrorError, OSError, subprocess.SubprocessError) as error:
            text = self.logs()
            self.stop()
            raise BenchError(f"{self.name}: {error}\n{text}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None:
        """Make the images, start what belongs to the system, fill `processes`."""

    def settle(self) -> None:
        """Make the images durable, so that no system's dirty pages slow the next one down."""
        for path in self.images.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDWR)
                os.fdatasync(descriptor)
                os.close(descriptor)

    def check(self) -> None:
        """Raises BenchError when a figure taken until now would not be one of this system."""
        gone = [part for part, pid in self.processes.items() if not Path(f"/proc/{pid}").exists()]
        if gone:
            raise BenchError(f"{self.name}: {', '.join(gone)} ended\n{self.logs()}")

    def stop(self) -> None:
        """End every process that was started, the last one first, and give the images back."""
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()
        shutil.rmtree(self.images, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)

    def image(self, name: str) -> Path:
        """A new sparse file of the device's size."""
        path = self.images / name
        path.touch()
        os.truncate(path, self.device_bytes)
        return path

    def spawn(self, part: str, arguments: Iterable[object]) -> int:
        """Start one program of the system; its output goes to a log. Returns its pid."""
        with (self.run / f"{part}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(each) for each in arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )
        self._started.append(process)
        return process.pid

    def logs(self) -> str:
        """The end of every log, for an error."""
        return "\n".join(
            f"{path.name}: {path.read_text(encoding='utf-8', errors='replace')[-2000:]}"
            for path in sorted(self.run.glob("*.log"))
        )


class File(System):
    """No replication: nbdkit's own file plugin, in C."""

    name = "file"
    what = "nbdkit file (C, one copy)"

    def start(self) -> None:
        command = ("nbdkit", "-f", "-t", THREADS, "-U", self.socket, "file", self.image("a.img"))
        self.processes = {"nbdkit": self.spawn("nbdkit", command)}


class Chain(System):
    """The practical limit: nbdkit forwarding to nbdkit over TCP, both C, no local copy."""

    name = "chain"
    what = "nbdkit nbd -> nbdkit file over TCP (C, one remote copy)"

    def start(self) -> None:
        port = free_port()
        far = ("nbdkit", "-f", "-t", THREADS, "-i", "127.0.0.1", "-p", port)
        remote = self.spawn("remote", (*far, "file", self.image("b.img")))
        wait_until("remote", lambda: listens(port))
        near = ("nbdkit", "-f", "-t", THREADS, "-U", self.socket)
        local = self.spawn("local", (*near, "nbd", f"uri=nbd://127.0.0.1:{port}"))
        self.processes = {"local": local, "remote": remote}


class Sketch(System):
    """The mirror without its safety: bench/sketch."""

    name = "sketch"
    what = "bare sketch (Python, two copies, nothing safe)"

    def start(self) -> None:
        port = free_port()
        receiver = (sys.executable, HERE / "sketch" / "receiver.py", self.image("b.img"), port)
        remote = self.spawn("remote", receiver)
        wait_until("receiver", lambda: listens(port))
        count = threads(0, shutil.which("nbdkit") or "nbdkit")
        near = ("nbdkit", "-f", "-t", count, "-U", self.socket, "python")
        plugin = HERE / "sketch" / "sketch_plugin.py"
        local = self.spawn("local", (*near, plugin, f"file={self.image('a.img')}", f"port={port}"))
        self.processes = {"local": local, "remote": remote}


CONFIGURATION: Final = """\
mirror = "bench"
key_file = "{run}/key"
arbiter = "none"
[node.a]
id = 1
address = "127.0.0.1:{ports[0]}"
data_dir = "{images}/a"
run_dir = "{run}/a"
[node.b]
id = 2
address = "127.0.0.1:{ports[1]}"
data_dir = "{images}/b"
run_dir = "{run}/b"
"""


class Mirror(System):
    """The product: PRIM and SECOND, started and commanded with its own command line."""

    name = "mirror"
    what = "nbdmirror, PRIM and SECOND (two copies, all rules)"

    def start(self) -> None:
        self.socket = self.run / "a" / "nbd.sock"
        key = self.run / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(32))
        ports = (free_port(), free_port())
        text = CONFIGURATION.format(run=self.run, images=self.images, ports=ports)
        self.configuration = self.run / "bench.toml"
        self.configuration.write_text(text, encoding="utf-8")
        self.create("a")
        self.create("b", "--join")
        runners = {name: self.spawn(name, self.command("engine", "run", name)) for name in "ab"}
        wait_until("engines", lambda: all(map(self.state, runners)))
        for part, name in (("primary", "a"), ("secondary", "b")):
            self.processes[part] = child_named(runners[name], "nbdkit")
        wait_until("session", self.in_sync)
        subprocess.run(self.command("engine", "promote", "a"), check=True, capture_output=True)

    def command(self, group: str, verb: str, name: str, *more: str) -> list[str]:
        """A command line of the product for one node."""
        program = str(Path(sys.executable).with_name("nbdmirror"))
        return [program, group, verb, "-c", str(self.configuration), "--node", name, *more]

    def create(self, node: str, *more: str) -> None:
        """Make the files of one node."""
        size = ("--size", str(self.device_bytes), "--sparse")
        command = self.command("metadata", "create", node, *size, *more)
        subprocess.run(command, check=True, capture_output=True)

    def state(self, name: str) -> dict[str, Any]:
        """The state of one engine; empty while it does not answer."""
        try:
            with ControlClient(self.run / name / "engine.sock") as client:
                return client.call("state")
        except NbdMirrorError:
            return {}

    def in_sync(self) -> bool:
        """Whether both copies are equal and every write goes to both."""
        session = self.state("a").get("session") or {}
        return session.get("phase") == "synced" and bool(session.get("sending"))

    def check(self) -> None:
        """A mirror that lost its peer is fast, and its figures are not those of a mirror."""
        super().check()
        if not self.in_sync():
            raise BenchError(f"mirror: not PRIM and SECOND any more\n{self.logs()}")


SYSTEMS: Final = (Mirror, Sketch, Chain, File)
