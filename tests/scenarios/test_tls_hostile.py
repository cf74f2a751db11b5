"""What comes to the port of a node that speaks TLS and is not the peer."""

import contextlib
import random
import socket
import ssl
from pathlib import Path

import pytest

from nbdmirror.limits import HANDSHAKE_TIMEOUT_MS
from nbdmirror.tls import TlsStream
from tests.scenarios.test_hostile_port import (
    GARBAGE,
    MEMORY_GROWTH_KIB_MAX,
    Flood,
    resident_kib,
)
from tests.support.fixtures import MakePair
from tests.support.impostor import dial, ended_by_the_other
from tests.support.links import make_setup
from tests.support.load import Load
from tests.support.pair import PEER_PORT, Engine, Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A pair in sync inside TLS that no deadline disturbs."""
    return make_pair(engine={"tls": "on", "ack_timeout_ms": 30_000}).up()


def client_hello(directory: Path) -> bytes:
    """What a dialer says first."""
    stream = TlsStream(make_setup(directory), dialer=True)
    stream.shake()
    return stream.outgoing.read()


def anybody() -> ssl.SSLContext:
    """A client that believes everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def reasons(engine: Engine, after: int, last: str) -> str:
    """Why connections came to nothing since then, up to a reason with the word `last`."""
    told: list[str] = []
    while not told or last not in told[-1]:
        event = engine.wait_event("no-peer", after=after)
        after = event["number"]
        told.append(event["reason"])
    return " | ".join(told)


def test_hostile_bytes_before_and_in_tls(pair: Pair, tmp_path: Path) -> None:
    """Breaks in the field: a port scanner, or who knows TLS and not the key, stops the mirror,
    fills the memory, or gets a traceback into the log.
    """
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(20)
    session, seen, before = beta.state()["session"]["number"], beta.last_event(), resident_kib(beta)
    hello = client_hello(tmp_path)
    dice = random.Random(3)
    broken = bytearray(hello)
    broken[60] ^= 0xFF
    sent = [
        *GARBAGE.values(),
        b"\x16\x03\x01\xff\xff" + bytes(1 << 20),
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(1 << 20),
        hello[:5] + dice.randbytes(len(hello) - 5),
        bytes(broken) + dice.randbytes(1 << 18),
        hello + dice.randbytes(1 << 18),
        hello[:40],
    ]
    for piece in sent:
        with dial(pair, beta) as connection:
            with contextlib.suppress(OSError):  # refused in the midst of it: as it should be
                connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
            ended_by_the_other(connection)
    with anybody().wrap_socket(dial(pair, beta)) as inside, contextlib.suppress(OSError):
        inside.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1 << 20))
        while inside.recv(65536):
            pass
    load.wait(50)
    load.stop()
    assert not load.error
    assert beta.state()["session"]["number"] == session, "the mirror went on undisturbed"
    assert resident_kib(beta) - before < MEMORY_GROWTH_KIB_MAX
    told = reasons(beta, seen, "handshake message")  # what came inside was judged, too
    assert "engine.tls differs" in told
    assert "is no TLS" in told
    assert "TLS: " in told
    pair.stop()
    pair.assert_equal()
    load.assert_kept(beta.data)


def test_who_is_slow_in_tls_is_cut_off(pair: Pair, tmp_path: Path) -> None:
    """Breaks in the field: connections that stop in the midst of TLS keep their places for ever."""
    beta = pair.beta
    session = beta.state()["session"]["number"]
    hello = client_hello(tmp_path)
    slow = [dial(pair, beta) for _ in range(3)]
    slow[0].sendall(hello[:3])
    slow[1].sendall(hello)
    inside = anybody().wrap_socket(slow.pop())
    for connection in (*slow, inside):
        connection.settimeout(HANDSHAKE_TIMEOUT_MS / 1000 + 20)
        with contextlib.suppress(ssl.SSLError):
            ended_by_the_other(connection)
        connection.close()
    assert beta.state()["session"]["number"] == session


def test_idle_connections_do_not_keep_a_peer_inside_tls_out(make_pair: MakePair) -> None:
    """Breaks in the field: TLS takes a round trip more until the peer has said who it is, and in
    this time a user without rights on its server has taken its place, again and again.
    """
    pair = make_pair(engine={"tls": "on"}).create()
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
