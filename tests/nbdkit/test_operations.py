"""Every operation of NBD, at its edges, with the errno that the client must see."""

import os
import random
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.support.fixtures import MakePair
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

GIB = 1 << 30


def test_unaligned_bytes_and_big_requests(make_pair: MakePair) -> None:
    """Breaks in the field: a client with odd sizes, or 64 MiB in one request, reads garbage."""
    pair = make_pair(size=80 << 20).up()
    handle = pair.alpha.connect()
    dice = random.Random(6)
    expected = bytearray(pair.size)
    big = dice.randbytes(64 << 20)
    handle.set_strict_mode(0)
    handle.pwrite(big, 5)
    expected[5 : 5 + len(big)] = big
    for _ in range(200):
        offset, count = dice.randrange(pair.size - 9000), dice.choice((1, 2, 511, 4097, 8999))
        piece = dice.randbytes(count)
        handle.pwrite(piece, offset, dice.choice((0, nbd.CMD_FLAG_FUA)))
        expected[offset : offset + count] = piece
    assert bytes(handle.pread(64 << 20, 3)) == expected[3 : 3 + (64 << 20)]
    handle.flush()
    handle.shutdown()
    pair.stop()
    pair.assert_equal()
    assert pair.beta.data.read_bytes() == expected


@pytest.mark.timeout(180)
def test_trim_and_zero_up_to_the_largest_range(make_pair: MakePair) -> None:
    """Breaks in the field: blkdiscard of a whole disk ends the mirror."""
    pair = make_pair(size=5 * GIB).up(sparse=True)
    handle = pair.alpha.connect()
    largest = 4 * GIB - 1
    handle.pwrite(b"x" * 8192, 4 * GIB - 4096)
    handle.pwrite(b"y" * 4096, GIB)
    handle.zero(largest, 1, nbd.CMD_FLAG_FUA)
    assert bytes(handle.pread(4096, GIB)) == bytes(4096)
    assert bytes(handle.pread(8192, 4 * GIB - 4096)) == bytes(4096) + b"x" * 4096
    handle.pwrite(b"z" * 4096, 2 * GIB)
    handle.trim(largest, 0)
    assert bytes(handle.pread(4096, 2 * GIB)) == bytes(4096)
    handle.pwrite(b"end", 5 * GIB - 3)
    handle.flush()
    pair.synced()
    handle.shutdown()
    pair.stop()
    with pair.beta.data.open("rb") as file:
        for offset, text in ((GIB, bytes(16)), (4 * GIB, b"x"), (5 * GIB - 3, b"end")):
            file.seek(offset)
            if text != b"x":
                assert file.read(len(text)) == text
    pair.assert_equal()


def test_demoted_node_says_shutdown(pair: Pair) -> None:
    """Breaks in the field: a client of a demoted node hears "done", or hangs."""
    alpha = pair.alpha
    handle = alpha.connect()
    handle.pwrite(bytes(4096), 0)
    failed: list[str] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            try:
                handle.pwrite(bytes(4096), 0)
            except nbd.Error as error:
                failed.append(str(error.errno))
                return

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    alpha.command("demote")
    thread.join(10)
    stop.set()
    assert not thread.is_alive()
    assert failed
    assert failed[0] in ("ESHUTDOWN", "ENOTCONN", "EINVAL", "None"), failed
    assert alpha.state()["clients"] == 0
    with pytest.raises(nbd.Error):
        alpha.connect()


def test_frozen_write_is_answered_by_demote(pair: Pair) -> None:
    """Breaks in the field: a write that nobody can answer keeps the client waiting for ever."""
    alpha, beta = pair.both
    handle = alpha.connect()
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    codes: list[int] = []

    def done(error: Any) -> int:
        codes.append(int(getattr(error, "value", error) or 0))
        return 1

    handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0, completion=done)
    alpha.wait_state(lambda s: s["in_flight"] == 1, "it waits")
    thread = threading.Thread(target=poll_until, args=(handle, codes), daemon=True)
    thread.start()
    alpha.command("demote")
    thread.join(10)
    assert codes
    assert codes[0] != 0


def poll_until(handle: nbd.NBD, codes: list[int]) -> None:
    """Serve a connection until a request was answered or the connection is gone."""
    while not codes:
        try:
            handle.poll(100)
        except nbd.Error:
            return


def test_out_of_range_is_invalid(pair: Pair) -> None:
    """Breaks in the field: a request beyond the end grows the file or ends the engine."""
    handle = pair.alpha.connect()
    handle.set_strict_mode(0)
    attempts: list[Callable[[], object]] = [
        lambda: handle.pwrite(bytes(4096), pair.size - 1),
        lambda: handle.pread(4096, pair.size),
        lambda: handle.zero(4096, pair.size),
        lambda: handle.trim(4096, pair.size),
    ]
    for attempt in attempts:
        with pytest.raises(nbd.Error) as caught:
            attempt()
        assert caught.value.errno in ("EINVAL", "ENOSPC"), caught.value.errno
    handle.pwrite(b"still here", 0)
    assert pair.alpha.data.stat().st_size == pair.size


def test_overlapping_writes_on_several_connections_end_equal(pair: Pair) -> None:
    """Breaks in the field: two connections write one place, and each node keeps another one."""
    handles = [pair.alpha.connect() for _ in range(4)]

    def write(index: int) -> None:
        dice = random.Random(index)
        for _ in range(300):
            count = dice.randrange(1, 20_000)
            handles[index].pwrite(bytes([index + 1]) * count, dice.randrange(0, 65536))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    for handle in handles:
        handle.shutdown()
    pair.stop()
    pair.assert_equal()


def test_a_flush_on_one_connection_covers_the_others(pair: Pair) -> None:
    """Breaks in the field: multi-conn is promised, and a flush leaves the others' writes behind."""
    one, other = pair.alpha.connect(), pair.alpha.connect()
    for _ in range(5):
        one.pwrite(os.urandom(4096), 8192)
        assert pair.alpha.state()["unflushed_bytes"] >= 0
        other.flush()
        assert pair.alpha.state()["unflushed_bytes"] == 0, "flushed on both nodes"


def test_connection_limit(make_pair: MakePair) -> None:
    """Breaks in the field: a client that leaks connections takes the engine's memory."""
    pair = make_pair(engine={"connections_max": 3}).up()
    handles = [pair.alpha.connect() for _ in range(3)]
    with pytest.raises(nbd.Error):
        pair.alpha.connect()
    handles[0].shutdown()
    pair.alpha.wait_state(lambda s: s["clients"] == 2, "one is gone")
    pair.alpha.connect().shutdown()


def test_sockets_and_their_modes(make_pair: MakePair) -> None:
    """Breaks in the field: every user of the server may write, or the TCP export is not there."""
    pair = make_pair(tcp=True).up()
    config = pair.alpha.config
    for path in (config.export_unix, config.control_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(config.me.run_dir.stat().st_mode) == 0o700
    handle = nbd.NBD()
    handle.connect_tcp(pair.hosts["alpha"], "10809")
    handle.pwrite(b"over tcp", 0)
    other = pair.alpha.connect()
    assert bytes(other.pread(8, 0)) == b"over tcp"


def test_nothing_leaks_over_reconnections(pair: Pair) -> None:
    """Breaks in the field: after weeks of short cuts the engine has no descriptors left."""
    alpha, beta = pair.both

    def counts() -> list[int]:
        return [len(list(Path(f"/proc/{e.pid}/fd").iterdir())) for e in pair.both]

    for _ in range(3):
        alpha.connect().shutdown()
    alpha.wait_state(lambda s: s["clients"] == 0, "gone")
    before = counts()
    for _ in range(6):
        for _ in range(5):
            alpha.connect().shutdown()
        beta.freeze()
        beta.thaw()
        seen = alpha.last_event()
        alpha.command("resync")
        alpha.wait_event("in-sync", after=seen)
        pair.synced()
    alpha.wait_state(lambda s: s["clients"] == 0, "gone")
    after = counts()
    assert all(now <= then + 2 for now, then in zip(after, before, strict=True)), (before, after)


def test_clients_that_come_and_go_leave_no_memory(pair: Pair) -> None:
    """Breaks in the field: each reconnecting client costs locked memory, until there is none."""
    status = Path(f"/proc/{pair.alpha.pid}/status")
    stays = pair.alpha.connect()

    def visits(count: int) -> int:
        for _ in range(count):
            handle = pair.alpha.connect()
            pending = [handle.aio_pwrite(nbd.Buffer(4096), i * 4096) for i in range(64)]
            while pending:
                pending = [cookie for cookie in pending if not handle.aio_command_completed(cookie)]
                if pending:
                    handle.poll(-1)
            handle.shutdown()
            stays.pwrite(bytes(4096), 0)
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0])

    visits(10)
    before = visits(10)
    after = visits(200)
    assert after - before < 2048, (before, after)
