"""What the kernel says about links and addresses, and the two changes that we ask of it.

Owns every netlink request of the virtual addresses, in the network namespace of this process. Each
one runs in a thread, one at a time, with a bound: the kernel's lock behind them can be held by
somebody else. Must never block the loop, or decide which address belongs where.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from nbdmirror.controller.announce import MAC_BYTES, IpAddress
from nbdmirror.errors import RefusedError

IpInterface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Route: TypeAlias = Any  # an open IPRoute; pyroute2 has no types
_T = TypeVar("_T")

NETLINK_TIMEOUT_S: Final = 3.0
DUMP_TRIES_MAX: Final = 4
EVENT_BYTES_MAX: Final = 65_536
EVENTS_AT_ONCE_MAX: Final = 64

_ARPHRD_ETHER: Final = 1
_IFF_UP: Final = 0x1
_IFF_LOWER_UP: Final = 0x10000
_IFA_F_SECONDARY: Final = 0x01
_IFA_F_NODAD: Final = 0x02
_IFA_F_DADFAILED: Final = 0x08
_IFA_F_TENTATIVE: Final = 0x40
_FOREVER_S: Final = 0xFFFF_FFFF
_GROUPS: Final = 0x1 | 0x10 | 0x100  # links, IPv4 addresses, IPv6 addresses
_PROMOTE: Final = "/proc/sys/net/ipv4/conf/{}/promote_secondaries"


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface; `mac` has 6 bytes, or none where it is no Ethernet."""

    index: int
    name: str
    mac: bytes
    up: bool
    carrier: bool


@dataclass(frozen=True, slots=True)
class Holding:
    """One address on one interface. `usable`: the kernel found no duplicate and waits for none."""

    address: IpInterface
    link: Link
    secondary: bool
    usable: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every link and address of this network namespace at one moment."""

    links: tuple[Link, ...]
    holdings: tuple[Holding, ...]

    def link(self, name: str) -> Link | None:
        """The interface of this name."""
        return next((each for each in self.links if each.name == name), None)

    def of(self, address: IpAddress) -> list[Holding]:
        """Where this address is, whatever its prefix length."""
        return [each for each in self.holdings if each.address.ip == address]


class Netlink:
    """Asks the kernel, one question at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._job: asyncio.Future[Any] | None = None

    async def ask(self, work: Callable[[Route], _T]) -> _T:
        """Run `work` with an open socket, in a thread.

        A job that was left by a cancelled caller ends before the next one begins, so what it did
        can be undone.

        Raises:
            RefusedError: no answer within NETLINK_TIMEOUT_S, or the kernel refused.
        """
        async with self._turn:
            if self._job is not None:
                await self._end_of(self._job)
            self._job = asyncio.ensure_future(asyncio.to_thread(_with_socket, work))
            job: asyncio.Future[_T] = self._job
            await self._end_of(job)
            self._job = None
            return job.result()

    async def _end_of(self, job: "asyncio.Future[Any]") -> None:
        done, _ = await asyncio.wait({job}, timeout=NETLINK_TIMEOUT_S)
        if not done:
            raise RefusedError(
                f"netlink: the kernel did not answer within {NETLINK_TIMEOUT_S:g} s; "
                "see what holds its network configuration (dmesg), then try again"
            )
        job.exception()  # looked at, so it is not reported a second time as never retrieved


def _with_socket(work: Callable[[Route], _T]) -> _T:
    # A loop of its own: under a policy of uvloop a new loop would be uvloop's, and that refuses
    # netlink sockets ("invalid family 16").
    loop = asyncio.SelectorEventLoop()
    try:
        with IPRoute(use_event_loop=loop) as route:
            return work(route)
    except NetlinkError as error:
        raise RefusedError(f"netlink: {_reason(error)}") from error
    except OSError as error:
        raise RefusedError(f"netlink: no socket to the kernel: {error}") from error
    finally:
        loop.run_until_complete(asyncio.sleep(0))  # the end of its transport is scheduled there
        loop.close()


def _reason(error: NetlinkError) -> str:
    if error.code == errno.EPERM:
        return "not permitted; the controller has to run as root or with CAP_NET_ADMIN"
    return str(error.args[-1])


def take_snapshot(route: Route) -> Snapshot:
    """Links and addresses as they are."""
    for _ in range(DUMP_TRIES_MAX):
        try:
            links = {each["index"]: _link(each) for each in route.link("dump")}
            addresses = list(route.addr("dump"))
        except NetlinkDumpInterrupted:
            continue  # something changed under the dump, so it may lack a part
        found = [
            _holding(each, links[each["index"]]) for each in addresses if each["index"] in links
        ]
        return Snapshot(tuple(links.values()), tuple(found))
    raise RefusedError("netlink: links and addresses change all the time; try again")


def _link(message: Any) -> Link:
    ethernet = message["ifi_type"] == _ARPHRD_ETHER
    text = message.get_attr("IFLA_ADDRESS") if ethernet else None
    mac = bytes.fromhex(text.replace(":", "")) if text else b""
    return Link(
        message["index"],
        message.get_attr("IFLA_IFNAME"),
        mac if len(mac) == MAC_BYTES else b"",
        bool(message["flags"] & _IFF_UP),
        bool(message["flags"] & _IFF_LOWER_UP),
    )


def _holding(message: Any, link: Link) -> Holding:
    ip = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    made = ipaddress.ip_interface(f"{ip}/{message['prefixlen']}")
    return Holding(
        made,
        link,
        made.version == 4 and bool(flags & _IFA_F_SECONDARY),
        not flags & (_IFA_F_DADFAILED | _IFA_F_TENTATIVE),
    )


def add(route: Route, address: IpInterface, link: Link) -> bool:
    """As `ip address add`; False where it was there already.

    IPv6 without the kernel's own detection, which would take a second; and deprecated, so that it
    takes connections but is no source of new ones: the newest address of a network else becomes
    the source of what the node itself sends, also to its peer, and breaks when it moves on.

    Raises:
        RefusedError: the kernel refuses.
    """
    keys: dict[str, Any] = {"address": str(address.ip), "prefixlen": address.network.prefixlen}
    if address.version == 6:
        keys |= {"flags": _IFA_F_NODAD, "preferred_lft": 0, "valid_lft": _FOREVER_S}
    try:
        route.addr("add", index=link.index, **keys)
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            return False
        hint = "; IPv6 is switched off there" if error.code == errno.EACCES else ""
        raise RefusedError(
            f"{address} cannot be added to {link.name}: {_reason(error)}{hint}"
        ) from error
    return True


def remove(route: Route, holding: Holding, seen: Snapshot) -> bool:
    """As `ip address delete`; False where it was gone already.

    Raises:
        RefusedError: the kernel refuses.
    """
    with _heirs_kept(route, holding, seen):
        try:
            route.addr(
                "del",
                index=holding.link.index,
                address=str(holding.address.ip),
                prefixlen=holding.address.network.prefixlen,
            )
        except NetlinkError as error:
            if error.code in (errno.EADDRNOTAVAIL, errno.ENODEV):
                return False
            raise RefusedError(
                f"{holding.address} cannot be removed from {holding.link.name}: {_reason(error)}; "
                f"remove it by hand: ip address delete {holding.address} dev {holding.link.name}"
            ) from error
    return True


@contextlib.contextmanager
def _heirs_kept(route: Route, holding: Holding, seen: Snapshot) -> Iterator[None]:
    """The kernel drops every later address of the same network with its first one, unless told.

    The virtual address can be the first one: when the node's own was taken away and given back
    while it was held (a renewed lease, a restart of the network's service).
    """
    heirs = [
        each
        for each in seen.holdings
        if each.secondary
        and each.link.index == holding.link.index
        and each.address.network == holding.address.network
        and each.address != holding.address
    ]
    if holding.secondary or not heirs:
        yield
        return
    switch = Path(_PROMOTE.format(holding.link.name))
    before = None
    with contextlib.suppress(OSError):
        before = switch.read_text(encoding="ascii")
        switch.write_text("1\n", encoding="ascii")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            switch.write_text(before or "0\n", encoding="ascii")
        for each in heirs:  # nothing to do, unless the switch could not be set
            add(route, each.address, each.link)


def open_events() -> socket.socket:
    """A socket that becomes readable when a link or an address changes.

    Raises:
        RefusedError: it cannot be had.
    """
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        made = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            made.bind((0, _GROUPS))
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise RefusedError(f"netlink: no events of the kernel: {error}") from error
    return made


def drain_events(events: socket.socket) -> None:
    """Read what is there, for its being there; an overflow is an event as well."""
    for _ in range(EVENTS_AT_ONCE_MAX):
        try:
            events.recv(EVENT_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            continue
