"""The record of an arbiter: its bytes, and that nothing else is taken for one."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.record import (
    COUNTER_READ_MAX,
    OWNER_MAX,
    RECORD_BYTES_MAX,
    Record,
    decode,
    encode,
)
from nbdmirror.core.superblock import ID_BYTES, NO_ID
from nbdmirror.errors import ArbiterError

MIRROR, GENERATION = b"m" * ID_BYTES, b"g" * ID_BYTES
RECORD = Record(MIRROR, 7, GENERATION, 1)
records = st.builds(
    Record,
    mirror_id=st.binary(min_size=ID_BYTES, max_size=ID_BYTES),
    counter=st.integers(1, COUNTER_READ_MAX),
    generation=st.binary(min_size=ID_BYTES, max_size=ID_BYTES).filter(lambda g: g != NO_ID),
    owner=st.integers(0, OWNER_MAX),
    moved=st.booleans(),
)


@given(records)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    """Breaks in the field: a node reads another owner or generation than was written."""
    data = encode(record)
    assert decode(data, record.mirror_id) == record
    assert len(data) <= RECORD_BYTES_MAX
    assert data == encode(replace(record))


@given(records, records)
def test_two_records_have_two_contents(one: Record, other: Record) -> None:
    """Breaks in the field: a store that tells contents apart by a hash takes old for new."""
    assert (encode(one) == encode(other)) == (one == other)


@given(st.binary(max_size=RECORD_BYTES_MAX + 2))
def test_noise_is_no_record(data: bytes) -> None:
    """Breaks in the field: rubbish in the store ends the controller, or frees a node."""
    with pytest.raises(ArbiterError):
        decode(data, MIRROR)


def changed(**changes: Any) -> bytes:
    """The bytes of a record with other values; a value of ... is left out."""
    facts = {**json.loads(encode(RECORD)), **changes}
    return json.dumps({key: each for key, each in facts.items() if each is not ...}).encode()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("format", [..., 0, 2, "1", None, [1]]),
        ("mirror", [..., "", "6d" * 15, "6d" * 17, "6D" * 16, 7, None, "6e" * 16, "zz" * 16]),
        ("generation", [..., "", "67" * 15, "0x" + "67" * 15, 7, None, "00" * 16]),
        ("counter", [..., 0, -1, COUNTER_READ_MAX + 1, "7", 7.0, True, None]),
        ("owner", [..., -1, OWNER_MAX + 1, "1", 1.0, True, None]),
        ("moved", [..., 0, 1, "false", None]),
    ],
)
def test_each_field_is_checked(key: str, values: list[Any]) -> None:
    """Breaks in the field: whoever may write to the store chooses what a node believes."""
    assert decode(changed(), MIRROR) == RECORD
    for value in values:
        with pytest.raises(ArbiterError) as caught:
            decode(changed(**{key: value}), MIRROR)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [b"[]", b"7", b"null", b'"x"', b"[" * 1000, b"{}" + b" " * 1023])
def test_other_json_is_no_record(data: bytes) -> None:
    """Breaks in the field: as above."""
    with pytest.raises(ArbiterError):
        decode(data, MIRROR)


def test_what_follows_has_a_higher_counter() -> None:
    """Breaks in the field: a delayed write finds the version that it waits for."""
    claim = RECORD.next(b"h" * ID_BYTES, 2)
    assert (claim.counter, claim.owner, claim.moved) == (8, 2, False)
    assert claim.names(2, b"h" * ID_BYTES)
    assert not claim.names(1, b"h" * ID_BYTES)
    assert not claim.names(2, GENERATION)
    assert not claim.next(b"h" * ID_BYTES, 2, moved=True).names(2, b"h" * ID_BYTES)
