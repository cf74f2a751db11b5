"""Somebody on the way records, replays, reflects or edits whole connections of real engines."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from nbdmirror.core.handshake import HELLO_SCHEMA, PREFIX_BYTES
from nbdmirror.errors import ConfigError
from tests.support.fixtures import MakePair
from tests.support.impostor import dial, ended_by_the_other
from tests.support.load import Load
from tests.support.pair import PEER_PORT, Pair
from tests.support.proxy import Editor, Proxy

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

HELLO_BYTES = PREFIX_BYTES + HELLO_SCHEMA.sizeof()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A relay that belongs to nobody yet."""
    made = Proxy()
    try:
        yield made
    finally:
        made.close()


def unedited(piece: bytes) -> bytes:
    """As it is."""
    return piece


@pytest.mark.parametrize("integrity", ["crc", "mac"])
def test_a_recorded_connection_played_again_gains_nothing(
    make_pair: MakePair, proxy: Proxy, integrity: str
) -> None:
    """Breaks in the field: who recorded a day of writes writes them again the day after."""
    recordings: list[list[bytes]] = []

    def recording() -> tuple[Editor, Editor]:
        pieces: list[bytes] = []
        recordings.append(pieces)

        def record(piece: bytes) -> bytes:
            pieces.append(piece)
            return piece

        return record, unedited

    proxy.editors = recording
    keys = {"integrity": integrity, "ack_timeout_ms": 30_000}
    pair = make_pair(dial=proxy.address, engine=keys)
    proxy.target = (pair.hosts["beta"], PEER_PORT)
    alpha, beta = pair.up().both
    load = Load(alpha.uri).start()
    load.wait(50)
    recorded = b"".join(recordings[-1])
    assert len(recorded) > 50 * 4096
    session, seen = beta.state()["session"]["number"], beta.last_event()
    with dial(pair, beta) as connection:
        with contextlib.suppress(OSError):  # it hangs up in the midst of it
            connection.sendall(recorded)
        ended_by_the_other(connection)
    told = beta.wait_event("no-peer", after=seen)["reason"]
    assert "does not hold this mirror's key" in told
    load.wait(50)
    load.stop()
    assert not load.error
    assert beta.state()["session"]["number"] == session
    pair.stop()
    pair.assert_equal()
    load.assert_kept(beta.data)


def test_a_node_that_hears_itself_has_no_peer(make_pair: MakePair) -> None:
    """Breaks in the field: a mirror in the switch sends a node its own words back, and the node
    takes them for a peer's that is in sync with it.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        pair = make_pair(dial=server.getsockname()[:2]).create()

        def reflect() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        while piece := connection.recv(65536):
                            connection.sendall(piece)

        reflector = threading.Thread(target=reflect)
        reflector.start()
        try:
            told = pair.alpha.start().wait_event("no-peer")
            assert "handshake message of type 1, not 2" in told["reason"]
            assert pair.alpha.state()["session"] is None
        finally:
            server.shutdown(socket.SHUT_RDWR)
            reflector.join()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_an_edited_wish_for_macs_gives_no_session(
    make_pair: MakePair, proxy: Proxy, bits: int
) -> None:
    """Breaks in the field: who sits on the way takes the keyed code off by clearing a bit."""

    def downgrading() -> tuple[Editor, Editor]:
        said = bytearray()

        def edit(piece: bytes) -> bytes:
            if len(said) >= HELLO_BYTES:
                return piece
            said.extend(piece)
            if len(said) < HELLO_BYTES:
                return b""
            hello = bytes(said)
            return hello[: HELLO_BYTES - 1] + bytes((hello[HELLO_BYTES - 1] & ~bits,))

        return edit, unedited

    proxy.editors = downgrading
    pair = make_pair(dial=proxy.address).create()
    proxy.target = (pair.hosts["beta"], PEER_PORT)
    text = pair.alpha.config_path.read_text()
    pair.alpha.config_path.write_text(text.replace("[engine]", '[engine]\nintegrity = "mac"'))
    beta, alpha = pair.beta.start(), pair.alpha.start()
    alpha.wait_state(lambda _: proxy.connections > 3, "it tries again and again")
    for engine in (alpha, beta):
        assert "decided" not in {event["event"] for event in engine.events}
        assert engine.state()["session"] is None
    # It was that, and nothing else.
    proxy.editors = lambda: (unedited, unedited)
    alpha.command("promote")
    pair.synced()
    assert beta.state()["session"]["integrity"] == "mac"


@pytest.mark.parametrize("fault", ["missing", "empty", "short", "readable", "link"])
def test_without_its_key_a_node_does_not_start(pair: Pair, fault: str) -> None:
    """Breaks in the field: a node whose key was lost, or was read by others, goes on without."""
    alpha, beta = pair.both
    beta.stop()
    key = pair.root / "key"
    secret = key.read_bytes()
    own = pair.root / "key-of-beta"
    own.touch(0o600)
    own.write_bytes({"empty": b"", "short": secret[:31]}.get(fault, secret))
    if fault == "missing":
        own.unlink()
    elif fault == "readable":
        own.chmod(0o644)
    elif fault == "link":
        own.unlink()
        own.symlink_to(key)
    beta.config_path.write_text(pair.config_text("beta", key=str(own)))
    # Of what alpha has read nothing is asked again.
    assert beta.start_refused() == ConfigError.exit_code
    assert "key_file" in beta.log()
    for form in (secret, secret.hex().encode()):
        assert form not in beta.log_path.read_bytes()
    assert alpha.state()["session"] is None
    with socket.socket() as knock:
        assert knock.connect_ex((pair.hosts["beta"], PEER_PORT)) != 0, "nobody listens there"
    beta.config_path.write_text(pair.config_text("beta"))
    assert beta.config.key_file.samefile(key)
    beta.start()
    pair.synced()
