"""A real HAProxy with the example of the documents, in front of two probes.

Proves docs/examples/haproxy.cfg: what runs is that file, with other addresses and ports. The nodes
are two hosts of 127.0.0.0/8; behind each probe are an HTTP server and a server that greets and then
holds its client, as an NBD server does.
"""

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdmirror.config_fields import Address
from nbdmirror.controller.probe import Probe

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "haproxy.cfg"
BOUND_S = 60.0
FRONT = "127.77.0.100"
HOSTS = {"alpha": "127.77.0.1", "beta": "127.77.0.2"}
SECTIONS = ("application", "device")
GREETING = b"NBDMAGIC "
LINE_BYTES_MAX = 65_536


def free_port() -> int:
    """A port that is free on each of the hosts now."""
    while True:
        with socket.socket() as first:
            first.bind((FRONT, 0))
            port: int = first.getsockname()[1]
            try:
                for host in HOSTS.values():
                    with socket.socket() as each:
                        each.bind((host, port))
            except OSError:
                continue
            return port


class Node:
    """One node: a probe, an application, and a device."""

    def __init__(self, name: str, ports: dict[str, int]) -> None:
        self.name = name
        self.ready = False
        self.probe = Probe(Address(HOSTS[name], ports["9010"]), "demo", lambda: self.ready)
        self._ports = ports
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen on all three ports."""
        await self.probe.start()
        for serve, port in ((self._application, "8080"), (self._device, "10809")):
            self._servers.append(
                await asyncio.start_server(serve, HOSTS[self.name], self._ports[port])
            )

    async def close(self) -> None:
        """End them."""
        for server in self._servers:
            server.close()
        await self.probe.close()

    async def _application(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = self.name.encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async def _device(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + self.name.encode() + b"\n")
        while line := await reader.readline():
            writer.write(line)
        writer.close()


class HAProxy:
    """The running program, and what it has said about its servers."""

    def __init__(self, child: asyncio.subprocess.Process, ports: dict[str, int]) -> None:
        self.said: list[str] = []
        self.states: dict[str, str] = {}  # "application/alpha" -> "UP" or "DOWN"
        self._child = child
        self._ports = ports
        self._heard = asyncio.Condition()
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self._child.stdout is not None
        while line := (await self._child.stdout.readline()).decode():
            async with self._heard:
                self.said.append(line)
                if found := re.search(r"Server (\w+/\w+) is (UP|DOWN)", line):
                    self.states[found[1]] = found[2]
                self._heard.notify_all()

    async def until(self, **states: str) -> None:
        """Until it has said this of both servers of a name."""
        wanted = {f"{s}/{name}": state for name, state in states.items() for s in SECTIONS}
        try:
            async with asyncio.timeout(BOUND_S), self._heard:
                await self._heard.wait_for(lambda: wanted.items() <= self.states.items())
        except TimeoutError:
            raise TimeoutError(f"wanted {wanted}: {''.join(self.said)}") from None

    async def application(self) -> bytes:
        """Who answers an HTTP client now: its name, or the status line of HAProxy's own answer."""
        reader, writer = await asyncio.open_connection(FRONT, self._ports["80"])
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        head, _, body = (await asyncio.wait_for(reader.read(LINE_BYTES_MAX), BOUND_S)).partition(
            b"\r\n\r\n"
        )
        writer.close()
        return body if head.startswith(b"HTTP/1.1 200 ") else head.partition(b"\r\n")[0]

    async def device(self) -> "Client":
        """A client of the device."""
        reader, writer = await asyncio.open_connection(FRONT, self._ports["10809"])
        return Client(reader, writer)

    async def close(self) -> None:
        """End it, by its process."""
        self._child.terminate()
        await self._child.wait()
        await self._task


class Client:
    """A connection to the device."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def line(self, sent: bytes = b"") -> bytes:
        """The next line; b"" when the connection has ended."""
        try:
            self._writer.write(sent)
            return await asyncio.wait_for(self._reader.readline(), BOUND_S)
        except ConnectionError:
            return b""

    def close(self) -> None:
        """Hang up."""
        self._writer.transport.abort()


def configuration(place: Path) -> tuple[str, dict[str, int]]:
    """The example with addresses of a test; and which port stands for which of the example's."""
    text = EXAMPLE.read_text(encoding="utf-8")
    free: set[int] = set()
    while len(free) < 4:
        free.add(free_port())
    ports = dict(zip(("80", "8080", "9010", "10809"), free, strict=True))
    changes = {
        r"10\.1\.0\.1:": f"{HOSTS['alpha']}:",
        r"10\.1\.0\.2:": f"{HOSTS['beta']}:",
        r"10\.1\.0\.100:": f"{FRONT}:",
        **{rf"(?<=[0-9]:){port}$": str(made) for port, made in ports.items()},
        r"(?<=check port )9010\b": str(ports["9010"]),
        r"/run/haproxy/admin\.sock": str(place / "admin.sock"),
        r"log /dev/log local0": "log stdout format raw local0",
        r"^ +(user|group) haproxy\n": "",
    }
    for pattern, given in changes.items():
        text, count = re.subn(pattern, given, text, flags=re.MULTILINE)
        assert count or pattern.endswith("9010$"), pattern
    assert not re.search(r"^[^#]*10\.1\.0\.", text, re.MULTILINE)
    return text, ports


@asynccontextmanager
async def cluster(place: Path) -> AsyncIterator[tuple[HAProxy, Node, Node]]:
    """HAProxy and both nodes, none of which is ready."""
    text, ports = configuration(place)
    file = place / "haproxy.cfg"
    file.write_text(text, encoding="utf-8")
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    assert program is not None, "the package haproxy is missing"
    async with AsyncExitStack() as stack:
        nodes = [Node(name, ports) for name in HOSTS]
        for node in nodes:
            stack.push_async_callback(node.close)
            await node.start()
        child = await asyncio.create_subprocess_exec(
            program, "-db", "-f", str(file),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        haproxy = HAProxy(child, ports)
        stack.push_async_callback(haproxy.close)
        await haproxy.until(alpha="DOWN", beta="DOWN")
        yield haproxy, nodes[0], nodes[1]


def run(main: Coroutine[Any, Any, None]) -> None:
    """On the loop of production, with a bound."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, 2.5 * BOUND_S))


@pytest.mark.slow
def test_clients_arrive_at_the_ready_node(tmp_path: Path) -> None:
    """Breaks in the field: after a failover clients are still sent to the node that has gone."""

    async def main() -> None:
        async with cluster(tmp_path) as (haproxy, alpha, beta):
            alpha.ready = True
            await haproxy.until(alpha="UP", beta="DOWN")
            assert await haproxy.application() == b"alpha"
            early = await haproxy.device()
            assert await early.line() == GREETING + b"alpha\n"

            alpha.ready, beta.ready = False, True
            await haproxy.until(alpha="DOWN", beta="UP")
            assert await haproxy.application() == b"beta"
            late = await haproxy.device()
            assert await late.line() == GREETING + b"beta\n"
            # Nobody stays connected to the node that is not ready any more.
            assert await early.line() == b""
            assert await late.line(b"still here\n") == b"still here\n"
            early.close()
            late.close()

    run(main())


@pytest.mark.slow
def test_nobody_is_let_in_while_no_node_is_ready(tmp_path: Path) -> None:
    """Breaks in the field: in the middle of a failover clients reach a node that must not serve."""

    async def main() -> None:
        async with cluster(tmp_path) as (haproxy, alpha, _):
            for _ in range(2):
                assert await haproxy.application() == b"HTTP/1.1 503 Service Unavailable"
                client = await haproxy.device()
                assert await client.line() == b""
                client.close()
                alpha.ready = True
                await haproxy.until(alpha="UP", beta="DOWN")
                client = await haproxy.device()
                assert await client.line() == GREETING + b"alpha\n"
                alpha.ready = False
                await haproxy.until(alpha="DOWN", beta="DOWN")
                assert await client.line() == b""
                client.close()

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_a_probe_that_is_gone_or_hangs_is_not_ready(hangs: bool, tmp_path: Path) -> None:
    """Breaks in the field: a controller ends or hangs, and its node keeps the clients for ever."""

    async def main() -> None:
        async with cluster(tmp_path) as (haproxy, alpha, beta):
            alpha.ready = True
            await haproxy.until(alpha="UP", beta="DOWN")
            beta.ready = True
            await alpha.probe.close()
            with socket.socket() as silent:
                if hangs:  # the kernel takes connections, and nobody answers them
                    silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    silent.bind((alpha.probe.address.host, alpha.probe.address.port))
                    silent.listen()
                await haproxy.until(alpha="DOWN", beta="UP")
                assert await haproxy.application() == b"beta"

    run(main())
