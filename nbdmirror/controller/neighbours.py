"""Asks an Ethernet segment who has an address, and tells it who has it now.

Owns the packet sockets, opened and closed outside the loop's thread (closing one waits for the
kernel's readers, 6 to 20 ms measured), and the timing of a detection. Must never add or remove an
address, or take an answer that came from this host for somebody else's.
"""

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address
from typing import Final, TypeAlias

from nbdmirror.controller.announce import (
    ADVERTISEMENT,
    ETHERTYPE_IPV6,
    FRAME_BYTES_MAX,
    ICMPV6,
    SOLICITATION,
    IpAddress,
    announcements,
    claimant,
    ethertype,
    multicast_mac,
    probe,
    solicited_node,
)
from nbdmirror.errors import RefusedError

# A takeover has 0.5 s for role, address and attach together. RFC 5227 takes seconds, for hosts that
# come up together; here a holder that is up answers within a millisecond.
PROBES_COUNT: Final = 2
PROBE_GAP_S: Final = 0.1
OPEN_TIMEOUT_S: Final = 2.0
FRAMES_AT_ONCE_MAX: Final = 256

SOL_PACKET: Final = 263
_SO_ATTACH_FILTER: Final = 26
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_MR_MULTICAST: Final = 0

# Classic BPF over the whole frame: of IPv6, neighbour solicitations and advertisements alone, so
# that a busy server's traffic does not pass through here. Code, jump if true, if false, operand.
_NEIGHBOURS_ONLY: Final = (
    (0x30, 0, 0, 20),  # A = next header
    (0x15, 0, 4, ICMPV6),
    (0x30, 0, 0, 54),  # A = type
    (0x15, 1, 0, SOLICITATION),
    (0x15, 0, 1, ADVERTISEMENT),
    (0x06, 0, 0, FRAME_BYTES_MAX),  # pass
    (0x06, 0, 0, 0),  # drop
)


@dataclass(frozen=True, slots=True)
class Place:
    """An address, and the interface that it is for: name, index and the 6 bytes of its MAC."""

    address: IpAddress
    interface: str
    index: int
    mac: bytes


Ear: TypeAlias = tuple[socket.socket, list[Place]]  # what is listened to, and for which addresses


async def find_holders(places: Sequence[Place], own: Collection[bytes]) -> dict[IpAddress, bytes]:
    """Which of the addresses another host has or wants, with the MAC that says so.

    Takes PROBES_COUNT * PROBE_GAP_S for all of them together, less when each one is answered.
    `own`: the MACs of this host. All interfaces have to have a carrier.

    Raises:
        RefusedError: an interface cannot be asked.
    """
    if not places:
        return {}
    search = _Search(len(places), frozenset(own))
    try:
        search.ears = await _open_ears(places)
        await search.run()
    except OSError as error:
        names = ", ".join(sorted({place.interface for place in places}))
        raise RefusedError(
            f"{names}: cannot ask there who has the address: {error}; "
            "run the controller as root or with CAP_NET_RAW, and see to it that the link is up"
        ) from error
    finally:
        search.end()
    return search.found


class _Search:
    """One detection."""

    def __init__(self, asked_count: int, own: frozenset[bytes]) -> None:
        self.ears: list[Ear] = []
        self.found: dict[IpAddress, bytes] = {}
        self._asked_count = asked_count
        self._own = own
        self._all_found = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for ear, group in self.ears:
            loop.add_reader(ear.fileno(), partial(self._read, ear, group))
        for _ in range(PROBES_COUNT):
            for ear, group in self.ears:
                for place in group:
                    ear.send(probe(place.mac, place.address))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_found.wait(), PROBE_GAP_S)
                return
        # The time may be over because this process was not run: what lies there came in time.
        for ear, group in self.ears:
            self._read(ear, group)

    def _read(self, ear: socket.socket, group: list[Place]) -> None:
        for _ in range(FRAMES_AT_ONCE_MAX):
            try:
                frame = ear.recv(FRAME_BYTES_MAX)
            except OSError:
                return  # nothing more; an interface that went down is seen when it is sent to
            for place in group:
                mac = claimant(frame, place.address)
                if mac is not None and mac not in self._own:
                    self.found[place.address] = mac
        if len(self.found) == self._asked_count:
            self._all_found.set()

    def end(self) -> None:
        """Stop listening. The sockets close later: nobody has to wait for that."""
        loop = asyncio.get_running_loop()
        for ear, _ in self.ears:
            loop.remove_reader(ear.fileno())
        close_later([ear for ear, _ in self.ears])


async def _open_ears(places: Sequence[Place]) -> list[Ear]:
    """One socket for each interface and family.

    Raises:
        OSError: one cannot be had, or not within OPEN_TIMEOUT_S.
    """
    groups: dict[tuple[str, int], list[Place]] = {}
    for place in places:
        groups.setdefault((place.interface, ethertype(place.address)), []).append(place)
    job = asyncio.ensure_future(asyncio.to_thread(_open_each, groups))
    try:
        done, _ = await asyncio.wait({job}, timeout=OPEN_TIMEOUT_S)
    except asyncio.CancelledError:
        job.add_done_callback(_close_late)
        raise
    if not done:
        job.add_done_callback(_close_late)
        raise TimeoutError(f"no packet socket within {OPEN_TIMEOUT_S:g} s")
    return job.result()


def _close_late(job: "asyncio.Future[list[Ear]]") -> None:
    if not job.cancelled() and job.exception() is None:
        close_later([ear for ear, _ in job.result()])


def _open_each(groups: dict[tuple[str, int], list[Place]]) -> list[Ear]:
    with contextlib.ExitStack() as opened:
        ears = []
        for (interface, kind), group in groups.items():
            ear = opened.enter_context(_packet_socket())
            if kind == ETHERTYPE_IPV6:
                _hear_neighbours(ear, group)
            ear.bind((interface, kind))
            ears.append((ear, group))
        opened.pop_all()
    return ears


def _hear_neighbours(ear: socket.socket, group: list[Place]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *e) for e in _NEIGHBOURS_ONLY))
    program = struct.pack("HP", len(_NEIGHBOURS_ONLY), ctypes.addressof(code))
    ear.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    for place in group:
        assert isinstance(place.address, IPv6Address)
        # RFC 4862, section 5.4.2: to hear another one that probes for it at the same time.
        mac = multicast_mac(solicited_node(place.address))
        wish = struct.pack("iHH8s", place.index, _PACKET_MR_MULTICAST, len(mac), mac)
        ear.setsockopt(SOL_PACKET, _PACKET_ADD_MEMBERSHIP, wish)


def _packet_socket() -> socket.socket:
    # Protocol 0 hears nothing, until it is bound.
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    return socket.socket(socket.AF_PACKET, kind, 0)


def close_later(sockets: Sequence[socket.socket]) -> None:
    """Close packet sockets in a thread, whether or not the loop ends meanwhile."""
    # No task: that would be cancelled with the loop's others, before its thread has begun.
    closing = asyncio.get_running_loop().run_in_executor(None, _close_each, sockets)
    closing.add_done_callback(lambda done: done.cancelled() or done.exception())


def _close_each(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        each.close()


class Voice:
    """Sends announcements; one socket for all interfaces, opened with the first of them."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def announce(self, place: Place) -> str:
        """Tell the segment once; returns why it could not be told, or ""."""
        try:
            if self._socket is None:
                self._socket = _packet_socket()
            for frame in announcements(place.mac, place.address):
                self._socket.sendto(frame, (place.interface, ethertype(place.address)))
        except OSError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Close the socket; another announcement opens it again."""
        if self._socket is not None:
            close_later([self._socket])
            self._socket = None
