"""The heartbeats of a controller: UDP sockets, the timer, and what `status` shows of each network.

Owns one socket for each network, the random nonce of this life, and the numbering of datagrams.
What a datagram proves is decided in core/cluster/heartbeat.py. Must never: block the loop, raise
for what a network or a stranger does, hold more than a bounded number of datagrams, or count a
time in which this process did not run as silence of the peer. Everything runs on the loop's thread.
"""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from nbdmirror.config import Address, Node
from nbdmirror.core.cluster.heartbeat import (
    BODY_BYTES_MAX,
    DATAGRAM_BYTES_MAX,
    EXTRA_LINK,
    NONCE_BYTES,
    Ends,
    Link,
    Newest,
    Refusal,
    derive_mac_key,
)
from nbdmirror.files import path_error

RETRY_MS: Final = 1_000
# Of one socket in one round of the loop: at some 20 us each the loop is free again after 1 ms.
RECEIVE_MAX: Final = 64
# What no waiting helps against. All else may come right by itself: an interface that comes up
# late, an address that is still being checked for duplicates.
_HOPELESS: Final = frozenset({errno.EADDRINUSE, errno.EACCES, errno.EPERM})
# What a peer that was heard leaves behind on the way, or sends again.
STRAGGLERS: Final = frozenset({Refusal.OLD, Refusal.ECHO})
_TOS_NETWORK_CONTROL: Final = 0xC0  # class selector 6 of RFC 2474
_PRIORITY: Final = 6  # the highest that needs no privilege, socket(7)


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """One network as `status` shows it.

    `up`: something fresh is heard, and what this node sends comes back, both within the silence.
    `silent_ms`: since the last fresh datagram, counted while awake; None if there was none.
    `rtt_ms`: of the last round trip, None unless up, and None of the channel. `refused_count`:
    datagrams that did not count. `reason`: why it is down, "" if it is up.
    """

    name: str
    local: str
    remote: str
    up: bool
    silent_ms: int | None
    rtt_ms: float | None
    refused_count: int
    reason: str


def boottime_ms() -> float:
    """Milliseconds since the system started, suspension included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6


class _Network:
    """One network: what is known of it, and its socket, as soon as the address is there."""

    def __init__(self, name: str, local: Address, remote: Address, link: Link) -> None:
        self.name = name
        self.local = local
        self.remote = remote
        self.link = link
        self.socket: socket.socket | None = None
        self.trouble = ""  # why there is no socket, or why the last datagram was not sent
        self.retry_ms = 0.0
        self._target: Any = None

    def open(self) -> socket.socket:
        """Bind the socket. Raises OSError."""
        # Of a numeric address: nothing is asked anywhere, and the host reads as recvfrom() has it.
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        (family, kind, protocol, _, mine), *_ = socket.getaddrinfo(
            self.local.host, self.local.port, type=socket.SOCK_DGRAM, flags=flags
        )
        (*_, theirs), *_ = socket.getaddrinfo(
            self.remote.host, self.remote.port, type=socket.SOCK_DGRAM, flags=flags
        )
        made = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        try:
            made.setblocking(False)
            _prefer(made)
            made.bind(mine)
        except OSError:
            made.close()
            raise
        self.socket, self._target, self.trouble = made, theirs, ""
        return made

    def send(self, datagram: bytes) -> None:
        """Hand it to the kernel, or lose it: the next one follows."""
        if self.socket is None:
            return
        try:
            self.socket.sendto(datagram, self._target)
        except OSError as error:
            self.trouble = f"sending to {self.remote}: {error.strerror or error}"
        else:
            self.trouble = ""

    def receive(self) -> tuple[bytes, bool] | None:
        """What waits in the socket, and whether the peer's host sent it; None: nothing."""
        if self.socket is None:
            return None
        try:
            datagram, source = self.socket.recvfrom(DATAGRAM_BYTES_MAX + 1)
        except BlockingIOError:
            return None
        except OSError as error:
            self.trouble = f"receiving at {self.local}: {error.strerror or error}"
            return None
        return datagram, source[0] == self._target[0]

    def facts(self, now_ms: float) -> LinkFacts:
        """As `status` shows it."""
        link = self.link
        reason = link.down(now_ms)
        up = not reason
        if not up:
            reason = "; ".join(filter(None, (self.trouble, reason, self._refused())))
        return LinkFacts(
            name=self.name,
            local=str(self.local),
            remote=str(self.remote),
            up=up,
            silent_ms=None if link.heard_ms is None else link.silent_ms(now_ms),
            # On the channel a packet waits at both ends for the next look at the engine.
            rtt_ms=link.rtt_ms if up and self.socket is not None else None,
            refused_count=sum(link.refused.values()),
            reason=reason,
        )

    def _refused(self) -> str:
        """Why datagrams do not count, where that says what to mend.

        A peer that was heard once leaves late and repeated ones behind; they explain nothing.
        """
        last = self.link.refused_last
        if last is None or (last in STRAGGLERS and self.link.heard_ms is not None):
            return ""
        return f"the last datagram that was refused: {last.value}"


def _prefer(made: socket.socket) -> None:
    """Before bulk data, where the network cares; nothing depends on it."""
    with contextlib.suppress(OSError):
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _TOS_NETWORK_CONTROL)
        else:
            made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _TOS_NETWORK_CONTROL)
        # Last: setting the class of an IPv4 socket sets a priority, too.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _PRIORITY)


class Heart:
    """One life of a controller's heartbeats, over all networks and the peer channel.

    Args:
        key: the mirror's key, 32 to 4096 bytes.
        mirror_id: 16 bytes.
        me, peer: the two nodes; their lists of heartbeat addresses have one length.
        heartbeat_ms: how often this node speaks.
        silence_ms: at least 5 heartbeats; a network is down after so long without a word.
        on_body: takes each body that is newer than all before and not empty.

    Raises:
        ConfigError: the key is too short or too long.
    """

    def __init__(  # noqa: PLR0913 - the settings of one end, named at the call
        self,
        key: bytes,
        mirror_id: bytes,
        me: Node,
        peer: Node,
        *,
        heartbeat_ms: int,
        silence_ms: int,
        on_body: Callable[[bytes], None],
    ) -> None:
        assert silence_ms >= 5 * heartbeat_ms, "the configuration was checked"
        ends = Ends(derive_mac_key(key), mirror_id, me.id, peer.id, os.urandom(NONCE_BYTES))
        self._networks = [
            _Network(f"network {index + 1}", local, remote, Link(ends, index, silence_ms))
            for index, (local, remote) in enumerate(
                zip(me.heartbeats, peer.heartbeats, strict=True)
            )
        ]
        self._extra = _Network(
            "channel", me.address, peer.address, Link(ends, EXTRA_LINK, silence_ms)
        )
        self._all = [*self._networks, self._extra]
        self._period_s = heartbeat_ms / 1000
        self._on_body = on_body
        self._body = b""
        self._seq = 0
        self._newest = Newest()
        self._bodies: deque[bytes] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the sockets and begin to speak. An address that is not there yet is tried again.

        Raises:
            ConfigError: an address is in use, or may not be used; nothing stays open.
        """
        assert self._loop is None, "a heart starts once"
        self._loop = asyncio.get_running_loop()
        now_ms = boottime_ms()
        try:
            for network in self._networks:
                self._open(network, now_ms, hopeless=_HOPELESS)
        except BaseException:
            await self.close()
            raise
        self._round(now_ms)
        self._beat(self._loop.time())

    async def close(self) -> None:
        """Be silent and deaf from now on."""
        if self._timer is not None:
            self._timer.cancel()
        self._bodies.clear()
        for network in self._networks:
            if network.socket is not None and self._loop is not None:
                self._loop.remove_reader(network.socket)
                network.socket.close()
                network.socket = None

    def _open(
        self, network: _Network, now_ms: float, *, hopeless: frozenset[int] = frozenset()
    ) -> None:
        """Try to have a socket. Raises ConfigError for an errno of `hopeless`."""
        assert self._loop is not None
        try:
            made = network.open()
        except OSError as error:
            what = f"heartbeats at {network.local}"
            network.trouble = f"{what}: {error.strerror or error}"
            network.retry_ms = now_ms + RETRY_MS
            if error.errno in hopeless:
                raise path_error(
                    error,
                    what,
                    "end the program that has this UDP port (`ss -ulpn` names it), or name another "
                    "address in node.<name>.heartbeats",
                ) from error
        else:
            self._loop.add_reader(made, self._readable, network)

    # --- speaking ---------------------------------------------------------------------------

    def say(self, body: bytes, *, now: bool = False) -> None:
        """What every heartbeat carries from here on, at most 1200 bytes; `now`: send it at once."""
        assert len(body) <= BODY_BYTES_MAX, "the body of a heartbeat has a bound"
        self._body = body
        if now:
            self._send(boottime_ms())

    def extra_packet(self) -> bytes:
        """The next datagram for the peer channel."""
        return self._packet(self._extra, boottime_ms())

    def _packet(self, network: _Network, now_ms: float) -> bytes:
        self._seq += 1
        return network.link.packet(self._seq, self._body, now_ms)

    def _send(self, now_ms: float) -> None:
        for network in self._networks:
            if network.socket is not None:
                network.send(self._packet(network, now_ms))

    def _beat(self, due_s: float) -> None:
        """Every period: open what is missing, listen, then speak."""
        assert self._loop is not None
        # What was missed in a pause is not made up for.
        next_s = max(due_s + self._period_s, self._loop.time())
        self._timer = self._loop.call_at(next_s, self._beat, next_s)
        now_ms = boottime_ms()
        for network in self._networks:
            if network.socket is None and now_ms >= network.retry_ms:
                self._open(network, now_ms)
        self._round(now_ms)
        self._send(now_ms)
        self._hand_on()

    # --- listening --------------------------------------------------------------------------

    def take_extra(self, datagram: bytes) -> None:
        """A datagram of the peer's `extra_packet` that came over the channel."""
        now_ms = boottime_ms()
        self._round(now_ms)
        self._take(self._extra.link, datagram, now_ms)
        self._hand_on()

    def _readable(self, network: _Network) -> None:
        now_ms = boottime_ms()
        self._round(now_ms)
        self._drain(network, now_ms)
        self._hand_on()

    def _round(self, now_ms: float) -> None:
        """One round of the loop; after a pause first hear what was said meanwhile (rule 18)."""
        paused = [network.link.tick(now_ms) for network in self._all]
        if any(paused):
            for network in self._networks:
                self._drain(network, now_ms)

    def _drain(self, network: _Network, now_ms: float) -> None:
        """Take what waits, up to a bound: the loop calls again for the rest."""
        for _ in range(RECEIVE_MAX):
            received = network.receive()
            if received is None:
                return
            datagram, from_peer = received
            if from_peer:
                self._take(network.link, datagram, now_ms)
            else:
                network.link.refuse(Refusal.STRANGER)

    def _take(self, link: Link, datagram: bytes, now_ms: float) -> None:
        body = link.take(datagram, now_ms)
        if body is None:
            return
        assert link.newest is not None
        # A peer that has nothing to say yet sends no body, and is alive.
        if self._newest.take(link.newest) and body:
            self._bodies.append(body)

    def _hand_on(self) -> None:
        while self._bodies:
            self._on_body(self._bodies.popleft())

    # --- what is known ----------------------------------------------------------------------

    def silent_ms(self) -> int:
        """Since the last fresh datagram on any network or the channel, or since the start.

        Counted while awake. After a pause the sockets are read first; bodies found there are
        handed on with the next heartbeat at the latest, never from inside of this call.
        """
        now_ms = boottime_ms()
        self._round(now_ms)
        return min(network.link.silent_ms(now_ms) for network in self._all)

    def ever_heard(self) -> bool:
        """Whether anything fresh came since the start."""
        return any(network.link.heard_ms is not None for network in self._all)

    def links(self) -> list[LinkFacts]:
        """Every network in the order of the configuration, then the peer channel."""
        now_ms = boottime_ms()
        return [network.facts(now_ms) for network in self._all]
