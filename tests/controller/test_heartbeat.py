"""The heartbeats' datagram, and what of it proves that the peer lives."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from nbdmirror.core.cluster.heartbeat import (
    BODY_BYTES_MAX,
    DATAGRAM_BYTES_MAX,
    DATAGRAM_BYTES_MIN,
    HELLOS_MAX,
    SENT_MAX,
    Ends,
    Link,
    Newest,
    Packet,
    Refusal,
    decode,
    derive_mac_key,
    encode,
)
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    PeerProtocolError,
    PeerRefusedError,
)

PSK = b"k" * 32
KEY = derive_mac_key(PSK)
MIRROR = b"m" * 16
SILENCE_MS = 1_500
HEARTBEAT_MS = 200
PACKET = Packet(MIRROR, 1, 0, b"n" * 16, 7, b"o" * 16, 5, 1234, b'{"role":"PRIM"}')

ids16 = st.binary(min_size=16, max_size=16)
u64 = st.integers(0, 2**64 - 1)
packets = st.builds(
    Packet,
    mirror_id=ids16,
    node_id=st.integers(0, 255),
    link=st.integers(0, 255),
    nonce=ids16.filter(any),
    seq=u64,
    echo_nonce=ids16,
    echo_seq=u64,
    echo_held_us=st.integers(0, 2**32 - 1),
    body=st.binary(max_size=BODY_BYTES_MAX),
)


def signed(unsigned: bytes) -> bytes:
    """With a MAC made without the code under test."""
    key = blake3(PSK, derive_key_context="nbdmirror 2026 heartbeat v1 mac").digest()
    return unsigned + blake3(unsigned, key=key).digest(length=16)


# --- the datagram -------------------------------------------------------------------------------


@given(packets)
def test_what_was_encoded_is_decoded(packet: Packet) -> None:
    """Breaks in the field: two nodes of one version do not understand each other."""
    datagram = encode(KEY, packet)
    assert decode(KEY, datagram) == packet
    assert len(datagram) == DATAGRAM_BYTES_MIN + len(packet.body)


def test_the_bytes_are_those_of_version_1() -> None:
    """Breaks in the field: during an upgrade the nodes of a pair are deaf to each other."""
    layout = b"NBDMBEAT\x01" + MIRROR + b"\x01\x00" + b"n" * 16 + (7).to_bytes(8, "big") + b"o" * 16
    layout += (5).to_bytes(8, "big") + (1234).to_bytes(4, "big") + b"\x00\x0f" + PACKET.body
    assert encode(KEY, PACKET) == signed(layout)


@given(packets, st.data())
def test_every_flipped_bit_is_refused(packet: Packet, data: st.DataObject) -> None:
    """Breaks in the field: a datagram changed on its way makes a node decide what nobody said."""
    datagram = bytearray(encode(KEY, packet))
    bit = data.draw(st.integers(0, 8 * len(datagram) - 1))
    datagram[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerProtocolError):
        decode(KEY, bytes(datagram))


def test_every_flipped_bit_of_one_datagram_is_refused() -> None:
    """Breaks in the field: the same, for a field that chance did not choose above."""
    datagram = encode(KEY, PACKET)
    for bit in range(8 * len(datagram)):
        changed = bytearray(datagram)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerProtocolError):
            decode(KEY, bytes(changed))


def test_every_truncation_and_every_extension_is_refused() -> None:
    """Breaks in the field: a cut datagram ends the controller, or half a body is believed."""
    datagram = encode(KEY, replace(PACKET, body=b"b" * 300))
    for count in range(len(datagram)):
        with pytest.raises(PeerProtocolError):
            decode(KEY, datagram[:count])
        with pytest.raises(PeerProtocolError):
            decode(KEY, signed(datagram[:count])[: len(datagram) - 1])
    with pytest.raises(PeerProtocolError):
        decode(KEY, datagram + b"\0")


@given(st.binary(max_size=DATAGRAM_BYTES_MAX + 100))
@example(b"NBDMBEAT\x01" + bytes(100))
@example(b"")
def test_garbage_is_refused(garbage: bytes) -> None:
    """Breaks in the field: whoever reaches the port ends the controller with one datagram."""
    for datagram in (garbage, signed(garbage), signed(b"NBDMBEAT\x01" + garbage)):
        try:
            packet = decode(KEY, datagram)
        except PeerProtocolError:
            continue
        assert encode(KEY, packet) == datagram


def test_a_datagram_over_the_maximum_is_refused_whatever_it_says() -> None:
    """Breaks in the field: memory and time are spent on what no peer can have sent."""
    longest = encode(KEY, replace(PACKET, body=b"b" * BODY_BYTES_MAX))
    assert len(longest) == DATAGRAM_BYTES_MAX
    head = longest[: DATAGRAM_BYTES_MIN - 16 - 2]
    body = b"b" * (BODY_BYTES_MAX + 1)
    assert decode(KEY, signed(head + (1200).to_bytes(2, "big") + body[1:])).body == body[1:]
    with pytest.raises(PeerProtocolError, match="1298 bytes"):
        decode(KEY, signed(head + (1201).to_bytes(2, "big") + body))


@given(packets, st.binary(min_size=32, max_size=64).filter(lambda key: key != PSK))
def test_another_key_is_refused(packet: Packet, psk: bytes) -> None:
    """Breaks in the field: anybody can speak for the peer."""
    with pytest.raises(AuthenticationError, match="install the same key"):
        decode(KEY, encode(derive_mac_key(psk), packet))


def test_the_key_of_the_mac_is_not_the_mirrors_key() -> None:
    """Breaks in the field: a MAC of one protocol passes for one of another."""
    assert PSK not in {KEY, derive_mac_key(PSK + b"k")}
    assert blake3(PSK).digest() != KEY


@pytest.mark.parametrize("count", [0, 31, 4097])
def test_no_key_no_heartbeat(count: int) -> None:
    """Breaks in the field: a node with an empty key file believes whoever has one, too."""
    with pytest.raises(ConfigError, match=f"{count} bytes"):
        derive_mac_key(b"k" * count)


def test_another_version_is_told_from_garbage() -> None:
    """Breaks in the field: an operator in the middle of an upgrade looks for a wrong key."""
    datagram = bytearray(encode(KEY, PACKET))
    datagram[8] = 2
    with pytest.raises(PeerRefusedError, match="upgrade the older node"):
        decode(KEY, bytes(datagram))


def test_a_nonce_of_zeros_is_refused() -> None:
    """Breaks in the field: "heard nobody" is taken for the echo of a life."""
    datagram = encode(KEY, PACKET)[:-16].replace(b"n" * 16, bytes(16))
    with pytest.raises(PeerProtocolError, match="zeros"):
        decode(KEY, signed(datagram))


def test_nothing_shows_the_key() -> None:
    """Breaks in the field: the key is in a log that is sent to somebody."""
    assert "k" * 4 not in repr(ends(1))
    assert repr(bytes(KEY))[2:10] not in repr(ends(1))


# --- one network --------------------------------------------------------------------------------


def ends(node_id: int, life: int = 1, **changes: Any) -> Ends:
    """One end; each life of each node has a nonce of its own."""
    values = Ends(KEY, MIRROR, node_id, 3 - node_id, bytes([node_id]) * 8 + life.to_bytes(8, "big"))
    return replace(values, **changes)


@dataclass
class Host:
    """A node's controller on one network: its present life, and all it ever sent."""

    node_id: int
    life: int = 1
    seq: int = 0
    sent: list[bytes] = field(default_factory=list)
    counted: set[bytes] = field(default_factory=set)
    link: Link = field(init=False)

    def __post_init__(self) -> None:
        self.link = Link(ends(self.node_id), 0, SILENCE_MS)

    def restart(self) -> None:
        self.life += 1
        self.seq = 0
        self.counted.clear()
        self.link = Link(ends(self.node_id, self.life), 0, SILENCE_MS)

    def hear(self, datagram: bytes, now_ms: float) -> None:
        """What counts echoes this life, and counts once in it."""
        if self.link.take(datagram, now_ms) is not None:
            assert decode(KEY, datagram).echo_nonce == ends(self.node_id, self.life).nonce
            assert datagram not in self.counted
            self.counted.add(datagram)

    def send(self, now_ms: float) -> bytes:
        self.seq += 1
        self.sent.append(self.link.packet(self.seq, b"%d.%d" % (self.life, self.seq), now_ms))
        return self.sent[-1]


def exchange(one: Host, two: Host, now_ms: float, rounds: int = 1) -> None:
    """Each speaks and hears the other, so many times, 200 ms apart."""
    for beat in range(rounds):
        at_ms = now_ms + beat * HEARTBEAT_MS
        one.link.tick(at_ms)
        two.link.tick(at_ms)
        two.hear(one.send(at_ms), at_ms)
        one.hear(two.send(at_ms), at_ms)


def met() -> tuple[Host, Host]:
    """Two hosts that hear each other at 1000 ms."""
    one, two = Host(1), Host(2)
    exchange(one, two, 600, 3)
    assert one.link.heard_ms == two.link.heard_ms == 1000
    return one, two


def test_the_first_word_proves_nothing_and_the_second_does() -> None:
    """Breaks in the field: a recording of last year keeps a dead peer alive."""
    one, two = Host(1), Host(2)
    assert two.link.take(one.send(0), 1) is None
    assert two.link.heard_ms is None
    assert two.link.refused == {}
    assert one.link.take(two.send(2), 3) == b"1.1"
    assert one.link.heard_ms == 3
    assert two.link.take(one.send(4), 5) == b"1.2"
    assert one.link.down(5) == two.link.down(5) == ""


def test_a_datagram_counts_once_and_in_order() -> None:
    """Breaks in the field: an old word of the peer is taken for its last one."""
    one, two = met()
    first, second, third = (one.send(1200 + at) for at in range(3))
    assert two.link.take(second, 1300) is not None
    assert two.link.take(first, 1301) is None
    assert two.link.take(second, 1302) is None
    assert two.link.heard_ms == 1300
    assert two.link.refused == {Refusal.OLD: 2}
    assert two.link.take(third, 1303) is not None


def test_a_recording_of_an_earlier_life_of_mine_proves_nothing() -> None:
    """Breaks in the field: after my restart a dead peer speaks from a recording."""
    one, two = met()
    two.restart()
    for datagram in one.sent:
        assert two.link.take(datagram, 2000) is None
    assert two.link.heard_ms is None


def test_a_restarted_peer_is_heard_within_two_heartbeats() -> None:
    """Breaks in the field: after a controller's restart the other end takes over a living node."""
    one, two = met()
    two.restart()
    exchange(one, two, 2000)
    assert one.link.heard_ms == 2000
    exchange(one, two, 2200)
    assert one.link.heard_ms == two.link.heard_ms == 2200


def test_hellos_of_dead_lives_do_not_disturb_the_live_one() -> None:
    """Breaks in the field: somebody replays an old hello, and each end loses the other."""
    one, two = Host(1), Host(2)
    old = [two.send(0)]
    two.restart()
    exchange(one, two, 600, 3)
    for at_ms in (1200, 1400):
        assert one.link.take(old[0], at_ms) is None
        exchange(one, two, at_ms)
        assert one.link.heard_ms == two.link.heard_ms == at_ms
    assert one.link.refused == {}


def test_words_of_the_peers_last_life_that_echo_mine_do_not_count_any_more() -> None:
    """Breaks in the field: two lives of a dead peer are replayed in turn, for ever."""
    one, two = met()
    held_back = [two.send(1100 + at) for at in range(3)]
    two.restart()
    exchange(one, two, 1200, 2)
    held_back += [two.send(1500 + at) for at in range(2)]
    for at_ms, datagram in enumerate(held_back, 2000):
        one.link.take(datagram, at_ms)
    # The last two are of the present life.
    assert one.link.refused == {Refusal.OLD: 3}
    for datagram in two.sent:
        assert one.link.take(datagram, 9000) is None


def test_two_lives_that_heard_the_same_word_do_not_count_in_turn() -> None:
    """Breaks in the field: two recorded words in turn keep a dead peer alive."""
    one, two = met()
    word = one.send(1200)
    two.link.take(word, 1200)
    first = two.send(1201)
    two.restart()
    two.link.take(word, 1202)
    second = two.send(1203)
    assert one.link.take(first, 1204) is not None
    assert one.link.take(second, 1205) is None
    assert one.link.refused == {Refusal.OLD: 1}


def test_a_live_peer_that_answers_somebody_else_is_refused_and_told() -> None:
    """Breaks in the field: a peer that is deaf here counts as heard, and `status` has no reason."""
    one, two = met()
    astray = replace(decode(KEY, two.send(1200)), echo_nonce=b"x" * 16)
    assert one.link.take(encode(KEY, astray), 1200) is None
    assert one.link.refused == {Refusal.ECHO: 1}
    assert one.link.take(two.send(1400), 1400) is not None


def test_recorded_hellos_do_not_keep_the_peer_out() -> None:
    """Breaks in the field: while somebody replays, two restarted nodes never hear each other."""
    hosts = (Host(1), Host(2))
    for each in hosts:
        for _ in range(HELLOS_MAX + 3):
            each.send(0)
            each.restart()
    for each, other in (hosts, hosts[::-1]):
        for datagram in other.sent:
            each.link.take(datagram, 100)
    exchange(*hosts, 200, HELLOS_MAX + 2)
    assert [each.link.heard_ms for each in hosts] == [200 + (HELLOS_MAX + 1) * HEARTBEAT_MS] * 2


def test_what_is_not_meant_is_refused_with_its_reason() -> None:
    """Breaks in the field: two mirrors or two networks mixed up in a config look like a peer."""
    mixed = {
        Refusal.KEY: ends(1, key=derive_mac_key(b"K" * 32)),
        Refusal.MIRROR: ends(1, mirror_id=b"M" * 16),
        Refusal.NODE: ends(3, peer_id=2),
        Refusal.OWN: ends(2),
    }
    link = Link(ends(2), 0, SILENCE_MS)
    for reason, wrong in mixed.items():
        # It even echoes what it could have heard.
        liar = Link(wrong, 0, SILENCE_MS)
        liar._live, liar._live_heard.seq = ends(2).nonce, 1
        link.packet(len(link.refused) + 1, b"", 0)
        assert link.take(liar.packet(9, b"x", 0), 1) is None
        assert link.refused_last is reason
    for index in (1, 255):
        other = Link(ends(1), index, SILENCE_MS)
        assert link.take(other.packet(9, b"x", 0), 1) is None
        assert link.refused_last is Refusal.LINK
    assert link.take(b"x" * 200, 1) is None
    assert link.take(b"NBDMBEAT\x02" + b"x" * 200, 1) is None
    assert link.heard_ms is None
    others = {Refusal.LINK: 2, Refusal.FORMAT: 1, Refusal.VERSION: 1}
    assert link.refused == dict.fromkeys(mixed, 1) | others


def test_an_echo_of_what_was_never_said_is_refused() -> None:
    """Breaks in the field: one wrong number of the peer, and it is never heard again."""
    one, two = met()
    two.link._live_heard.seq = 2**64 - 1
    assert one.link.take(two.send(1200), 1200) is None
    assert one.link.refused == {Refusal.ECHO: 1}
    two.link._live_heard.seq = one.seq
    assert one.link.take(two.send(1201), 1201) is not None


def test_what_is_remembered_is_bounded() -> None:
    """Breaks in the field: a controller that hears nobody, or many, eats the memory."""
    one, two = Host(1), Host(2)
    for _ in range(SENT_MAX * 2):
        one.link.take(two.send(0), 0)
        two.restart()
        one.send(0)
        one.link.take(b"x", 0)
    assert len(one.link._sent_ms) == SENT_MAX
    assert len(one.link._hellos) == HELLOS_MAX
    assert len(one.link.refused) == 1


def test_the_round_trip_is_measured_without_the_peers_pause() -> None:
    """Breaks in the field: `status` shows the heartbeat's period as the network's delay."""
    one, two = met()
    two.link.take(one.send(2000), 2003)
    one.link.take(two.send(2103), 2107.5)
    assert one.link.rtt_ms == pytest.approx(7.5)


def test_a_network_that_works_one_way_is_down_and_its_peer_alive() -> None:
    """Breaks in the field: a node that hears a primary takes over, or a cut is not shown."""
    one, two = met()
    now_ms = 1000
    for now_ms in range(1200, 4001, HEARTBEAT_MS):
        one.link.tick(now_ms)
        two.link.tick(now_ms)
        one.link.take(two.send(now_ms), now_ms)
        one.send(now_ms)  # lost
    assert one.link.silent_ms(now_ms) == 0
    assert "does not arrive" in one.link.down(now_ms)
    assert "silent for 3000 ms" in two.link.down(now_ms)
    exchange(one, two, now_ms + HEARTBEAT_MS, 2)
    assert one.link.down(4400) == two.link.down(4400) == ""


def test_a_network_that_delays_for_longer_than_the_silence_is_down() -> None:
    """Breaks in the field: words of a minute ago make a network look alive."""
    one, two = met()
    sent = [two.send(1000)]
    for now_ms in range(1200, 5001, HEARTBEAT_MS):
        one.link.tick(now_ms)
        two.link.take(one.send(now_ms), now_ms)
        sent.append(two.send(now_ms))
    for now_ms in range(5200, 9001, HEARTBEAT_MS):
        one.link.tick(now_ms)
        if sent:
            one.link.take(sent.pop(0), now_ms)
    assert "does not arrive in time" in one.link.down(8800)


def test_a_network_that_was_never_heard_says_so() -> None:
    """Breaks in the field: a network that never worked is shown as one that was cut."""
    link = Link(ends(1), 0, SILENCE_MS)
    link.tick(0)
    assert "since this controller started" in link.down(200)


# What happens to the pair: lives begin and end, datagrams are sent, and each one that was ever
# sent arrives at any time and any number of times.
events = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("arrive"), st.integers(0, 1), st.integers(0, 40)),
    st.tuples(st.just("exchange"), st.just(0), st.just(0)),
    st.tuples(st.just("restart"), st.integers(0, 1), st.just(0)),
)


@given(st.lists(events, max_size=60))
def test_no_history_makes_a_datagram_count_twice_or_the_pair_deaf(
    history: list[tuple[str, int, int]],
) -> None:
    """Breaks in the field: with the right recordings a dead peer lives, or a living one is dead."""
    hosts = (Host(1), Host(2))
    now_ms = 0.0
    for what, which, back in history:
        now_ms += 10
        host, other = hosts[which], hosts[1 - which]
        if what == "send":
            host.send(now_ms)
        elif what == "exchange":
            exchange(host, other, now_ms)
        elif what == "restart":
            host.restart()
        elif back < len(other.sent):
            host.hear(other.sent[-1 - back], now_ms)
    exchange(*hosts, now_ms + 10, HELLOS_MAX + 2)
    last_ms = now_ms + 10 + (HELLOS_MAX + 1) * HEARTBEAT_MS
    assert [each.link.heard_ms for each in hosts] == [last_ms, last_ms]


# --- the newest word ----------------------------------------------------------------------------


def word(life: int, seq: int, echo_seq: int) -> Packet:
    return replace(PACKET, nonce=bytes([life]) * 16, seq=seq, echo_seq=echo_seq)


def test_the_newest_word_wins_over_all_networks() -> None:
    """Breaks in the field: a slow network brings back what the peer has long taken back."""
    newest = Newest()
    assert newest.take(word(1, 5, 9))
    assert not newest.take(word(1, 4, 10))
    assert not newest.take(word(1, 5, 9))
    assert newest.take(word(1, 6, 8))
    # What a slower network echoes does not make room for an earlier life.
    assert not newest.take(word(7, 99, 9))
    assert newest.take(word(2, 1, 10))
    assert not newest.take(word(1, 7, 9))
    assert newest.take(word(2, 2, 10))
