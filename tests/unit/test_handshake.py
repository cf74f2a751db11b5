"""The handshake: two holders of one key get one session; everybody else gets nothing."""

import contextlib
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.handshake import (
    Established,
    Handshake,
    Identity,
    RefusalCode,
    encode_refusal,
)
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    PeerProtocolError,
    PeerRefusedError,
)
from nbdmirror.limits import HANDSHAKE_BYTES_MAX, KEY_BYTES_MAX, KIB, REASON_BYTES_MAX

KEY = b"k" * 32
OTHER_KEY = b"K" * 32
ONE = Identity(b"m" * 16, 1, b"1" * 16, b"i" * 16)
TWO = Identity(b"m" * 16, 2, b"2" * 16, b"j" * 16)
NONCE_ONE = b"n" * 32
NONCE_TWO = b"o" * 32
HELLO_BYTES = 3 + 102
AT_MAX_VERSION = 3 + 8 + 2
AT_NODE_ID = 3 + 8 + 5 + 16


def dialer(
    psk: bytes = KEY, me: Identity = ONE, nonce: bytes = NONCE_ONE, **more: Any
) -> Handshake:
    return Handshake(dialer=True, psk=psk, me=me, nonce=nonce, **more)


def listener(
    psk: bytes = KEY, me: Identity = TWO, nonce: bytes = NONCE_TWO, **more: Any
) -> Handshake:
    return Handshake(dialer=False, psk=psk, me=me, nonce=nonce, **more)


def meet(one: Handshake, two: Handshake) -> tuple[bytes, bytes, bytes]:
    """Run it to the end; returns the three messages."""
    hello = one.start()
    reply = two.receive(hello)
    confirm = one.receive(reply)
    assert two.receive(confirm) == b""
    return hello, reply, confirm


def done(handshake: Handshake) -> Established:
    assert handshake.done is not None
    return handshake.done


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def proof(psk: bytes, label: bytes, transcript: bytes) -> bytes:
    """The proof as docs/wire-protocol.md defines it, made without the code under test."""
    context = "nbdmirror 2026 peer channel v1 handshake proof"
    key = blake3(psk, derive_key_context=context).digest()
    return blake3(label + transcript, key=key).digest()


def test_two_holders_of_the_key_get_one_session() -> None:
    """Breaks in the field: no session, or two ends that refuse each other's frames."""
    one, two = dialer(features=0b110), listener(features=0b011)
    meet(one, two)
    mine, theirs = done(one), done(two)
    assert (mine.peer, theirs.peer) == (TWO, ONE)
    assert mine.session == theirs.session != 0
    assert (mine.version, mine.features) == (theirs.version, theirs.features) == (2, 0b010)
    assert (mine.send_seed, mine.receive_seed) == (theirs.receive_seed, theirs.send_seed)
    assert (mine.send_mac_key, mine.receive_mac_key) == (
        theirs.receive_mac_key,
        theirs.send_mac_key,
    )
    assert mine.send_seed != mine.receive_seed
    assert mine.send_mac_key != mine.receive_mac_key
    assert {len(mine.send_mac_key), len(mine.receive_mac_key)} == {32}


@given(cuts=st.lists(st.integers(1, 140), max_size=20), leftover=st.binary(max_size=64))
def test_any_chunking_gives_the_same_session(cuts: list[int], leftover: bytes) -> None:
    """Breaks in the field: the handshake fails where TCP happened to cut, or eats frames."""
    reference = dialer(), listener()
    meet(*reference)
    one, two = dialer(), listener()

    def trickle(into: Handshake, data: bytes) -> bytes:
        sent = b""
        for cut in cuts:
            if data[cut:]:
                sent += into.receive(data[:cut])
                data = data[cut:]
        return sent + into.receive(data)

    confirm = trickle(one, trickle(two, one.start()))
    # What follows must be in the last piece: a finished handshake takes no more bytes.
    for at in range(len(confirm)):
        two.receive(confirm[at : at + 1] if at < len(confirm) - 1 else confirm[at:] + leftover)
    assert done(one) == done(reference[0])
    assert done(two) == replace(done(reference[1]), leftover=leftover)


@pytest.mark.parametrize("changed", ["dialer", "listener"])
def test_both_ends_contribute_to_the_session(changed: str) -> None:
    """Breaks in the field: one end alone can bring back an old session, and its frames with it."""
    first = dialer(), listener()
    meet(*first)
    other = b"x" * 32
    second = (
        (dialer(nonce=other), listener())
        if changed == "dialer"
        else (dialer(), listener(nonce=other))
    )
    meet(*second)
    for field in (
        "session",
        "send_seed",
        "receive_seed",
        "send_mac_key",
        "receive_mac_key",
        "hash_key",
    ):
        assert getattr(done(first[0]), field) != getattr(done(second[0]), field), field


def test_the_keys_are_those_of_the_document() -> None:
    """Breaks in the field: two builds with the same version number cannot form a session."""
    one, two = dialer(), listener()
    hello, reply, confirm = meet(one, two)
    assert reply[-32:] == proof(KEY, b"listener", hello + reply[:-32])
    assert confirm == b"\x00\x21\x03" + proof(KEY, b"dialer", hello + reply)
    context = "nbdmirror 2026 peer channel v1 session keys"
    key = blake3(KEY, derive_key_context=context).digest()
    material = blake3(hello + reply + confirm, key=key).digest(length=176)
    assert done(one).session == int.from_bytes(material[:8], "big")
    seed = int.from_bytes(material[8:12], "big")
    assert done(one).send_seed == seed
    assert done(one).receive_seed == seed ^ (int.from_bytes(material[12:16], "big") | 1)
    assert (done(one).send_mac_key, done(one).receive_mac_key) == (
        material[16:48],
        material[48:80],
    )
    assert done(one).hash_key == done(two).hash_key == material[80:112]
    for mine, theirs in ((one, two), (two, one)):
        assert done(mine).send_frame_key == done(theirs).receive_frame_key
    assert (done(one).send_frame_key, done(two).send_frame_key) == (
        material[112:144],
        material[144:],
    )


def test_the_messages_keep_their_bytes() -> None:
    """Breaks in the field: two builds with the same version number cannot form a session."""
    hello, reply, _ = meet(dialer(features=5), listener(features=6))
    assert hello == b"".join(
        (b"\x00\x67\x01", b"NBDMIRR\x01", b"\0\2\0\2", b"\0", b"m" * 16, b"\x01", b"1" * 16,
         b"i" * 16, NONCE_ONE, (5).to_bytes(8, "big"))
    )  # fmt: skip
    assert reply[:-32] == b"".join(
        (b"\x00\x85\x02", b"NBDMIRR\x01", b"\0\2", b"\0", b"m" * 16, b"\x02", b"2" * 16,
         b"j" * 16, NONCE_TWO, (6).to_bytes(8, "big"))
    )  # fmt: skip


def test_a_wrong_key_is_found_by_the_dialer() -> None:
    """Breaks in the field: a node sends its writes to whoever took the peer's address."""
    one, two = dialer(), listener(psk=OTHER_KEY)
    reply = two.receive(one.start())
    with pytest.raises(AuthenticationError):
        one.receive(reply)
    assert one.done is None
    assert two.done is None


def test_a_wrong_key_is_found_by_the_listener() -> None:
    """Breaks in the field: anybody who reaches the port can overwrite the secondary's copy."""
    two = listener()
    hello = dialer(psk=OTHER_KEY).start()
    reply = two.receive(hello)
    with pytest.raises(AuthenticationError):
        two.receive(b"\x00\x21\x03" + proof(OTHER_KEY, b"dialer", hello + reply))
    assert two.done is None


def test_a_failed_proof_tells_nothing() -> None:
    """Breaks in the field: the refusal tells an attacker which part of a guess was right."""
    told = set()
    for confirm in (bytes(32), b"\xff" * 32):
        two = listener()
        two.receive(dialer().start())
        with pytest.raises(AuthenticationError) as caught:
            two.receive(b"\x00\x21\x03" + confirm)
        assert KEY.decode() not in str(caught.value)
        told.add(two.refusal)
    one = dialer()
    reply = listener(psk=OTHER_KEY).receive(one.start())
    with pytest.raises(AuthenticationError):
        one.receive(reply)
    told.add(one.refusal)
    assert told == {encode_refusal(RefusalCode.AUTHENTICATION, "authentication failed")}


def test_an_edited_hello_never_gives_a_session() -> None:
    """Breaks in the field: somebody on the way chooses identity, version or features."""
    for bit in range(HELLO_BYTES * 8):
        one, two = dialer(versions=(1, 3), features=7), listener(versions=(1, 3), features=7)
        try:
            reply = two.receive(flip(one.start(), bit))
            one.receive(reply)
        except PeerProtocolError:
            pass
        assert one.done is None
        assert two.done is None


def test_an_edited_reply_never_gives_a_session() -> None:
    """Breaks in the field: somebody on the way chooses identity, version or features."""
    _, whole, _ = meet(dialer(), listener())
    for bit in range(24, len(whole) * 8):
        one, two = dialer(), listener()
        with pytest.raises(AuthenticationError):
            one.receive(flip(two.receive(one.start()), bit))
        assert one.done is None


def test_an_edited_confirm_never_gives_a_session() -> None:
    """Breaks in the field: a dialer without the key is believed."""
    for bit in range(35 * 8):
        one, two = dialer(), listener()
        confirm = one.receive(two.receive(one.start()))
        with contextlib.suppress(PeerProtocolError):
            two.receive(flip(confirm, bit))
        assert two.done is None


def test_a_recorded_dialer_is_not_believed_again() -> None:
    """Breaks in the field: a recorded session, sent again, overwrites new data with old."""
    hello, _, confirm = meet(dialer(), listener())
    for first, second in ((hello, confirm), (b"", hello + confirm)):
        two = listener(nonce=b"fresh nonce for the next session")
        two.receive(first)
        with pytest.raises(AuthenticationError):
            two.receive(second)
        assert two.done is None


def test_a_recorded_listener_is_not_believed_again() -> None:
    """Breaks in the field: a primary hears acknowledgements from a recording."""
    _, reply, _ = meet(dialer(), listener())
    one = dialer(nonce=b"fresh nonce for the next session")
    one.start()
    with pytest.raises(AuthenticationError):
        one.receive(reply)
    assert one.done is None


def test_a_proof_fits_only_its_side() -> None:
    """Breaks in the field: one end's proof, sent back to it, passes for its peer's."""
    one, two = dialer(), listener()
    hello = one.start()
    reply = two.receive(hello)
    with pytest.raises(AuthenticationError):
        one.receive(reply[:-32] + proof(KEY, b"dialer", hello + reply[:-32]))
    with pytest.raises(AuthenticationError):
        two.receive(b"\x00\x21\x03" + proof(KEY, b"listener", hello + reply))


def test_a_reflected_hello_is_refused() -> None:
    """Breaks in the field: a node takes its own echo for its peer."""
    one = dialer()
    with pytest.raises(PeerProtocolError, match="type 1, not 2"):
        one.receive(one.start())
    # The same, sent to the node's own listener, as it is and under another node id.
    with pytest.raises(PeerRefusedError, match="itself"):
        listener(me=ONE).receive(dialer().start())
    one = dialer()
    hello = one.start()
    other_id = hello[:AT_NODE_ID] + b"\x02" + hello[AT_NODE_ID + 1 :]
    own = listener(me=ONE)
    with pytest.raises(PeerRefusedError, match="itself"):
        own.receive(other_id)
    # Even where nothing in it looks like our own, its proof is of no use to the dialer.
    stranger = hello[:AT_NODE_ID] + b"\x02" + b"z" * 32 + hello[AT_NODE_ID + 33 :]
    with pytest.raises(AuthenticationError):
        one.receive(listener(me=ONE).receive(stranger))


def test_an_own_nonce_is_refused() -> None:
    """Breaks in the field: with one nonce for both ends a session is no longer fresh."""
    with pytest.raises(PeerRefusedError, match="itself"):
        listener(nonce=NONCE_ONE).receive(dialer().start())


def test_a_stripped_confirm_gives_no_session() -> None:
    """Breaks in the field: frames of a dialer that proved nothing are applied."""
    two = listener()
    two.receive(dialer().start())
    with pytest.raises(PeerProtocolError, match="type 1, not 3"):
        two.receive(bytes.fromhex("4e4d01000000100000"))
    assert two.done is None


def test_both_versions_are_chosen_as_high_as_both_go() -> None:
    """Breaks in the field: after an upgrade of both nodes they stay on the old protocol."""
    one, two = dialer(versions=(1, 4)), listener(versions=(2, 3))
    meet(one, two)
    assert done(one).version == done(two).version == 3


def test_a_downgrade_in_flight_is_refused() -> None:
    """Breaks in the field: somebody on the way makes both ends speak a weaker version."""
    one, two = dialer(versions=(1, 2)), listener(versions=(1, 2))
    hello = one.start()
    edited = hello[:AT_MAX_VERSION] + b"\0\1" + hello[AT_MAX_VERSION + 2 :]
    with pytest.raises(AuthenticationError):
        one.receive(two.receive(edited))
    assert one.done is None


def test_a_version_that_was_not_offered_is_refused() -> None:
    """Breaks in the field: a peer with a bug speaks a version that this node does not know."""
    one = dialer(versions=(2, 2))
    hello = one.start()
    reply = listener(versions=(1, 3)).receive(dialer(versions=(1, 3)).start())[:-32]
    with pytest.raises(PeerRefusedError, match="version 3"):
        one.receive(reply + proof(KEY, b"listener", hello + reply))


@pytest.mark.parametrize(("mine", "theirs"), [((1, 1), (2, 3)), ((2, 3), (1, 1))])
def test_no_common_version_is_refused(mine: tuple[int, int], theirs: tuple[int, int]) -> None:
    """Breaks in the field: two versions misread each other; the operator must see which is old."""
    two = listener(versions=theirs)
    with pytest.raises(PeerRefusedError, match="upgrade the older node"):
        two.receive(dialer(versions=mine).start())
    assert two.refusal[:4] == bytes((0, len(two.refusal) - 2, 4, RefusalCode.VERSION))


@pytest.mark.parametrize(
    ("changed", "code", "told"),
    [
        ({"mirror_id": b"M" * 16}, RefusalCode.MIRROR, "belongs to mirror"),
        ({"node_id": 2}, RefusalCode.NODE, "claims my node id 2"),
        ({"node_uuid": b"2" * 16}, RefusalCode.NODE, "metadata was not created for it"),
        ({"instance": b"j" * 16}, RefusalCode.NODE, "itself"),
    ],
)
def test_who_cannot_be_the_peer_is_refused(
    changed: dict[str, Any], code: RefusalCode, told: str
) -> None:
    """Breaks in the field: another mirror's writes, or a clone's, land on this copy."""
    stranger = replace(ONE, **changed)
    two = listener()
    with pytest.raises(PeerRefusedError, match=told):
        two.receive(dialer(me=stranger).start())
    assert two.refusal[2:4] == bytes((4, code))
    # The other way round: a listener that does not look, met by a dialer that does.
    one = dialer(me=TWO, nonce=NONCE_TWO)
    hello = one.start()
    reply = listener(me=stranger, nonce=NONCE_ONE).receive(friend_of(stranger))[:-32]
    with pytest.raises(PeerRefusedError, match=told):
        one.receive(reply + proof(KEY, b"listener", hello + reply))
    assert one.done is None


def friend_of(node: Identity) -> bytes:
    """A HELLO that the listener `node` accepts."""
    friend = Identity(node.mirror_id, 99, b"9" * 16, b"8" * 16)
    return dialer(me=friend, nonce=b"7" * 32).start()


def test_a_node_without_a_number_is_refused() -> None:
    """Breaks in the field: metadata that was never completed takes part."""
    hello = dialer().start()
    with pytest.raises(PeerRefusedError, match="node id 0"):
        listener().receive(hello[:AT_NODE_ID] + b"\0" + hello[AT_NODE_ID + 1 :])


def test_a_required_feature_must_be_there() -> None:
    """Breaks in the field: one end sends what the other end does not understand."""
    two = listener(features=12, required=8)
    with pytest.raises(PeerRefusedError, match="features 0x8"):
        two.receive(dialer(features=20).start())
    assert two.refusal[3] == RefusalCode.FEATURES


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [(3, b"nbd", "handshake message"), (3 + 8 + 4, b"\x01", "channel 1"), (10, b"\x02", "magic")],
)
def test_what_is_not_our_handshake_is_refused(at: int, value: bytes, told: str) -> None:
    """Breaks in the field: a port scanner or another program gets further than the first bytes."""
    hello = dialer().start()
    two = listener()
    with pytest.raises(PeerProtocolError, match=told):
        two.receive(hello[:at] + value + hello[at + len(value) :])
    assert two.refusal[3] == RefusalCode.PROTOCOL


@pytest.mark.parametrize(
    "prefix",
    [
        "ffff01",
        "000001",
        "000101",
        "006601",
        "006801",
        "ffff04",
        "000104",
        "040304",
        "006703",
        "008502",
    ],
)
def test_a_wrong_length_is_refused_before_the_body(prefix: str) -> None:
    """Breaks in the field: an unknown caller makes the engine wait, or take memory."""
    two = listener()
    tracemalloc.start()
    try:
        with pytest.raises(PeerProtocolError, match=r"handshake message (of|.*type)"):
            two.receive(bytes.fromhex(prefix))
        assert tracemalloc.get_traced_memory()[1] < HANDSHAKE_BYTES_MAX + 16 * KIB
    finally:
        tracemalloc.stop()


def test_a_refusal_is_shown_as_unproven_and_harmless() -> None:
    """Breaks in the field: an unknown caller writes what it likes into the operator's terminal."""
    for text, shown in (
        (b"go away\x1b[2J\nok", "go away?[2J?ok"),
        (b"\xff\xfe", "??"),
        (b"", ""),
        (b"\xff" * REASON_BYTES_MAX, "?" * REASON_BYTES_MAX),
    ):
        one = dialer()
        one.start()
        with pytest.raises(PeerRefusedError) as caught:
            one.receive((2 + len(text)).to_bytes(2, "big") + b"\x04\x07" + text)
        assert str(caught.value) == f"peer says (unauthenticated): {shown}"
        assert one.refusal == b""


@given(text=st.text(max_size=2000))
def test_our_refusals_are_understood(text: str) -> None:
    """Breaks in the field: the other node's operator does not learn why there is no session."""
    one = dialer()
    one.start()
    with pytest.raises(PeerRefusedError, match="unauthenticated"):
        one.receive(encode_refusal(RefusalCode.BUSY, text))


def test_a_failed_handshake_stays_failed() -> None:
    """Breaks in the field: a second try inside one connection gets past the first refusal."""
    two = listener()
    with pytest.raises(PeerRefusedError):
        two.receive(dialer(me=TWO, nonce=NONCE_ONE).start())
    with pytest.raises(PeerProtocolError, match="the handshake ended with"):
        two.receive(dialer().start())
    assert two.done is None


@given(data=st.binary(max_size=400))
def test_no_bytes_from_a_stranger_do_harm(data: bytes) -> None:
    """Breaks in the field: anybody who reaches the port ends the engine."""
    for end in (dialer(), listener()):
        end.start()
        with contextlib.suppress(PeerProtocolError):
            end.receive(data)
        assert end.done is None


@pytest.mark.parametrize("length", [0, 31, KEY_BYTES_MAX + 1])
def test_a_weak_key_is_refused(length: int) -> None:
    """Breaks in the field: a truncated key file protects nothing."""
    with pytest.raises(ConfigError, match=f"{length} bytes"):
        dialer(psk=b"k" * length)


def test_the_session_shows_no_key() -> None:
    """Breaks in the field: a traceback in the log gives the session away."""
    one, two = dialer(), listener()
    meet(one, two)
    shown = f"{done(one)} {done(one)!r}"
    assert repr(done(one).send_mac_key) not in shown
    assert str(done(one).send_seed) not in shown
    assert "mac_key" not in shown
