"""The health probe: one HTTP port that says whether this node may be sent clients.

Owns the listening socket of `probe.address`, its bounds, and the two pages that load balancers ask
for. An answer is made from `is_ready` at the moment of answering: nothing is stored, so there is no
answer that can go stale, and a process that hangs answers nothing. Must never: ask for a secret,
wait for anything, or repeat in an answer or a log what a stranger has sent. An application for all
other paths (API, console) can be put behind; it is asked only after the two pages.
"""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Final

from aiohttp import web

from nbdmirror.config_fields import Address
from nbdmirror.errors import ConfigError

# At most so many connections, and none of them without a whole request for longer than the
# time-out: 300 strangers that hold theirs open cannot keep out the one that asks.
CONNECTIONS_MAX: Final = 256
BEHIND_MAX: Final = 192  # requests with what is behind; the rest of the connections is the probe's
REQUEST_TIMEOUT_S: Final = 2.0
BACKLOG: Final = 256
# 64 fields of 4 KiB: 256 KiB for a connection, 64 MiB for all, for at most 2 s.
LINE_BYTES_MAX: Final = 4096
FIELD_BYTES_MAX: Final = 4096
FIELDS_MAX: Final = 64
CLOSE_TIMEOUT_S: Final = 1.0
PORTS_TRIED_MAX: Final = 64
PORT_MAX: Final = 65_535

METHODS: Final = ("GET", "HEAD")
READY: Final = b"ready\n"
NOT_READY: Final = b"not ready\n"
_WHY: Final = {
    errno.EADDRNOTAVAIL: "this server has no such address",
    errno.EACCES: "only root may listen there; take a port from 1024 on",
    errno.EAFNOSUPPORT: "this kernel has no such address family",
}


class Probe:
    """The probe of one mirror; lives on the loop that start() was called on."""

    def __init__(self, address: Address, mirror: str, is_ready: Callable[[], bool]) -> None:
        """`is_ready`: cheap, never waits; anything but True, an exception too, is "not ready"."""
        # After start() with its real port, where 0 was given.
        self.address = address
        # What the last exception of `is_ready` said; for the status, as nobody else sees it.
        self.failure = ""
        self._is_ready = is_ready
        self._not_ready_codes = {
            "/ready": HTTPStatus.SERVICE_UNAVAILABLE,
            f"/var/modules/{mirror}/ready.txt": HTTPStatus.NOT_FOUND,
        }
        self._behind: web.AppRunner | None = None
        self._server: _Server | None = None
        self._runner: web.ServerRunner | None = None

    def put_behind(self, application: web.Application) -> None:
        """Before start(): `application` answers every path that is not the probe's."""
        assert self._runner is None
        self._behind = web.AppRunner(application)

    async def start(self) -> None:
        """Listen and answer. Raises ConfigError when the address cannot be had."""
        assert self._runner is None
        listener = _listener(self.address)
        try:
            if self._behind is not None:
                await self._behind.setup()
            inner = self._behind.server if self._behind is not None else None
            self._server = _Server(self._answer, inner)
            self._runner = web.ServerRunner(self._server, shutdown_timeout=CLOSE_TIMEOUT_S)
            await self._runner.setup()
            self.address = Address(self.address.host, listener.getsockname()[1])
            await web.SockSite(self._runner, listener, backlog=BACKLOG).start()
        except BaseException:
            listener.close()
            await self.close()
            raise

    async def close(self) -> None:
        """Stop listening and end every connection, within about a second. Again: nothing."""
        for runner in (self._runner, self._behind):
            if runner is not None:
                await runner.cleanup()
        self._runner = self._behind = self._server = None

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Everything that arrives comes here first, before any authentication."""
        not_ready = self._not_ready_codes.get(request.path)
        if not_ready is None:
            return await self._other(request)
        if request.method not in METHODS:
            refusal = _page(HTTPStatus.METHOD_NOT_ALLOWED, b"GET or HEAD\n")
            refusal.headers["Allow"] = ", ".join(METHODS)
            return refusal
        if self._ready():
            return _page(HTTPStatus.OK, READY)
        return _page(not_ready, NOT_READY)

    def _ready(self) -> bool:
        try:
            return self._is_ready() is True
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no "ready"
            self.failure = f"{type(error).__name__}: {error}"
            return False

    async def _other(self, request: web.BaseRequest) -> web.StreamResponse:
        inner = self._behind.server if self._behind is not None else None
        if inner is None or self._server is None:
            return _page(HTTPStatus.NOT_FOUND, b"not found\n")
        if self._server.busy_count >= BEHIND_MAX:
            return _page(HTTPStatus.SERVICE_UNAVAILABLE, b"too many requests\n")
        with self._server.busy(request.protocol):
            return await inner.request_handler(request)


def _page(status: HTTPStatus, body: bytes) -> web.Response:
    """One of our constant answers; the connection ends with it."""
    page = web.Response(
        status=status,
        body=body,
        content_type="text/plain",
        headers={"Cache-Control": "no-store", "Server": "nbdmirror"},
    )
    page.force_close()
    return page


class _Connection(web.RequestHandler):
    """One connection. aiohttp tells a client what it did not understand; we repeat nothing."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status == HTTPStatus.BAD_REQUEST:
            return _page(HTTPStatus.BAD_REQUEST, b"bad request\n")
        return super().handle_error(request, status, exc, message)


class _Server(web.Server):
    """Makes the connections and bounds their number; `inner` is the server of what is behind."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        inner: web.Server | None,
    ) -> None:
        super().__init__(answer, request_factory=inner.request_factory if inner else None)
        self._open: dict[web.RequestHandler, asyncio.Transport] = {}  # the oldest first
        self._busy: set[web.RequestHandler] = set()

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Connection(
            self,
            loop=asyncio.get_running_loop(),
            # aiohttp closes what has not sent a whole request for so long, the first one included.
            keepalive_timeout=REQUEST_TIMEOUT_S,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's way to say "none"
            max_line_size=LINE_BYTES_MAX,
            max_field_size=FIELD_BYTES_MAX,
            max_headers=FIELDS_MAX,
            lingering_time=0.0,  # a body that nobody wants is not read
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Keep the newest: whoever asks now is worth more than whoever has been silent longest."""
        super().connection_made(handler, transport)
        self._open[handler] = transport
        if len(self._open) > CONNECTIONS_MAX:
            idle = (each for each in self._open if each not in self._busy)
            # Without its entry at once: an abort is told to us only in a later round of the loop.
            self._open.pop(next(idle)).abort()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Forget it."""
        super().connection_lost(handler, exc)
        self._open.pop(handler, None)

    @property
    def busy_count(self) -> int:
        """How many requests are with what is behind."""
        return len(self._busy)

    @contextmanager
    def busy(self, handler: web.RequestHandler) -> Iterator[None]:
        """While a request of this connection is with what is behind, it is not idle."""
        self._busy.add(handler)
        try:
            yield
        finally:
            self._busy.discard(handler)


def _listener(address: Address) -> socket.socket:
    """A socket that listens at `address`. Raises ConfigError that says what to do."""
    try:
        return _listen(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"in use; {_free_after(address)}"
        else:
            why = _WHY.get(error.errno or 0, error.strerror or str(error))
        raise ConfigError(f"probe.address = {address}: {why}") from error


def _listen(address: Address) -> socket.socket:
    ((family, kind, _, _, name),) = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    listener = socket.socket(family, kind)
    try:
        listener.setblocking(False)
        # A restart must not wait for connections of its earlier life that linger in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "[::]" is both
        listener.bind(name)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _free_after(address: Address) -> str:
    """Says which port after the one of `address` is free now."""
    last = min(address.port + PORTS_TRIED_MAX, PORT_MAX)
    for port in range(address.port + 1, last + 1):
        with suppress(OSError):
            _listen(Address(address.host, port)).close()
            return f"{port} is free"
    return f"none of the next {last - address.port} ports is free either"
