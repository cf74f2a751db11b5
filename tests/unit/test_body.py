"""What a heartbeat says: its bytes, their bound, and what of a peer's is refused."""

import json
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdmirror.core.cluster.body import (
    BODY_VERSION,
    BRIEF_CHARS_MAX,
    PIECE_CHARS,
    PIECES_MAX,
    REASON_CHARS_MAX,
    SHORT_CHARS_MAX,
    Answer,
    Ask,
    Body,
    Piece,
    Word,
    decode,
    encode,
    peer_of,
    short,
)
from nbdmirror.core.cluster.heartbeat import BODY_BYTES_MAX
from nbdmirror.core.cluster.view import Peer
from nbdmirror.errors import PeerProtocolError

IDS: Final = st.text("0123456789abcdef", max_size=SHORT_CHARS_MAX)
BRIEF: Final = st.text("0123456789abcdef", max_size=BRIEF_CHARS_MAX)
# The words of this program itself; the longest ones there are.
ROLES: Final = st.sampled_from(("STOP", "WAIT", "ALONE", "PRIM", "SECOND"))
READINESS: Final = st.sampled_from(("ready", "transient", "not-ready"))
SERVICES: Final = st.sampled_from(("down", "entering", "up", "leaving", "failed"))
STATES: Final = st.sampled_from(("", "blank", "inconsistent", "outdated", "uptodate"))
NODES: Final = st.integers(0, 255)
TEXTS: Final = st.text(max_size=2 * REASON_CHARS_MAX).map(short)
BODIES: Final = st.builds(
    Body, v=st.just(BODY_VERSION), role=ROLES, readiness=READINESS, reason=TEXTS,
    wanted=st.booleans(), engine=st.booleans(), primary=st.booleans(), promotable=st.booleans(),
    was_primary=st.booleans(), held_back=st.booleans(), candidate=NODES, facts_id=BRIEF,
    facts_seen=BRIEF, swap_to=NODES, deposed=st.booleans(), stop_both=st.booleans(),
    service=SERVICES, data_state=STATES, config=IDS, arbiter=BRIEF,
    alone=st.booleans(),
    piece=st.none() | st.integers(1, PIECES_MAX).flatmap(lambda count: st.builds(
        Piece, index=st.integers(0, count - 1), count=st.just(count),
        text=st.text("abc= é\"", max_size=PIECE_CHARS))),
    ask=st.none() | st.builds(Ask, id=IDS, generation=IDS),
    answer=st.none() | st.builds(Answer, id=IDS, stay=st.booleans(), session=IDS, reason=TEXTS),
    word=st.none() | st.builds(Word, id=IDS, generation=IDS, session=IDS),
    please=IDS, refused=IDS, done=IDS,
)  # fmt: skip
SHOWN: Final = {"reason", "piece"}


def longest(text: str) -> Body:
    """Everything at once, each part as long as it may be."""
    number, brief = "f" * SHORT_CHARS_MAX, "f" * BRIEF_CHARS_MAX
    return Body(
        v=BODY_VERSION, role="SECOND", readiness="transient", reason=text, wanted=True,
        engine=True, primary=True, promotable=True, was_primary=True, held_back=True,
        candidate=255, facts_id=brief, facts_seen=brief, swap_to=255, deposed=True,
        stop_both=True, service="entering", data_state="inconsistent", config=number,
        arbiter=brief,
        piece=Piece(index=PIECES_MAX - 1, count=PIECES_MAX, text=text[:1] * PIECE_CHARS),
        ask=Ask(id=number, generation=number), please=number, refused=number, done=number,
        answer=Answer(id=number, stay=True, session=number, reason=text),
        word=Word(id=number, generation=number, session=number),
    )  # fmt: skip


def without_show(body: Body) -> dict[str, Any]:
    """What decisions hang on."""
    facts = body.model_dump(exclude=SHOWN)
    if facts["answer"] is not None:
        del facts["answer"]["reason"]
    return facts


@given(BODIES)
@example(longest("x" * REASON_CHARS_MAX))
@example(longest("\N{GRINNING FACE}" * REASON_CHARS_MAX))
@example(longest('"' * REASON_CHARS_MAX))
@example(longest("\\" * REASON_CHARS_MAX))
def test_a_body_arrives_as_it_was_said(body: Body) -> None:
    """Breaks in the field: a long sentence ends the controller, or makes a heartbeat too big for
    the network; or the peer decides on something that was not said.
    """
    data = encode(body)
    assert len(data) <= BODY_BYTES_MAX
    heard = decode(data)
    assert without_show(heard) == without_show(body)
    assert heard.reason in (body.reason, "")
    assert heard.piece in (body.piece, None)


@given(BODIES.filter(lambda body: body.piece is None and body.answer is None))
def test_a_short_body_keeps_its_sentence(body: Body) -> None:
    """Breaks in the field: `status` does not say why the other node is where it is."""
    plain = body.model_copy(update={"reason": short(body.reason[:40])})
    assert decode(encode(plain)) == plain


@given(st.text(max_size=1000))
def test_a_sentence_fits_and_shows_nothing_but_text(text: str) -> None:
    """Breaks in the field: a checker's output with escapes clears the operator's screen."""
    said = short(text)
    assert len(said) <= REASON_CHARS_MAX
    assert said.isprintable()
    assert said == text or not text.isprintable() or len(text) > REASON_CHARS_MAX


def test_what_the_peer_says_is_made_printable() -> None:
    """Breaks in the field: a peer whose program is broken writes escapes into logs and consoles."""
    data = json.dumps({"v": BODY_VERSION, "role": "\x1b[2J", "reason": "a\nb"}).encode()
    assert (decode(data).role, decode(data).reason) == ("?[2J", "a?b")


def test_a_newer_peer_may_say_more() -> None:
    """Breaks in the field: while one node is upgraded before the other, neither hears anything."""
    data = json.dumps({"v": BODY_VERSION, "news": [1, {"a": None}], "wanted": True}).encode()
    assert decode(data) == Body(v=BODY_VERSION, wanted=True)


@pytest.mark.parametrize("version", [0, 2, 99, -1])
def test_another_version_is_refused_as_that(version: int) -> None:
    """Breaks in the field: after an upgrade of one node nobody sees what has to be done."""
    data = json.dumps({"v": version, "wanted": "in another form", "candidate": 10**6}).encode()
    with pytest.raises(PeerProtocolError, match=f"version {version}, this node .* upgrade the old"):
        decode(data)


WRONG: Final[tuple[bytes, ...]] = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"v"',
    b"\xff\xfe",
    b"[" * 5000,
    b'{"v":' + b"[" * 5000,
    b'{"v":"1"}',
    b'{"v":1.5}',
    b'{"v":true}',
    b'{"v":' + b"9" * 5000 + b"}",
    b'{"v":1,"candidate":256}',
    b'{"v":1,"candidate":-1}',
    b'{"v":1,"candidate":1e999}',
    b'{"v":1,"swap_to":"2"}',
    b'{"v":1,"wanted":1}',
    b'{"v":1,"wanted":null}',
    b'{"v":1,"reason":"' + b"x" * (REASON_CHARS_MAX + 1) + b'"}',
    b'{"v":1,"reason":"' + b"x" * 10**6 + b'"}',
    b'{"v":1,"role":"' + b"x" * (SHORT_CHARS_MAX + 1) + b'"}',
    b'{"v":1,"reason":"\\ud800"}',
    b'{"v":1,"please":"not hex"}',
    b'{"v":1,"please":"ab\\n"}',
    b'{"v":1,"please":"' + b"a" * (SHORT_CHARS_MAX + 1) + b'"}',
    b'{"v":1,"facts_id":"' + b"a" * (BRIEF_CHARS_MAX + 1) + b'"}',
    b'{"v":1,"ask":{}}',
    b'{"v":1,"ask":{"id":"a"}}',
    b'{"v":1,"ask":[]}',
    b'{"v":1,"answer":{"id":"a","stay":"yes"}}',
    b'{"v":1,"word":{"id":"a","generation":"b","session":3}}',
    b'{"v":1,"piece":{"index":400,"count":1,"text":""}}',
    b'{"v":1,"piece":{"index":0,"count":0,"text":""}}',
)


@pytest.mark.parametrize("data", WRONG, ids=[each[:40].decode("latin1") for each in WRONG])
def test_nonsense_is_refused(data: bytes) -> None:
    """Breaks in the field: a peer whose program is broken ends the other node's controller."""
    with pytest.raises(PeerProtocolError, match=r"^heartbeat: ") as caught:
        decode(data)
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=BODY_BYTES_MAX) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.dictionaries(
        st.sampled_from((*Body.model_fields, "id", "generation", "stay")), inner, max_size=6
    ),
).map(lambda made: json.dumps(made).encode()))  # fmt: skip
def test_any_bytes_are_a_body_or_refused(data: bytes) -> None:
    """Breaks in the field: an exception that nobody expects ends the controller."""
    try:
        body = decode(data)
    except PeerProtocolError:
        return
    assert body.v == BODY_VERSION


def test_a_peer_that_was_never_heard_says_nothing() -> None:
    """Breaks in the field: a node acts on what a peer never said."""
    assert peer_of(None, heard=True) == Peer()


@given(BODIES, st.booleans())
def test_the_view_of_the_peer_is_what_it_said(body: Body, heard: bool) -> None:
    """Breaks in the field: a fact of the peer is mixed up with another one and decided upon."""
    made = peer_of(body, heard=heard)
    assert made.heard is heard
    assert made.ever_heard
    for name in set(Peer.__slots__) - {"heard", "ever_heard"}:
        assert getattr(made, name) == getattr(body, name), name
