"""Real echoes: to this host, and from one network namespace to another."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import pytest
import uvloop

from nbdmirror.controller.ping import ping_any
from tests.support.network import ADDRESSES, Network

RunLoop = Callable[[Coroutine[Any, Any, str]], str]

PEER = ADDRESSES["beta"]
NOBODY = "192.0.2.99"
MARGIN_S = 5.0  # for a machine that is many times slower

# One question, asked on a host of its own.
ASK = """
import json, sys, uvloop
from nbdmirror.controller.ping import ping_any
print(uvloop.run(ping_any(sys.argv[2:], int(sys.argv[1]))))
"""

# A host that answers like none should: it is the only one that does, the kernel is told not to.
IMPOSTOR = """
import socket, sys, threading
from struct import pack, unpack

def summed(message):
    words = sum(unpack(f"!{len(message) // 2}H", message))
    words = (words >> 16) + (words & 0xFFFF)
    return ~(words + (words >> 16)) & 0xFFFF

wire = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
print("ready", flush=True)
while True:
    packet, source = wire.recvfrom(2048)
    message = packet[20:]
    if message[0] != 8:
        continue
    rest = bytearray(message[4:])
    if sys.argv[1] == "foreign":
        rest[-1] ^= 1
    if sys.argv[1] == "late":
        threading.Event().wait(0.2)
    body = bytes(rest)
    wire.sendto(pack("!BBH", 0, 0, summed(pack("!BBH", 0, 0, 0) + body)) + body, source)
"""

# The loop is held, as if the machine had been paused, from the echo until long after its answer.
PAUSED = f"""
import asyncio, threading
from nbdmirror.controller.ping import ping_any

async def main():
    asked = asyncio.create_task(ping_any(["{PEER}"], 300))
    for _ in range(3):
        await asyncio.sleep(0)
    threading.Event().wait(1.0)
    print(await asked)

asyncio.run(main())
"""

# All sockets draw the same identifier, as those of two processes may.
SAME_IDENTIFIER = f"""
import asyncio
from nbdmirror.controller import ping
ping.secrets.randbelow = lambda _: 7

async def main():
    dead = [ping.ping_any(["{NOBODY}"], 600) for _ in range(5)]
    alive = [ping.ping_any(["{PEER}"], 600) for _ in range(5)]
    said = await asyncio.gather(*dead, *alive)
    print([not each for each in said])

asyncio.run(main())
"""


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts."""
    with Network() as made:
        yield made


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run_loop(request: pytest.FixtureRequest) -> RunLoop:
    """Both loops."""
    made: RunLoop = request.param
    return made


def ask(network: Network, *hosts: str, timeout_ms: int = 500, before: tuple[str, ...] = ()) -> str:
    """What host alpha is told when it asks."""
    command = (*before, sys.executable, "-c", ASK, str(timeout_ms), *hosts)
    return network.run("alpha", *command).strip()


@contextmanager
def impostor(network: Network, kind: str) -> Iterator[None]:
    """Host beta answers in this way."""
    network.run("beta", "sysctl", "-q", "-w", "net.ipv4.icmp_echo_ignore_all=1")
    command = (*network.enter("beta"), sys.executable, "-c", IMPOSTOR, kind)
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.usefixtures("require_root")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_host_that_answers(run_loop: RunLoop, host: str) -> None:
    """Breaks in the field: a node that sees its router is told that it is cut off."""
    assert run_loop(ping_any([host], 5000)) == ""


@pytest.mark.net
def test_one_that_answers_is_enough(network: Network) -> None:
    """Breaks in the field: one router in maintenance takes the right to go on from both nodes."""
    assert ask(network, NOBODY, PEER, "203.0.113.1", timeout_ms=30_000) == ""


@pytest.mark.net
@pytest.mark.slow
def test_silence_is_a_no_in_time(network: Network) -> None:
    """Breaks in the field: a cut node goes on, or the decision waits far beyond its time."""
    network.cut("alpha")
    start_s = monotonic()
    said = ask(network, PEER, NOBODY)
    assert 0.5 <= monotonic() - start_s < 0.5 + MARGIN_S
    assert f"{PEER} did not answer within 500 ms" in said
    assert f"{NOBODY} " in said
    assert network.lost("beta") == 3


@pytest.mark.net
@pytest.mark.slow
def test_two_lost_packets_are_no_silence(network: Network) -> None:
    """Breaks in the field: a network that loses a packet now and then demotes the primary."""
    network._rule("beta", "icmp type echo-request numgen inc mod 3 < 2 counter drop")
    assert ask(network, PEER, timeout_ms=3000) == ""
    assert network.lost("beta") == 2


@pytest.mark.net
@pytest.mark.slow
def test_only_an_echo_of_the_question_counts(network: Network) -> None:
    """Breaks in the field: another process's answer, or a forged one, keeps a cut node alive."""
    with impostor(network, "true"):
        assert ask(network, PEER, timeout_ms=5000) == ""
    with impostor(network, "foreign"):
        assert "did not answer" in ask(network, PEER)


@pytest.mark.net
@pytest.mark.slow
def test_questions_at_once_do_not_take_each_others_answers(network: Network) -> None:
    """Breaks in the field: the router of another mirror answers for the one that is dead."""
    said = network.run("alpha", sys.executable, "-c", SAME_IDENTIFIER)
    assert said.strip() == str([False] * 5 + [True] * 5)


@pytest.mark.net
@pytest.mark.slow
def test_a_pause_of_this_process_is_no_silence(network: Network) -> None:
    """Breaks in the field: a virtual machine that was moved steps back without need."""
    with impostor(network, "late"):
        assert network.run("alpha", sys.executable, "-c", PAUSED).strip() == ""


@pytest.mark.net
@pytest.mark.slow
def test_what_the_system_refuses_is_a_no_with_the_reason(network: Network) -> None:
    """Breaks in the field: the deciding process dies of its own network, or nobody learns why."""
    assert "Network is unreachable" in ask(network, "203.0.113.1", "2001:db8::1")
    network.run("alpha", "ip", "route", "add", "unreachable", "203.0.113.0/24")
    assert "No route to host" in ask(network, "203.0.113.1")
    network.run("alpha", "nft", "-f", "-", given="""
        table inet mine { chain output { type filter hook output priority 0; policy drop; }; }
    """)  # fmt: skip
    assert "a firewall of this node" in ask(network, PEER)


@pytest.mark.net
@pytest.mark.slow
def test_without_the_right_to_ask_it_says_so(network: Network) -> None:
    """Breaks in the field: a container without the capability looks like a dead network."""
    weak = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")
    assert "no right to open a raw socket" in ask(network, PEER, before=weak)


def test_names_are_not_looked_up(run_loop: RunLoop) -> None:
    """Breaks in the field: a dead name server decides who is primary."""
    assert (
        run_loop(ping_any(["localhost"], 500)) == "no echo: localhost is not a numeric IP address"
    )
    assert run_loop(ping_any([], 500)) == "no address to ping is configured"
