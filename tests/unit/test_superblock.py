"""The superblock: what is written is read, what is damaged is refused, and what a crash leaves."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.checks import crc32c
from nbdmirror.core.superblock import (
    BODY_BYTES,
    NO_ID,
    SCHEMA,
    ArbiterKind,
    DataState,
    Flags,
    PendingKind,
    Superblock,
    advance_generation,
    choose,
    decode,
    encode,
    known_generations,
    log_generations,
    mine,
)
from nbdmirror.errors import MetadataError
from nbdmirror.limits import GIB, HISTORY_COUNT_MAX, KIB, MIB


def gen(number: int) -> bytes:
    return number.to_bytes(16, "big")


def full_superblock(**changes: Any) -> Superblock:
    """One with every field set to something."""
    values: dict[str, Any] = {
        "mirror_id": b"m" * 16,
        "mirror_name": "orders-db-1",
        "node_id": 7,
        "node_uuid": b"n" * 16,
        "peer_uuid": b"p" * 16,
        "device_bytes": 5 * GIB + 512,
        "extent_bytes": 4 * KIB,
        "region_bytes": 4 * MIB,
        "map_id": b"x" * 16,
        "generation": gen(100),
        "base": (gen(98), gen(99)),
        "pending": gen(101),
        "pending_kind": PendingKind.JOINT,
        "history": (gen(99), gen(98), gen(97)),
        "data_state": DataState.UPTODATE,
        "flags": Flags.WAS_PRIMARY | Flags.ALONE | Flags.CACHE_LOST,
        "boot_id": b"b" * 16,
        "mount_id": b"t" * 16,
        "arbiter": ArbiterKind.S3,
        "arbiter_identity": b"i" * 32,
        "arbiter_counter": 12,
        "forced_over": gen(55),
        "own_txn": 1234,
        "peer_txn": 2**64 - 1,
        "term": 9,
        "read_lease_ms": 1000,
        "saved_bytes": 77,
        "sequence": 41,
    }
    return Superblock(**(values | changes))


def small_superblock(**changes: Any) -> Superblock:
    values: dict[str, Any] = {
        "mirror_id": b"m" * 16,
        "mirror_name": "a",
        "node_id": 1,
        "node_uuid": b"n" * 16,
        "device_bytes": MIB,
        "extent_bytes": 4 * KIB,
        "region_bytes": MIB,
        "map_id": b"x" * 16,
        "arbiter": ArbiterKind.NONE,
    }
    return Superblock(**(values | changes))


def resealed(block: bytes) -> bytes:
    """The block with a fitting checksum: what somebody hostile, or a bug, would write."""
    content = block[:-4]
    return content + crc32c(content).to_bytes(4, "big")


def patched(block: bytes, offset: int, data: bytes) -> bytes:
    return resealed(block[:offset] + data + block[offset + len(data) :])


IDS = st.binary(min_size=16, max_size=16).filter(any)


@st.composite
def superblocks(draw: st.DrawFn) -> Superblock:
    ids = draw(st.lists(IDS, min_size=30, max_size=30, unique=True))
    kind = draw(st.sampled_from(PendingKind))
    return full_superblock(
        mirror_name=draw(st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True)),
        node_id=draw(st.integers(1, 255)),
        mirror_id=ids[0],
        node_uuid=ids[1],
        peer_uuid=draw(st.sampled_from([ids[2], NO_ID])),
        generation=ids[3],
        base=tuple(ids[4 : 4 + draw(st.integers(0, 8))]),
        history=tuple(ids[12 : 12 + draw(st.integers(0, 16))]),
        pending=NO_ID if kind is PendingKind.NONE else ids[29],
        pending_kind=kind,
        data_state=draw(st.sampled_from(DataState)),
        flags=Flags(draw(st.integers(0, sum(Flags)))),
        arbiter=draw(st.sampled_from(ArbiterKind)),
        own_txn=draw(st.integers(0, 2**63 - 1)),
        sequence=draw(st.integers(0, 2**63 - 1)),
        read_lease_ms=draw(st.integers(0, 2**32 - 1)),
    )


@given(superblocks())
def test_what_is_written_is_read(sb: Superblock) -> None:
    """A node comes back from a restart with another state than the one it told its peer."""
    block = encode(sb)
    assert len(block) == 4096
    assert decode(block) == sb


def test_every_field_is_on_disk() -> None:
    """A field added to the record but not to the format is forgotten at every restart."""
    names = {field.name for field in fields(Superblock)}
    stored = set(SCHEMA.parse(encode(full_superblock())).body) - {"_io"}
    assert stored - names == {"magic", "format_version", "base_count", "history_count"}
    assert names <= stored


def test_format_is_the_documented_one() -> None:
    """A change of layout under the same version: the next upgrade reads other fields than written.

    Offsets as in docs/disk-format.md.
    """
    block = encode(full_superblock())
    assert block[:8] == b"NBDMIRR\0"
    assert block[8:10] == b"\0\1"
    assert (block[10], block[11]) == (7, 3)
    assert block[12:16] == (0b1_0000_0011).to_bytes(4, "big")
    assert block[16:24] == (41).to_bytes(8, "big")
    assert block[24:40] == b"m" * 16
    assert block[40:104] == b"orders-db-1".ljust(64, b"\0")
    assert block[104:136] == b"n" * 16 + b"p" * 16
    assert block[136:152] == (5 * GIB + 512).to_bytes(8, "big") + b"\0\0\x10\0\0\x40\0\0"
    assert block[152:200] == b"x" * 16 + gen(100) + gen(101)
    assert block[200:248] == gen(55) + b"b" * 16 + b"t" * 16
    numbers = (1234, 2**64 - 1, 9, 12, 77)
    assert block[248:288] == b"".join(n.to_bytes(8, "big") for n in numbers)
    assert block[288:320] == b"i" * 32
    assert block[320:328] == (1000).to_bytes(4, "big") + bytes([2, 3, 2, 3])
    assert block[328:456] == gen(98) + gen(99) + bytes(96)
    assert block[456:712] == gen(99) + gen(98) + gen(97) + bytes(13 * 16)
    assert block[712:4092] == bytes(3380)
    assert BODY_BYTES == 712
    assert block[4092:] == crc32c(block[:4092]).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mirror_id": NO_ID}, "mirror_id"),
        ({"node_uuid": NO_ID}, "node_uuid"),
        ({"map_id": NO_ID}, "map_id"),
        ({"boot_id": b"short"}, "boot_id"),
        ({"peer_uuid": b"n" * 16}, "peer_uuid"),
        ({"node_id": 0}, "node_id"),
        ({"node_id": 256}, "node_id"),
        ({"mirror_name": ""}, "mirror_name"),
        ({"mirror_name": "-a"}, "mirror_name"),
        ({"mirror_name": "a/b"}, "mirror_name"),
        ({"mirror_name": "Ab"}, "mirror_name"),
        ({"mirror_name": "ab\n"}, "mirror_name"),
        ({"mirror_name": "a" * 65}, "mirror_name"),
        ({"arbiter_identity": b"i" * 31}, "arbiter_identity"),
        ({"own_txn": -1}, "own_txn"),
        ({"sequence": 2**63}, "sequence"),
        ({"read_lease_ms": 2**32}, "read_lease_ms"),
        ({"flags": max(Flags) << 1}, "flags"),
        ({"data_state": 2}, "data_state"),
        ({"base": tuple(gen(n) for n in range(1, 10))}, "base"),
        ({"base": (NO_ID,)}, "base"),
        ({"base": (gen(1), gen(1))}, "base"),
        ({"history": tuple(gen(n) for n in range(1, 18))}, "history"),
        ({"history": (gen(1), NO_ID)}, "history"),
        ({"history": (gen(1), b"x")}, "history"),
        ({"history": (gen(100),)}, "history"),
        ({"pending": NO_ID}, "pending"),
        ({"pending_kind": PendingKind.NONE}, "pending"),
        ({"generation": NO_ID}, "generation"),
        ({"device_bytes": 513}, "device_bytes"),
        ({"extent_bytes": 4097}, "extent_bytes"),
        ({"region_bytes": 0}, "region_bytes"),
    ],
)
def test_impossible_states_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    """A state that the rules exclude is stored, and every later decision builds on it."""
    with pytest.raises(MetadataError, match=named):
        full_superblock(**changes)


@pytest.mark.parametrize(
    ("offset", "data", "named"),
    [
        (8, b"\0\2", "format version 2"),
        (8, b"\0\0", "format version 0"),
        (10, b"\0", "node_id"),
        (11, b"\4", "data_state"),
        (12, b"\x80", "flags"),
        (40, b"\0", "mirror_name"),
        (40, b"\xc3\xa9", "mirror_name"),
        (60, b"x", "mirror_name"),
        (136, b"\xff", "device_bytes"),
        (144, bytes(4), "extent_bytes"),
        (324, b"\3", "pending_kind"),
        (325, b"\5", "arbiter"),
        (326, b"\x09", "base_count"),
        (326, b"\xff", "base_count"),
        (326, b"\3", "base"),
        (326, b"\1", "unused slot"),
        (327, b"\x11", "history_count"),
        (327, b"\2", "unused slot"),
        (456, gen(98), "history"),
        (712, b"\1", "must be zero"),
        (4091, b"\1", "must be zero"),
    ],
)
def test_hostile_blocks_with_good_checksums_are_refused(
    offset: int, data: bytes, named: str
) -> None:
    """A forged or buggy block is believed because its checksum fits."""
    with pytest.raises(MetadataError, match=named):
        decode(patched(encode(full_superblock()), offset, data))


def test_accepted_blocks_encode_to_themselves() -> None:
    """Two readings of one block: a field that is read but not written back, or the reverse."""
    block = encode(full_superblock())
    accepted = 0
    for bit in range(BODY_BYTES * 8):
        changed = bytearray(block)
        changed[bit // 8] ^= 1 << bit % 8
        forged = resealed(bytes(changed))
        try:
            sb = decode(forged)
        except MetadataError:
            continue
        accepted += 1
        assert encode(sb) == forged
        assert sb != full_superblock()
    assert accepted > 1000


def test_no_flipped_bit_is_accepted() -> None:
    """Rot on the disk becomes a state that nobody ever stored."""
    block = encode(full_superblock())
    for bit in range(0, len(block) * 8, 7):
        rotten = bytearray(block)
        rotten[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MetadataError):
            decode(bytes(rotten))


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (b"", "0 bytes"),
        (encode(small_superblock()) + b"\0", "4097 bytes"),
        (bytes(4096), "never written"),
        (b"LVM2" + bytes(4092), "not ours"),
        (b"NBDMIRR\0" + bytes(4088), "checksum"),
    ],
)
def test_what_is_no_superblock_is_named(block: bytes, named: str) -> None:
    """The operator is told "corrupt" and not what the file really is."""
    with pytest.raises(MetadataError, match=named):
        decode(block)


# --- two slots -------------------------------------------------------------------------------

OLD = full_superblock(sequence=41, flags=Flags.WAS_PRIMARY)
NEW = replace(OLD, sequence=42, generation=gen(101), data_state=DataState.OUTDATED)
OLD_BLOCK, NEW_BLOCK = encode(OLD), encode(NEW)
ROTTEN = NEW_BLOCK[:600] + b"!" + NEW_BLOCK[601:]


def test_a_clean_store_leaves_two_equal_slots() -> None:
    """A sound file raises doubts and the node is held back for no reason."""
    chosen = choose(NEW_BLOCK, NEW_BLOCK)
    assert (chosen.superblock, chosen.slot, chosen.fell_back, chosen.notes) == (NEW, 0, False, ())


def test_tear_of_slot_0_at_every_byte() -> None:
    """A power cut in the first write makes a state of two halves, or one nobody is warned of."""
    for cut in range(4097):
        torn = NEW_BLOCK[:cut] + OLD_BLOCK[cut:]
        chosen = choose(torn, OLD_BLOCK)
        if torn == NEW_BLOCK:
            assert (chosen.superblock, chosen.fell_back) == (NEW, False)
        elif torn == OLD_BLOCK:
            assert (chosen.superblock, chosen.fell_back) == (OLD, False)
        else:
            assert (chosen.superblock, chosen.slot, chosen.fell_back) == (OLD, 1, True)
            assert any("slot 0: superblock: checksum" in note for note in chosen.notes)


def test_tear_of_slot_1_at_every_byte() -> None:
    """A power cut in the second write takes back what slot 0 already holds durably."""
    for cut in range(4097):
        chosen = choose(NEW_BLOCK, NEW_BLOCK[:cut] + OLD_BLOCK[cut:])
        assert (chosen.superblock, chosen.slot, chosen.fell_back) == (NEW, 0, False)


def test_first_store_torn_into_slots_never_written() -> None:
    """Creation interrupted: half a superblock is taken for a mirror."""
    with pytest.raises(MetadataError, match="never written"):
        choose(NEW_BLOCK[:2048] + bytes(2048), bytes(4096))
    assert choose(NEW_BLOCK, bytes(4096)).superblock == NEW


def test_rot_of_slot_0_is_a_fall_back() -> None:
    """A node that lost the word "outdated" is promoted as if it had never been told."""
    chosen = choose(ROTTEN, NEW_BLOCK)
    assert (chosen.superblock, chosen.slot, chosen.fell_back) == (NEW, 1, True)


def test_a_lost_write_of_slot_1_is_a_fall_back() -> None:
    """A disk that loses writes is trusted with the newest state."""
    ahead = encode(replace(NEW, sequence=43))
    chosen = choose(ahead, OLD_BLOCK)
    assert (chosen.superblock.sequence, chosen.fell_back) == (43, True)


@pytest.mark.parametrize(
    ("slots", "named"),
    [
        ((OLD_BLOCK, NEW_BLOCK), "no crash can leave"),
        ((NEW_BLOCK, encode(replace(NEW, term=10))), "two states with sequence 42"),
        ((NEW_BLOCK, encode(replace(OLD, mirror_id=b"o" * 16))), "two identities"),
        ((NEW_BLOCK, encode(replace(OLD, node_uuid=b"o" * 16))), "two identities"),
        ((ROTTEN, bytes(4096)), "slot 0: .*checksum.*slot 1: .*never written.*--join --adopt"),
        ((patched(NEW_BLOCK, 8, b"\0\2"), OLD_BLOCK), "newer program"),
        ((OLD_BLOCK, patched(NEW_BLOCK, 8, b"\0\2")), "newer program"),
    ],
)
def test_slots_that_no_crash_explains_are_refused(slots: tuple[bytes, bytes], named: str) -> None:
    """A file restored in part, or written by a newer program, starts with an old state."""
    with pytest.raises(MetadataError, match=named):
        choose(*slots)


# --- generations -----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), max_size=60))
def test_history_is_what_was_current_newest_first(steps: list[int]) -> None:
    """An ancestor is missing, listed twice or empty: unrelated data looks related, or reverse."""
    sb = small_superblock()
    model: list[bytes] = []
    for number in steps:
        new = gen(number)
        if sb.generation not in (NO_ID, new):
            model.insert(0, sb.generation)
        model = [g for n, g in enumerate(model) if g != new and g not in model[:n]]
        sb = advance_generation(sb, new)
        assert sb.generation == new
        assert sb.history == tuple(model[:HISTORY_COUNT_MAX])
        model = model[:HISTORY_COUNT_MAX]


def test_taking_a_generation_leaves_the_rest_alone() -> None:
    """The base is forgotten with the first write alone, and the peer needs a full copy."""
    sb = full_superblock()
    fresh = advance_generation(sb, gen(200))
    assert replace(fresh, generation=sb.generation, history=sb.history) == sb


def test_own_generations_are_current_and_pending() -> None:
    """A crash between claim and first write makes this node a stranger to its own record."""
    assert mine(full_superblock()) == {gen(100), gen(101)}
    assert mine(small_superblock()) == frozenset()
    assert known_generations(full_superblock()) == {gen(n) for n in (97, 98, 99, 100, 101)}


def test_none_is_never_an_ancestor_but_may_head_a_log() -> None:
    """An unused slot relates two strangers; or the first log of a new target reads as damage."""
    assert NO_ID not in known_generations(small_superblock())
    assert log_generations(small_superblock()) == {NO_ID}
    first = advance_generation(small_superblock(), gen(1))
    assert log_generations(first) == {NO_ID, gen(1)}
    assert log_generations(advance_generation(first, gen(2))) == {gen(1), gen(2)}
