"""What comes to the peer port and is not the peer."""

import contextlib
import os
import random
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdmirror.core.handshake import RefusalCode, encode_refusal
from nbdmirror.core.wire import HEADER, HEADER_MAGIC, FrameType
from nbdmirror.errors import AuthenticationError, PeerProtocolError, PeerRefusedError
from tests.support.fixtures import MakePair
from tests.support.impostor import Proven, dial, ended_by_the_other, prove
from tests.support.load import Load
from tests.support.pair import PEER_PORT, Engine, Pair
from tests.support.proxy import Proxy, reset

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

MEMORY_GROWTH_KIB_MAX = 16 * 1024
GARBAGE: dict[str, bytes] = {
    "zeros": bytes(1 << 20),
    "random": random.Random(5).randbytes(1 << 20),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "giant hello": b"\xff\xff\x01" + b"NBDMIRR\x01" + b"x" * 100_000,
    "truncated hello": b"\x00\x40\x01NBDMIRR\x01",
}


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A pair in sync that no deadline disturbs: what ends its session here is a visitor."""
    return make_pair(engine={"ack_timeout_ms": 30_000}).up()


def resident_kib(engine: Engine) -> int:
    """Memory of the engine's process that is resident."""
    for line in Path(f"/proc/{engine.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_before_the_proof(pair: Pair, name: str) -> None:
    """Breaks in the field: a port scanner fills the memory, ends the mirror or changes data."""
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(20)
    session = beta.state()["session"]["number"]
    before = resident_kib(beta)
    connections = [dial(pair, beta) for _ in range(4)]
    for connection in connections:
        with contextlib.suppress(OSError):  # refused in the midst of it: as it should be
            connection.sendall(GARBAGE[name])
            connection.shutdown(socket.SHUT_WR)
    for connection in connections:
        ended_by_the_other(connection)
        connection.close()
    load.wait(50)
    load.stop()
    assert not load.error
    assert beta.state()["session"]["number"] == session, "the mirror went on undisturbed"
    assert resident_kib(beta) - before < MEMORY_GROWTH_KIB_MAX
    pair.stop()
    pair.assert_equal()
    load.assert_kept(beta.data)


def test_wrong_key_and_wrong_version_are_told_why(pair: Pair) -> None:
    """Breaks in the field: after a key change or an update nobody can see why they do not talk."""
    beta = pair.beta
    session = beta.state()["session"]["number"]
    attempts: list[tuple[type[PeerProtocolError], str, dict[str, Any]]] = [
        (AuthenticationError, "key", {"key": os.urandom(32)}),
        (PeerRefusedError, "version", {"versions": (7, 9)}),
        (PeerRefusedError, "node", {"node_id": 2}),
    ]
    for error, word, changes in attempts:
        seen = beta.last_event()
        with pytest.raises(error, match=word):
            prove(pair, beta, **changes)
        told = str(beta.wait_event("no-peer", after=seen)["reason"])
        assert word in told or "authentication" in told
    assert beta.state()["session"]["number"] == session


def test_idle_connections_do_not_keep_the_peer_out(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: somebody who opens connections and says nothing stops the mirror."""
    pair, proxy = proxied
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(20)
    idle = []
    for _ in range(64):
        with contextlib.suppress(ConnectionResetError):
            idle.append(dial(pair, beta))
    load.wait(50)
    seen = alpha.last_event()
    proxy.cut_after(0)
    alpha.wait_event("resumed", after=seen)
    load.wait(50)
    load.stop()
    assert not load.error
    for connection in idle:
        ended_by_the_other(connection)
        connection.close()
    pair.synced()
    descriptors = len(list(Path(f"/proc/{beta.pid}/fd").iterdir()))
    assert descriptors < 64, "connections that never proved themselves are given back"
    pair.stop()
    pair.assert_equal()


class Flood:
    """Connections from an address, again and again, that stay and say nothing."""

    def __init__(self, source: str, address: tuple[str, int]) -> None:
        self._ended = threading.Event()
        self.full = threading.Event()
        self._source = source
        self._address = address
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        held: deque[socket.socket] = deque()
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(self._address, 10, (self._source, 0)))
            if len(held) >= 64:
                self.full.set()
                held.popleft().close()
        for connection in held:
            connection.close()

    def end(self) -> None:
        """None is left."""
        self._ended.set()
        self._thread.join()


def test_idle_connections_from_the_peers_host_do_not_keep_it_out(make_pair: MakePair) -> None:
    """Breaks in the field: a user without rights on the peer's server stops the mirror for ever."""
    pair = make_pair().create()
    alpha, beta = pair.both
    beta.start()
    flood = Flood(pair.hosts["alpha"], (pair.hosts["beta"], PEER_PORT))
    try:
        assert flood.full.wait(60)
        alpha.start()
        alpha.command("promote")
        pair.synced()
    finally:
        flood.end()
    pair.stop()
    pair.assert_equal()


def test_a_stranger_cannot_speak_to_the_operator(pair: Pair) -> None:
    """Breaks in the field: "run `discard` now", says the state of a healthy mirror, in the words of
    somebody who has no key.
    """
    beta = pair.beta
    seen = beta.last_event()
    for number in range(50):
        with dial(pair, beta) as connection:
            connection.sendall(encode_refusal(RefusalCode.BUSY, f"run discard now {number}"))
            ended_by_the_other(connection)
    assert "not proven" in str(beta.wait_event("no-peer", after=seen)["reason"])
    assert beta.state()["refusal"] == "", "the peer is here"
    told = [event for event in beta.events if event["event"] == "no-peer"]
    assert len([event for event in told if event["number"] > seen]) == 1, "and not fifty times"
    assert "run discard" not in str(beta.events)
    pair.alpha.stop()
    beta.stop()
    assert "nbdmirror: role: role secondary" in beta.log(), "the journal has what matters"
    assert "run discard" not in beta.log()


def header(proven: Proven, **changes: int) -> bytes:
    """The bytes of a frame's header with its checks as they should be, but for what is changed."""
    fields = {"kind": int(FrameType.WRITE), "flags": 0, "seq": 1, "offset": 0, "aux": 0}
    fields |= changes
    payload = bytes(fields.pop("payload_bytes", 0))
    kind, flags, seq = FrameType(fields["kind"]), fields["flags"], fields["seq"]
    encoded = proven.channel.encode(kind, flags, seq, fields["offset"], fields["aux"], payload)
    return bytes(encoded) + payload


def write_at_once(proven: Proven) -> bytes:
    """A write in the midst of the negotiation."""
    return header(proven, payload_bytes=4096)


def write_beyond_the_end(proven: Proven) -> bytes:
    """A write whose range lies outside the device."""
    return header(proven, payload_bytes=4096, offset=1 << 60)


def wrong_check(proven: Proven) -> bytes:
    """A header of which one bit is not as it was."""
    frame = bytearray(header(proven, payload_bytes=4096))
    frame[20] ^= 1
    return bytes(frame)


def giant(_: Proven) -> bytes:
    """A header that promises 4 GiB, and then a lot of it."""
    return HEADER.pack(HEADER_MAGIC, 1, 0, 0xFFFFFFFF, 0, 1, 0, 0, 0, 0) + bytes(1 << 20)


def garbage(_: Proven) -> bytes:
    """No frame at all."""
    return random.Random(9).randbytes(300_000)


def truncated(proven: Proven) -> bytes:
    """Half a frame."""
    return header(proven, payload_bytes=4096)[:1000]


@pytest.mark.parametrize(
    "make", [write_at_once, write_beyond_the_end, wrong_check, giant, garbage, truncated]
)
def test_bad_frames_from_one_who_has_the_key(pair: Pair, make: Callable[[Proven], bytes]) -> None:
    """Breaks in the field: a peer with a defect writes where it may not, or eats the memory."""
    alpha, beta = pair.both
    load = Load(alpha.uri, slots=256).start()
    load.wait(50)
    load.stop()
    alpha.command("drain")
    image = beta.data.read_bytes()
    before, seen = resident_kib(beta), beta.last_event()
    proven = prove(pair, beta)
    frame = make(proven)
    with contextlib.suppress(OSError):  # it need not even let us finish
        proven.connection.sendall(frame)
        proven.connection.shutdown(socket.SHUT_WR)
    ended_by_the_other(proven.connection)
    proven.connection.close()
    beta.wait_event("session-lost", after=seen)
    pair.synced()
    assert beta.data.read_bytes() == image, "not one byte of the file has changed"
    assert resident_kib(beta) - before < MEMORY_GROWTH_KIB_MAX
    load.start().wait(50)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()


def test_a_port_that_is_taken_is_had_later(make_pair: MakePair) -> None:
    """Breaks in the field: at boot the address is not there yet, or another program has the port
    for a moment, and the node never meets its peer until somebody restarts it.
    """
    pair = make_pair().create()
    alpha, beta = pair.both
    with socket.create_server((pair.hosts["beta"], PEER_PORT)):
        beta.start()
        beta.wait_state(lambda s: "listening for the peer" in s["refusal"], "it says so")
    alpha.start()
    pair.synced()


def test_connections_that_break_at_once(pair: Pair) -> None:
    """Breaks in the field: a link that flaps leaves a dead session behind that bars the peer."""
    alpha, beta = pair.both
    for _ in range(10):
        proven = prove(pair, beta)
        reset(proven.connection)
    pair.synced()
    load = Load(alpha.uri).start()
    load.wait(50)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
