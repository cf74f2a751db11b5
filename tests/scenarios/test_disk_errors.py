"""The disk of one node fails or fills up, under load."""

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.support.fixtures import MakePair
from tests.support.load import Load
from tests.support.pair import Engine, Pair
from tests.support.powercut import run

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]


@contextlib.contextmanager
def failing(engine: Engine, call: str, path: Path, number: str = "EIO") -> Iterator[None]:
    """Let a system call on one file fail in a running engine."""
    tracer = subprocess.Popen(
        [
            "strace", "-f", "-p", str(engine.pid), "-P", str(path),
            "-e", f"trace={call}", "-e", f"inject={call}:error={number}",
        ],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert tracer.stderr is not None
        assert b"attached" in tracer.stderr.readline()
        # It writes a line for each call: nobody may have to wait for a reader.
        subprocess_drain(tracer)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(60)
        assert tracer.stderr is not None
        tracer.stderr.close()


def subprocess_drain(tracer: subprocess.Popen[bytes]) -> None:
    """Give the tracer's output somewhere to go that never fills up."""
    assert tracer.stderr is not None
    fcntl.fcntl(tracer.stderr.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)


def test_primary_cannot_write_hands_over(pair: Pair) -> None:
    """Breaks in the field: a write that one disk refused is reported as done, or lost."""
    alpha, beta = pair.both
    alpha.allowed.add("EIO")
    load = Load(alpha.uri, depth=8).start()
    load.wait(100)
    idle = alpha.connect()
    with failing(alpha, "pwrite64", alpha.data):
        load.ended()
        assert load.error, "what was in flight cannot have been acknowledged"
        state = alpha.wait_state(lambda s: s["role"] != "primary", "stepped back")
        assert "EIO" in state["failed"]
        alpha.wait_state(lambda s: s["clients"] == 0, "rule 22: no client outlives the term")
        with pytest.raises(nbd.Error):
            idle.pread(512, 0)
    load.assert_kept(beta.data)
    beta.wait_state(lambda s: s["session"] is None, "alpha left")
    beta.command("promote")
    load.start(beta.uri).wait(100)
    load.stop()
    assert not load.error
    load.assert_kept(beta.data)
    alpha.kill()
    alpha.start()
    pair.synced()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def fill(handle: nbd.NBD, image: bytes) -> None:
    """Write an image in pieces of 1 MiB."""
    for offset in range(0, len(image), 1 << 20):
        handle.pwrite(image[offset : offset + (1 << 20)], offset)


def handed_over(pair: Pair) -> None:
    """Alpha stepped back by itself: beta takes over, alpha returns, and they end equal."""
    alpha, beta = pair.both
    alpha.wait_state(lambda s: s["role"] != "primary", "stepped back")
    beta.wait_state(lambda s: s["session"] is None, "alpha left")
    beta.command("promote")
    handle = beta.connect()
    assert bytes(handle.pread(8, 0)) == b"was here", "the one that takes over has it"
    handle.pwrite(b"and here", 8192)
    handle.shutdown()
    alpha.kill()
    alpha.start()
    pair.synced()
    pair.stop()
    pair.assert_equal()


def test_primary_cannot_read_hands_over(pair: Pair) -> None:
    """Breaks in the field: a disk that cannot read any more serves on, or takes its peer along."""
    alpha = pair.alpha
    alpha.allowed.add("EIO")
    handle = alpha.connect()
    handle.pwrite(b"was here", 0)
    with failing(alpha, "preadv,preadv2", alpha.data), pytest.raises(nbd.Error) as caught:
        handle.pread(8, 0)
    assert caught.value.errno == "ESHUTDOWN", "the peer has what this disk cannot read"
    handed_over(pair)


def test_full_disk_of_the_primary_hands_over(tmp_path: Path, make_pair: MakePair) -> None:
    """Breaks in the field: a full primary gives errors to the application although its peer has
    room, or says "done" for what only the peer has.
    """
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small))
    pair = make_pair(size=32 << 20, data_dirs={"alpha": small / "node"})
    try:
        alpha = pair.up(sparse=True).alpha
        handle = alpha.connect()
        with pytest.raises(nbd.Error) as caught:
            fill(handle, b"was here" + os.urandom((32 << 20) - 8))
        assert caught.value.errno == "ESHUTDOWN"
        assert "ENOSPC" in alpha.state()["failed"]
        run("mount", "-o", "remount,size=64m", str(small))
        handed_over(pair)
    finally:
        pair.close()
        run("umount", str(small))


def test_secondary_cannot_write_is_left_behind(pair: Pair) -> None:
    """Breaks in the field: a secondary with a dead disk acknowledges, or stops the application."""
    alpha, beta = pair.both
    beta.allowed.add("EIO")
    load = Load(alpha.uri, depth=8).start()
    load.wait(100)
    with failing(beta, "pwrite64", beta.data):
        state = alpha.wait_state(lambda s: s["frozen"], "frozen")
        assert "disk" in state["frozen_reason"], state["frozen_reason"]
        alpha.command("alone")
        load.wait(100)
    assert "EIO" in beta.state()["failed"]
    beta.kill()
    beta.start()
    pair.synced()
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_secondary_cannot_flush_is_left_behind(pair: Pair) -> None:
    """Breaks in the field: a flush counts although one disk refused it, and is tried again."""
    alpha, beta = pair.both
    beta.allowed.add("EIO")
    load = Load(alpha.uri, depth=8).start()
    load.wait(50)
    with failing(beta, "fdatasync", beta.data):
        alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(50)
    beta.kill()
    beta.start()
    pair.synced()
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_last_copy_fails_with_eio(make_pair: MakePair) -> None:
    """Breaks in the field: the only copy goes on after its disk refused a flush."""
    pair = make_pair().create()
    alpha = pair.alpha.start()
    alpha.allowed.add("EIO")
    alpha.command("promote")
    load = Load(alpha.uri, depth=4).start()
    load.wait(50)
    load.stop()
    handle = alpha.connect()
    with failing(alpha, "fdatasync", alpha.data):
        with contextlib.suppress(nbd.Error):
            handle.flush()
        alpha.wait_state(lambda s: bool(s["failed"]), "failed")
    with pytest.raises(nbd.Error) as caught:
        handle.pwrite(bytes(4096), 0)
    assert caught.value.errno == "EIO"
    with pytest.raises(nbd.Error) as caught:
        handle.flush()
    assert caught.value.errno == "EIO"


def test_full_disk_of_the_only_copy_is_told_and_heals(tmp_path: Path, make_pair: MakePair) -> None:
    """Breaks in the field: a full file system ends the mirror instead of telling the client."""
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small))
    pair = make_pair(size=32 << 20, data_dirs={"alpha": small / "node"})
    try:
        pair.create(sparse=True)
        alpha = pair.alpha.start()
        alpha.command("promote")
        handle = alpha.connect()
        with pytest.raises(nbd.Error) as caught:
            fill(handle, os.urandom(32 << 20))
        assert caught.value.errno == "ENOSPC"
        assert not alpha.state()["failed"]
        run("mount", "-o", "remount,size=64m", str(small))
        image = os.urandom(32 << 20)
        fill(handle, image)
        handle.flush()
        pair.beta.start()
        pair.synced()
        handle.shutdown()
        pair.stop()
        pair.assert_equal()
        assert alpha.data.read_bytes()[: 32 << 20] == image
    finally:
        pair.close()
        run("umount", str(small))


def test_full_disk_of_the_secondary_is_the_loss_of_that_side(
    tmp_path: Path, make_pair: MakePair
) -> None:
    """Breaks in the field: a full secondary makes the application see errors."""
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small))
    pair = make_pair(
        size=32 << 20, data_dirs={"beta": small / "node"}, engine={"on_freeze": "alone"}
    )
    try:
        alpha, beta = pair.up(sparse=True).both
        load = Load(alpha.uri, slots=6000, depth=16).start()
        beta.wait_state(lambda s: "ENOSPC" in s["failed"], "full")
        alpha.wait_state(lambda s: s["right_alone"], "alone")
        load.wait(100)
        run("mount", "-o", "remount,size=64m", str(small))
        beta.kill()
        beta.start()
        pair.synced()
        load.stop()
        assert not load.error
        pair.stop()
        pair.assert_equal()
        load.assert_kept(alpha.data, beta.data)
    finally:
        pair.close()
        run("umount", str(small))
