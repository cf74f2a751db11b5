"""A connection before its proof: plain, or inside TLS. What peering.py says goes through here.

Owns the moving of bytes on the loop until the two ends have proven themselves. Bounded by whoever
calls: in time by its time-out, in memory by `TlsStream.feed` and by the places of peering.py. Must
never be used once the session has the socket.
"""

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import Final, Protocol

from nbdmirror.core.channel import Channel
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import TLS_RECORD_BYTES
from nbdmirror.tls import TlsSetup, TlsStream

PARTING_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Proven:
    """A connection whose other end is the peer. `tls`: what is around its frames."""

    connection: socket.socket
    channel: Channel
    tls: TlsStream | None


class Way(Protocol):
    """How the messages of the handshake get to the other end."""

    tls: TlsStream | None

    async def begin(self) -> bytes:
        """Whatever comes before the first message; returns what the proofs are bound to."""
        ...

    async def send(self, data: bytes) -> None:
        """All of it."""
        ...

    async def receive_into(self, buffer: memoryview) -> int:
        """At least a byte; 0 when the other end has closed."""
        ...

    async def part(self, last: bytes) -> None:
        """Say why, and wait a moment until it is read: closing at once could take it back."""
        ...


class PlainWay:
    """Without TLS."""

    def __init__(self, connection: socket.socket) -> None:
        self.tls: TlsStream | None = None
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def begin(self) -> bytes:
        """Nothing."""
        return b""

    async def send(self, data: bytes) -> None:
        """To the socket."""
        await self._loop.sock_sendall(self._connection, data)

    async def receive_into(self, buffer: memoryview) -> int:
        """From the socket."""
        return await self._loop.sock_recv_into(self._connection, buffer)

    async def part(self, last: bytes) -> None:
        """See Way."""
        with contextlib.suppress(OSError):
            await self._loop.sock_sendall(self._connection, last)
            self._connection.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(self._loop.sock_recv(self._connection, 1), PARTING_S)


class TlsWay:
    """Inside TLS."""

    def __init__(self, connection: socket.socket, setup: TlsSetup, *, dialer: bool) -> None:
        self.tls: TlsStream | None = None
        self._stream = TlsStream(setup, dialer=dialer)
        self._raw = PlainWay(connection)
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def begin(self) -> bytes:
        """TLS's own handshake.

        Raises:
            PeerProtocolError: it failed; the other end was told.
        """
        stream = self._stream
        try:
            while not stream.shake():
                await self._flush()
                await self._take()
        except PeerProtocolError:
            await self._raw.part(stream.farewell())
            raise
        await self._flush()
        self.tls = stream
        return stream.binding

    async def send(self, data: bytes) -> None:
        """Encrypted."""
        self._stream.write(data)
        await self._flush()

    async def receive_into(self, buffer: memoryview) -> int:
        """Decrypted.

        Raises:
            PeerProtocolError: what came is not what the other end sent, or it refuses.
        """
        while (count := self._stream.read(buffer)) is None:
            await self._flush()
            await self._take()
        return count

    async def part(self, last: bytes) -> None:
        """See Way."""
        stream = self._stream
        with contextlib.suppress(PeerProtocolError):  # if TLS failed, its alert says why
            stream.write(last)
        await self._raw.part(stream.outgoing.read())

    async def _flush(self) -> None:
        if self._stream.outgoing.pending:
            await self._loop.sock_sendall(self._connection, self._stream.outgoing.read())

    async def _take(self) -> None:
        piece = await self._loop.sock_recv(self._connection, TLS_RECORD_BYTES)
        if not piece:
            raise PeerProtocolError("the peer closed the connection in the handshake")
        self._stream.feed(piece)
