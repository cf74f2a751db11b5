"""The superblock: who this node is and what it durably knows about its copy.

Owns: the 4 KiB record, its two slots and the choice between them. Must never: decide which side is
right, or turn a damaged block into a state. A `Superblock` that exists is valid: every check is
made when it is built, so a hostile file and a bug of ours meet the same refusal.

How the two slots are written. A store takes sequence s+1 and puts the SAME bytes into slot 0, makes
them durable, then into slot 1, makes them durable, and only then is the new state told to anybody.
The pictures that a crash can leave, and what `choose` makes of them:

    slot 0      slot 1      what happened                               used    fell back
    s           s           nothing                                     0       no
    s+1         s           between the two writes                      0       no
    s+1         unreadable  inside the write of slot 1                  0       no
    unreadable  s           inside the write of slot 0, which nobody    1       YES
                            relied on; or rot of a state that somebody
                            did rely on: the two look the same
    s+2 or more s           a write of slot 1 was lost                  0       YES
    s           s+1         impossible: restored from a copy            refused
    unreadable  unreadable  nothing is known                            refused

A node that fell back is neither promotable nor a source until somebody confirms its generation.
"""

import enum
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from construct import Array, Bytes, Const, ConstructError, Int8ub, Int16ub, Int32ub, Int64ub, Struct

from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import Geometry
from nbdmirror.errors import MetadataError
from nbdmirror.limits import (
    BASE_COUNT_MAX,
    HISTORY_COUNT_MAX,
    META_BLOCK_BYTES,
    MIRROR_NAME_CHARS_MAX,
)

MAGIC: Final = b"NBDMIRR\0"
FORMAT_VERSION: Final = 1
ID_BYTES: Final = 16
ARBITER_IDENTITY_BYTES: Final = 32
NO_ID: Final = bytes(ID_BYTES)
_CRC_BYTES: Final = 4
_NODE_ID_MAX: Final = 255
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_REMEDY: Final = (
    "move the metadata file away; if the peer is well, join anew over the data with `nbdmirror "
    "metadata create --join --adopt`; only if this is the last copy, leave `--join` out: whatever "
    "it holds then counts as complete"
)


class DataState(enum.IntEnum):
    """What the local copy is worth."""

    BLANK = 0
    INCONSISTENT = 1
    OUTDATED = 2
    UPTODATE = 3


class PendingKind(enum.IntEnum):
    """What the pending generation was stored for."""

    NONE = 0
    CLAIM = 1
    JOINT = 2


class ArbiterKind(enum.IntEnum):
    """Which arbiter the pair agreed on."""

    NONE = 0
    PING = 1
    ETCD = 2
    S3 = 3
    AZURE_BLOB = 4

    @property
    def has_memory(self) -> bool:
        """Whether the right to go on alone comes from a compare-and-swap."""
        return self not in (ArbiterKind.NONE, ArbiterKind.PING)

    @property
    def word(self) -> str:
        """As configuration, commands and status have it."""
        return self.name.lower().replace("_", "-")

    @classmethod
    def of_word(cls, word: str) -> "ArbiterKind":
        """The one that is called so. Raises KeyError."""
        return {kind.word: kind for kind in cls}[word]


class Flags(enum.IntFlag):
    """Durable yes-or-no facts; the values are the bits on disk."""

    WAS_PRIMARY = 1 << 0
    ALONE = 1 << 1
    CLEAN = 1 << 2
    PEER_OUTDATED = 1 << 3
    ZEROED = 1 << 4
    FAILED = 1 << 5
    SPLIT = 1 << 6
    SPARSE = 1 << 7
    CACHE_LOST = 1 << 8
    FELL_BACK = 1 << 9
    TOOK_OVER = 1 << 10


_FLAGS_KNOWN: Final = int(sum(Flags))
_NO_FLAGS: Final = Flags(0)

# The schema of record. Everything big-endian; docs/disk-format.md has the offsets.
_BODY = Struct(
    "magic" / Bytes(len(MAGIC)),
    "format_version" / Int16ub,
    "node_id" / Int8ub,
    "data_state" / Int8ub,
    "flags" / Int32ub,
    "sequence" / Int64ub,
    "mirror_id" / Bytes(ID_BYTES),
    "mirror_name" / Bytes(MIRROR_NAME_CHARS_MAX),
    "node_uuid" / Bytes(ID_BYTES),
    "peer_uuid" / Bytes(ID_BYTES),
    "device_bytes" / Int64ub,
    "extent_bytes" / Int32ub,
    "region_bytes" / Int32ub,
    "map_id" / Bytes(ID_BYTES),
    "generation" / Bytes(ID_BYTES),
    "pending" / Bytes(ID_BYTES),
    "forced_over" / Bytes(ID_BYTES),
    "boot_id" / Bytes(ID_BYTES),
    "mount_id" / Bytes(ID_BYTES),
    "own_txn" / Int64ub,
    "peer_txn" / Int64ub,
    "term" / Int64ub,
    "arbiter_counter" / Int64ub,
    "saved_bytes" / Int64ub,
    "arbiter_identity" / Bytes(ARBITER_IDENTITY_BYTES),
    "read_lease_ms" / Int32ub,
    "pending_kind" / Int8ub,
    "arbiter" / Int8ub,
    "base_count" / Int8ub,
    "history_count" / Int8ub,
    "base" / Array(BASE_COUNT_MAX, Bytes(ID_BYTES)),
    "history" / Array(HISTORY_COUNT_MAX, Bytes(ID_BYTES)),
)
BODY_BYTES: Final = int(_BODY.sizeof())
_PADDING_BYTES: Final = META_BLOCK_BYTES - BODY_BYTES - _CRC_BYTES
assert _PADDING_BYTES >= 0
SCHEMA = Struct(
    "body" / _BODY,
    "padding" / Const(bytes(_PADDING_BYTES)),
    "crc" / Int32ub,
)
_COMPUTED: Final = ("magic", "format_version", "base_count", "history_count")
_ID_FIELDS: Final = (
    "mirror_id",
    "node_uuid",
    "peer_uuid",
    "map_id",
    "generation",
    "pending",
    "forced_over",
    "boot_id",
    "mount_id",
)
# Numbers that this node counts up itself leave room for the next one, whatever a file says.
_INT_FIELD_BITS: Final = {
    "own_txn": 63,
    "peer_txn": 64,
    "term": 63,
    "arbiter_counter": 63,
    "saved_bytes": 64,
    "sequence": 63,
    "read_lease_ms": 32,
}


class _NewerFormatError(MetadataError):
    """A sound block of a format that this program does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a node durably knows of itself. Ids are 16 bytes, all zeros = none.

    Raises MetadataError, naming field and value, when a field holds what the format forbids.
    """

    mirror_id: bytes
    mirror_name: str
    node_id: int
    node_uuid: bytes
    device_bytes: int
    extent_bytes: int
    region_bytes: int
    map_id: bytes
    arbiter: ArbiterKind
    arbiter_identity: bytes = bytes(ARBITER_IDENTITY_BYTES)
    arbiter_counter: int = 0
    peer_uuid: bytes = NO_ID
    generation: bytes = NO_ID
    base: tuple[bytes, ...] = ()
    pending: bytes = NO_ID
    pending_kind: PendingKind = PendingKind.NONE
    history: tuple[bytes, ...] = ()
    data_state: DataState = DataState.BLANK
    flags: Flags = _NO_FLAGS
    boot_id: bytes = NO_ID
    mount_id: bytes = NO_ID
    forced_over: bytes = NO_ID
    own_txn: int = 0
    peer_txn: int = 0
    term: int = 0
    read_lease_ms: int = 0
    saved_bytes: int = 0
    sequence: int = 0

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_numbers(self)
        _check_generations(self)
        self.geometry()

    def geometry(self) -> Geometry:
        """The device's geometry. Raises MetadataError when the sizes are impossible."""
        return Geometry(self.device_bytes, self.extent_bytes, self.region_bytes)


def _require(condition: bool, field: str, value: object, rule: str) -> None:  # noqa: FBT001 - a check
    if not condition:
        raise MetadataError(f"superblock: {field} is {value!r}; {rule}")


def _check_identity(sb: Superblock) -> None:
    for name in _ID_FIELDS:
        value = getattr(sb, name)
        _require(len(value) == ID_BYTES, name, value, f"it has {ID_BYTES} bytes")
    for name in ("mirror_id", "node_uuid", "map_id"):
        _require(getattr(sb, name) != NO_ID, name, getattr(sb, name), "it is never all zeros")
    _require(sb.peer_uuid != sb.node_uuid, "peer_uuid", sb.peer_uuid, "it is this node's own")
    _require(1 <= sb.node_id <= _NODE_ID_MAX, "node_id", sb.node_id, f"use 1 to {_NODE_ID_MAX}")
    _require(
        len(sb.mirror_name) <= MIRROR_NAME_CHARS_MAX
        and _NAME.fullmatch(sb.mirror_name) is not None,
        "mirror_name",
        sb.mirror_name,
        f"use 1 to {MIRROR_NAME_CHARS_MAX} of a-z, 0-9 and -, not beginning with -",
    )
    _require(
        len(sb.arbiter_identity) == ARBITER_IDENTITY_BYTES,
        "arbiter_identity",
        sb.arbiter_identity,
        f"it has {ARBITER_IDENTITY_BYTES} bytes",
    )


def _check_numbers(sb: Superblock) -> None:
    for name, bits in _INT_FIELD_BITS.items():
        value = getattr(sb, name)
        _require(0 <= value < 1 << bits, name, value, f"use 0 to 2**{bits} - 1")
    _require(
        0 <= sb.flags <= _FLAGS_KNOWN, "flags", int(sb.flags), f"known bits: {_FLAGS_KNOWN:#x}"
    )
    for name, kind in (
        ("data_state", DataState),
        ("pending_kind", PendingKind),
        ("arbiter", ArbiterKind),
    ):
        value = getattr(sb, name)
        _require(isinstance(value, kind), name, value, f"it is a {kind.__name__}")


def _check_generations(sb: Superblock) -> None:
    for name, count_max in (("base", BASE_COUNT_MAX), ("history", HISTORY_COUNT_MAX)):
        ids = getattr(sb, name)
        _require(len(ids) <= count_max, name, len(ids), f"at most {count_max} generations")
        _require(all(len(i) == ID_BYTES for i in ids), name, ids, f"ids have {ID_BYTES} bytes")
        _require(NO_ID not in ids, name, ids, "an unused slot is not a generation")
        _require(len(set(ids)) == len(ids), name, ids, "a generation is listed once")
    _require(
        sb.generation not in sb.history, "history", sb.history, "it holds the current generation"
    )
    _require(
        (sb.pending == NO_ID) == (sb.pending_kind is PendingKind.NONE),
        "pending",
        sb.pending,
        f"it does not fit pending_kind {sb.pending_kind.name}",
    )
    _require(
        sb.generation != NO_ID or sb.data_state < DataState.OUTDATED,
        "generation",
        sb.generation,
        f"a copy that is {sb.data_state.name.lower()} has one",
    )


def _padded(ids: tuple[bytes, ...], count: int) -> list[bytes]:
    return [*ids, *[NO_ID] * (count - len(ids))]


def encode(sb: Superblock) -> bytes:
    """The 4 KiB block of `sb`, CRC-32C of the rest in its last four bytes."""
    body: dict[str, Any] = {
        sub.name: getattr(sb, sub.name) for sub in _BODY.subcons if sub.name not in _COMPUTED
    }
    body.update(
        magic=MAGIC,
        format_version=FORMAT_VERSION,
        base_count=len(sb.base),
        history_count=len(sb.history),
        mirror_name=sb.mirror_name.encode("ascii").ljust(MIRROR_NAME_CHARS_MAX, b"\0"),
        base=_padded(sb.base, BASE_COUNT_MAX),
        history=_padded(sb.history, HISTORY_COUNT_MAX),
    )
    block: bytes = SCHEMA.build({"body": body, "padding": None, "crc": 0})
    content = block[:-_CRC_BYTES]
    return content + crc32c(content).to_bytes(_CRC_BYTES, "big")


def _check_envelope(block: bytes) -> None:
    """Refuse a block that is not sound, before any field of it is believed."""
    if len(block) != META_BLOCK_BYTES:
        raise MetadataError(f"superblock: {len(block)} bytes, expected {META_BLOCK_BYTES}")
    if not any(block):
        raise MetadataError("superblock: never written (all zeros)")
    if not block.startswith(MAGIC):
        raise MetadataError(f"superblock: not ours (magic {block[: len(MAGIC)]!r})")
    stored = int.from_bytes(block[-_CRC_BYTES:], "big")
    computed = crc32c(block[:-_CRC_BYTES])
    if stored != computed:
        raise MetadataError(f"superblock: checksum {stored:#010x}, content {computed:#010x}")
    # Place and rule of magic, version and checksum are the same in every version of the format,
    # so that a version can be believed before the rest can be read.
    version = int.from_bytes(block[len(MAGIC) : len(MAGIC) + 2], "big")
    if version > FORMAT_VERSION:
        raise _NewerFormatError(
            f"superblock: format version {version}, this program knows {FORMAT_VERSION}; "
            "use the newer program that wrote it"
        )
    if version != FORMAT_VERSION:
        raise MetadataError(f"superblock: format version {version} never existed")


def _enum_member(kind: type[enum.IntEnum], field: str, value: int) -> Any:
    members = {int(member): member for member in kind}
    _require(value in members, field, value, f"known: {sorted(members)}")
    return members[value]


def decode(block: bytes) -> Superblock:
    """The superblock that `block` (4096 bytes) holds.

    Raises MetadataError with the reason: length, magic, checksum, version, or the field that holds
    what the format forbids. What is accepted encodes to the same bytes again.
    """
    _check_envelope(block)
    try:
        parsed = SCHEMA.parse(block)
    except ConstructError as error:
        raise MetadataError("superblock: bytes that must be zero are not") from error
    body = dict(parsed.body)
    body.pop("_io", None)
    counts = {name: body[f"{name}_count"] for name in ("base", "history")}
    _require(counts["base"] <= BASE_COUNT_MAX, "base_count", counts["base"], "too many")
    _require(counts["history"] <= HISTORY_COUNT_MAX, "history_count", counts["history"], "too many")
    for name in _COMPUTED:
        del body[name]
    name_bytes = body["mirror_name"].rstrip(b"\0")
    _require(name_bytes.isascii(), "mirror_name", name_bytes, "it is ASCII")
    body.update(
        mirror_name=name_bytes.decode("ascii"),
        flags=Flags(body["flags"]),
        data_state=_enum_member(DataState, "data_state", body["data_state"]),
        pending_kind=_enum_member(PendingKind, "pending_kind", body["pending_kind"]),
        arbiter=_enum_member(ArbiterKind, "arbiter", body["arbiter"]),
        base=tuple(body["base"][: counts["base"]]),
        history=tuple(body["history"][: counts["history"]]),
    )
    sb = Superblock(**body)
    if encode(sb) != block:
        raise MetadataError("superblock: bytes in an unused slot")
    return sb


@dataclass(frozen=True, slots=True)
class Chosen:
    """The superblock to use, the slot it came from, and what an operator should know about it.

    `fell_back`: a state newer than this one may have existed and been relied on.
    """

    superblock: Superblock
    slot: int
    fell_back: bool
    notes: tuple[str, ...] = ()


def choose(slot0: bytes, slot1: bytes) -> Chosen:
    """Pick the state that the two slots (4096 bytes each) stand for; see the table above.

    Raises MetadataError when none can be trusted: both unreadable, both sound but impossible by
    the writing protocol, of two identities, or one written by a newer program.
    """
    found: list[Superblock | None] = []
    problems: list[str] = []
    for slot, block in enumerate((slot0, slot1)):
        try:
            found.append(decode(block))
            problems.append("")
        except _NewerFormatError:
            raise
        except MetadataError as error:
            found.append(None)
            problems.append(f"slot {slot}: {error}")
    first, second = found
    if first is not None and second is not None:
        return _choose_of_two(first, second)
    if first is not None:
        return Chosen(first, 0, fell_back=False, notes=(problems[1],))
    if second is not None:
        note = "a newer state may be lost: the peer or the arbiter's record must confirm this one"
        return Chosen(second, 1, fell_back=True, notes=(problems[0], note))
    raise MetadataError(f"{problems[0]}; {problems[1]}; {_REMEDY}")


def _choose_of_two(first: Superblock, second: Superblock) -> Chosen:
    identities = [(sb.mirror_id, sb.node_uuid, sb.node_id) for sb in (first, second)]
    if identities[0] != identities[1]:
        raise MetadataError(f"superblock: the two slots belong to two identities; {_REMEDY}")
    ahead = first.sequence - second.sequence
    if ahead < 0:
        raise MetadataError(
            f"superblock: slot 1 (sequence {second.sequence}) is newer than slot 0 "
            f"(sequence {first.sequence}), which no crash can leave; {_REMEDY}"
        )
    if ahead == 0:
        if first != second:
            raise MetadataError(
                f"superblock: two states with sequence {first.sequence}, "
                f"which no crash can leave; {_REMEDY}"
            )
        return Chosen(first, 0, fell_back=False)
    if ahead == 1:
        note = "slot 1 holds the state before: a crash between the two writes"
        return Chosen(first, 0, fell_back=False, notes=(note,))
    note = f"slot 1 is {ahead} states behind: a write to it was lost"
    return Chosen(first, 0, fell_back=True, notes=(note,))


def advance_generation(sb: Superblock, new: bytes) -> Superblock:
    """`sb` with generation `new`; the old one becomes the newest entry of its history.

    Pending, base and data state stay as they are: they change in the same store, by the caller.
    """
    assert len(new) == ID_BYTES, "a generation has 16 bytes"
    assert new != NO_ID, "all zeros is no generation"
    if new == sb.generation:
        return sb
    earlier = [g for g in (sb.generation, *sb.history) if g not in (new, NO_ID)]
    return replace(sb, generation=new, history=tuple(earlier[:HISTORY_COUNT_MAX]))


def mine(sb: Superblock) -> frozenset[bytes]:
    """The generations that count as this node's own: the current one and the pending one."""
    return frozenset({sb.generation, sb.pending} - {NO_ID})


def known_generations(sb: Superblock) -> frozenset[bytes]:
    """Own generations and their history: what this node's line went through. Never all zeros."""
    return mine(sb) | frozenset(sb.history)


def log_generations(sb: Superblock) -> frozenset[bytes]:
    """Generations under which this node's intent log may have been written.

    Before its first generation a target logs under none (all zeros). Only for the intent log:
    zeros are never an ancestor.
    """
    return known_generations(sb) if sb.history else known_generations(sb) | {NO_ID}
