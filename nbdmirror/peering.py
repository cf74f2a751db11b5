"""Finding the peer: the lower node id dials, the higher one listens; both prove themselves.

Owns the peer port and the time between "connected" and "authenticated". Nothing of the engine is
touched before the handshake is done; connections that have not proven themselves are few,
short-lived and cost no memory worth naming. Runs on the uvloop thread.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from nbdmirror.core.channel import Channel
from nbdmirror.core.handshake import TLS_DIFFERS, Handshake, Identity, offers
from nbdmirror.errors import PeerProtocolError, PeerRefusedError
from nbdmirror.limits import HANDSHAKE_TIMEOUT_MS, RECONNECT_MS_MAX, RECONNECT_MS_MIN
from nbdmirror.link import abort, enlarge, tune
from nbdmirror.tls import TlsSetup
from nbdmirror.unproven import PlainWay, Proven, TlsWay, Way

UNPROVEN_MAX = 16
NONCE_BYTES = 32
# How core/handshake.py begins what the other end says, and what one of ours says.
UNAUTHENTICATED = "peer says (unauthenticated): "
REFUSALS = frozenset(
    {
        "authentication failed",
        "this is another mirror",
        "your node identity is mine, or none",
        "no protocol version in common",
        "a required feature is missing",
        TLS_DIFFERS,
    }
)
LISTEN_BACKLOG = 32


# Connections that have not proven themselves, oldest first, and whether they said a valid HELLO.
Places: TypeAlias = dict["asyncio.Task[None]", bool]


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who this node is to its peer, what it proves that with, and whether every frame is keyed.

    `tls`: what it needs to speak TLS, None to speak without.
    """

    identity: Identity
    key: bytes = field(repr=False)
    asks_macs: bool
    tls: TlsSetup | None = None

    def handshake(self, *, dialer: bool, binding: bytes = b"") -> Handshake:
        """A fresh one, of this node, bound to the TLS channel around it."""
        features, required = offers(macs=self.asks_macs)
        return Handshake(
            dialer,
            self.key,
            self.identity,
            os.urandom(NONCE_BYTES),
            features=features,
            required=required,
            binding=binding,
        )

    def way(self, connection: socket.socket, *, dialer: bool) -> Way:
        """How the messages of the handshake go."""
        if self.tls is None:
            return PlainWay(connection)
        return TlsWay(connection, self.tls, dialer=dialer)


class Peering:
    """Dials or listens for ever, and hands each authenticated connection to `contact`.

    `contact(proven)` returns when the session of that connection has ended.
    """

    def __init__(
        self,
        credentials: Credentials,
        mine: tuple[str, int],
        peer: tuple[str, int, int],
        contact: Callable[[Proven], Awaitable[None]],
        note: Callable[[str], None],
    ) -> None:
        self._credentials = credentials
        self._mine = mine
        self._peer = peer
        self._contact = contact
        self._note = note
        self._unproven: dict[bool, Places] = {True: {}, False: {}}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def dials(self) -> bool:
        """Whether this node is the one that dials."""
        return self._credentials.identity.node_id < self._peer[2]

    def hurry(self) -> None:
        """Try to connect now instead of after the pause."""
        self._wake.set()

    async def run(self) -> None:
        """Never returns."""
        if self.dials:
            await self._dial_for_ever()
        else:
            await self._listen_for_ever()

    # --- dialing ----------------------------------------------------------------------------

    async def _dial_for_ever(self) -> None:
        pause_ms = RECONNECT_MS_MIN
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._dial()
            except (OSError, PeerProtocolError, TimeoutError) as error:
                self._note(why_not_connected(error, *self._peer[:2]))
            lasted_ms = (asyncio.get_running_loop().time() - began) * 1000
            pause_ms = RECONNECT_MS_MIN if lasted_ms > RECONNECT_MS_MAX else pause_ms * 2
            pause_ms = min(pause_ms, RECONNECT_MS_MAX)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_ms / 1000)

    async def _dial(self) -> None:
        host, port, _ = self._peer
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            tune(connection)
            with contextlib.suppress(OSError):
                # From the configured address, so that the peer's firewall can be narrow.
                connection.bind((self._mine[0], 0))
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_MS / 1000):
                await loop.sock_connect(connection, (host, port))
                proven = await self._prove(connection, lambda: None, dialer=True)
        except BaseException:
            abort(connection)
            raise
        enlarge(connection)
        await self._contact(proven)

    # --- listening --------------------------------------------------------------------------

    async def _listen_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        listener = await self._listening()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:
                self._note(f"accepting the peer failed: {error.strerror}")
                await asyncio.sleep(RECONNECT_MS_MIN / 1000)
                continue
            # The peer's own address has places that strangers cannot take.
            stranger = address[0] != self._peer[0]
            self._make_room(self._unproven[stranger])
            task = loop.create_task(self._accepted(connection, self._unproven[stranger]))
            self._unproven[stranger][task] = False
            self._tasks.add(task)
            task.add_done_callback(partial(self._task_ended, connection))
            # A flood leaves the accepted ones their turn: they speak at once, if they are the peer.
            await asyncio.sleep(0)

    @staticmethod
    def _make_room(places: Places) -> None:
        """The newest comer has a place: the oldest that never said a valid HELLO gives it up.

        Anybody on the peer's host connects from the peer's address. The peer says HELLO at once and
        proves itself within a round trip, so what stays is not the peer.
        """
        if len(places) >= UNPROVEN_MAX:
            silent = (task for task, greeted in places.items() if not greeted)
            oldest = next(silent, next(iter(places)))
            del places[oldest]
            oldest.cancel()

    def _task_ended(self, connection: socket.socket, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            # Perhaps before its first step.
            abort(connection)

    async def _listening(self) -> socket.socket:
        """The listening socket, as soon as it can be had: at boot the address may come later."""
        while True:
            try:
                return self._listener()
            except OSError as error:
                host, port = self._mine
                self._note(f"listening for the peer at {host} port {port}: {error.strerror}")
                await asyncio.sleep(RECONNECT_MS_MAX / 1000)

    def _listener(self) -> socket.socket:
        host, port = self._mine
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((host, port))
            listener.listen(LISTEN_BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    async def _accepted(self, connection: socket.socket, places: Places) -> None:
        task = asyncio.current_task()
        assert task is not None

        def greeted() -> None:
            if task in places:
                places[task] = True

        try:
            try:
                tune(connection)
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_MS / 1000):
                    proven = await self._prove(connection, greeted, dialer=False)
            finally:
                places.pop(task, None)
        except (OSError, PeerProtocolError, TimeoutError) as error:
            self._note(told_of_a_stranger(error))
            abort(connection)
            return
        except BaseException:
            abort(connection)
            raise
        enlarge(connection)
        await self._contact(proven)

    # --- both -------------------------------------------------------------------------------

    async def _prove(
        self, connection: socket.socket, greeted: Callable[[], None], *, dialer: bool
    ) -> Proven:
        """Run the handshake; `greeted` is told when the other end has said something valid.

        Raises:
            PeerProtocolError: refused, by either side; the refusal was sent.
        """
        way = self._credentials.way(connection, dialer=dialer)
        binding = await way.begin()
        channel = Channel(self._credentials.handshake(dialer=dialer, binding=binding))
        try:
            await way.send(channel.start())
            while channel.established is None:
                count = await way.receive_into(channel.buffer_for_read())
                require_bytes(count)
                channel.received(count)
                if outgoing := channel.take_outgoing():
                    greeted()
                await way.send(outgoing)
        except PeerProtocolError:
            await way.part(channel.refusal)
            raise
        return Proven(connection, channel, way.tls)


def why_not_connected(error: Exception, host: str, port: int) -> str:
    """Why dialing came to nothing, in words that name where; no number of the system's."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing answers at {where}: connection refused"
    if isinstance(error, TimeoutError):
        return f"no answer from {where} in time"
    if isinstance(error, OSError):
        if error.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH}:
            return f"no route to {where}, or its host is down"
        return f"{where}: {in_words(error)}"
    return in_words(error)


def in_words(error: Exception) -> str:
    """The sentence of an error, without the number that the system gives it."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def told_of_a_stranger(error: Exception) -> str:
    """Why an accepted connection came to nothing; never in the words of whoever made it.

    Anybody can connect and say "run this command". The peer's own refusals are few and known.
    """
    if isinstance(error, PeerRefusedError) and str(error).startswith(UNAUTHENTICATED):
        text = str(error).removeprefix(UNAUTHENTICATED)
        known = text if text in REFUSALS else "a reason that is not shown"
        return f"somebody who has not proven to be the peer refused this node: {known}"
    if isinstance(error, TimeoutError):
        return "a connection did not prove in time to be the peer's"
    return in_words(error)


def require_bytes(count: int) -> None:
    """A connection that ends in the handshake is an answer, too.

    Raises:
        PeerProtocolError: it ended.
    """
    if count == 0:
        raise PeerProtocolError("the peer closed the connection in the handshake")
