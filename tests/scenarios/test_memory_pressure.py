"""A mirror mounted on its own host, engine and writer in small memory cgroups, heavy dirtying.

Engine and application have a cgroup each, as two units have: in a common one the engine's memory is
reclaimed by waiting for the writeback of the application's pages, which is the engine's own work
(seen here: both wait for ever, where the system refuses PR_SET_IO_FLUSHER). The attach helper is in
neither: nbdfuse does not lock its memory. A deadlock would stop every process that looks at the
stuck ones, so a watchdog ends the FUSE connection, which fails all of its I/O and frees everybody.
"""

import contextlib
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fixtures import MakePair
from tests.support.powercut import run

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

ENGINE_BYTES = 96 << 20
WRITER_BYTES = 64 << 20
WRITTEN_MIB = 320
# Only a deadlock takes so long: it is some seconds on two cores that others use as well.
BOUND_S = 150
WATCHDOG_S = 120


@contextlib.contextmanager
def cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup; who is still in it at the end goes back to the root."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"nbdmirror-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()


@pytest.fixture
def groups() -> Iterator[tuple[Path, Path]]:
    """The cgroups of the engine and of the writer."""
    with cgroup(ENGINE_BYTES) as engine, cgroup(WRITER_BYTES) as writer:
        yield engine, writer


@contextlib.contextmanager
def watchdog(mountpoint: Path, directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Abort a FUSE connection after WATCHDOG_S, from a process that no stuck one can hold up."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (minor,) = (
        line.split()[2].split(":")[1] for line in lines if line.split()[4] == str(mountpoint)
    )
    control = directory / "fusectl"
    control.mkdir()
    run("mount", "-t", "fusectl", "none", str(control))
    abort = control / minor / "abort"
    command = f"trap 'kill $!; exit 0' TERM; sleep {WATCHDOG_S} & wait; echo 1 > {abort}; exit 9"
    process = subprocess.Popen(["sh", "-c", command])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(5)
        run("umount", str(control))


def test_dirtying_more_than_memory_does_not_deadlock(
    make_pair: MakePair, groups: tuple[Path, Path]
) -> None:
    """Breaks in the field: the engine waits for memory that only its own device could free."""
    pair = make_pair(size=512 << 20, engine={"ack_timeout_ms": 20_000}).up(sparse=True)
    engine = pair.alpha
    mountpoint, file_system = pair.root / "fuse", pair.root / "fs"
    mountpoint.mkdir()
    file_system.mkdir()
    fuse = subprocess.Popen(
        ["nbdfuse", "--pidfile", str(pair.root / "pid"), str(mountpoint / "nbd"), engine.uri]
    )
    loop = ""
    mounted = False
    try:
        engine.wait_state(
            lambda _: (pair.root / "pid").exists() or fuse.poll() is not None, "nbdfuse is ready"
        )
        loop = run("losetup", "--find", "--show", str(mountpoint / "nbd"))
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1", loop)
        run("mount", loop, str(file_system))
        mounted = True
        (groups[0] / "cgroup.procs").write_text(str(engine.pid))
        # The writer joins the cgroup before it writes, so its dirty pages are counted there.
        command = (
            f"echo $$ > {groups[1]}/cgroup.procs && exec dd if=/dev/urandom "
            f"of={file_system}/big bs=1M count={WRITTEN_MIB} conv=fsync status=none"
        )
        with watchdog(mountpoint, pair.root) as dog:
            done = subprocess.run(["sh", "-c", command], timeout=BOUND_S, check=False)
            assert dog.poll() is None, "a deadlock: the watchdog had to end it"
        assert done.returncode == 0
        for group in groups:
            failures = int((group / "memory.failcnt").read_text())
            assert failures > 0, "the limit was never reached: this test has shown nothing"
        assert engine.state()["role"] == "primary"
        pair.synced()
    finally:
        if mounted:
            run("umount", str(file_system))
        if loop:
            run("losetup", "--detach", loop)
        run("fusermount3", "-u", str(mountpoint))
        fuse.wait(60)
    engine.command("drain")
    pair.stop()
    pair.assert_equal()
    run("e2fsck", "-fn", str(pair.beta.data))
