"""What every link of the peer channel keeps, asked of the plain one and of the one inside TLS."""

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from nbdmirror import tls_link
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import TLS_ANSWERS_BYTES_MAX, TLS_BATCH_BYTES, TLS_RECORD_BYTES
from nbdmirror.tls import TlsSetup
from nbdmirror.tls_link import TlsLink
from tests.support.links import (
    BOUND_S,
    End,
    LoopThread,
    connected,
    exactly,
    make_setup,
    tls_ends,
    tls_pair,
)

MIB = 1 << 20
# A record has a head, a tag and a byte of its type around at most 16 KiB.
OVERHEAD = 64


@dataclass
class Channel:
    """Our end with its link, and the other end, a plain or TLS socket of Python's."""

    thread: LoopThread
    end: End
    peer: socket.socket


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TlsSetup:
    """One certificate for all of them."""
    return make_setup(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    """A loop."""
    made = LoopThread()
    yield made
    made.end()


def taken_down(end: End) -> None:
    """The link gives its socket back by itself."""
    end.link.close("the test is over")
    assert end.closed.wait(BOUND_S)


@pytest.fixture(params=["tcp", "tls"])
def channel(
    request: pytest.FixtureRequest, thread: LoopThread, setup: TlsSetup
) -> Iterator[Channel]:
    """Each link in turn."""
    ours, theirs = connected()
    if request.param == "tcp":
        made = Channel(thread, End(thread.loop, ours, None), theirs)
    else:
        made = Channel(thread, *tls_ends(thread.loop, ours, theirs, setup))
    yield made
    taken_down(made.end)
    made.peer.close()


@pytest.fixture
def secret(thread: LoopThread, setup: TlsSetup) -> Iterator[Channel]:
    """The one inside TLS."""
    made = Channel(thread, *tls_ends(thread.loop, *connected(), setup))
    yield made
    taken_down(made.end)
    made.peer.close()


def noise(count: int, seed: int = 1) -> bytes:
    """Bytes that look like no others."""
    return random.Random(seed).randbytes(count)


# --- sending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [48, 4096] * 20, [MIB], [0xFFFF, 1, 3 * MIB, 2, 16384]])
def test_what_is_queued_arrives_in_order(channel: Channel, sizes: list[int]) -> None:
    """Breaks in the field: a frame is torn, or one overtakes another, where the socket took a part
    of a batch.
    """
    buffers = [noise(size, seed) for seed, size in enumerate(sizes)]
    channel.end.send(*buffers)
    assert exactly(channel.peer, sum(sizes)) == b"".join(buffers)
    assert channel.end.link.drain()
    assert not channel.end.reasons


def test_threads_that_send_at_once_keep_the_order_of_the_queue(channel: Channel) -> None:
    """Breaks in the field: two clients write at once, and the peer finds no frame where one has to
    begin.
    """
    lock, order = threading.Lock(), bytearray()

    def write(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            piece = chance.randbytes(chance.choice((16, 64, 4096, 20_000)))
            with lock:  # as the engine's: what is queued is in the order in which it is registered
                order.extend(piece)
                channel.end.queue.append(piece)
            channel.end.link.kick()

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for each in threads:
        each.start()
    got = bytearray()
    while any(each.is_alive() for each in threads) or len(got) < len(order):
        got += channel.peer.recv(65536)
    assert got == order


def test_a_peer_that_does_not_read_holds_nobody_up(channel: Channel) -> None:
    """Breaks in the field: a thread of nbdkit hangs in a send, and with it the whole mirror; or
    what the socket did not take is encrypted all the same, and fills the memory.
    """
    buffers = [noise(MIB, seed) for seed in range(8)]
    thread = threading.Thread(target=channel.end.send, args=buffers)
    thread.start()
    thread.join(BOUND_S)
    assert not thread.is_alive()
    assert channel.end.queue or channel.end.waiting_bytes(), "the socket cannot hold it"
    if isinstance(channel.end.link, TlsLink):
        records = TLS_BATCH_BYTES // TLS_RECORD_BYTES + 1
        assert 0 < channel.end.waiting_bytes() <= TLS_BATCH_BYTES + records * OVERHEAD
    assert not channel.end.link.drain()
    assert exactly(channel.peer, 8 * MIB) == b"".join(buffers)
    assert channel.end.link.drain()
    channel.end.send(b"more")
    assert exactly(channel.peer, 4) == b"more"


def test_closing_while_the_peer_does_not_read(channel: Channel) -> None:
    """Breaks in the field: a session that is over still sends, or its end waits for a dead peer."""
    buffers = [noise(MIB, seed) for seed in range(8)]
    channel.end.send(*buffers)
    channel.end.link.close("over")
    assert channel.end.closed.wait(BOUND_S)
    channel.end.send(b"too late")
    assert channel.end.link.drain()
    got = bytearray()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while piece := channel.peer.recv(65536):
            got += piece
    assert len(got) < 8 * MIB
    assert b"".join(buffers).startswith(got), "a prefix, and nothing behind it"


def test_the_last_words_leave(channel: Channel) -> None:
    """Breaks in the field: the peer never hears why a session was ended."""
    channel.end.queue.append(b"because")
    channel.end.link.close("over")
    assert exactly(channel.peer, 7) == b"because"


def test_a_peer_that_is_gone_is_told_of(channel: Channel) -> None:
    """Breaks in the field: writes go into a connection that leads nowhere until a deadline."""
    channel.peer.close()
    for _ in range(1000):
        channel.end.send(noise(65536))
        if channel.end.lost.wait(0.01):
            break
    assert channel.end.lost.is_set()
    assert channel.end.reasons[0].startswith("sending failed: ")


# --- receiving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [700, 70_000])
def test_all_that_came_is_received(channel: Channel, room: int) -> None:
    """Breaks in the field: the last bytes of a burst wait inside TLS until the peer sends again,
    which it does when it is answered: the write hangs until its time-out.
    """
    reader = channel.end.receive(channel.thread, room)
    sent = noise(100_000)
    for at in range(0, len(sent), 30_000):
        channel.peer.sendall(sent[at : at + 30_000])
    assert reader.wait(len(sent)) == sent
    assert not reader.error


def test_the_end_comes_after_the_last_byte(channel: Channel) -> None:
    """Breaks in the field: what a peer said before it closed (its leave) is lost."""
    reader = channel.end.receive(channel.thread, 700)
    sent = noise(5_000)
    channel.peer.sendall(sent)
    if isinstance(channel.peer, ssl.SSLSocket):
        with contextlib.suppress(OSError):
            channel.peer.settimeout(0)
            channel.peer.unwrap()
    channel.peer.close()
    assert reader.ended.wait(BOUND_S)
    assert (bytes(reader.got), reader.error) == (sent, "")


def test_after_closing_nothing_is_received(channel: Channel) -> None:
    """Breaks in the field: a frame of a session that is over is applied."""
    reader = channel.end.receive(channel.thread)
    channel.end.link.close("over")
    assert channel.end.closed.wait(BOUND_S)
    with contextlib.suppress(OSError):
        channel.peer.sendall(b"late")
    channel.thread.do(lambda: None)
    if isinstance(channel.end.link, TlsLink):
        with pytest.raises(BlockingIOError):
            channel.end.link.recv_into(memoryview(bytearray(10)))
    assert not reader.got


# --- inside TLS -----------------------------------------------------------------------------------


def test_both_directions_at_once(thread: LoopThread, setup: TlsSetup) -> None:
    """Breaks in the field: sending and receiving share one state of OpenSSL; two threads in it
    break a record, and a kick that found it in use is forgotten.
    """
    one, two = tls_pair(thread.loop, setup)
    readers = one.receive(thread, 3_000), two.receive(thread, 100_000)
    sent = noise(3 * MIB, 7), noise(3 * MIB, 8)

    def write(end: End, data: bytes, seed: int) -> None:
        chance, at = random.Random(seed), 0
        while at < len(data):
            step = chance.choice((1, 50, 4_144, 30_000))
            end.send(data[at : at + step])
            at += step

    threads = [
        threading.Thread(target=write, args=each) for each in ((one, sent[0], 1), (two, sent[1], 2))
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(BOUND_S)
    assert readers[1].wait(len(sent[0])) == sent[0]
    assert readers[0].wait(len(sent[1])) == sent[1]
    assert not readers[0].error + readers[1].error
    for end in (one, two):
        taken_down(end)


def test_nobody_reads_while_somebody_sends(secret: Channel) -> None:
    """Breaks in the field: two threads are in one state of OpenSSL, which is made for one: now and
    then, under load, a record is broken or the process dies.
    """
    link, got = secret.end.link, bytearray(10)
    assert isinstance(link, TlsLink)
    secret.peer.sendall(b"hello")
    link._lock.acquire()  # as who encrypts has it
    reader = threading.Thread(target=link.recv_into, args=(memoryview(got),))
    reader.start()
    reader.join(0.1)
    assert reader.is_alive()
    assert not any(got)
    link._lock.release()
    reader.join(BOUND_S)
    assert got[:5] == b"hello"


def test_the_reader_sends_what_was_queued_while_it_read(secret: Channel) -> None:
    """Breaks in the field: a write whose kick came while an acknowledgement was decrypted stays in
    the queue until something else is sent.
    """
    link = secret.end.link
    assert isinstance(link, TlsLink)
    link._lock.acquire()
    secret.end.send(b"hello")  # returns: the one who has the lock looks again
    link._lock.release()
    with pytest.raises(BlockingIOError):
        link.recv_into(memoryview(bytearray(100)))
    assert exactly(secret.peer, 5) == b"hello"


def test_what_was_forged_ends_the_session_and_the_peer_is_told(secret: Channel) -> None:
    """Breaks in the field: a changed record is taken, ends in a traceback, or the peer waits for a
    deadline because OpenSSL's alert stays in our memory.
    """
    reader = secret.end.receive(secret.thread)
    secret.peer.sendall(b"good")
    reader.wait(4)
    with socket.socket(fileno=socket.dup(secret.peer.fileno())) as raw:
        raw.sendall(b"\x17\x03\x03\x00\x30" + noise(48))
    assert reader.ended.wait(BOUND_S)
    assert reader.error == "TLS: decryption failed or bad record mac"
    assert reader.got == b"good"
    with pytest.raises(ssl.SSLError, match="bad record mac"):
        secret.peer.recv(10)


def test_a_peer_that_makes_tls_answer_and_does_not_read_is_cut_off(secret: Channel) -> None:
    """Breaks in the field: a peer asks for new keys again and again, and the answers that it does
    not read fill the memory.
    """
    link = secret.end.link
    assert isinstance(link, TlsLink)
    secret.end.send(*(noise(MIB, seed) for seed in range(8)))
    assert link._rest, "the socket is full"
    link._stream.outgoing.write(bytes(TLS_ANSWERS_BYTES_MAX))
    with pytest.raises(BlockingIOError):
        link.recv_into(memoryview(bytearray(10)))
    link._stream.outgoing.write(b"one more")
    with pytest.raises(PeerProtocolError, match="does not read them"):
        link.recv_into(memoryview(bytearray(10)))


def test_a_giant_record_is_refused_at_once(secret: Channel) -> None:
    """Breaks in the field: a length from outside makes this node wait, or take memory."""
    reader = secret.end.receive(secret.thread)
    with socket.socket(fileno=socket.dup(secret.peer.fileno())) as raw:
        raw.sendall(b"\x17\x03\x03\xff\xff")
    assert reader.ended.wait(BOUND_S)
    assert "length" in reader.error


def test_a_key_is_used_for_a_bounded_number_of_records(
    secret: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: AES-GCM under one key for too long gives away what it should hide."""
    monkeypatch.setattr(tls_link, "TLS_RECORDS_MAX", 10)
    for number in range(5):
        secret.end.send(bytes([number]))
    secret.end.send(noise(5 * TLS_RECORD_BYTES))
    exactly(secret.peer, 5 + 5 * TLS_RECORD_BYTES)
    assert not secret.end.lost.is_set(), "so many are allowed"
    secret.end.send(b"one more")
    assert secret.end.lost.wait(BOUND_S)
    assert "connect anew" in secret.end.reasons[0]
    secret.peer.settimeout(0.2)
    with pytest.raises(TimeoutError):
        secret.peer.recv(10)


@pytest.mark.parametrize("direction", ["sent", "received"])
def test_new_keys_are_asked_for_in_time(
    secret: Channel, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """Breaks in the field: the connection ends at the bound, at either end, as a cut does: the
    controllers let one node go on alone, again and again.
    """
    monkeypatch.setattr(tls_link, "TLS_RECORDS_RENEW", 10)
    reader = secret.end.receive(secret.thread)

    def records(first: int, last: int) -> None:
        for number in range(first, last):
            if direction == "sent":
                secret.end.send(bytes([number]))
                exactly(secret.peer, 1)
            else:
                secret.peer.sendall(bytes([number]))
                reader.wait(number + 1)

    records(0, 9)
    secret.thread.do(lambda: None)
    assert not secret.end.spent.is_set()
    records(9, 11)
    assert secret.end.spent.wait(BOUND_S)
    records(11, 20)
    assert not secret.end.lost.is_set(), "it goes on until somebody acts"
