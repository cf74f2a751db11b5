"""The quick start of the README, typed literally on two servers: what a new user does first."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.support.pair import ROOT

pytestmark = [pytest.mark.nbdkit, pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(180)]

BIN = Path(sys.executable).parent
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
BOUND_S = 60.0
HOLD = ("unshare", "--net", "--mount", "--uts", "sh", "-c", "echo ready; exec cat")
# The application of the page: something that anybody would have there.
APP = """#!/bin/sh
case $1 in
start) date > /srv/demo/started; echo started ;;
stop) echo "stopped $2" ;;
esac
"""
# Each server has an /etc, a /var/lib, a /run, a /srv and a /usr/local/bin of its own.
SETTLE = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run
# By its real name: loop devices are seen by all servers of this machine, by the path behind them.
mkdir {own}/run && ln -s {own}/run /run/nbdmirror
mount --bind {own}/var /var/lib
mount --bind {own}/srv /srv
mount --bind {own}/bin /usr/local/bin
mount -t overlay overlay -o lowerdir=/etc,upperdir={own}/etc,workdir={own}/work /etc
mkdir -p /etc/nbdmirror
"""


ASK = """
import http.client
asked = http.client.HTTPConnection("127.0.0.1", 9010, timeout=5)
asked.request("GET", "/ready")
print(asked.getresponse().status)
"""


def blocks() -> list[list[str]]:
    """The commands of the README's section, block by block, without their comments."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Two servers") : text.index("## Status and limits")]
    return [
        [line.partition("#")[0].strip() for line in body.splitlines()]
        for body in BLOCK.findall(section)
    ]


class Server:
    """A host with its own network, mounts and name."""

    def __init__(self, name: str, own: Path) -> None:
        self.name = name
        self.log = own / "log"
        self._holder = subprocess.Popen(HOLD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        self.pid = self._holder.pid
        self._running: list[subprocess.Popen[str]] = []

    def enter(self) -> list[str]:
        """What stands before a command."""
        where = f"/proc/{self.pid}/ns"
        return ["nsenter", f"--net={where}/net", f"--mount={where}/mnt", f"--uts={where}/uts"]

    def root(self, script: str) -> None:
        """Set the host up."""
        done = subprocess.run([*self.enter(), "sh", "-c", script], capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr

    def begin(self, line: str) -> "subprocess.Popen[str]":
        """Type a command and leave it running."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*self.enter(), "sh", "-c", f"exec {line}"], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
            )  # fmt: skip
        self._running.append(process)
        return process

    def type(self, line: str, given: str = "") -> str:
        """Type a command and wait for its end; returns what it said."""
        code, said = self.tried(line, given)
        assert code == 0, f"{self.name}: {line}: {said}\n{self.log.read_text()}"
        return said

    def tried(self, line: str, given: str = "") -> tuple[int, str]:
        """The same, with its exit code."""
        process = self.begin(line)
        self._running.remove(process)
        said, _ = process.communicate(given, timeout=BOUND_S)
        return process.returncode, said

    def end(self) -> None:
        """End everything that runs on the host, its engine first of all, and the host."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for process in self._running:
            process.communicate(timeout=BOUND_S)
        self._holder.communicate(timeout=BOUND_S)

    def processes(self) -> Iterator[int]:
        """Whatever has the mounts of this host: what is left would hang with its engine gone."""
        mounts = Path(f"/proc/{self.pid}/ns/mnt").readlink()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                with contextlib.suppress(OSError):
                    if (entry / "ns/mnt").readlink() == mounts:
                        yield int(entry.name)


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """alpha and beta on a switch, which is the router that the page speaks of."""
    base = Path(tempfile.mkdtemp(prefix="nmq"))
    made: list[Server] = []
    try:
        for name in ("alpha", "beta", "router"):
            own = base / name
            for part in ("etc", "work", "var", "srv", "bin"):
                (own / part).mkdir(parents=True)
            (own / "bin" / "app").write_text(APP)
            (own / "bin" / "app").chmod(0o755)
            made.append(Server(name, own))
            if name != "router":
                made[-1].root(SETTLE.format(name=name, own=own))
        connect(*made)
        yield made[0], made[1]
    finally:
        for server in made:
            server.end()
        shutil.rmtree(base)


def connect(alpha: Server, beta: Server, router: Server) -> None:
    """10.1.0.0/24."""
    router.root("ip link add switch type bridge && ip link set switch up && ip link set lo up"
                " && ip address add 10.1.0.254/24 dev switch")  # fmt: skip
    for number, server in enumerate((alpha, beta), 1):
        router.root(
            f"ip link add p{number} type veth peer name eth0 netns {server.pid}"
            f" && ip link set p{number} master switch up"
        )
        server.root(f"ip link set lo up && ip link set eth0 up"
                    f" && ip address add 10.1.0.{number}/24 dev eth0")  # fmt: skip


def token_of(process: "subprocess.Popen[str]") -> str:
    """The token that `create` prints, to be pasted on the other server."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"\b([A-Z2-7]{5}(?:-[A-Z2-7]{5}){5,})\b", line, re.IGNORECASE)
        if found:
            return found[1]
    raise AssertionError("no token")


def wait_for(server: Server, wanted: str) -> str:
    """Until the status has these words."""
    until = monotonic() + BOUND_S
    said = ""
    while monotonic() < until:
        code, said = server.tried("nbdmirror status -m demo")
        if code == 0 and wanted in said:
            return said
    logs = "\n".join(path.read_text()[-3000:] for path in server.log.parent.parent.glob("*/log"))
    raise TimeoutError(f"{server.name}: not {wanted}:\n{said}\n{logs}")


def test_the_quick_start_leads_to_a_protected_application(
    servers: tuple[Server, Server],
) -> None:
    """Breaks in the field: a new user types what the first page says, and has nothing."""
    alpha, beta = servers
    create, join, both, after = blocks()
    assert "--size 10GiB" in create[0], "the size alone is smaller here"
    creating = alpha.begin(create[0].replace("--size 10GiB", "--size 64MiB"))
    beta.type(join[0], given=f"{token_of(creating)}\n")
    creating.communicate(timeout=BOUND_S)
    assert creating.returncode == 0, alpha.log.read_text()
    for server in (alpha, beta):
        assert [line.split()[0] for line in both] == ["nbdmirrord", "nbdmirror", "nbdmirror"]
        server.begin(both[0])
        wait_for(server, "STOP")
        server.type(both[1])
        server.type(both[2])
    wait_for(alpha, "PRIM ready")
    wait_for(beta, "SECOND ready")
    alpha.root("test -s /srv/demo/started && mountpoint -q /srv/demo")
    alpha.root("ip address show | grep -q 10.1.0.100/24")
    assert ready(alpha) == 200
    assert ready(beta) == 503
    alpha.type(after[0])
    wait_for(beta, "PRIM ready")
    beta.root("test -s /srv/demo/started && mountpoint -q /srv/demo")
    assert "SECOND" in wait_for(alpha, "SECOND ready")
    assert alpha.type(after[1])
    beta.type("nbdmirror stop -m demo --both")


def ready(server: Server) -> int:
    """The status of the page that a load balancer asks for, as the server itself has it."""
    return int(server.type(f"{sys.executable} -c '{ASK}'"))
