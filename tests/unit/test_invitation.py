"""Tokens and the exchange they open, without sockets: who has the token joins, nobody else."""

import base64
import binascii
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.config_fields import Address
from nbdmirror.errors import AuthenticationError, ConfigError, PeerProtocolError
from nbdmirror.token_exchange import (
    HEADER_BYTES,
    OFFER_BYTES_MAX,
    Kind,
    Offer,
    Outcome,
    Proven,
    Receive,
    Send,
    Token,
    body_bytes,
    inviting,
    joining,
    parse_token,
)

SECRET = b"s" * 16
OTHER_SECRET = b"S" * 16
ONE, TWO, THREE = b"1" * 32, b"2" * 32, b"3" * 32
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
OFFER = Offer(
    mirror="demo",
    inviter="alpha",
    configuration='mirror = "demo"\n',
    key="5a" * 32,
    size_bytes=8 << 20,
    sparse=True,
)
TOKENS = (
    Token(Address("10.1.0.1", 40123), bytes(range(16))),
    Token(Address("fd00::1", 40123), bytes(range(16))),
)


# --- the token -----------------------------------------------------------------------------------


@given(
    st.ip_addresses().filter(lambda ip: "%" not in str(ip)),
    st.integers(1, 65535),
    st.binary(min_size=16, max_size=16),
)
def test_a_token_says_what_it_was_made_from(ip: Any, port: int, secret: bytes) -> None:
    """Breaks in the field: the second server dials another address, or with another secret."""
    token = Token(Address(str(ip), port), secret)
    text = token.text()
    assert parse_token(text) == token
    assert parse_token(f"  {text.lower().replace('-', ' ')}\n") == token
    assert len(text) == (47 if ip.version == 4 else 71)


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token.address.host)
def test_every_wrong_character_is_found(token: Token) -> None:
    """Breaks in the field: a typing error leads to a time-out at an address that nobody has, or is
    counted as somebody who guesses.
    """
    plain = token.text().replace("-", "")
    for at, right in enumerate(plain):
        for wrong in (*ALPHABET, *"0189!/"):
            if wrong != right:
                with pytest.raises(ConfigError):
                    parse_token(plain[:at] + wrong + plain[at + 1 :])


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token.address.host)
def test_exchanged_missing_and_added_characters_are_found(token: Token) -> None:
    """Breaks in the field: as above, for the other errors of a hand."""
    plain = token.text().replace("-", "")
    for at in range(len(plain)):
        swapped = plain[:at] + plain[at : at + 2][::-1] + plain[at + 2 :]
        for text in (plain[:at] + plain[at + 1 :], f"{plain[:at]}A{plain[at:]}", swapped):
            if text != plain:
                with pytest.raises(ConfigError):
                    parse_token(text)


@given(st.text(max_size=300) | st.text(ALPHABET + "-", max_size=80))
def test_no_text_breaks_the_reader_of_tokens(text: str) -> None:
    """Breaks in the field: a pasted novel ends in a traceback; or a text is taken for a token."""
    with pytest.raises(ConfigError) as caught:
        parse_token(text)
    assert len(text) < 8 or text not in str(caught.value)


def test_a_token_is_not_shown_by_accident() -> None:
    """Breaks in the field: a log or a traceback has the secret."""
    token = TOKENS[0]
    assert "10.1.0.1" in repr(token)
    assert repr(token.secret) not in repr(token)
    assert OFFER.key not in repr(OFFER)
    wrong = token.text()[:-1] + ("A" if token.text()[-1] != "A" else "B")
    with pytest.raises(ConfigError) as caught:
        parse_token(wrong)
    assert wrong[:10] not in str(caught.value)


def test_a_token_of_another_version_says_so() -> None:
    """Breaks in the field: two versions of the program blame the operator's typing."""
    raw = bytes([0x24]) + bytes([10, 1, 0, 1]) + b"\x1e\x6d" + SECRET
    text = base64.b32encode(raw + binascii.crc_hqx(raw, 0xFFFF).to_bytes(2, "big")).decode()
    with pytest.raises(ConfigError, match="version 2"):
        parse_token(text)


# --- the exchange, without sockets ---------------------------------------------------------------


@dataclass
class Meeting:
    """What both sides said, and what they came to."""

    to_joiner: list[bytes]
    to_inviter: list[bytes]
    offer: Offer | None = None
    outcome: Outcome | None = None
    proven: bool = False


def same(frame: bytes) -> bytes:
    """A wire that changes nothing."""
    return frame


class Side:
    """One of the two, at a step that waits for its answer; None at the end."""

    def __init__(self, steps: Any) -> None:
        self._steps = steps
        self.step: Any = next(steps)
        self.inbox: list[bytes] = []
        self.read = 0

    def answer(self, value: Any) -> None:
        self.step = None
        with contextlib.suppress(StopIteration):
            self.step = self._steps.send(value)


def meet(
    secret: bytes = SECRET,
    nonces: tuple[bytes, bytes] = (ONE, TWO),
    change: Callable[[bytes], bytes] = same,
    offer: Offer = OFFER,
) -> Meeting:
    """Run both to the end over a wire; raises what the first of them raises."""
    joiner, inviter = Side(joining(secret, nonces[0])), Side(inviting(SECRET, nonces[1], offer))
    made = Meeting(joiner.inbox, inviter.inbox)
    me, other = joiner, inviter
    while joiner.step or inviter.step:
        step = me.step
        if isinstance(step, Send):
            other.inbox.append(change(step.frame))
            me.answer(None)
        elif isinstance(step, Receive) and me.read < len(me.inbox):
            me.read += 1
            me.answer(body_of(me.inbox[me.read - 1], step.kind))
        elif isinstance(step, Offer):
            made.offer = step
            me.answer(Outcome(node="beta"))
        elif isinstance(step, Outcome):
            made.outcome = step
            me.answer(None)
        elif isinstance(step, Proven):
            made.proven = True
            me.answer(None)
        else:
            me, other = other, me
    return made


def body_of(frame: bytes, kind: Kind) -> bytes:
    """As a driver takes it from the wire."""
    length = body_bytes(frame[:HEADER_BYTES], kind)
    if length != len(frame) - HEADER_BYTES:
        raise PeerProtocolError("a driver reads so many bytes, and the next message is cut")
    return frame[HEADER_BYTES:]


def test_two_with_one_token_meet() -> None:
    """Breaks in the field: no mirror is ever made."""
    made = meet()
    assert (made.offer, made.outcome, made.proven) == (OFFER, Outcome(node="beta"), True)
    # Nothing of the mirror is on the wire in the clear, and no two exchanges look alike.
    said = b"".join(made.to_joiner + made.to_inviter)
    again = meet(nonces=(THREE, TWO))
    for clear in (b"demo", b"alpha", b"beta", bytes.fromhex(OFFER.key), OFFER.key.encode(), SECRET):
        assert clear not in said
    assert not set(made.to_inviter) & set(again.to_inviter)
    assert [frame[0] for frame in again.to_joiner] == [2, 4, 6]
    assert not set(made.to_joiner[1:]) & set(again.to_joiner[1:])


@pytest.mark.parametrize("nonces", [(THREE, TWO), (ONE, THREE)], ids=["joiner", "inviter"])
def test_new_random_numbers_are_new_keys(nonces: tuple[bytes, bytes]) -> None:
    """Breaks in the field: two tries with one token use one key stream, and who recorded both has
    the difference of what they carried, the key of the mirror with it.
    """
    one, two = meet(), meet(nonces=nonces)
    for first, second in zip(in_order(one), in_order(two), strict=True):
        if first[0] >= Kind.WELCOME:  # without the tag, which differs in any case
            assert first[HEADER_BYTES:-16] != second[HEADER_BYTES:-16]


def test_a_wrong_secret_gets_a_random_number_and_nothing_else() -> None:
    """Breaks in the field: whoever reaches the port gets a proof to work on, or the mirror."""
    heard: list[bytes] = []

    def listen(frame: bytes) -> bytes:
        heard.append(frame)
        return frame

    with pytest.raises(AuthenticationError, match="does not have this token"):
        meet(secret=OTHER_SECRET, change=listen)
    assert [frame[0] for frame in heard] == [Kind.HELLO, Kind.CHALLENGE, Kind.PROOF]
    assert heard[1].endswith(TWO)
    assert len(heard[1]) == HEADER_BYTES + 8 + 32


def test_what_was_said_once_is_no_proof_again() -> None:
    """Breaks in the field: a recording of one join opens the next invitation, or a false inviter
    gives a second server a mirror of its own.
    """
    recorded = meet()
    steps = inviting(SECRET, THREE, OFFER)
    assert isinstance(next(steps), Receive)
    assert isinstance(steps.send(body_of(recorded.to_inviter[0], Kind.HELLO)), Send)
    assert isinstance(next(steps), Receive)
    with pytest.raises(AuthenticationError):
        steps.send(body_of(recorded.to_inviter[1], Kind.PROOF))

    asks = joining(SECRET, THREE)
    assert isinstance(next(asks), Send)
    assert isinstance(next(asks), Receive)
    assert isinstance(asks.send(body_of(recorded.to_joiner[0], Kind.CHALLENGE)), Send)
    assert isinstance(next(asks), Receive)
    with pytest.raises(AuthenticationError):
        asks.send(body_of(recorded.to_joiner[1], Kind.WELCOME))


def test_ones_own_words_are_refused() -> None:
    """Breaks in the field: a mirror in the way answers a server with its own proofs."""
    recorded = meet()
    pairs = [(Kind.CHALLENGE, recorded.to_inviter), (Kind.HELLO, recorded.to_joiner)]
    for kind, frames in pairs:
        for frame in frames:
            with pytest.raises(PeerProtocolError):
                body_of(frame, kind)
    # With the type byte changed it is the nonce that gives it away.
    asks = joining(SECRET, ONE)
    step = next(asks)
    assert isinstance(step, Send)
    next(asks)
    with pytest.raises(PeerProtocolError, match="own words"):
        asks.send(step.frame[HEADER_BYTES:])
    steps = inviting(SECRET, ONE, OFFER)
    next(steps)
    with pytest.raises(PeerProtocolError, match="own words"):
        steps.send(step.frame[HEADER_BYTES:])


def test_nothing_can_be_changed_on_the_way() -> None:
    """Breaks in the field: somebody between the servers puts a key or an address of his own in."""
    lengths = [len(frame) for frame in in_order(meet())]
    for number, length in enumerate(lengths):
        for at in range(length):
            count = 0

            def turn(frame: bytes, number: int = number, at: int = at) -> bytes:
                nonlocal count
                count += 1
                if count != number + 1:
                    return frame
                return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]

            with pytest.raises(PeerProtocolError):
                meet(change=turn)


def in_order(made: Meeting) -> list[bytes]:
    """All frames of an exchange, as they were sent."""
    return sorted(made.to_inviter + made.to_joiner, key=lambda frame: frame[0])


def test_the_mirror_that_was_proven_is_the_one_that_comes() -> None:
    """Breaks in the field: the name in the proof and the configuration differ, unseen."""
    other = OFFER.model_copy(update={"mirror": "else"})

    class Changing(Offer):
        def model_dump_json(self, **_: Any) -> str:
            return other.model_dump_json()

    with pytest.raises(AuthenticationError, match="another mirror"):
        meet(offer=Changing(**OFFER.model_dump()))


@pytest.mark.parametrize("kind", list(Kind))
def test_a_length_is_checked_before_anything_is_read(kind: Kind) -> None:
    """Breaks in the field: five bytes from a stranger take the memory of a server."""
    for length in (0, OFFER_BYTES_MAX + 1, (1 << 32) - 1):
        with pytest.raises(PeerProtocolError):
            body_bytes(bytes([kind]) + length.to_bytes(4, "big"), kind)
    other = Kind(kind % len(Kind) + 1)
    with pytest.raises(PeerProtocolError):
        body_bytes(bytes([other]) + (40).to_bytes(4, "big"), kind)


@given(st.binary(min_size=5, max_size=5), st.sampled_from(list(Kind)))
def test_no_header_breaks_the_reader(header: bytes, kind: Kind) -> None:
    """Breaks in the field: a stray connection ends an invitation with a traceback."""
    with contextlib.suppress(PeerProtocolError):
        assert 0 < body_bytes(header, kind) <= OFFER_BYTES_MAX


@pytest.mark.parametrize(
    "change",
    [
        {"mirror": "../etc"},
        {"inviter": "a b"},
        {"key": "5a" * 31},
        {"key": "5a" * 32 + "5"},
        {"key": "zz" * 32},
        {"size_bytes": 0},
        {"size_bytes": True},
        {"sparse": 1},
        {"configuration": "x" * (64 * 1024 + 1)},
        {"more": 1},
    ],
)
def test_an_offer_out_of_bounds_is_none(change: dict[str, Any]) -> None:
    """Breaks in the field: a name from the network leads out of the directory it is written to."""
    with pytest.raises(ValueError, match="validation error"):
        Offer(**{**OFFER.model_dump(), **change})
