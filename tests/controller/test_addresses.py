"""Virtual addresses between two hosts and a client on one switch, with real kernels on each."""

import asyncio
import itertools
import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest
import uvloop

from nbdmirror.controller import neighbours
from nbdmirror.controller import netlink as netlink_module
from nbdmirror.controller.addresses import ANNOUNCE_EVERY_S, ANNOUNCE_GAPS_S
from nbdmirror.controller.announce import IpAddress, announcements
from nbdmirror.controller.neighbours import PROBE_GAP_S, PROBES_COUNT, Place
from nbdmirror.controller.netlink import Netlink, Route, take_snapshot
from nbdmirror.errors import RefusedError
from tests.support.lan import CABLE, NET4, NET6, WAIT_S, Lan, Program, mac

pytestmark = [pytest.mark.net, pytest.mark.slow]

FOUR, SIX = f"{NET4}.100", f"{NET6}:100"
FOUR_24, SIX_64 = f"{FOUR}/24", f"{SIX}/64"
BOTH = (FOUR_24, SIX_64)
EACH = pytest.mark.parametrize("ip", [FOUR, SIX], ids=["IPv4", "IPv6"])
OWN = {"alpha": {f"{NET4}.1/24", f"{NET6}:1/64"}, "beta": {f"{NET4}.2/24", f"{NET6}:2/64"}}


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Three hosts and a switch."""
    with Lan() as made:
        yield made


@pytest.fixture
def alpha(lan: Lan) -> Iterator[Program]:
    """The controller's part on one node."""
    with Program(lan, "alpha", "hold", *BOTH) as made:
        yield made


@pytest.fixture
def beta(lan: Lan) -> Iterator[Program]:
    """And on the other one."""
    with Program(lan, "beta", "hold", *BOTH) as made:
        yield made


def on(ip: str) -> str:
    """The configured form of an address."""
    return FOUR_24 if ip == FOUR else SIX_64


def taken(program: Program) -> None:
    """Every address is taken; the program says how long it took, or why not."""
    answer = program.ask("take")
    assert isinstance(answer, int), answer


def refused(program: Program, what: str = "take") -> str:
    """What it says when it refuses."""
    answer = program.ask(what)
    assert isinstance(answer, str), "it did not refuse"
    assert answer.startswith(("RefusedError: ", "DuplicateAddressError: "))
    return answer


def facts(program: Program, address: str) -> dict[str, Any]:
    """What is known of one address."""
    (found,) = [each for each in program.ask("facts") if each["address"] == address]
    assert isinstance(found, dict)
    return found


# --- a takeover -----------------------------------------------------------------------------


@EACH
def test_a_client_follows_the_address(lan: Lan, alpha: Program, beta: Program, ip: str) -> None:
    """Breaks in the field: after a failover clients talk to the dead node until their own entry is
    too old, which takes minutes and looks like a failover that did not work."""
    taken(alpha)
    lan.ping(ip)
    assert lan.neighbour(ip) == mac("alpha")
    alpha.kill()
    for each in BOTH:
        lan.run("alpha", "ip", "address", "delete", each, "dev", CABLE)
    assert lan.neighbour(ip) == mac("alpha"), "nobody told the client yet"
    taken(beta)
    assert lan.neighbour(ip) == mac("beta"), "told, not asked"
    lan.ping(ip)
    assert lan.neighbour(ip) == mac("beta")


@EACH
def test_a_client_that_missed_it_is_told_again(lan: Lan, alpha: Program, ip: str) -> None:
    """Breaks in the field: one lost packet at the moment of the failover, and a client is lost."""
    with Program(lan, "client", "hear") as ear:
        taken(alpha)
        heard_from(ear, "alpha", ip, 1)
        lan.mislead(ip)
        comes_right(lan, ear, ip)


def comes_right(lan: Lan, ear: Program, ip: str) -> None:
    """The client learns where the address is from one of the next announcements."""
    while lan.neighbour(ip) != mac("alpha"):
        heard_from(ear, "alpha", ip, 1)


def heard_from(ear: Program, host: str, ip: str, count: int) -> list[dict[str, Any]]:
    """Everything that the client hears until a host has announced an address so often."""
    said = []
    last = 2 if ip == FOUR else 136  # of IPv4 the reply is the second one
    while count:
        said.append(ear.next())
        count -= said[-1] == {"mac": mac(host), "kind": last, "address": ip}
    return said


def test_it_is_announced_in_both_forms_and_again(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: hosts that learn from one form alone never follow; and see above."""
    with Program(lan, "client", "hear") as ear:
        taken(alpha)
        said = heard_from(ear, "alpha", FOUR, 3)
        kinds = [each["kind"] for each in said if each["address"] == FOUR]
        assert kinds == [1, 2] * 3
        probes = [each for each in said if each["address"] == "0.0.0.0"]
        assert len(probes) == PROBES_COUNT


def test_an_answer_counts_that_came_while_this_process_did_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks in the field: on a busy host the time is over before the answer was read, and the
    address is taken beside its holder."""
    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_reader", lambda *_: None)
    ip = IPv4Address(FOUR)
    theirs = bytes.fromhex(mac("beta").replace(":", ""))
    ear, segment = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    async def search() -> dict[IpAddress, bytes]:
        made = neighbours._Search(1, frozenset())
        made.ears = [(ear, [Place(ip, CABLE, 1, bytes(6))])]
        segment.send(announcements(theirs, ip)[0])
        await made.run()
        return made.found

    with ear, segment:
        assert asyncio.run(search()) == {ip: theirs}


def test_the_times_are_within_their_budget() -> None:
    """Breaks in the field: the detection eats the time that a takeover has for everything."""
    assert PROBES_COUNT * PROBE_GAP_S < 0.3
    assert len(ANNOUNCE_GAPS_S) == 5
    assert sum(ANNOUNCE_GAPS_S) <= 10
    assert all(one < next_one for one, next_one in itertools.pairwise(ANNOUNCE_GAPS_S))
    assert ANNOUNCE_EVERY_S == 60


def test_who_dropped_it_says_nothing_more(lan: Lan, alpha: Program, beta: Program) -> None:
    """Breaks in the field: after a swap the old primary goes on announcing, and clients flap."""
    with Program(lan, "client", "hear") as ear:
        taken(alpha)
        heard_from(ear, "alpha", SIX, 2)
        assert isinstance(alpha.ask("drop"), int)
        taken(beta)
        heard_from(ear, "beta", FOUR, 1)
        said = heard_from(ear, "beta", FOUR, 3)  # longer than alpha's next gap would be
        assert mac("alpha") not in {each["mac"] for each in said}


def test_the_address_is_no_source_of_new_connections(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: the node's own connection to its peer comes from the virtual address,
    and breaks when that moves on."""
    taken(alpha)
    for target, source in ((f"{NET4}.2", f"{NET4}.1"), (f"{NET6}:2", f"{NET6}:1")):
        route = lan.run("alpha", "ip", "route", "get", target)
        assert f"src {source} " in route


# --- somebody else has it -------------------------------------------------------------------


@EACH
def test_a_duplicate_is_refused(lan: Lan, alpha: Program, ip: str) -> None:
    """Breaks in the field: two hosts hold one address; clients reach now this one, now that."""
    lan.give("beta", on(ip), CABLE)
    said = refused(alpha)
    for word in (on(ip), CABLE, mac("beta")):
        assert word in said
    assert (FOUR if ip == SIX else SIX) not in said
    assert lan.addresses("alpha") == OWN["alpha"], "nor the one that was free"
    assert alpha.ask("leftovers") == []
    assert not facts(alpha, on(ip))["held"]


def test_a_refused_take_can_be_repeated(lan: Lan, alpha: Program, beta: Program) -> None:
    """Breaks in the field: a node that was refused once never takes over again."""
    taken(beta)
    refused(alpha)
    assert isinstance(beta.ask("drop"), int)
    taken(alpha)
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)
    assert lan.addresses("beta") == OWN["beta"]


@EACH
def test_force_takes_it_all_the_same(lan: Lan, alpha: Program, beta: Program, ip: str) -> None:
    """Breaks in the field: a host that hangs, but whose kernel still answers, keeps the address
    for ever."""
    taken(beta)
    lan.ping(ip)
    assert isinstance(alpha.ask("force"), int)
    alpha.wait_told(rf"{on(ip)} on {CABLE}: {mac('beta')} has it, too; taken by force")
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)
    assert lan.neighbour(ip) == mac("alpha")


def test_what_is_in_service_is_not_asked_for(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: a controller that was restarted beside its running application gives
    the address up because somebody else took it as well."""
    taken(alpha)
    lan.give("beta", FOUR_24, CABLE)
    taken(alpha)
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)


# --- what an earlier life left --------------------------------------------------------------


def test_drop_removes_what_an_earlier_life_left(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: a node that comes back as secondary answers for the address still."""
    lan.spare("alpha", "other")
    lan.give("alpha", f"{FOUR}/32", "other")
    lan.give("alpha", FOUR_24, CABLE)
    lan.give("alpha", SIX_64, CABLE)
    assert alpha.ask("leftovers") == list(BOTH)
    assert facts(alpha, SIX_64) == {
        "address": SIX_64,
        "interface": CABLE,
        "held": True,
        "reason": "left here, but not taken",
    }
    assert isinstance(alpha.ask("drop"), int)
    assert alpha.ask("leftovers") == []
    assert lan.addresses("alpha") == OWN["alpha"]
    alpha.wait_told(f"{FOUR}/32 removed from other")
    assert facts(alpha, SIX_64)["reason"] == "not taken"


def test_take_moves_what_lies_on_the_wrong_interface(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: after a change of the configuration the address is on two interfaces."""
    lan.spare("alpha", "other")
    lan.give("alpha", f"{FOUR}/32", "other")
    taken(alpha)
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)


@EACH
def test_this_host_is_not_somebody_else(lan: Lan, alpha: Program, ip: str) -> None:
    """Breaks in the field: a node with two interfaces on one segment refuses what it left itself
    on the other one, and names its own MAC as the culprit."""
    lan.plug("alpha", "eth1", "02:00:00:00:07:11")
    lan.give("alpha", f"{ip}/{32 if ip == FOUR else 128}", "eth1")
    lan.ping(ip)
    taken(alpha)
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)


def test_doing_it_twice_changes_nothing(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: whoever repeats a step after a failure fails at what is done already."""
    assert isinstance(alpha.ask("drop"), int)
    taken(alpha)
    taken(alpha)
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)
    assert isinstance(alpha.ask("drop"), int)
    assert isinstance(alpha.ask("drop"), int)
    assert lan.addresses("alpha") == OWN["alpha"]


READ_ONLY = """
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"
"""


@pytest.mark.parametrize(
    "before",
    [(), ("unshare", "--mount", "sh", "-c", READ_ONLY, "sh")],
    ids=["the kernel is told to keep them", "they are given back"],
)
def test_drop_leaves_the_addresses_of_the_node(lan: Lan, before: tuple[str, ...]) -> None:
    """Breaks in the field: the node's own address was renewed while it held the virtual one, and
    goes with it at the next swap: the node has no network. In a container the kernel's switch
    against that may be read-only."""
    own = f"{NET4}.1/24"
    lan.run("alpha", "ip", "address", "delete", own, "dev", CABLE)
    for each in (FOUR_24, own):
        lan.give("alpha", each, CABLE)
    switch = f"/proc/sys/net/ipv4/conf/{CABLE}/promote_secondaries"
    assert lan.run("alpha", "cat", switch) == "0\n"
    with Program(lan, "alpha", "hold", *BOTH, before=before) as program:
        taken(program)
        assert isinstance(program.ask("drop"), int)
    assert lan.addresses("alpha") == OWN["alpha"]
    assert lan.run("alpha", "cat", switch) == "0\n", "as the operator had it"


def test_the_end_of_the_program_leaves_them(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: an upgrade of the controller takes the application off the network."""
    taken(alpha)
    alpha.close()
    assert lan.addresses("alpha") == OWN["alpha"] | set(BOTH)


# --- where it cannot be put -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        (f"{FOUR_24}@eth7", "no interface eth7; correct virtual_address.interface"),
        ("203.0.113.9/24", "no interface of this host has another address in its network"),
        (f"{FOUR_24}@lo", "lo is no Ethernet"),
    ],
    ids=["no such one", "none fits", "no Ethernet"],
)
def test_an_interface_is_missing(lan: Lan, word: str, remedy: str) -> None:
    """Breaks in the field: a takeover fails, and nobody is told what to correct."""
    with Program(lan, "alpha", "hold", SIX_64, word) as program:
        said = refused(program)
        assert word.partition("@")[0] in said
        assert remedy in said
        assert lan.addresses("alpha") == OWN["alpha"]


def test_two_interfaces_fit(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: the address appears on the cable of the backup, say."""
    lan.spare("alpha", "other")
    lan.give("alpha", f"{NET4}.9/24", "other")
    assert f"{CABLE}, other all have another address" in refused(alpha)
    with Program(lan, "alpha", "hold", f"{FOUR_24}@{CABLE}") as named:
        taken(named)


def test_nothing_is_left_when_the_kernel_refuses_one(lan: Lan) -> None:
    """Breaks in the field: a node that gave up still answers for one of its addresses."""
    lan.run("alpha", "sysctl", "-q", "-w", f"net.ipv6.conf.{CABLE}.disable_ipv6=1")
    with Program(lan, "alpha", "hold", FOUR_24, f"{SIX_64}@{CABLE}") as program:
        said = refused(program)
        assert SIX_64 in said
        assert "IPv6 is switched off there" in said
        assert lan.addresses("alpha") == {f"{NET4}.1/24"}


def test_nothing_is_left_when_it_is_cancelled(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: a takeover that was called off half-way leaves the address on a node
    that is not primary."""
    assert alpha.ask("cancel") == "cancelled"
    assert lan.addresses("alpha") == OWN["alpha"]
    assert not facts(alpha, FOUR_24)["held"]
    taken(alpha)


# --- while it is held -----------------------------------------------------------------------


def test_a_lost_carrier_is_seen_and_its_return_announced(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: a node without a cable is taken for one that serves; and when the cable
    is back, clients that learnt something else meanwhile do not follow."""
    taken(alpha)
    assert facts(alpha, FOUR_24) == {
        "address": FOUR_24,
        "interface": CABLE,
        "held": True,
        "reason": f"taken on {CABLE}",
    }
    lan.run("switch", "ip", "link", "set", "alpha", "down")
    alpha.wait_told(f"{FOUR_24} lost: {CABLE} has no carrier")
    assert not facts(alpha, FOUR_24)["held"]
    with Program(lan, "client", "hear") as ear:
        lan.mislead(FOUR)
        lan.run("switch", "ip", "link", "set", "alpha", "up")
        alpha.wait_told(f"{FOUR_24} is back on {CABLE}")
        assert facts(alpha, FOUR_24)["held"]
        comes_right(lan, ear, FOUR)


def test_an_address_that_is_taken_away_is_seen(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: a restart of the network's service took the address, and the node says
    that all is well; or it goes on announcing what it no longer has."""
    taken(alpha)
    lan.run("alpha", "ip", "address", "delete", FOUR_24, "dev", CABLE)
    alpha.wait_told(f"{FOUR_24} lost: it was removed from {CABLE}")
    assert not facts(alpha, FOUR_24)["held"]
    assert facts(alpha, SIX_64)["held"]
    lan.run("switch", "ip", "link", "set", "alpha", "down")
    alpha.wait_told(f"{SIX_64} lost: {CABLE} has no carrier")
    with Program(lan, "client", "hear") as ear:
        lan.run("switch", "ip", "link", "set", "alpha", "up")
        said = heard_from(ear, "alpha", SIX, 2)
        assert FOUR not in {each["address"] for each in said}
    taken(alpha)
    assert facts(alpha, FOUR_24)["held"]


def test_an_interface_that_is_gone_is_seen(lan: Lan) -> None:
    """Breaks in the field: as above, for a device that was pulled out; and a stop of the node fails
    at an address that went with it."""
    lan.spare("beta", "spare")
    with Program(lan, "beta", "hold", "203.0.113.100/24@spare") as program:
        taken(program)
        lan.run("beta", "ip", "link", "delete", "spare")
        program.wait_told("203.0.113.100/24 lost: spare is gone")
        assert facts(program, "203.0.113.100/24")["reason"] == "spare is gone"
        assert isinstance(program.ask("drop"), int)


def test_without_a_carrier_it_is_taken_and_told(lan: Lan, alpha: Program) -> None:
    """Breaks in the field: a switch that restarts keeps the application from starting at all."""
    lan.run("switch", "ip", "link", "set", "alpha", "down")
    taken(alpha)
    alpha.wait_told(f"{FOUR_24}: {CABLE} has no carrier, not asked")
    assert facts(alpha, FOUR_24)["reason"] == f"{CABLE} has no carrier"
    lan.run("switch", "ip", "link", "set", "alpha", "up")
    lan.ping(FOUR)


# --- the kernel's answer --------------------------------------------------------------------


def test_one_job_at_a_time_also_after_a_cancelled_one() -> None:
    """Breaks in the field: what a cancelled take still adds is added after it was cleaned up."""
    begun, second_ran = threading.Event(), threading.Event()
    overtaken: list[bool] = []

    def first(_: Route) -> None:
        begun.set()
        overtaken.append(second_ran.wait(0.2))

    async def both() -> None:
        netlink = Netlink()
        asked = asyncio.create_task(netlink.ask(first))
        assert await asyncio.to_thread(begun.wait, WAIT_S)
        asked.cancel()
        await asyncio.wait({asked})
        assert asked.cancelled()
        await netlink.ask(lambda _: second_ran.set())

    asyncio.run(both())
    assert overtaken == [False]


def test_a_kernel_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: somebody holds the kernel's lock, and the controller hangs with it; or
    it piles up threads that wait."""
    monkeypatch.setattr(netlink_module, "NETLINK_TIMEOUT_S", 0.01)
    go_on = threading.Event()
    begun: list[int] = []

    def hang(_: Route) -> None:
        begun.append(1)
        go_on.wait(WAIT_S)

    async def ask() -> None:
        netlink = Netlink()
        for _ in range(3):
            with pytest.raises(RefusedError, match="the kernel did not answer within"):
                await netlink.ask(hang)
        go_on.set()

    asyncio.run(ask())
    assert len(begun) == 1


def test_a_policy_of_uvloop_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: where every new loop is uvloop's, no address can be taken at all."""
    monkeypatch.setattr(asyncio, "new_event_loop", uvloop.new_event_loop)
    seen = asyncio.run(Netlink().ask(take_snapshot))
    assert seen.link("lo") is not None
