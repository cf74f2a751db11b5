"""What every implementation of the port `Store` keeps, held against a bytearray."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdmirror.errors import NotSupportedError, StoreError
from tests.contract.conftest import DEVICE_BYTES, failing_syncs


def read(store: Any, offset: int, length: int) -> bytes:
    """What the store holds there."""
    buffer = bytearray(b"\xee" * length)
    store.pread(buffer, offset)
    return bytes(buffer)


def spans() -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) within the device, often at the edges of pages and of the device."""
    edges = st.sampled_from([0, 1, 511, 4095, 4096, 4097, 65536, 1 << 20, DEVICE_BYTES - 4096])
    offsets = edges | st.integers(0, DEVICE_BYTES - 1)
    lengths = st.sampled_from([1, 512, 4096, 8192, 100_000, 3 << 20]) | st.integers(1, 200_000)
    return st.tuples(offsets, lengths).map(lambda s: (s[0], min(s[1], DEVICE_BYTES - s[0])))


operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "durable", "zero", "zero-trim", "trim", "sync"]),
        spans(),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=12,
)


def apply(store: Any, kind: str, span: tuple[int, int], fill: int) -> bytes | None:
    """Do it to the store; return what the range must hold afterwards, None if it is unchanged."""
    offset, length = span
    if kind == "write":
        store.pwrite(memoryview(bytes([fill]) * length), offset)
        return bytes([fill]) * length
    if kind == "durable":
        store.pwrite_durable(bytes([fill]) * length, offset)
        return bytes([fill]) * length
    if kind == "sync" or (kind == "trim" and not store.can_trim):
        store.fdatasync()
        return None
    if kind == "trim":
        store.trim(offset, length)
    else:
        store.zero(offset, length, kind == "zero-trim")
    return bytes(length)


@given(sequence=operations)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_what_was_written(
    store: Any, sequence: list[tuple[str, tuple[int, int], int]]
) -> None:
    """If this fails, clients read other bytes than they wrote, zeroed or trimmed."""
    store.zero(0, DEVICE_BYTES, True)
    model = bytearray(DEVICE_BYTES)
    for kind, span, fill in sequence:
        expected = apply(store, kind, span, fill)
        if expected is not None:
            model[span[0] : span[0] + span[1]] = expected
    assert read(store, 0, DEVICE_BYTES) == model


@given(sequence=operations, window=spans())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_data_runs_miss_nothing(
    store: Any, sequence: list[tuple[str, tuple[int, int], int]], window: tuple[int, int]
) -> None:
    """If this fails, a resync or a client's block status takes data for zeros and loses it."""
    store.zero(0, DEVICE_BYTES, True)
    for kind, span, fill in sequence:
        apply(store, kind, span, fill)
    offset, length = window
    runs = store.data_runs(offset, length)
    at = offset
    for start, end in runs:
        assert at <= start < end <= offset + length
        assert not any(read(store, at, start - at))
        at = end
    assert not any(read(store, at, offset + length - at))


def test_data_runs_of_an_empty_device_are_few(store: Any) -> None:
    """If this fails, the first resync of an empty mirror reads and sends the whole device."""
    store.pwrite(b"x" * 4096, 1 << 20)
    store.fdatasync()
    assert sum(end - start for start, end in store.data_runs(0, DEVICE_BYTES)) <= 65536


def test_trim_is_refused_where_it_cannot_zero(store: Any) -> None:
    """If this fails, a trim succeeds that leaves old data in place, different on each node."""
    store.pwrite(b"x" * 65536, 0)
    if store.can_trim:
        store.trim(0, 65536)
        assert not any(read(store, 0, 65536))
    else:
        with pytest.raises(NotSupportedError):
            store.trim(0, 65536)
        assert read(store, 0, 65536) == b"x" * 65536


def test_a_range_outside_the_device_changes_nothing(store: Any) -> None:
    """If this fails, an off-by-one of ours grows the file or zeroes behind the device."""
    with pytest.raises(AssertionError):
        store.zero(DEVICE_BYTES - 512, 1024, True)
    with pytest.raises(AssertionError):
        store.trim(DEVICE_BYTES, 512)
    with pytest.raises(AssertionError):
        store.data_runs(0, DEVICE_BYTES + 1)


def test_a_failed_sync_fails_for_ever(store: Any) -> None:
    """If this fails, a retried sync reports data as durable that the kernel has dropped."""
    store.pwrite(b"x" * 4096, 0)
    with failing_syncs(store), pytest.raises(StoreError, match="EINVAL"):
        store.fdatasync()
    with pytest.raises(StoreError, match="failed before"):
        store.fdatasync()
    with pytest.raises(StoreError, match="failed before"):
        store.pwrite_durable(b"x", 0)
    store.pwrite(b"y" * 4096, 0)
    assert read(store, 0, 4096) == b"y" * 4096


def test_a_failed_durable_write_fails_for_ever(store: Any) -> None:
    """If this fails, a write with FUA that never reached the disk is forgotten by the next sync."""
    with failing_syncs(store), pytest.raises(StoreError):
        store.pwrite_durable(b"x" * 4096, 0)
    with pytest.raises(StoreError, match="failed before"):
        store.fdatasync()
