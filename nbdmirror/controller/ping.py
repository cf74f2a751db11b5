"""Asks hosts for an ICMP echo: does at least one of them hear this node.

Owns the sockets, the echoes and the matching of answers. Must never look up a name, block the loop,
or take for an answer what was not one. Needs the right to raw sockets (root).

icmplib makes the sockets and the packets. Its own ways to wait (`async_ping`) are not used, because
a "no" from here can demote a primary, and a "yes" can keep one: they measure the time-out on the
wall clock, so a step of the clock is silence; they match an answer by 16 bits that every process of
the host draws anew, from whatever source; and they send one echo, so one lost packet is silence.
Here each question carries 128 random bits and only an echo of these is an answer; the socket is
connected, so the kernel hands over no other host's; and each host is asked several times.
"""

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Final

from icmplib import (
    ICMPLibError,
    ICMPRequest,
    ICMPv4Socket,
    ICMPv6Socket,
    SocketBroadcastError,
    SocketPermissionError,
)

# Echoes to each host, at equal distances within the time: two may be lost, or fall into a pause of
# this process, without a wrong "no".
ECHOES_COUNT: Final = 3
NONCE_BYTES: Final = 16
ANSWER_BYTES_MAX: Final = 1024
# Packets read in one go before others on the loop have their turn.
READ_COUNT_MAX: Final = 64
HEADER_BYTES: Final = 8
ECHO_REPLY: Final = {4: 0, 6: 129}

# Linux: linux/icmp.h and linux/icmpv6.h; a set bit is a type that is not delivered. Python's socket
# module has none of them.
SOL_RAW: Final = 255
ICMP_FILTER: Final = 1
ICMP6_FILTER: Final = 1
ONLY_REPLIES_4: Final = struct.pack("=I", 0xFFFF_FFFF & ~(1 << ECHO_REPLY[4]))
ONLY_REPLIES_6: Final = struct.pack(
    "=8I",
    *(0xFFFF_FFFF & ~(1 << 1) if word == ECHO_REPLY[6] // 32 else 0xFFFF_FFFF for word in range(8)),
)


async def ping_any(hosts: Sequence[str], timeout_ms: int) -> str:
    """Ask all hosts at once; "" as soon as one has answered, else one sentence why none did.

    `hosts`: numeric addresses, IPv4 or IPv6, the latter with a zone ("%eth0") where it needs one.
    Without an answer it takes `timeout_ms` on the monotonic clock, plus what the loop is late. What
    the system refuses (no right to ask, no route) is a "no" with that reason.
    """
    if not hosts:
        return "no address to ping is configured"
    asked = [asyncio.create_task(_ask(each, timeout_ms / 1000)) for each in hosts]
    try:
        for each in asyncio.as_completed(asked):
            if not await each:
                return ""
        said = [f"{host} {task.result()}" for host, task in zip(hosts, asked, strict=True)]
        return f"no echo: {', '.join(said)}"
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _ask(host: str, timeout_s: float) -> str:
    """ "" when the host answered in time, else what happened, as the rest of a sentence."""
    loop = asyncio.get_running_loop()
    try:
        question = _Question(host)
    except (ICMPLibError, OSError, ValueError) as error:
        return _explained(error)
    said = f"did not answer within {round(timeout_s * 1000)} ms"
    try:
        for sequence in range(ECHOES_COUNT):
            # From now, not from the start: a pause of this process uses up one echo, not all.
            until_s = loop.time() + timeout_s / ECHOES_COUNT
            try:
                question.send(sequence)
                if await question.answered(until_s):
                    return ""
            except (ICMPLibError, OSError) as error:
                said = _explained(error)
                # The way may come back before the time is over.
                await asyncio.sleep(until_s - loop.time())
    finally:
        question.close()
    return said


def _explained(error: Exception) -> str:
    """What the system said, in the words of an operator."""
    if isinstance(error, SocketPermissionError):
        return "cannot be asked: no right to open a raw socket (needs root or CAP_NET_RAW)"
    if isinstance(error, SocketBroadcastError):
        return "cannot be asked: sending is not permitted (a firewall of this node?)"
    if isinstance(error, ValueError):
        return "is not a numeric IP address"
    # icmplib wraps what the system said.
    cause = error.__context__ if isinstance(error, ICMPLibError) else error
    said = cause.strerror if isinstance(cause, OSError) else str(error)
    return f"cannot be asked: {said or type(error).__name__}"


class _Question:
    """One host, its socket, and the bits that only its answers carry."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._version = ipaddress.ip_address(host).version
        self._socket = ICMPv4Socket() if self._version == 4 else ICMPv6Socket()
        self._raw: socket.socket = self._socket.sock
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._id = secrets.randbelow(1 << 16)
        self._connected = False
        self._raw.setblocking(False)
        # Without it the buffer fills with the echo requests and errors of all others.
        with contextlib.suppress(OSError):
            if self._version == 4:
                self._raw.setsockopt(SOL_RAW, ICMP_FILTER, ONLY_REPLIES_4)
            else:
                self._raw.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, ONLY_REPLIES_6)

    def send(self, sequence: int) -> None:
        """One echo request. Raises OSError or ICMPLibError."""
        if not self._connected:
            flags = socket.AI_NUMERICHOST
            found = socket.getaddrinfo(self._host, None, self._raw.family, self._raw.type, 0, flags)
            self._raw.connect(found[0][4])
            self._connected = True
        self._socket.send(
            ICMPRequest(self._host, id=self._id, sequence=sequence, payload=self._nonce)
        )

    async def answered(self, until_s: float) -> bool:
        """Whether an answer is there by then (time of the loop).

        Raises:
            OSError: a router, or this node, says that the host cannot be reached.
        """
        loop = asyncio.get_running_loop()
        while (left_s := until_s - loop.time()) > 0:
            await self._readable(left_s)
            if self._answer_is_there():
                return True
        # After a pause of this process the time is over, and the answer is in the buffer.
        return self._answer_is_there()

    async def _readable(self, wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._raw.fileno(), ready.set)
        try:
            # Not wait_for: up to Python 3.11 it can swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await ready.wait()
        finally:
            loop.remove_reader(self._raw.fileno())

    def _answer_is_there(self) -> bool:
        for _ in range(READ_COUNT_MAX):
            try:
                packet = self._raw.recv(ANSWER_BYTES_MAX)
            except BlockingIOError:
                return False
            if self._is_answer(packet):
                return True
        return False

    def _is_answer(self, packet: bytes) -> bool:
        # IPv4 raw sockets deliver the header of IP; its length in words is in the first byte.
        start = (packet[0] & 0x0F) * 4 if self._version == 4 and packet else 0
        message = packet[start:]
        if len(message) < HEADER_BYTES or message[0] != ECHO_REPLY[self._version]:
            return False
        return message[HEADER_BYTES:] == self._nonce

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()
