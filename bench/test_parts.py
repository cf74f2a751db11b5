"""Micro benches of the parts that a write passes: python -m pytest bench/test_parts.py

Run by hand or by CI beside the tests; figures are of one machine, so compare runs of one machine
(`--benchmark-save`, `--benchmark-compare`). Each bench checks what it measured: a part that became
fast by doing nothing fails here.
"""

from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from bench.rig import (
    DEVICE_BYTES,
    Primary,
    Secondary,
    channels,
    feed,
    superblock,
    tls_streams,
)
from nbdmirror.core.checks import crc32c, crc32c_reference, keyed_hash
from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.intentlog import IntentLog
from nbdmirror.core.ranges import RangeLocks
from nbdmirror.core.session import Operation, Verdict
from nbdmirror.core.superblock import ArbiterKind, decode, encode
from nbdmirror.core.wire import HEADER, HEADER_SCHEMA, FrameType, encode_header
from nbdmirror.driver import ThreadWaiter
from nbdmirror.limits import GIB, KIB, MIB, TIB

Benchmark: TypeAlias = Callable[..., Any]
BLOCK = bytes(range(256)) * 16
MAP_ID = b"p" * 16
GENERATION = b"g" * 16
INTEGRITIES = pytest.mark.parametrize("integrity", ["crc", "mac"])


def blocks() -> Iterator[int]:
    """Offsets of 4 KiB blocks all over the device, none next to the one before it."""
    return cycle(range(0, DEVICE_BYTES - 4096, 1021 * 4096))


# --- header and frames -----------------------------------------------------------------------


def test_encode_header(benchmark: Benchmark) -> None:
    """Breaks in the field: each write pays for this header twice, so all writes slow down."""
    header = benchmark(encode_header, FrameType.WRITE, 0, 4096, 7, 8, 4096, 0, 9, 10)
    assert HEADER_SCHEMA.parse(header).offset == 4096


def test_header_by_schema(benchmark: Benchmark) -> None:
    """Breaks in the field: nothing; it shows why the hot header has a struct twin."""
    values = dict.fromkeys(("flags", "length", "session", "seq", "offset", "aux"), 0)
    values |= {"type": 1, "payload_crc": 0, "header_crc": 0}
    assert len(benchmark(HEADER_SCHEMA.build, values)) == HEADER.size


@INTEGRITIES
@pytest.mark.parametrize("batch", [1, 16])
def test_frame_reader(benchmark: Benchmark, batch: int, integrity: str) -> None:
    """Breaks in the field: the replica cannot keep up with the wire; figure is per batch."""
    sender, receiver = channels(macs=integrity == "mac")
    receiver.open_data(DEVICE_BYTES, 1)
    numbers = count(1)

    def arrived() -> tuple[tuple[bytes], dict[str, Any]]:
        frames = [
            sender.encode(FrameType.WRITE, 0, next(numbers), 4096, 0, BLOCK) + BLOCK
            for _ in range(batch)
        ]
        return (b"".join(frames),), {}

    def take(data: bytes) -> int:
        feed(receiver, data)
        return len(receiver.frames())

    found = benchmark.pedantic(take, setup=arrived, rounds=2000)  # type: ignore[attr-defined]
    assert found == batch


@INTEGRITIES
@pytest.mark.parametrize("size", [0, 4 * KIB, MIB])
def test_frame_sender(benchmark: Benchmark, size: int, integrity: str) -> None:
    """Breaks in the field: each write and each answer pays for this under the engine's lock."""
    sender, _ = channels(macs=integrity == "mac")
    kind, data, numbers = FrameType.WRITE if size else FrameType.ACK, bytes(size), count(1)
    head = benchmark(lambda: sender.encode(kind, 0, next(numbers), 0, 0, data))
    assert len(head) == HEADER.size + (16 if integrity == "mac" else 0)


# --- TLS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 4 * KIB + 48, MIB + 48])
def test_tls_seal(benchmark: Benchmark, size: int, tmp_path: Path) -> None:
    """Breaks in the field: with `tls = "on"` each write and each answer pays for this, with the
    link's lock held: from the joined buffers to the bytes for the socket.
    """
    one, _ = tls_streams(tmp_path)
    parts = [bytes(48), bytes(size - 48)]

    def seal() -> bytes:
        one.write(b"".join(parts))
        return one.outgoing.read()

    assert len(benchmark(seal)) > size


@pytest.mark.parametrize("size", [48, 4 * KIB + 48, MIB + 48])
def test_tls_open(benchmark: Benchmark, size: int, tmp_path: Path) -> None:
    """Breaks in the field: as above, for the end that receives."""
    one, two = tls_streams(tmp_path)
    buffer = memoryview(bytearray(size))

    def arrived() -> tuple[tuple[bytes], dict[str, Any]]:
        one.write(bytes(size))
        return (one.outgoing.read(),), {}

    def take(data: bytes) -> int:
        two.incoming.write(data)
        got = 0
        while got < size:
            got += two.read(buffer[got:]) or 0
        return got

    assert benchmark.pedantic(take, setup=arrived, rounds=2000) == size  # type: ignore[attr-defined]


# --- checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [44, 4 * KIB, MIB])
def test_crc32c(benchmark: Benchmark, size: int) -> None:
    """Breaks in the field: a library without the hardware's instruction costs 50 times this."""
    data = bytes(size)
    assert benchmark(crc32c, data, 7) == crc32c_reference(data, 7)


@pytest.mark.parametrize("size", [4 * KIB, 32 * KIB])
def test_keyed_hash(benchmark: Benchmark, size: int) -> None:
    """Breaks in the field: a full sync that compares is slower than one that copies."""
    assert len(benchmark(keyed_hash, b"k" * 32, bytes(size))) == 16


# --- dirty map -------------------------------------------------------------------------------


def test_dirty_mark(benchmark: Benchmark) -> None:
    """Breaks in the field: a primary that is alone slows down with each write."""
    dirty = DirtyMap(superblock().geometry(), MAP_ID)
    offsets = blocks()

    def mark() -> None:
        at = next(offsets)
        dirty.mark(at, at + 4096)

    benchmark(mark)
    assert dirty.any()


def test_dirty_next_run_of_1_tib(benchmark: Benchmark) -> None:
    """Breaks in the field: a resync of a large device searches longer than it copies."""
    dirty = DirtyMap(Geometry(TIB, 4096, 4 * MIB), MAP_ID)
    dirty.mark(TIB - 8192, TIB - 4096)
    first = TIB // 4096 - 2
    assert benchmark(dirty.next_run, 0, 256) == (first, first + 1)


def test_dirty_count_of_1_gib(benchmark: Benchmark) -> None:
    """Breaks in the field: asking for the state stops the writes for as long as this takes."""
    dirty = DirtyMap(Geometry(GIB, 4096, 4 * MIB), MAP_ID)
    dirty.mark(0, 64 * MIB)
    assert benchmark(lambda: dirty.count) == 64 * MIB // 4096


def test_dirty_page(benchmark: Benchmark) -> None:
    """Breaks in the field: regions leave the intent log slowly, so cold writes wait."""
    dirty = DirtyMap(superblock().geometry(), MAP_ID)

    def save() -> int:
        page = dirty.begin_page(0, GENERATION)
        dirty.end_page(page)
        return len(page.block)

    assert benchmark(save) == 4096


# --- intent log ------------------------------------------------------------------------------


def test_intent_touch_hot(benchmark: Benchmark) -> None:
    """Breaks in the field: every write pays for this, in hot regions too."""
    log = IntentLog(superblock().geometry(), MAP_ID)
    log.touch(3, 3, 1)
    log.end_commit(log.begin_commit(GENERATION))
    assert benchmark(log.touch, 3, 3, 2) == 0


@pytest.mark.parametrize("hot", [8, 256])
def test_intent_commit_block(benchmark: Benchmark, hot: int) -> None:
    """Breaks in the field: each write to a cold region waits for this before it touches data."""
    log = IntentLog(superblock().geometry(), MAP_ID)
    for region in range(hot):
        log.touch(region, region, region + 1)

    def commit() -> int:
        begun = log.begin_commit(GENERATION)
        log.end_commit(begun)
        return len(begun.block)

    assert benchmark(commit) == 4096


# --- locks, window, superblock ---------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 15])
def test_range_lock(benchmark: Benchmark, held: int) -> None:
    """Breaks in the field: a deep queue of a client costs more for each request in it."""
    locks = RangeLocks(ThreadWaiter)
    for index in range(held):
        locks.acquire(index * MIB, index * MIB + 4096, True)

    def lock() -> None:
        locks.release(locks.acquire(GIB, GIB + 4096, True))

    benchmark(lock)
    assert len(locks) == held


def test_window(benchmark: Benchmark) -> None:
    """Breaks in the field: register, frame and acknowledge are paid for by each write."""
    primary = Primary()
    session = primary.session
    numbers = count(1)

    def one_write() -> Verdict | None:
        operation = Operation(FrameType.WRITE, 0, 4096, BLOCK, 0, ThreadWaiter())
        operation.seq = next(numbers)
        session.submit(operation)
        session.outgoing.clear()
        session.acknowledged(operation.seq)
        return operation.verdict

    assert benchmark(one_write) is Verdict.ACKNOWLEDGED


def test_superblock(benchmark: Benchmark) -> None:
    """Breaks in the field: changes of role take longer than the second that they have."""
    sb = superblock()
    assert benchmark(lambda: decode(encode(sb))) == sb


# --- whole paths -----------------------------------------------------------------------------


@INTEGRITIES
@pytest.mark.parametrize("size", [4 * KIB, MIB])
def test_write_path(benchmark: Benchmark, size: int, integrity: str) -> None:
    """Breaks in the field: this is what safety adds to each write on the primary."""
    primary = Primary(macs=integrity == "mac")
    data = bytes(size)
    offsets = cycle(range(0, 128 * MIB, MIB))
    benchmark(lambda: primary.write(data, next(offsets)))
    assert primary.node.seq > 0
    assert primary.session.acked_seq == primary.node.seq
    assert not primary.node.inflight
    assert len(primary.node.log.hot) == min(-(-primary.node.seq // 4), 32)


@pytest.mark.parametrize("arbiter", [ArbiterKind.NONE, ArbiterKind.ETCD])
def test_read_path(benchmark: Benchmark, arbiter: ArbiterKind) -> None:
    """Breaks in the field: this is what safety adds to each read; a lease is next to nothing."""
    buffer = bytearray(4096)
    primary = Primary(arbiter)
    if arbiter is ArbiterKind.ETCD:
        primary.node.lease.until_ms = primary.node.shell.now_ms() + 3_600_000
    offsets = cycle(range(0, 128 * MIB, MIB))
    benchmark(lambda: primary.read(buffer, next(offsets)))
    assert not len(primary.node.locks)


@INTEGRITIES
@pytest.mark.parametrize("batch", [1, 16])
def test_replica_path(benchmark: Benchmark, batch: int, integrity: str) -> None:
    """Breaks in the field: this is what the peer adds to each write; figure is per batch."""
    secondary = Secondary(macs=integrity == "mac")
    offsets = cycle(range(0, 128 * MIB, MIB))

    def arrived() -> tuple[tuple[bytes], dict[str, Any]]:
        frames = [secondary.frame(BLOCK, next(offsets)) for _ in range(batch)]
        return (b"".join(frames),), {}

    benchmark.pedantic(  # type: ignore[attr-defined]
        secondary.receive, setup=arrived, rounds=2000
    )
    assert secondary.session.applied_seq == secondary.session.acked_seq == secondary.seq
