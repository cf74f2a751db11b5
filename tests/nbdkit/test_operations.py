"""Every operation of NBD, at its edges, with the errno that the client must see."""

import contextlib
import errno
import os
import random
import re
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.support.fixtures import MakePair
from tests.support.pair import Engine, Pair
from tests.support.powercut import run

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


class Requests:
    """Requests in flight, each on a connection of its own if not told otherwise, and the errno that
    each ended with.
    """

    def __init__(self, engine: Engine) -> None:
        self.codes: dict[str, int] = {}
        self._engine = engine
        self._handles: dict[str, nbd.NBD] = {}

    def _begin(self, name: str, behind: str = "") -> tuple[nbd.NBD, Callable[[Any], int]]:
        """A connection for the request `name`, and what notes how it ends."""

        def note(error: Any) -> int:
            self.codes[name] = int(getattr(error, "value", error) or 0)
            return 1

        self._handles[name] = self._handles[behind] if behind else self._engine.connect()
        return self._handles[name], note

    def write(self, name: str, *, behind: str = "") -> None:
        """A block at the beginning, not waited for; on the connection of the request `behind`."""
        handle, note = self._begin(name, behind)
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0, completion=note)

    def read(self, name: str, count: int) -> None:
        """From the beginning; waited for until the first bytes of the reply are here."""
        handle, note = self._begin(name)
        handle.aio_pread(nbd.Buffer(count), 0, completion=note)
        handle.poll(-1)

    def answered(self) -> dict[str, int]:
        """Serve every connection until its request is answered or it is gone; what they got."""
        for name, handle in self._handles.items():
            with contextlib.suppress(nbd.Error):
                while name not in self.codes:
                    handle.poll(-1)
        return self.codes


@contextlib.contextmanager
def demoting(engine: Engine) -> Iterator[None]:
    """Demote beside what the test does, from the moment on in which the gate is shut."""
    thread = threading.Thread(target=engine.command, args=("demote",), daemon=True)
    thread.start()
    engine.wait_state(lambda s: s["role"] != "primary", "the gate is shut")
    yield
    thread.join(60)
    assert not thread.is_alive()
    assert engine.state()["clients"] == 0


def number_of(operation: Callable[[], object]) -> str | None:
    """The errno that an operation fails with, or None."""
    try:
        operation()
    except nbd.Error as error:
        return str(error.errno)
    return None


def test_demotion_under_load_says_shutdown(make_pair: MakePair) -> None:
    """Breaks in the field: a client of a demoted node hears "done" for what was not done, hangs,
    or gets an errno that it takes for a broken disk.

    The gate is held shut with the clients connected by a write whose peer does not answer.
    """
    pair = make_pair(engine={"ack_timeout_ms": 30_000}).up()
    alpha, beta = pair.both
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(alpha.uri)
    requests = Requests(alpha)
    beta.freeze()
    requests.write("in flight before")
    alpha.wait_state(
        lambda s: s["in_flight"] >= 1, "it waits for beta, perhaps beside a background flush"
    )
    requests.write("waits for the first")
    with demoting(alpha):
        operations: dict[str, Callable[[], object]] = {
            "read": lambda: handle.pread(1, 0),
            "write": lambda: handle.pwrite(b"x", 0),
            "write, FUA": lambda: handle.pwrite(b"x", 0, nbd.CMD_FLAG_FUA),
            "flush": handle.flush,
            "zero": lambda: handle.zero(4096, 0),
            "fast zero": lambda: handle.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO),
            "trim": lambda: handle.trim(4096, 0),
            "extents": lambda: handle.block_status(4096, 0, lambda *_: 0),
        }
        found = {name: number_of(operation) for name, operation in operations.items()}
        beta.thaw()
        codes = requests.answered()
    assert set(found.values()) == {"ESHUTDOWN"}, found
    assert codes == {"in flight before": 0, "waits for the first": errno.ESHUTDOWN}
    with pytest.raises(nbd.Error):
        alpha.connect()
    pair.stop()
    pair.assert_equal()


def test_frozen_writes_are_answered_by_demote(pair: Pair) -> None:
    """Breaks in the field: a write that nobody can answer keeps the client waiting for ever, or
    ends as a broken connection, which a client takes for a reason to send it again.
    """
    alpha, beta = pair.both
    requests = Requests(alpha)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    for name in ("first", "waits for the first", "and the next"):
        requests.write(name)
    requests.write("behind it", behind="first")  # one thread has not even read it
    alpha.wait_state(lambda s: s["in_flight"] >= 1, "it waits")
    with demoting(alpha):
        codes = requests.answered()
    assert list(codes.values()) == [errno.ESHUTDOWN] * 4, codes


def test_a_reply_on_its_way_arrives(make_pair: MakePair) -> None:
    """Breaks in the field: demotion cuts a reply off, and the client hears of a broken connection
    instead of what became of its request.
    """
    pair = make_pair(size=80 << 20).up(sparse=True)
    requests = Requests(pair.alpha)
    # More than the socket holds: nbdkit is in the midst of it as long as nobody reads.
    requests.read("read", 64 << 20)
    with demoting(pair.alpha):
        assert requests.answered() == {"read": 0}


def test_a_client_that_does_not_read_is_cut_off(make_pair: MakePair) -> None:
    """Breaks in the field: a stopped client keeps a node from stepping back."""
    pair = make_pair(size=80 << 20).up(sparse=True)
    requests = Requests(pair.alpha)
    requests.read("read", 64 << 20)
    with demoting(pair.alpha):
        pair.alpha.wait_state(lambda s: s["clients"] == 0, "it is gone")
    assert requests.answered() == {"read": errno.ENOTCONN}


def test_out_of_range_is_refused(pair: Pair) -> None:
    """Breaks in the field: a request beyond the end grows the file or ends the engine."""
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(pair.alpha.uri)
    handle.set_strict_mode(0)
    attempts: dict[str, Callable[[int], object]] = {
        "ENOSPC write": lambda offset: handle.pwrite(bytes(4096), offset),
        "ENOSPC zero": lambda offset: handle.zero(4096, offset),
        "EINVAL read": lambda offset: handle.pread(4096, offset),
        "EINVAL trim": lambda offset: handle.trim(4096, offset),
        "EINVAL cache": lambda offset: handle.cache(4096, offset),
        "EINVAL extents": lambda offset: handle.block_status(4096, offset, lambda *_: 0),
    }
    for offset in (pair.size - 1, pair.size, (1 << 63) - 4096):
        for name, attempt in attempts.items():
            found = number_of(partial(attempt, offset))
            assert found == name.split()[0], (name, offset)
    handle.pwrite(b"still here", 0)
    assert pair.alpha.data.stat().st_size == pair.size


def test_fast_zero_that_is_not_fast_is_refused(
    make_pair: MakePair, tmp_path: Path, require_root: None
) -> None:
    """Breaks in the field: a client that zeroes a device first, because that is fast, writes all
    of it twice.
    """
    run("mount", "-t", "tmpfs", "none", str(tmp_path))  # which cannot zero but by writing
    pair = make_pair(data_dirs={"beta": tmp_path / "node"})
    try:
        handle = pair.up().alpha.connect()
        handle.pwrite(b"x" * 4096, 0)
        assert (
            number_of(lambda: handle.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)) == "ENOTSUP"
        )  # one number on Linux
        assert bytes(handle.pread(4096, 0)) == b"x" * 4096, "nothing was done"
        handle.zero(4096, 0)
        assert bytes(handle.pread(4096, 0)) == bytes(4096)
    finally:
        pair.close()
        run("umount", str(tmp_path))


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
        thread.join(60)
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
