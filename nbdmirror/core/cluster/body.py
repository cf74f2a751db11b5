"""What a heartbeat says: where a node stands, and the words of leaving that are under way.

Owns the form of it: a JSON object, small enough for one datagram. It repeats until it changes, so
a lost datagram costs one beat and nothing else; a question and its answer carry the same id, and
saying them twice is the same as once. Must never carry a secret, or trust a field of the peer's.
"""

import json
from typing import Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nbdmirror.core.cluster.heartbeat import BODY_BYTES_MAX
from nbdmirror.core.cluster.view import Peer
from nbdmirror.core.messages import printable
from nbdmirror.errors import PeerProtocolError

BODY_VERSION: Final = 1
REASON_CHARS_MAX: Final = 160
SHORT_CHARS_MAX: Final = 40
BRIEF_CHARS_MAX: Final = 16
PIECE_CHARS: Final = 240
PIECES_MAX: Final = 400

_Id = Annotated[str, Field(max_length=SHORT_CHARS_MAX, pattern=r"^[0-9a-f]*$")]
# What the peer says ends on terminals and in logs.
_Short = Annotated[str, Field(max_length=SHORT_CHARS_MAX), AfterValidator(printable)]
_Text = Annotated[str, Field(max_length=REASON_CHARS_MAX), AfterValidator(printable)]
_Brief = Annotated[str, Field(max_length=BRIEF_CHARS_MAX, pattern=r"^[0-9a-f]*$")]
_Node = Annotated[int, Field(ge=0, le=255)]


class _Part(BaseModel):
    # A newer peer may say more than this program understands.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Ask(_Part):
    """ "Do you stay?", by a node whose engine is dead or has no channel."""

    id: _Id
    generation: _Id


class Answer(_Part):
    """The answer to the question of that id; `session` binds it to a moment."""

    id: _Id
    stay: bool
    session: _Id = ""
    reason: _Text = ""


class Word(_Part):
    """ "I am durably outdated", said until the peer has stored it."""

    id: _Id
    generation: _Id
    session: _Id


class Piece(_Part):
    """One piece of the sender's configuration, as text; said while the two differ."""

    index: Annotated[int, Field(ge=0, lt=PIECES_MAX)]
    count: Annotated[int, Field(ge=1, le=PIECES_MAX)]
    text: Annotated[str, Field(max_length=PIECE_CHARS)]

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.index >= self.count:
            raise ValueError("index is not below count")
        return self


class _Versioned(_Part):
    """What every version of a body has."""

    v: int = 0


class Body(_Part):
    """One heartbeat. `please`: the id of a request to leave. `done`: of a word that was stored.

    `candidate` was chosen over the `facts_id` of the sender and the `facts_seen` of the other node.
    """

    v: int = 0
    role: _Short = "WAIT"
    readiness: _Short = "not-ready"
    reason: _Text = ""
    wanted: bool = False
    engine: bool = False
    primary: bool = False
    promotable: bool = False
    was_primary: bool = False
    passive: bool = False
    held_back: bool = False
    candidate: _Node = 0
    facts_id: _Brief = ""
    facts_seen: _Brief = ""
    swap_to: _Node = 0
    deposed: bool = False
    stop_both: bool = False
    alone: bool = False
    service: _Short = "down"
    data_state: _Short = ""
    config: _Id = ""
    arbiter: _Brief = ""
    piece: Piece | None = None
    ask: Ask | None = None
    answer: Answer | None = None
    word: Word | None = None
    please: _Id = ""
    refused: _Id = ""
    done: _Id = ""


def short(text: str) -> str:
    """A sentence as it fits into a heartbeat."""
    clean = printable(text)
    return clean if len(clean) <= REASON_CHARS_MAX else clean[: REASON_CHARS_MAX - 3] + "..."


def encode(body: Body) -> bytes:
    """The bytes of a body; without what is only for show where they would be too many."""
    data = b""
    for left_out in ((), ("piece",), ("piece", "reason"), ("piece", "reason", "answer_reason")):
        facts = body.model_dump(exclude_defaults=True) | {"v": BODY_VERSION}
        if "answer_reason" in left_out and isinstance(facts.get("answer"), dict):
            facts["answer"] = facts["answer"] | {"reason": ""}
        kept = {name: value for name, value in facts.items() if name not in left_out}
        data = json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) <= BODY_BYTES_MAX:
            break
    assert len(data) <= BODY_BYTES_MAX, "the parts of a body are bounded"
    return data


def decode(data: bytes) -> Body:
    """A body of the peer.

    Raises:
        PeerProtocolError: it is none, or of another version.
    """
    try:
        version = _Versioned.model_validate_json(data).v
        if version != BODY_VERSION:
            raise PeerProtocolError(
                f"heartbeat: the peer speaks version {version}, this node {BODY_VERSION}: upgrade "
                "the older node"
            )
        return Body.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise PeerProtocolError(f"heartbeat: {where}: {first['msg']}") from error


def peer_of(body: Body | None, *, heard: bool) -> Peer:
    """The view of the peer from its newest body; None: it was never heard."""
    if body is None:
        return Peer()
    return Peer(
        heard=heard,
        ever_heard=True,
        role=body.role,
        readiness=body.readiness,
        wanted=body.wanted,
        engine=body.engine,
        primary=body.primary,
        promotable=body.promotable,
        was_primary=body.was_primary,
        passive=body.passive,
        held_back=body.held_back,
        candidate=body.candidate,
        facts_id=body.facts_id,
        facts_seen=body.facts_seen,
        swap_to=body.swap_to,
        deposed=body.deposed,
        stop_both=body.stop_both,
        service=body.service,
    )
