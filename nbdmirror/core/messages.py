"""The control messages of a session: their format and the checks that make bytes a message.

Owns the payload of CONTROL frames, as one construct schema and one frozen dataclass per kind. Must
never interpret a message, and never let a value out that its field does not allow. Frame, MAC and
sequence belong to `wire.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, Final

from construct import (
    Bytes,
    Const,
    ConstructError,
    ExprAdapter,
    GreedyBytes,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Pass,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
)

from nbdmirror.core.superblock import (
    ARBITER_IDENTITY_BYTES,
    ID_BYTES,
    ArbiterKind,
    DataState,
    Flags,
    PendingKind,
)
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import (
    BASE_COUNT_MAX,
    HISTORY_COUNT_MAX,
    MAP_PAGE_PAYLOAD_BYTES,
    REASON_BYTES_MAX,
    RELAY_BYTES_MAX,
)

STATE_RESERVED_BYTES: Final = 32


class Message:
    """Base of all control messages. `KIND` is the first byte on the wire."""

    __slots__ = ()
    KIND: ClassVar[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class State(Message):
    """A node's whole view, as both need it for the decision. Identities are 16 bytes, zeros: none.

    `own_txn` is the last durable intent transaction of the sender, `peer_txn` the highest that it
    durably saw from the receiver. `resume_session` is the session the sender would like to go on
    with (0: none), `resume_applied` the last sequence it applied of that session, `peer_instance`
    the engine instance of the receiver that it had that session with.
    """

    KIND: ClassVar[int] = 1
    device_bytes: int
    extent_bytes: int
    region_bytes: int
    generation: bytes
    base: tuple[bytes, ...]
    pending: bytes
    pending_kind: PendingKind
    history: tuple[bytes, ...]
    data_state: DataState
    flags: Flags
    primary_now: bool
    cache_survived: bool
    fell_back: bool
    own_txn: int
    peer_txn: int
    dirty_count: int
    arbiter: ArbiterKind
    arbiter_identity: bytes
    arbiter_counter: int
    ack_timeout_ms: int
    read_lease_ms: int
    term: int
    trim_ok: bool
    fast_zero_ok: bool
    resume_session: int
    resume_applied: int
    peer_instance: bytes
    claim_unsettled: bool
    forced_over: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Message):
    """What the sender's decision table said; both must say the same before a byte moves."""

    KIND: ClassVar[int] = 2
    decision: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPage(Message):
    """One page of the sender's dirty map: its index and its bits."""

    KIND: ClassVar[int] = 3
    index: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MapEnd(Message):
    """The dirty map was sent: `pages` of them; `full` says that everything is dirty."""

    KIND: ClassVar[int] = 4
    pages: int
    full: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionStored(Message):
    """The source has stored the union of both maps; `first_seq` as in SourceBegin, 0: not yet."""

    KIND: ClassVar[int] = 5
    first_seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReady(Message):
    """The target is durably what it will be during the resync and takes data frames."""

    KIND: ClassVar[int] = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class JointTake(Message):
    """Flush, then take this generation; `last_seq` is the last data frame it covers."""

    KIND: ClassVar[int] = 7
    generation: bytes
    last_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JointTaken(Message):
    """The joint generation is durable at the target."""

    KIND: ClassVar[int] = 8
    generation: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsk(Message):
    """The sender wants to leave: does the receiver stay?"""

    KIND: ClassVar[int] = 9
    generation: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAnswer(Message):
    """Whether the sender stays, under which generation; if not, why."""

    KIND: ClassVar[int] = 10
    stay: bool
    generation: bytes
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(Message):
    """The leaver is durably outdated; bound to mirror, generation, both node ids and session."""

    KIND: ClassVar[int] = 11
    mirror_id: bytes
    generation: bytes
    leaver: int
    stayer: int
    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Role(Message):
    """Whether the sender is primary, in which term."""

    KIND: ClassVar[int] = 12
    primary: bool
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye(Message):
    """The sender closes this session on purpose."""

    KIND: ClassVar[int] = 13
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stable(Message):
    """Both nodes have flushed everything up to `seq`."""

    KIND: ClassVar[int] = 14
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """A system call on the sender's files failed with this errno; `where` says which."""

    KIND: ClassVar[int] = 15
    where: str
    errno: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceBegin(Message):
    """The sender is the source; its data frames begin at `first_seq`, as a resumption or not."""

    KIND: ClassVar[int] = 16
    first_seq: int
    resume: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtUp(Message):
    """Everything that was dirty has been sent; the last data frame of it was `seq`."""

    KIND: ClassVar[int] = 17
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay(Message):
    """From controller to controller, opaque to the engines; `attended`: the sender's has one."""

    KIND: ClassVar[int] = 18
    attended: bool
    payload: bytes


def printable(text: str) -> str:
    """The text with every unprintable character (escapes, line breaks, bidi marks) as `?`."""
    return "".join(char if char.isprintable() else "?" for char in text)


def text_bytes(text: str) -> bytes:
    """A text as it goes out: UTF-8, cut at a character so that it has at most 1024 bytes.

    Cut and not refused: a long reason must never be what ends a session.
    """
    return text.encode("utf-8", "replace")[:REASON_BYTES_MAX].decode("utf-8", "ignore").encode()


def _checked(name: str, subcon: Any, decode_one: Callable[[Any], Any]) -> Any:
    """A field whose parsed value must pass `decode_one`; its ValueError names what is wrong."""

    def parse(value: Any, _context: Any) -> Any:
        try:
            return decode_one(value)
        except ValueError as error:
            raise PeerProtocolError(f"{name}: {error}") from error

    return name / ExprAdapter(subcon, parse, lambda value, _context: value)


def _yes_no(name: str) -> Any:
    def one(value: int) -> bool:
        if value > 1:
            raise ValueError(f"{value} is neither 0 nor 1")
        return value == 1

    return _checked(name, Int8ub, one)


def _one_of(name: str, kinds: type[IntEnum]) -> Any:
    return _checked(name, Int8ub, kinds)


def _bits(name: str, kinds: type[IntFlag]) -> Any:
    known = sum(kinds)

    def one(value: int) -> IntFlag:
        if value & ~known:
            raise ValueError(f"unknown flags {value & ~known:#x}")
        return kinds(value)

    return _checked(name, Int32ub, one)


def _text(name: str) -> Any:
    def one(value: bytes) -> str:
        if len(value) > REASON_BYTES_MAX:
            raise ValueError(f"{len(value)} bytes, more than {REASON_BYTES_MAX}")
        return printable(value.decode("utf-8"))

    subcon = ExprAdapter(
        Prefixed(Int16ub, GreedyBytes),
        lambda value, _context: value,
        lambda value, _context: text_bytes(value),
    )
    return _checked(name, subcon, one)


def _bytes(name: str, count_max: int) -> Any:
    def one(value: bytes) -> bytes:
        if len(value) > count_max:
            raise ValueError(f"{len(value)} bytes, more than {count_max}")
        return value

    return _checked(name, Prefixed(Int16ub, GreedyBytes), one)


def _ids(name: str, count_max: int) -> Any:
    def one(value: list[bytes]) -> tuple[bytes, ...]:
        if len(value) > count_max:
            raise ValueError(f"{len(value)} entries, more than {count_max}")
        if not all(map(any, value)):
            raise ValueError("an entry of zeros, which names no generation")
        return tuple(value)

    return _checked(name, PrefixedArray(Int8ub, Bytes(ID_BYTES)), one)


def _id(name: str) -> Any:
    return name / Bytes(ID_BYTES)


_SCHEMAS: Final[Mapping[type[Message], Any]] = {
    State: Struct(
        "device_bytes" / Int64ub,
        "extent_bytes" / Int32ub,
        "region_bytes" / Int32ub,
        _id("generation"),
        _ids("base", BASE_COUNT_MAX),
        _id("pending"),
        _one_of("pending_kind", PendingKind),
        _ids("history", HISTORY_COUNT_MAX),
        _one_of("data_state", DataState),
        _bits("flags", Flags),
        _yes_no("primary_now"),
        _yes_no("cache_survived"),
        _yes_no("fell_back"),
        "own_txn" / Int64ub,
        "peer_txn" / Int64ub,
        "dirty_count" / Int64ub,
        _one_of("arbiter", ArbiterKind),
        "arbiter_identity" / Bytes(ARBITER_IDENTITY_BYTES),
        "arbiter_counter" / Int64ub,
        "ack_timeout_ms" / Int32ub,
        "read_lease_ms" / Int32ub,
        "term" / Int64ub,
        _yes_no("trim_ok"),
        _yes_no("fast_zero_ok"),
        "resume_session" / Int64ub,
        "resume_applied" / Int64ub,
        _id("peer_instance"),
        _yes_no("claim_unsettled"),
        _id("forced_over"),
        "reserved" / Const(bytes(STATE_RESERVED_BYTES)),
    ),
    Verdict: Struct("decision" / Int8ub, _text("text")),
    MapPage: Struct("index" / Int32ub, "payload" / Bytes(MAP_PAGE_PAYLOAD_BYTES)),
    MapEnd: Struct("pages" / Int32ub, _yes_no("full")),
    UnionStored: Struct("first_seq" / Int64ub),
    TargetReady: Struct(Pass),
    JointTake: Struct(_id("generation"), "last_seq" / Int64ub),
    JointTaken: Struct(_id("generation")),
    LeaveAsk: Struct(_id("generation")),
    LeaveAnswer: Struct(_yes_no("stay"), _id("generation"), _text("reason")),
    Left: Struct(
        _id("mirror_id"),
        _id("generation"),
        "leaver" / Int8ub,
        "stayer" / Int8ub,
        "session" / Int64ub,
    ),
    Role: Struct(_yes_no("primary"), "term" / Int64ub),
    Bye: Struct(_text("reason")),
    Stable: Struct("seq" / Int64ub),
    Failed: Struct(_text("where"), "errno" / Int32ub),
    SourceBegin: Struct("first_seq" / Int64ub, _yes_no("resume")),
    CaughtUp: Struct("seq" / Int64ub),
    Relay: Struct(_yes_no("attended"), _bytes("payload", RELAY_BYTES_MAX)),
}
"""The format of record of every message; the kind, one byte, comes before."""


def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


MESSAGE_TYPES: Final = tuple(_SCHEMAS)
_BY_KIND: Final = {kind.KIND: kind for kind in MESSAGE_TYPES}
_FIELDS: Final = {kind: _field_names(kind) for kind in MESSAGE_TYPES}
_PARSERS: Final = {kind: Struct("body" / schema, Terminated) for kind, schema in _SCHEMAS.items()}
assert len(_BY_KIND) == len(MESSAGE_TYPES), "two messages share a kind"


def encode(message: Message) -> bytes:
    """The bytes of a message. A value that does not fit its field raises: a bug of the caller."""
    kind = type(message)
    values = {name: getattr(message, name) for name in _FIELDS[kind]}
    return bytes((kind.KIND,)) + bytes(_SCHEMAS[kind].build(values))


def decode(data: bytes) -> Message:
    """The message in `data`, all of it.

    Raises:
        PeerProtocolError: an unknown kind, missing or surplus bytes, or a field that holds what it
            may not; the text names it.
    """
    if not data:
        raise PeerProtocolError("an empty control message")
    kind = _BY_KIND.get(data[0])
    if kind is None:
        raise PeerProtocolError(f"control message of unknown kind {data[0]}")
    try:
        body = _PARSERS[kind].parse(data[1:])["body"]
    except ConstructError as error:
        text = printable(str(error).replace("\n", " "))
        raise PeerProtocolError(f"{kind.__name__}: {text}") from error
    except PeerProtocolError as error:
        raise PeerProtocolError(f"{kind.__name__}: {error}") from error
    return kind(**{name: body[name] for name in _FIELDS[kind]})
