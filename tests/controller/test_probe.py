"""The health probe over real sockets: its answers, its bounds, and what a prober sees of a hang."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from nbdmirror.config_fields import Address
from nbdmirror.controller import probe as probe_module
from nbdmirror.controller.probe import CONNECTIONS_MAX, Probe
from nbdmirror.errors import ConfigError
from tests.support.azure_prober import AzureProber

ROOT = Path(__file__).resolve().parents[2]
ANY = Address("127.0.0.1", 0)
READY = "/ready"
READY_TXT = "/var/modules/demo/ready.txt"
BOUND_S = 60.0
MARK = "s3cr3t-mark"
TO_WAIT = b"GET /wait HTTP/1.1\r\nHost: a\r\nAuthorization: x\r\nConnection: close\r\n\r\n"


def run(main: Coroutine[Any, Any, None]) -> None:
    """On the loop of production, with a bound."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, BOUND_S))


@asynccontextmanager
async def probing(
    is_ready: Callable[[], bool] = lambda: True,
    behind: web.Application | None = None,
    address: Address = ANY,
) -> AsyncIterator[Probe]:
    """A probe that listens."""
    probe = Probe(address, "demo", is_ready)
    if behind is not None:
        probe.put_behind(behind)
    await probe.start()
    try:
        yield probe
    finally:
        await probe.close()


@asynccontextmanager
async def connection(probe: Probe) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    """A client that connects and says nothing yet."""
    reader, writer = await asyncio.open_connection(probe.address.host, probe.address.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server ends the connection, in whatever way."""
    got = bytearray()
    with suppress(ConnectionError):
        while more := await reader.read(65_536):
            got += more
    return bytes(got)


async def ask(probe: Probe, sent: bytes) -> bytes:
    """The whole answer to these bytes."""
    async with connection(probe) as (reader, writer):
        writer.write(sent)
        return await to_the_end(reader)


async def code(probe: Probe, path: str = READY, method: str = "GET") -> int:
    """The status of one plain request."""
    request = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = await ask(probe, request.encode())
    return int(answer.split(b" ")[1])


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "is_ready", "expected"),
    [
        (READY, True, 200),
        (READY, False, 503),
        (READY_TXT, True, 200),
        (READY_TXT, False, 404),
        ("/ready?from=lb", True, 200),
        ("/ready?from=lb", False, 503),
        ("/var/modules/other/ready.txt", True, 404),
        ("/ready/", True, 404),
        ("/", True, 404),
    ],
)
def test_the_pages_and_their_codes(path: str, is_ready: bool, expected: int) -> None:
    """Breaks in the field: clients are sent to the node that declines them, or to none."""

    async def main() -> None:
        async with probing(lambda: is_ready) as probe:
            assert await code(probe, path) == expected
            assert await code(probe, path, "HEAD") == expected

    run(main())


def test_each_answer_is_made_when_it_is_asked_for() -> None:
    """Breaks in the field: a node that stepped down a moment ago is still called ready."""
    answers = [True, False, True, False]

    async def main() -> None:
        async with probing(lambda: answers.pop(0)) as probe:
            assert [await code(probe) for _ in range(4)] == [200, 503, 200, 503]

    run(main())


def fails() -> bool:
    raise RuntimeError("no view")


@pytest.mark.parametrize(
    ("is_ready", "failure"),
    [
        (fails, "RuntimeError: no view"),
        (lambda: "no", ""),
        (lambda: 1, ""),
        (lambda: None, ""),
    ],
)
def test_what_is_not_plainly_ready_is_not_ready(is_ready: Callable[[], bool], failure: str) -> None:
    """Breaks in the field: a controller that no longer knows its state calls itself ready."""

    async def main() -> None:
        async with probing(is_ready) as probe:
            assert await code(probe) == 503
            assert await code(probe, READY_TXT) == 404
            assert probe.failure == failure

    run(main())


def test_head_and_get_differ_in_the_body_alone() -> None:
    """Breaks in the field: a cache on the way keeps an old "ready" and answers with it."""

    async def main() -> None:
        async with probing() as probe:
            get = await ask(probe, b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n")
            head = await ask(probe, b"HEAD /ready HTTP/1.1\r\nHost: a\r\n\r\n")
        lines, _, body = get.partition(b"\r\n\r\n")
        assert body == b"ready\n"
        fields = {line for line in lines.split(b"\r\n") if not line.startswith(b"Date:")}
        assert fields == {
            b"HTTP/1.1 200 OK",
            b"Content-Type: text/plain",
            b"Content-Length: 6",
            b"Cache-Control: no-store",
            b"Connection: close",
            b"Server: nbdmirror",
        }
        lines, _, body = head.partition(b"\r\n\r\n")
        assert fields == {line for line in lines.split(b"\r\n") if not line.startswith(b"Date:")}
        assert body == b""

    run(main())


def test_what_haproxy_sends_by_default_is_understood() -> None:
    """Breaks in the field: `option httpchk` speaks HTTP/1.0 and names no host, and gets a 400."""

    async def main() -> None:
        async with probing() as probe:
            answer = await ask(probe, b"GET /ready HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 200 ")
        assert answer.endswith(b"\r\n\r\nready\n")

    run(main())


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_nothing_but_reading(method: str) -> None:
    """Breaks in the field: a port without a password takes something that could be a command."""

    async def main() -> None:
        async with probing() as probe:
            for path in (READY, READY_TXT):
                request = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
                answer = await ask(probe, request.encode())
                assert answer.startswith(b"HTTP/1.1 405 ")
                assert b"\r\nAllow: GET, HEAD\r\n" in answer
            assert await code(probe, "/state", method) == 404
            assert await code(probe) == 200

    run(main())


def test_one_answer_then_the_connection_ends() -> None:
    """Breaks in the field: connections kept alive add up until nobody else gets one."""

    async def main() -> None:
        async with probing() as probe:
            asked = b"GET /ready HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
            assert (await ask(probe, asked * 3)).count(b"HTTP/1.1 200 ") == 1

    run(main())


# --- strangers --------------------------------------------------------------------------------

STRANGE = {
    "noise": bytes(range(256)) * 8 + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "no version": b"GET /" + MARK.encode() + b"\r\n\r\n",
    "method": b"S3CR3T/MARK /ready HTTP/1.1\r\n\r\n",
    "field": f"GET /ready HTTP/1.1\r\n{MARK} {MARK}\r\n\r\n".encode(),
    "length": f"GET /ready HTTP/1.1\r\nHost: a\r\nContent-Length: {MARK}\r\n\r\n".encode(),
    "coding": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "line": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
    "long field": b"GET /ready HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 5000 + b"\r\n\r\n",
    "giant field": b"GET /ready HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 4_000_000,
    "many fields": b"GET /ready HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 100 + b"\r\n",
    "path": f"GET /{MARK}?{MARK}#{MARK} HTTP/1.1\r\nHost: {MARK}\r\n{MARK}: 1\r\n\r\n".encode(),
    "expect": f"GET /x HTTP/1.1\r\nHost: a\r\nExpect: {MARK}\r\n\r\n".encode(),
    "connect": f"CONNECT {MARK}:25 HTTP/1.1\r\nHost: {MARK}:25\r\n\r\n".encode(),
    "star": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "elsewhere": f"GET http://{MARK}:x/ready HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "version": b"GET /ready HTTP/9.9\r\nHost: a\r\n\r\n",
    "body": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_stranger_sends_is_refused_and_never_repeated(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: a scanner stops the probe, fills the log, or writes into it."""
    caplog.set_level("INFO")

    async def main() -> None:
        async with probing() as probe:
            answer = await ask(probe, STRANGE[name])
            assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.0 2"))
            assert answer[:9] in {b"", b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/0.9 "}
            assert MARK.encode() not in answer.lower()
            assert answer.partition(b"\r\n\r\n")[2] in {b"", b"bad request\n", b"not found\n"}
            assert await code(probe) == 200

    run(main())
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_body_is_not_waited_for() -> None:
    """Breaks in the field: a client announces a body, sends none, and holds its place for long."""

    async def main() -> None:
        async with probing() as probe:
            asked = b"POST /ready HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
            # aiohttp alone waits 10 s for the rest.
            answer = await asyncio.wait_for(ask(probe, asked), 8.0)
            assert answer.startswith(b"HTTP/1.1 405 ")

    run(main())


def test_an_upgrade_is_not_taken_up() -> None:
    """Breaks in the field: a client talks the probe into another protocol and stays for ever."""
    asked = (
        b"GET /ready HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nmore"
    )

    async def main() -> None:
        async with probing() as probe:
            assert (await ask(probe, asked)).endswith(b"\r\n\r\nready\n")

    run(main())


@pytest.mark.slow
def test_idle_connections_keep_nobody_out() -> None:
    """Breaks in the field: 300 open connections, and the load balancer takes the node out."""

    async def main() -> None:
        async with probing() as probe, AsyncExitStack() as stack:
            idle = [await stack.enter_async_context(connection(probe)) for _ in range(300)]
            ends = [asyncio.create_task(to_the_end(reader)) for reader, _ in idle]
            assert await code(probe) == 200
            assert probe._server is not None
            assert len(probe._server._open) <= CONNECTIONS_MAX
            # Those that found a place lose it by the time-out.
            assert await asyncio.gather(*ends) == [b""] * 300
            assert await code(probe) == 200

    run(main())


def test_the_oldest_idle_connection_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: with the place given up only after a while, a flood fills the table."""
    monkeypatch.setattr(probe_module, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(probe_module, "REQUEST_TIMEOUT_S", 2 * BOUND_S)

    async def main() -> None:
        async with probing() as probe, AsyncExitStack() as stack:
            made = [await stack.enter_async_context(connection(probe)) for _ in range(3)]
            assert await to_the_end(made[0][0]) == b""
            for reader, writer in made[1:]:
                writer.write(b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n")
                assert (await to_the_end(reader)).endswith(b"ready\n")

    run(main())


@pytest.mark.slow
def test_a_request_that_dribbles_in_is_cut() -> None:
    """Breaks in the field: a client that sends a byte now and then holds its place for ever."""

    async def main() -> None:
        async with probing() as probe, connection(probe) as (reader, writer):
            began = asyncio.get_running_loop().time()
            writer.write(b"GET /ready HTTP/1.1\r\nX: ")
            answer = None
            while answer is None:
                with suppress(TimeoutError):
                    answer = await asyncio.wait_for(to_the_end(reader), 0.1)
                writer.write(b"x")
            lasted_s = asyncio.get_running_loop().time() - began
            assert answer == b""
            assert lasted_s > probe_module.REQUEST_TIMEOUT_S - 0.2

    run(main())


# --- what hangs -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", [READY, READY_TXT])
def test_a_controller_that_hangs_is_not_ready(path: str) -> None:
    """Breaks in the field: a hung controller keeps the clients of a node that decides nothing."""

    async def main() -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.probed", cwd=ROOT,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdin is not None
        try:
            address = Address("127.0.0.1", int(await child.stdout.readline()))
            async with AzureProber(address, path, interval_s=0.1, timeout_s=1.0) as prober:
                await prober.wait_for("healthy", BOUND_S)
                os.kill(child.pid, signal.SIGSTOP)
                await prober.wait_for("unhealthy", BOUND_S)
                # The kernel still takes connections for it; only a check that wants 200 sees it.
                with socket.create_connection((address.host, address.port), BOUND_S):
                    assert await prober.probe() == "no answer"
                os.kill(child.pid, signal.SIGCONT)
                await prober.wait_for("healthy", BOUND_S)
        finally:
            os.kill(child.pid, signal.SIGCONT)
            child.stdin.close()
            await child.wait()
        assert child.returncode == 0

    run(main())


# --- places -----------------------------------------------------------------------------------


def test_a_taken_port_is_refused_and_another_one_proposed() -> None:
    """Breaks in the field: the second mirror of a server starts without a probe, or on no port."""

    async def main() -> None:
        async with probing() as first:
            second = Probe(first.address, "demo", lambda: True)
            with pytest.raises(ConfigError) as caught:
                await second.start()
            await second.close()
            said, _, free = str(caught.value).partition("; ")
            assert said == f"probe.address = {first.address}: in use"
            port, _, words = free.partition(" ")
            assert words == "is free"
            assert int(port) > first.address.port
            proposed = Address(first.address.host, int(port))
            async with probing(lambda: False, address=proposed) as third:
                assert await code(third) == 503
                assert await code(first) == 200

    run(main())


def test_the_last_port_has_no_successor() -> None:
    """Breaks in the field: the proposal is a port that does not exist."""

    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 65_535))
            taken.listen()
            with pytest.raises(ConfigError, match=r"65535: in use; none of the next 0 ports"):
                await Probe(Address("127.0.0.1", 65_535), "demo", lambda: True).start()

    run(main())


def test_an_address_of_another_server_is_named() -> None:
    """Breaks in the field: the configuration of the other node was copied, and nothing says so."""

    async def main() -> None:
        probe = Probe(Address("192.0.2.77", 9010), "demo", lambda: True)
        with pytest.raises(
            ConfigError, match=r"^probe.address = 192.0.2.77:9010: this server has no such address$"
        ):
            await probe.start()

    run(main())


def test_the_wildcard_of_ipv6_answers_both() -> None:
    """Breaks in the field: a load balancer of the other family finds nobody."""

    async def main() -> None:
        async with probing(address=Address("::", 0)) as probe:
            assert str(probe.address) == f"[::]:{probe.address.port}"
            for host in ("::1", "127.0.0.1"):
                reader, writer = await asyncio.open_connection(host, probe.address.port)
                writer.write(b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n")
                assert (await to_the_end(reader)).startswith(b"HTTP/1.1 200 ")
                writer.close()

    run(main())


def test_the_end_frees_the_port_and_leaves_nobody_connected() -> None:
    """Breaks in the field: a stopped controller leaves clients waiting, or cannot start again."""

    async def main() -> None:
        probe = Probe(ANY, "demo", lambda: True)
        await probe.close()
        await probe.start()
        async with connection(probe) as (reader, _):
            assert await code(probe) == 200  # so the idle one is known as well
            await probe.close()
            assert await to_the_end(reader) == b""
        await probe.close()
        async with probing(address=probe.address) as again:
            assert await code(again) == 200

    run(main())


# --- what is behind ---------------------------------------------------------------------------


def locked() -> tuple[web.Application, asyncio.Event]:
    """An application that wants a password everywhere, and a page that waits for the event."""
    event = asyncio.Event()

    @web.middleware
    async def authenticate(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if "Authorization" not in request.headers:
            return web.Response(status=401, text="who are you?\n")
        return await handler(request)

    async def wait(_request: web.Request) -> web.Response:
        await event.wait()
        return web.Response(text="waited\n")

    application = web.Application(middlewares=[authenticate])
    application.router.add_get("/wait", wait)
    return application, event


def test_the_probe_is_answered_before_any_authentication() -> None:
    """Breaks in the field: the console gets a password, and the load balancer is locked out."""

    async def main() -> None:
        application, event = locked()
        event.set()
        async with probing(behind=application) as probe:
            assert await code(probe) == 200
            assert await code(probe, READY_TXT) == 200
            assert await code(probe, READY, "POST") == 405
            assert await code(probe, "/wait") == 401
            assert (await ask(probe, TO_WAIT)).endswith(b"waited\n")

    run(main())


def test_what_is_behind_cannot_take_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: many open consoles, and the load balancer takes the node out."""
    monkeypatch.setattr(probe_module, "CONNECTIONS_MAX", 4)
    monkeypatch.setattr(probe_module, "BEHIND_MAX", 2)

    async def main() -> None:
        application, event = locked()
        async with probing(behind=application) as probe, AsyncExitStack() as stack:
            waiting = []
            for _ in range(2):
                reader, writer = await stack.enter_async_context(connection(probe))
                writer.write(TO_WAIT)
                waiting.append(reader)
                await code(probe)  # a whole answer later the earlier request is with its handler
            assert (await ask(probe, TO_WAIT)).startswith(b"HTTP/1.1 503 ")
            for _ in range(8):
                await stack.enter_async_context(connection(probe))
                assert await code(probe) == 200
            event.set()
            for reader in waiting:
                assert (await to_the_end(reader)).endswith(b"waited\n")
            assert (await ask(probe, TO_WAIT)).endswith(b"waited\n")

    run(main())
