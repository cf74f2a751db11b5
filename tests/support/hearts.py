"""Hearts for tests: a heart and what it heard, a peer that is moved by hand, a loop to run them on.

Owns every socket of the peer, and the thread of a network namespace. Must never: wait without a
bound, or leave a namespace behind: it ends with its thread and the sockets in it.
"""

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import uvloop

from nbdmirror.config import Address, Node
from nbdmirror.controller.heart import Heart, LinkFacts, boottime_ms
from nbdmirror.core.cluster.heartbeat import (
    DATAGRAM_BYTES_MAX,
    Ends,
    Link,
    derive_mac_key,
)

KEY = b"k" * 32
MIRROR = b"m" * 16
PORT = 7789
HEARTBEAT_MS = 50
SILENCE_MS = 1_500
BOUND_S = 60.0
POLL_S = 0.02
CLONE_NEWNET = 0x40000000

Main = Callable[[], Awaitable[None]]


def run(main: Main) -> None:
    """As production runs it; a callback that raises fails the test."""
    raised: list[dict[str, Any]] = []

    async def guarded() -> None:
        handler = asyncio.get_running_loop().set_exception_handler
        handler(lambda _, context: raised.append(context))
        await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(guarded())
    assert not raised, raised


def run_in_network(main: Main) -> None:
    """The same in a network namespace that ends with its thread and sockets."""
    failed: list[BaseException] = []

    def thread() -> None:
        try:
            assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0, ctypes.get_errno()
            ip("link", "set", "lo", "up")
            run(main)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    runner = threading.Thread(target=thread)
    runner.start()
    runner.join(2 * BOUND_S)
    assert not runner.is_alive()
    if failed:
        raise failed[0]


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, with a bound."""
    deadline = monotonic() + BOUND_S
    never = asyncio.Event()
    while not condition():
        assert monotonic() < deadline, what
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(never.wait(), POLL_S)


def nodes(networks: int = 1) -> tuple[Node, Node]:
    """Two nodes on loopback addresses that no other test has."""
    start = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(254) + 1}"
    made = []
    for node_id in (1, 2):
        beats = tuple(Address(f"{start}.{10 * node_id + i}", PORT) for i in range(networks))
        made.append(node(node_id, beats))
    return made[0], made[1]


def node(node_id: int, beats: tuple[Address, ...]) -> Node:
    nowhere = Path("/nowhere")
    own = Address("127.0.0.1", node_id)
    return Node(f"n{node_id}", node_id, own, nowhere, nowhere, beats, None)


class Ear:
    """A heart, and the bodies that it handed on."""

    def __init__(self, me: Node, peer: Node, heartbeat_ms: int = HEARTBEAT_MS) -> None:
        self.bodies: list[bytes] = []
        self.heart = Heart(
            KEY,
            MIRROR,
            me,
            peer,
            heartbeat_ms=heartbeat_ms,
            silence_ms=max(SILENCE_MS, 5 * heartbeat_ms),
            on_body=self.bodies.append,
        )

    def link(self, index: int = 0) -> LinkFacts:
        return self.heart.links()[index]


@asynccontextmanager
async def started(*ears: Ear) -> AsyncIterator[None]:
    """Hearts that beat, and end with the block."""
    try:
        for ear in ears:
            await ear.heart.start()
        yield
    finally:
        for ear in ears:
            await ear.heart.close()


class Puppet:
    """The peer, moved by hand: it speaks when it is told to, and keeps all that it said."""

    def __init__(self, me: Node, peer: Node) -> None:
        self.said: list[bytes] = []
        self.seq = 0
        ends = Ends(derive_mac_key(KEY), MIRROR, me.id, peer.id, os.urandom(16))
        self.links = [Link(ends, index, SILENCE_MS) for index in range(len(me.heartbeats))]
        self.targets = [(each.host, each.port) for each in peer.heartbeats]
        self.sockets = [bound(each.host, each.port) for each in me.heartbeats]

    def say(self, body: bytes, index: int = 0) -> bytes:
        """Hear all that waits, then say one thing."""
        datagram = self.word(body, index)
        self.send(datagram, index)
        return datagram

    def word(self, body: bytes, index: int = 0) -> bytes:
        with contextlib.suppress(BlockingIOError):
            while True:
                received = self.sockets[index].recv(DATAGRAM_BYTES_MAX)
                self.links[index].take(received, boottime_ms())
        self.seq += 1
        self.said.append(self.links[index].packet(self.seq, body, boottime_ms()))
        return self.said[-1]

    def send(self, datagram: bytes, index: int = 0) -> None:
        self.sockets[index].sendto(datagram, self.targets[index])

    async def meet(self, ear: Ear, index: int = 0) -> None:
        """Speak until the heart hears it on that network."""

        def heard() -> bool:
            self.say(b"meet", index)
            return ear.link(index).up and self.links[index].heard_ms is not None

        await until(heard, "the heart does not hear its peer")


def bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.setblocking(False)
    made.bind((host, port))
    return made


@contextmanager
def puppet(me: Node, peer: Node) -> Iterator[Puppet]:
    made = Puppet(me, peer)
    try:
        yield made
    finally:
        for each in made.sockets:
            each.close()
