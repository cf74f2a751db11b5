"""Checks of ports, pages, hosts, interfaces and addresses, against the real ones."""

import asyncio
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import uvloop
from aiohttp import web

from nbdmirror.controller.checks import USER_AGENT, check
from tests.support.checks import BOUND_S, RunLoop, alone, answered, looked, section, soon
from tests.support.network import Network, hold

# Without a listener, on a host whose connections all begin at the port that is asked for.
MEETS_ITSELF = """
import socket
one = socket.create_connection(("127.0.0.1", 45000))
one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
print(one.getsockname() == one.getpeername())
"""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run_loop(request: pytest.FixtureRequest) -> RunLoop:
    """Both loops."""
    made: RunLoop = request.param
    return made


# --- tcp ----------------------------------------------------------------------------------------


def test_a_connection_is_taken_and_closed(run_loop: RunLoop) -> None:
    """Breaks in the field: a listening application counts as dead, or its connections run out."""

    async def main() -> None:
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.put_nowait(await reader.read())
            writer.close()

        for host in ("127.0.0.1", "::1"):
            server = await asyncio.start_server(serve, host, 0)
            shown = f"[{host}]" if ":" in host else host
            address = f"{shown}:{server.sockets[0].getsockname()[1]}"
            assert await soon(check(section("tcp", address=address))) == ""
            assert await soon(heard.get()) == b""
            server.close()

    run_loop(main())


def test_a_refused_connection_is_a_failure(run_loop: RunLoop) -> None:
    """Breaks in the field: an application that listens no more counts as well."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        said = run_loop(check(section("tcp", address=address)))
    assert said == f"{address} takes no connection: Connection refused"


def test_a_connection_without_answer_has_its_bound(run_loop: RunLoop) -> None:
    """Breaks in the field: an overloaded application holds its checker for minutes."""
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())  # the queue is full: the system drops who else asks
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        said = run_loop(check(section("tcp", address=address, timeout_ms=300)))
    assert said == "no answer within 300 ms"


@pytest.mark.net
@pytest.mark.slow
def test_a_connection_that_meets_itself_is_none() -> None:
    """Breaks in the field: a dead application on a high port is up now and then, by chance."""
    holder = hold()
    try:
        host = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        for command in (
            ("ip", "link", "set", "lo", "up"),
            ("sysctl", "-q", "-w", "net.ipv4.ip_local_port_range=45000 45000"),
        ):
            subprocess.run([*host, *command], check=True)
        raw = subprocess.run(
            [*host, sys.executable, "-c", MEETS_ITSELF], capture_output=True, check=True
        )
        assert raw.stdout == b"True\n"
        # The second one finds the port free again, as the application would.
        said = alone(host, *[{"kind": "tcp", "address": "127.0.0.1:45000"}] * 2)
    finally:
        holder.communicate()
    assert said == ["127.0.0.1:45000 takes no connection: nobody listens"] * 2


# --- http ---------------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler, **keys: Any) -> AsyncIterator[int]:
    """A web server whose every page is `handler`; its port."""
    application = web.Application()
    application.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, **keys)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def test_the_status_decides(run_loop: RunLoop) -> None:
    """Breaks in the field: an error page counts as well; a redirect to a login page, too."""
    asked: list[tuple[str, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append((request.path_qs, request.headers.get("User-Agent")))
        status = int(request.path.strip("/"))
        return web.Response(status=status, headers={"Location": "/200"} if status == 302 else {})

    async def main() -> list[str]:
        async with served(handler) as port:
            url = f"http://127.0.0.1:{port}"
            return [
                await check(section("http", url=f"{url}/200?a=b%20c")),
                await check(section("http", url=f"{url}/503")),
                await check(section("http", url=f"{url}/302")),
                await check(section("http", url=f"{url}/404", status=404)),
            ]

    said = ["", "answers 503, 200 expected", "answers 302, 200 expected", ""]
    assert run_loop(main()) == said
    assert asked == [(path, USER_AGENT) for path in ("/200?a=b%20c", "/503", "/302", "/404")]


def test_the_body_is_not_waited_for(run_loop: RunLoop) -> None:
    """Breaks in the field: a page that never ends fills the memory of the controller."""

    async def main() -> None:
        gone = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(bytes(1 << 16))
            finally:
                gone.set()

        async with served(handler) as port:
            assert await soon(check(section("http", url=f"http://127.0.0.1:{port}/"))) == ""
            await soon(gone.wait())

    run_loop(main())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer of HTTP"),
        (b"", "no answer: Server disconnected"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "no answer of HTTP"),
    ],
    ids=["foreign", "closed", "long"],
)
def test_what_is_no_http_is_a_failure(run_loop: RunLoop, answer: bytes, said: str) -> None:
    """Breaks in the field: another service on the port counts as well, or a password is shown."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def main() -> str:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await answered(section("http", url=f"http://me:secret@127.0.0.1:{port}/?secret"))

    reason = run_loop(main())
    assert reason.startswith(said)
    assert "secret" not in reason
    assert len(reason) < 2000
    assert reason.isprintable()


def test_a_page_without_answer_has_its_bound(run_loop: RunLoop) -> None:
    """Breaks in the field: a hung web server holds its checker for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        said = run_loop(check(section("http", url=url, timeout_ms=300)))
        assert said == "no answer within 300 ms"
    assert run_loop(check(section("http", url=url))) == "takes no connection: Connection refused"
    assert looked("http", url="http://127.0.0.1:99999/") == "url is not the address of a page"


def test_a_certificate_is_verified(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: whoever sits on the way answers for the application."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/CN=127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def handler(_: web.Request) -> web.Response:
        return web.Response()

    async def main() -> str:
        async with served(handler, ssl_context=context) as port:
            return await answered(section("http", url=f"https://127.0.0.1:{port}/"))

    assert "certificate" in run_loop(main())


# --- ping, interface, address -------------------------------------------------------------------


@pytest.mark.net
@pytest.mark.slow
def test_hosts_interfaces_and_addresses_of_this_node() -> None:
    """Breaks in the field: a pulled cable or a lost address is not seen, or seen where none is."""
    cable, lo = ({"kind": "interface", "interface": each} for each in ("cable", "lo"))
    here, other, sixth = (
        {"kind": "address", "held": each} for each in ("192.0.2.1/24", "192.0.2.2/24", "fd00::5/64")
    )
    with Network() as network:
        alpha = network.enter("alpha")
        network.run("alpha", "ip", "address", "add", "fd00::5/64", "dev", "cable", "nodad")
        ping = {"kind": "ping", "hosts": ["192.0.2.99", "192.0.2.2"]}
        assert alone(alpha, cable, lo, here, sixth, ping) == [""] * 5
        missing = [{"kind": "interface", "interface": each} for each in ("cable0", "ü" * 15)]
        assert alone(alpha, *missing, other) == [
            "there is no interface cable0",
            f"there is no interface {'ü' * 15}",
            "192.0.2.2 is on no interface of this node",
        ]
        network.run("beta", "ip", "link", "set", "cable", "down")
        silent = {"kind": "ping", "hosts": ["192.0.2.2"], "timeout_ms": 300}
        assert alone(alpha, here, silent) == [
            "",
            "no echo: 192.0.2.2 did not answer within 300 ms",
        ]
        # The kernel takes up to a second to say so.
        end_s = monotonic() + BOUND_S
        while (said := alone(alpha, cable)) == [""]:
            assert monotonic() < end_s
        assert said == ["cable has no carrier"]
        network.run("alpha", "ip", "link", "set", "cable", "down")
        network.run("alpha", "ip", "address", "del", "192.0.2.1/24", "dev", "cable")
        assert alone(alpha, cable, here) == [
            "cable is switched off",
            "192.0.2.1 is on no interface of this node",
        ]
