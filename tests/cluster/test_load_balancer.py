"""A load balancer on a third host in front of two real nodes, and what its probes see.

HAProxy runs docs/examples/haproxy.cfg, with the addresses of this network and nothing else
changed. Behind it are the application, an HTTP server that says on which node it runs, and the NBD
export over TCP. `AzureProber` probes both nodes by the paths of this product and of SafeKit.
"""

import asyncio
import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Executor
from pathlib import Path
from time import monotonic
from typing import Any, Self

import nbd
import pytest

from nbdmirror.config_fields import Address
from tests.support.azure_prober import AzureProber
from tests.support.cluster import PROBE_PORT, Cluster, ClusterNode
from tests.support.network import ADDRESSES, ROUTER, WIRES, Switched
from tests.support.pair import ROOT

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

EXAMPLE = ROOT / "docs" / "examples" / "haproxy.cfg"
SECTIONS = ("application", "device")
FRONT = WIRES["cable"][ROUTER]
CONFIG = f"""
[export]
tcp = "0.0.0.0:10809"

[application]
start = ["{sys.executable}", "{ROOT}/tests/support/served.py", "8080"]
"""
PATHS = {"/ready": "503", "/var/modules/demo/ready.txt": "404"}
BOUND_S = 60.0
ANSWER_S = 2.0
PACE_S = 0.02
# Of the probers: far shorter than Azure's 5 s, far longer than an answer takes.
INTERVAL_S = 0.2
TIMEOUT_S = 1.0
BLOCK_BYTES = 4096


class HAProxy:
    """The running program, and what it has said about its servers."""

    def __init__(self, network: Switched, directory: Path) -> None:
        file = directory / "haproxy.cfg"
        file.write_text(configuration(directory))
        program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        assert program is not None, "the package haproxy is missing"
        self.said: list[str] = []
        # It takes each one for usable until a check has failed, and says nothing of that.
        self._states = {f"{section}/{name}": "UP" for section in SECTIONS for name in ADDRESSES}
        self._heard = threading.Condition()
        self._child = subprocess.Popen(
            [*network.enter(ROUTER), program, "-db", "-f", str(file)],
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with self._heard:
                self.said.append(line)
                if found := re.search(r"Server (\w+/\w+) is (UP|DOWN)", line):
                    self._states[found[1]] = found[2]
                self._heard.notify_all()

    def uses(self, name: str) -> None:
        """Wait until this node is in use for application and device, and the other one is not."""
        wanted = {
            f"{section}/{node}": "UP" if node == name else "DOWN"
            for section in SECTIONS
            for node in ADDRESSES
        }
        with self._heard:
            there = self._heard.wait_for(lambda: wanted == self._states, BOUND_S)
        assert there, f"wanted {wanted}: {''.join(self.said)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        self._child.wait(BOUND_S)
        self._reader.join(BOUND_S)
        assert self._child.stdout is not None
        self._child.stdout.close()


def configuration(directory: Path) -> str:
    """The example with the addresses of this network, and what needs a whole system left out."""
    changes = {
        r"10\.1\.0\.1:": f"{ADDRESSES['alpha']}:",
        r"10\.1\.0\.2:": f"{ADDRESSES['beta']}:",
        r"10\.1\.0\.100:": f"{FRONT}:",
        r"/run/haproxy/admin\.sock": str(directory / "admin.sock"),
        r"log /dev/log local0": "log stdout format raw local0",
        r"^ +(user|group) haproxy\n": "",
    }
    text = EXAMPLE.read_text()
    for pattern, given in changes.items():
        text, count = re.subn(pattern, given, text, flags=re.MULTILINE)
        assert count, pattern
    return text


@pytest.fixture
def network() -> Iterator[Switched]:
    """Two nodes and a load balancer."""
    with Switched() as made:
        yield made


@pytest.fixture
def front(network: Switched) -> Iterator[Executor]:
    """A thread on the load balancer's host."""
    with network.inside(ROUTER) as made:
        yield made


@pytest.fixture
def c(network: Switched) -> Iterator[Cluster]:
    """A pair in sync."""
    with Cluster(network=network, more=CONFIG) as made:
        yield made.start()


def ask() -> str:
    """Which node answers an HTTP client; the status code where HAProxy answers itself."""
    connection = http.client.HTTPConnection(FRONT, 80, timeout=ANSWER_S)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.read().decode() if answer.status == 200 else str(answer.status)
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def arrive(name: str) -> None:
    """Ask until that node answers.

    Raises:
        TimeoutError: it does not.
    """
    pace = threading.Event()
    until = monotonic() + BOUND_S
    while (said := ask()) != name:
        if monotonic() > until:
            raise TimeoutError(f"not {name}, but {said or 'nobody'}")
        pace.wait(PACE_S)


def device() -> nbd.NBD:
    """A new NBD client, through the load balancer."""
    handle = nbd.NBD()
    handle.connect_uri(f"nbd://{FRONT}:10809")
    return handle


def write(number: int) -> None:
    """A block by a new client, flushed."""
    handle = device()
    handle.pwrite(bytes([number]) * BLOCK_BYTES, number * BLOCK_BYTES)
    handle.flush()
    handle.shutdown()


def require_written(numbers: range) -> None:
    """A new client reads what was written."""
    handle = device()
    for number in numbers:
        assert handle.pread(BLOCK_BYTES, number * BLOCK_BYTES) == bytes([number]) * BLOCK_BYTES
    handle.shutdown()


def leads_to(front: Executor, haproxy: HAProxy, c: Cluster, node: ClusterNode) -> None:
    """New clients of application and device arrive at this node."""
    front.submit(arrive, node.name).result()
    c.in_sync(node)
    haproxy.uses(node.name)
    assert front.submit(ask).result() == node.name


def test_clients_follow_the_primary(
    c: Cluster, network: Switched, front: Executor, tmp_path: Path
) -> None:
    """Breaks in the field: behind a load balancer, as in every cloud, a failover ends nobody's
    outage.
    """
    with HAProxy(network, tmp_path) as haproxy:
        leads_to(front, haproxy, c, c.alpha)
        front.submit(write, 1).result()
        early = front.submit(device).result()
        c.alpha.kill_engine()
        leads_to(front, haproxy, c, c.beta)
        front.submit(require_written, range(1, 2)).result()
        front.submit(write, 2).result()
        with pytest.raises(nbd.Error):
            early.pread(BLOCK_BYTES, 0)
        c.alpha.order("swap")
        leads_to(front, haproxy, c, c.alpha)
        front.submit(require_written, range(1, 3)).result()
        front.submit(write, 3).result()
    c.assert_equal()


class Probers:
    """A prober of each path of each node; on the load balancer's loop."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], AzureProber] = {}

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        for name, host in ADDRESSES.items():
            for path in PATHS:
                prober = AzureProber(
                    Address(host, PROBE_PORT), path, interval_s=INTERVAL_S, timeout_s=TIMEOUT_S
                )
                self.of[name, path] = await self._stack.enter_async_context(prober)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def see(self, healthy: str) -> None:
        """Both paths say that this node and no other one is healthy; "": none is."""
        for (name, _), prober in self.of.items():
            await prober.wait_for("healthy" if name == healthy else "unhealthy", BOUND_S)

    async def said(self, name: str) -> dict[str, str]:
        """What each path of a node answers now."""
        return {path: await self.of[name, path].probe() for path in PATHS}


def on_front(front: Executor, work: Coroutine[Any, Any, None]) -> None:
    """Run this on the load balancer's host, bounded."""
    front.submit(asyncio.run, asyncio.wait_for(work, 5 * BOUND_S)).result()


async def in_thread(do: Any, *args: Any) -> Any:
    """What waits, beside the probers."""
    return await asyncio.to_thread(do, *args)


async def hangs(probers: Probers, outcomes: dict[str, str]) -> None:
    """Alpha is out of use by both paths, because of this outcome of each."""
    for path, outcome in outcomes.items():
        prober = probers.of["alpha", path]
        await prober.wait_for("unhealthy", BOUND_S)
        assert prober.outcomes[-1] == outcome


def test_exactly_one_node_is_healthy(c: Cluster, front: Executor) -> None:
    """Breaks in the field: a load balancer sends clients to both nodes or to none, or keeps them on
    a node whose engine or controller hangs.
    """

    async def main() -> None:
        async with Probers() as probers:
            await probers.see("alpha")
            assert await probers.said("alpha") == dict.fromkeys(PATHS, "200")
            assert await probers.said("beta") == PATHS, "a secondary says no, each path in its way"
            await in_thread(c.alpha.order, "swap")
            await probers.see("beta")
            await in_thread(c.in_sync, c.beta)
            await in_thread(c.beta.kill_engine)
            await probers.see("alpha")
            await in_thread(c.in_sync, c.alpha)
            await in_thread(c.alpha.signal, signal.SIGSTOP)
            try:
                await hangs(probers, dict.fromkeys(PATHS, "no answer"))
            finally:
                await in_thread(c.alpha.signal, signal.SIGCONT)
            await probers.see("alpha")
            os.kill(await in_thread(c.alpha.engine_pid), signal.SIGSTOP)
            seen = len(c.alpha.told("engine-ended"))
            await hangs(probers, PATHS)
            assert len(c.alpha.told("engine-ended")) == seen, "long before the engine is given up"
            await probers.see("beta")
            await in_thread(c.in_sync, c.beta)

    on_front(front, main())
