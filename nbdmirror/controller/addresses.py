"""The virtual addresses: taken by the primary, told to the network, dropped by everybody else.

Owns which address belongs on which interface, the order of a take (ask, add, tell), the repeated
announcements, and what is known of the addresses at any moment. Must never announce an address that
this host does not have, leave a part of a refused take behind, or decide who is primary: whoever
calls `take` has the right to it.
"""

import asyncio
import itertools
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_interface
from typing import Final

from nbdmirror.config_cluster import VirtualAddressSection
from nbdmirror.controller.announce import IpAddress, mac_text
from nbdmirror.controller.neighbours import Place, Voice, find_holders
from nbdmirror.controller.netlink import (
    Holding,
    IpInterface,
    Link,
    Netlink,
    Route,
    Snapshot,
    add,
    drain_events,
    open_events,
    remove,
    take_snapshot,
)
from nbdmirror.errors import NbdMirrorError, RefusedError

# After the first announcement: five more within 10 s, for a packet lost and a switch that is still
# learning; then now and then, for whoever was not there.
ANNOUNCE_GAPS_S: Final = (0.2, 0.5, 1.2, 2.5, 5.0)
ANNOUNCE_EVERY_S: Final = 60.0
# From one look at the kernel's tables to the next, however much changes there.
LOOK_GAP_S: Final = 0.5
CANCEL_TIMEOUT_S: Final = 1.0

assert sum(ANNOUNCE_GAPS_S) <= 10.0
assert LOOK_GAP_S < 1.0


class DuplicateAddressError(RefusedError):
    """Another host has an address: nothing that this node could put right."""


@dataclass(frozen=True, slots=True)
class AddressFacts:
    """What is known of one virtual address.

    `held`: it is on `interface` of this host, and the link has a carrier. `interface` is "" while
    none is known. `reason` is a sentence in either case.
    """

    address: str
    interface: str
    held: bool
    reason: str


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One section of the configuration, parsed."""

    address: IpInterface
    interface: str | None


class Addresses:
    """The virtual addresses of one mirror on this host."""

    def __init__(
        self, sections: Sequence[VirtualAddressSection], *, tell: Callable[[str], None]
    ) -> None:
        """`tell` takes one sentence for log and events; called on the loop."""
        self._wanted = [_Wanted(ip_interface(each.address), each.interface) for each in sections]
        self._tell = tell
        self._netlink = Netlink()
        self._voice = Voice()
        self._changing = asyncio.Lock()
        self._seen: Snapshot | None = None
        self._blind = "not looked at yet"
        self._taken: dict[_Wanted, str] = {}  # where each one was put, by the interface's name
        self._well: dict[IpAddress, Place] = {}
        self._lost: set[IpAddress] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._announcer: asyncio.Task[None] | None = None

    # --- what the controller asks for -------------------------------------------------------

    async def take(self, *, force: bool = False) -> None:
        """Take every address: ask the segment, add, announce, and go on announcing.

        What is in its place already is only announced. `force` takes an address that another host
        answers for as well: right when that host has lost its role and hangs. Takes 0.2 s for the
        question and some ms for the rest.

        Raises:
            RefusedError: no interface fits, or the kernel refuses. DuplicateAddressError: another
            host has an address (its MAC is named). Nothing that this call added is left.
        """
        if not self._wanted:
            return
        async with self._changing:
            self._watch()
            seen = await self._netlink.ask(take_snapshot)
            links = {each: self._link_for(each, seen) for each in self._wanted}
            await self._ask_segment(links, seen, force=force)
            added: list[Holding] = []
            try:
                after = await self._netlink.ask(partial(_put, links, added))
            except BaseException:
                await self._undo(added)
                raise
            self._taken = {each: link.name for each, link in links.items()}
            self._well, self._lost = {}, set()
            self._learn(after)
            for each in added:
                self._tell(f"virtual address {each.address} taken on {each.link.name}")

    async def _undo(self, added: list[Holding]) -> None:
        """Remove what a failed take added; after a cancelled one, when its thread has ended."""
        try:
            await self._netlink.ask(lambda route: _remove_all(route, added))
        except NbdMirrorError as error:
            self._tell(f"virtual addresses: a part of a failed take is left: {error}")

    async def drop(self) -> None:
        """Stop announcing, and remove every configured address from wherever it is on this host.

        Raises:
            RefusedError: the kernel refuses to remove one; the others are removed all the same.
        """
        if not self._wanted:
            return
        async with self._changing:
            self._watch()
            self._taken, self._well, self._lost = {}, {}, set()
            await _cancel(self._announcer)
            ips = [each.address.ip for each in self._wanted]
            after, removed, problems = await self._netlink.ask(partial(_drop, ips))
            self._learn(after)
            for each in removed:
                self._tell(f"virtual address {each.address} removed from {each.link.name}")
            if problems:
                raise RefusedError("; ".join(problems))

    async def leftovers(self) -> list[str]:
        """The configured addresses that are on this host now, as the configuration spells them."""
        if not self._wanted:
            return []
        self._watch()
        seen = await self._netlink.ask(take_snapshot)
        self._learn(seen)
        return [str(each.address) for each in self._wanted if seen.of(each.address.ip)]

    def facts(self) -> list[AddressFacts]:
        """What is known; never older than a change of the kernel's tables plus LOOK_GAP_S."""
        return [self._facts_of(each) for each in self._wanted]

    async def close(self) -> None:
        """Stop watching and announcing; the addresses stay where they are."""
        async with self._changing:
            watcher, self._watcher = self._watcher, None
            await _cancel(self._announcer)
            await _cancel(watcher)
            self._voice.close()

    # --- before it is taken -----------------------------------------------------------------

    def _link_for(self, wanted: _Wanted, seen: Snapshot) -> Link:
        """The interface that is named, or the only one with another address of the network."""
        if wanted.interface is not None:
            link = seen.link(wanted.interface)
            if link is None:
                raise RefusedError(
                    f"virtual address {wanted.address}: this host has no interface "
                    f"{wanted.interface}; correct virtual_address.interface"
                )
            return _require_ethernet(wanted, link)
        names = sorted({each.link.name for each in self._related(wanted, seen)})
        if len(names) != 1:
            which = f"{', '.join(names)} all have" if names else "no interface of this host has"
            raise RefusedError(
                f"virtual address {wanted.address}: {which} another address in its network; "
                "name one with virtual_address.interface"
            )
        found = seen.link(names[0])
        assert found is not None
        return _require_ethernet(wanted, found)

    def _related(self, wanted: _Wanted, seen: Snapshot) -> Iterable[Holding]:
        """The other addresses of its network; a virtual one may be here by mistake."""
        virtual = {each.address.ip for each in self._wanted}
        for each in seen.holdings:
            near = (
                wanted.address.ip in each.address.network
                or each.address.ip in wanted.address.network
            )
            if each.link.mac and each.address.ip not in virtual and near:
                yield each

    async def _ask_segment(
        self, links: dict[_Wanted, Link], seen: Snapshot, *, force: bool
    ) -> None:
        """Refuse, or with `force` tell, that another host has one of the addresses."""
        places = []
        for each, link in links.items():
            if _is_in_place(seen, each, link.name):
                continue  # in service: another holder of it is no reason to stop
            if link.up and link.carrier:
                places.append(Place(each.address.ip, link.name, link.index, link.mac))
            else:
                self._tell(f"virtual address {each.address}: {link.name} has no carrier, not asked")
        own = {each.mac for each in seen.links if each.mac}
        holders = await find_holders(places, own)
        said = [
            f"virtual address {each.address} on {link.name}: {mac_text(holders[each.address.ip])} "
            "has it"
            for each, link in links.items()
            if each.address.ip in holders
        ]
        if said and not force:
            raise DuplicateAddressError(
                f"{'; '.join(said)}; remove it from that host or switch that host off, "
                "then try again"
            )
        for sentence in said:
            self._tell(f"{sentence}, too; taken by force")

    # --- while it is taken ------------------------------------------------------------------

    def _watch(self) -> None:
        """Have the watcher run. Raises RefusedError: the kernel gives no socket for its events."""
        if self._watcher is None or self._watcher.done():
            events = open_events()
            self._watcher = asyncio.create_task(self._keep_watching(events))
            self._watcher.add_done_callback(lambda _: events.close())

    async def _keep_watching(self, events: socket.socket) -> None:
        """Look whenever the kernel says that something changed, and not more often than needed."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def heard() -> None:
            drain_events(events)
            changed.set()

        loop.add_reader(events.fileno(), heard)
        try:
            while True:
                changed.clear()
                try:
                    self._learn(await self._netlink.ask(take_snapshot))
                except NbdMirrorError as error:
                    changed.set()  # look again after the gap
                    self._go_blind(str(error))
                await asyncio.sleep(LOOK_GAP_S)
                await changed.wait()
        finally:
            loop.remove_reader(events.fileno())

    def _go_blind(self, why: str) -> None:
        """The kernel does not answer: nothing is known, so nothing is announced."""
        if self._seen is not None or self._blind != why:
            self._tell(f"virtual addresses: {why}")
        self._seen, self._blind, self._well = None, why, {}

    def _learn(self, seen: Snapshot) -> None:
        """Take in a new look: what was lost is told, what is new or back is announced at once."""
        self._seen = seen
        before, self._well = self._well, self._places()
        for wanted, name in self._taken.items():
            ip = wanted.address.ip
            if ip in before and ip not in self._well:
                self._lost.add(ip)
                self._tell(f"virtual address {wanted.address} lost: {_trouble(seen, wanted, name)}")
            elif ip in self._well and ip in self._lost:
                self._lost.discard(ip)
                self._tell(f"virtual address {wanted.address} is back on {name}")
        if any(before.get(ip) != place for ip, place in self._well.items()):
            self._start_announcing()

    def _places(self) -> dict[IpAddress, Place]:
        """The addresses that were taken, and are where they belong, on a link with a carrier."""
        found = {}
        for wanted, name in self._taken.items():
            link = self._seen.link(name) if self._seen else None
            if self._seen and link and link.mac and not _trouble(self._seen, wanted, name):
                ip = wanted.address.ip
                found[ip] = Place(ip, link.name, link.index, link.mac)
        return found

    def _facts_of(self, wanted: _Wanted) -> AddressFacts:
        text, name = str(wanted.address), self._taken.get(wanted)
        if self._seen is None:
            return AddressFacts(text, name or "", False, self._blind)
        if name is not None:
            trouble = _trouble(self._seen, wanted, name)
            return AddressFacts(text, name, not trouble, trouble or f"taken on {name}")
        left = self._seen.of(wanted.address.ip)
        if left:
            link = left[0].link
            return AddressFacts(text, link.name, link.carrier, "left here, but not taken")
        return AddressFacts(text, wanted.interface or "", False, "not taken")

    def _start_announcing(self) -> None:
        if self._announcer is not None:
            self._announcer.cancel()
        self._announce()
        self._announcer = asyncio.create_task(self._keep_announcing())

    async def _keep_announcing(self) -> None:
        for gap_s in itertools.chain(ANNOUNCE_GAPS_S, itertools.repeat(ANNOUNCE_EVERY_S)):
            await asyncio.sleep(gap_s)
            self._announce()

    def _announce(self) -> None:
        for place in self._well.values():
            problem = self._voice.announce(place)
            if problem:
                self._tell(
                    f"virtual address {place.address} not announced on {place.interface}: {problem}"
                )


def _trouble(seen: Snapshot, wanted: _Wanted, name: str) -> str:
    """Why an address that was taken does not serve on the interface of this name, or ""."""
    link = seen.link(name)
    if link is None:
        return f"{name} is gone"
    if not _is_in_place(seen, wanted, name):
        return f"it was removed from {name}"
    return "" if link.up and link.carrier else f"{name} has no carrier"


def _require_ethernet(wanted: _Wanted, link: Link) -> Link:
    if not link.mac:
        raise RefusedError(
            f"virtual address {wanted.address}: {link.name} is no Ethernet, so the address can be "
            "neither asked for nor announced there; name another one with virtual_address.interface"
        )
    return link


def _is_in_place(seen: Snapshot, wanted: _Wanted, name: str) -> bool:
    return any(_fits(each, wanted, name) for each in seen.of(wanted.address.ip))


def _fits(holding: Holding, wanted: _Wanted, name: str) -> bool:
    return holding.usable and (holding.address, holding.link.name) == (wanted.address, name)


def _put(links: dict[_Wanted, Link], added: list[Holding], route: Route) -> Snapshot:
    """Every address on its link and nowhere else; `added` names what was not there before."""
    seen = take_snapshot(route)
    for wanted, link in links.items():
        for each in seen.of(wanted.address.ip):
            if not _fits(each, wanted, link.name):
                remove(route, each, seen)  # of an earlier life: another link, another prefix
        if add(route, wanted.address, link):
            added.append(Holding(wanted.address, link, False, True))
    return take_snapshot(route)


def _remove_all(route: Route, added: list[Holding]) -> None:
    seen = take_snapshot(route)
    for each in added:
        for there in seen.of(each.address.ip):
            remove(route, there, seen)


def _drop(ips: list[IpAddress], route: Route) -> tuple[Snapshot, list[Holding], list[str]]:
    seen = take_snapshot(route)
    removed, problems = [], []
    for each in itertools.chain.from_iterable(map(seen.of, ips)):
        try:
            if remove(route, each, seen):
                removed.append(each)
        except RefusedError as error:
            problems.append(str(error))
    return take_snapshot(route), removed, problems


async def _cancel(task: "asyncio.Task[None] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_TIMEOUT_S)
