"""Clients that we did not write, against the export: nbdinfo, nbdcopy, qemu, fio, mkfs."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.support.fixtures import MakePair
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def run(*command: str) -> str:
    """Run one client; what it said, or an error with all of it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refused(*command: str) -> str:
    """Run one client that has to fail; returns what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode != 0, f"{command} worked\n{done.stdout}"
    return done.stdout + done.stderr


def test_nbdinfo_shows_what_the_engine_can(pair: Pair) -> None:
    """Breaks in the field: a client does without flush, trim or parallel connections."""
    export = json.loads(run("nbdinfo", "--json", pair.alpha.uri))["exports"][0]
    assert export["export-size"] == pair.size
    for name in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "cache"):
        assert export[f"can_{name}"], name
    assert not export["is_read_only"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 64 << 20


def test_the_secondary_declines(pair: Pair) -> None:
    """Breaks in the field: a client on the wrong server writes beside the mirror."""
    refused("nbdinfo", pair.beta.uri)
    refused("qemu-img", "info", pair.beta.uri)


def test_map_of_a_sparse_device(make_pair: MakePair) -> None:
    """Breaks in the field: backups of an empty device read all of it."""
    pair = make_pair(size=64 << 20).up(sparse=True)
    run("qemu-io", "-f", "raw", "-c", "write -P 7 32M 1M", pair.alpha.uri)
    extents = json.loads(run("nbdinfo", "--map", "--json", pair.alpha.uri))
    data = [(e["offset"], e["length"]) for e in extents if e["type"] == 0]
    assert data == [(32 << 20, 1 << 20)]
    assert sum(e["length"] for e in extents) == 64 << 20


def test_nbdcopy_both_ways(pair: Pair) -> None:
    """Breaks in the field: an image that is copied in or out is another one afterwards."""
    image, back = pair.root / "in.img", pair.root / "out.img"
    image.write_bytes(random.Random(4).randbytes(pair.size))
    run("nbdcopy", "--flush", "--connections=4", str(image), pair.alpha.uri)
    run("nbdcopy", "--connections=4", pair.alpha.uri, str(back))
    assert back.read_bytes() == image.read_bytes()
    identical = run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), pair.alpha.uri)
    assert "identical" in identical
    pair.stop()
    pair.assert_equal()
    assert pair.beta.data.read_bytes() == image.read_bytes()


def test_qemu_io_patterns(pair: Pair) -> None:
    """Breaks in the field: one byte beside a block border, or a discard, ends up elsewhere."""
    commands = [
        "write -P 1 0 16M", "write -P 2 4095 2", "write -P 3 1 1", "write -f -P 4 1M 64k",
        "discard 2M 1M", "write -z 4M 1M", "write -z -u 6M 12345", "flush",
        "read -P 2 4095 2", "read -P 3 1 1", "read -P 1 2 4093", "read -P 4 1M 64k",
        "read -P 0 2M 1M", "read -P 0 4M 1M", "read -P 0 6M 12345", "read -P 1 7M 9M",
    ]  # fmt: skip
    arguments = [part for command in commands for part in ("-c", command)]
    said = run("qemu-io", "-f", "raw", *arguments, pair.alpha.uri)
    assert "Pattern verification failed" not in said
    pair.stop()
    pair.assert_equal()


def test_fio_verifies_with_overlaps(pair: Pair, tmp_path: Path) -> None:
    """Breaks in the field: overlapping writes in flight end differently on the two nodes."""
    run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={pair.alpha.uri}", "--rw=randwrite",
        "--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=16", "--size=4M", "--io_size=12M",
        "--verify=crc32c", "--verify_fatal=1", "--random_generator=tausworthe64", "--fsync=50",
        "--serialize_overlap=1", f"--aux-path={tmp_path}", "--randseed=7",
        "--numjobs=3", "--thread=1", "--offset_increment=4M",
    )  # fmt: skip
    run(
        "fio", "--name=o", "--ioengine=nbd", f"--uri={pair.alpha.uri}", "--rw=randwrite",
        "--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=16", "--size=256k", "--io_size=8M",
        "--norandommap=1", f"--aux-path={tmp_path}", "--numjobs=3", "--thread=1",
    )  # fmt: skip
    pair.stop()
    pair.assert_equal()


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (["mkfs.ext4", "-q", "-F"], ["e2fsck", "-fn"]),
        (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n", "-f"]),
    ],
)
def test_file_system_made_over_nbd(make_pair: MakePair, make: list[str], check: list[str]) -> None:
    """Breaks in the field: a file system made on the mirror is damaged on the second node."""
    pair = make_pair(size=320 << 20, engine={"ack_timeout_ms": 10_000}).up(sparse=True)
    mountpoint = pair.root / "fuse"
    mountpoint.mkdir()
    device = mountpoint / "nbd"
    fuse = subprocess.Popen(["nbdfuse", "--pidfile", str(pair.root / "pid"), str(device),
                             pair.alpha.uri])  # fmt: skip
    try:
        wait_for_file(pair, device, fuse)
        run(*make, str(device))
        run("sync", str(device))
    finally:
        run("fusermount3", "-u", str(mountpoint))
        fuse.wait(60)
    pair.alpha.command("drain")
    pair.stop()
    pair.assert_equal()
    run(*check, str(pair.beta.data))


def wait_for_file(pair: Pair, device: Path, fuse: "subprocess.Popen[bytes]") -> None:
    """Until nbdfuse shows the device; it writes its pid file when it does."""
    pair.alpha.wait_state(
        lambda _: (pair.root / "pid").exists() or fuse.poll() is not None, "nbdfuse is ready"
    )
    assert device.exists()
