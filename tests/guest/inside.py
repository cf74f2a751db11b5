"""The programs that tests run in a guest: `python -m tests.guest.inside NAME`.

Owns what happens inside: the file system on the guest's disk, a real pair on it, the pressure.
Prints what it saw as lines of JSON, which the test outside judges; what must hold for the rest
to mean anything raises here. Must never: run on the host (it fills the memory and formats a disk).
"""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd

from nbdmirror.memory import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT
from tests.guest.guest import DISK, MIB, MODULES
from tests.support.pair import Engine, Pair
from tests.support.powercut import run

Facts = dict[str, Any]

DISK_MOUNT = Path("/run/disk")
NEVER_KILLED = "-1000"
HOG_BYTES = 20 * MIB
HOGS_MAX = 20
DEVICE = "/dev/nbd0"
FILE_SYSTEM = Path("/run/fs")
DEVICE_BYTES = 400 * MIB
WRITTEN_BYTES = 320 * MIB
# With the usual 20 and 10 the kernel keeps the pressure away; hosts are tuned like this.
DIRTY_PERCENT = {"dirty_ratio": 60, "dirty_background_ratio": 40}
# What an engine wrote and has not flushed is memory that nobody can reclaim: little, on this host.
ENGINE_KEYS: dict[str, object] = {"ack_timeout_ms": 20_000, "flush_bytes": 4 * MIB}
# Smaller than an engine, so that an unprotected engine would be chosen before any of these.
# Locked: else each of them spends seconds reading its own code again and again.
HOG = f"""
import ctypes, signal
ctypes.CDLL(None).mlockall({MCL_CURRENT | MCL_FUTURE})
held = b"x" * {HOG_BYTES}
print("full", flush=True)
signal.pause()
"""
HOG_COMMAND = f"exec {shlex.join([sys.executable, '-I', '-S', '-c', HOG])}"


def tell(what: str, facts: Facts) -> None:
    """One line for the test outside, at once: what comes later may end this process."""
    sys.stdout.write(json.dumps({what: facts}) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def pair_on_disk(size: int) -> Iterator[Pair]:
    """Two engines in sync, alpha primary, with their data on ext4 on the guest's disk.

    Launchers and this process are protected as a service manager would do it, but only after
    the engines have started: what those have is their own doing.
    """
    run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", DISK)
    run("mount", "-t", "ext4", "-o", "noatime", DISK, str(DISK_MOUNT))
    directories = {name: DISK_MOUNT / name for name in ("alpha", "beta")}
    with Pair(size=size, data_dirs=directories, engine=ENGINE_KEYS) as pair:
        pair.up(sparse=True)
        for pid in (os.getpid(), *(e.launcher.pid for e in pair.both if e.launcher)):
            Path(f"/proc/{pid}/oom_score_adj").write_text(NEVER_KILLED)
        # Nobody but the engines and what presses on them shall want memory: a hang is theirs.
        signal_launchers(pair, signal.SIGSTOP)
        yield pair
        signal_launchers(pair, signal.SIGCONT)
        pair.stop()
        pair.assert_equal()
    run("umount", str(DISK_MOUNT))


def signal_launchers(pair: Pair, number: int) -> None:
    """The launchers alone, not their engines."""
    for engine in pair.both:
        assert engine.launcher is not None
        engine.launcher.send_signal(number)


def protection(engine: Engine) -> Facts:
    """What the kernel says about an engine, and what the engine says the kernel refused."""
    process = Path(f"/proc/{engine.pid}")
    lines = (line.split(":", 1) for line in (process / "status").read_text().splitlines())
    status = {key: value.split() for key, value in lines}
    stats = {
        # Counted behind the name, which may hold anything: field 3 of proc_pid_stat(5) is first.
        stat: stat.read_text().rpartition(")")[2].split()
        for stat in (process / "stat", *sorted(process.glob("task/*/stat")))
    }
    return {
        "pid": engine.pid,
        "oom_score_adj": int((process / "oom_score_adj").read_text()),
        "locked_kib": int(status["VmLck"][0]),
        "mapped_kib": int(status["VmSize"][0]),
        "resident_kib": int(status["VmRSS"][0]),
        "major_faults": int(stats.pop(process / "stat")[9]),
        "thread_flags": [int(fields[6]) for fields in stats.values()],
        "refused": [e["refused"] for e in engine.events if e["event"] == "memory"],
    }


@contextlib.contextmanager
def client_of(engine: Engine) -> Iterator[nbd.NBD]:
    """An NBD client, disconnected at the end."""
    handle = engine.connect()
    yield handle
    handle.shutdown()


def oom() -> None:
    """Start processes that together need more than there is, until the kernel has killed some."""
    with pair_on_disk(16 * MIB) as pair, client_of(pair.alpha) as client:
        # nbdkit starts the threads that write when the first client writes.
        client.pwrite(b"1" * 4096, 0)
        tell("protection", {engine.name: protection(engine) for engine in pair.both})
        ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_ONFAULT)
        hogs: list[subprocess.Popen[bytes]] = []
        try:
            while all(hog.poll() is None for hog in hogs):
                if len(hogs) == HOGS_MAX:
                    raise RuntimeError(f"{HOGS_MAX} hogs and the memory is not full")
                hogs.append(start_hog())
            endings = [hog.poll() for hog in hogs]
            # If an older one was chosen, the newest has filled what that gave back. The engine's
            # allocations may not call the OOM killer (out_of_memory() of mm/oom_kill.c does not
            # kill for one that may not start I/O): they are tried again and again until somebody
            # else's calls it, and here everybody else waits for the engine.
            hogs[-1].kill()
            hogs[-1].wait()
            states = {engine.name: engine.state() for engine in pair.both}
            client.pwrite(b"2" * MIB, MIB)
            client.flush()
            pair.synced()
            after = {engine.name: protection(engine) for engine in pair.both}
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()
        facts: Facts = {
            "hog_endings": [code for code in endings if code is not None],
            "states": states,
            "after": after,
        }
    tell("oom", facts)


def start_hog() -> subprocess.Popen[bytes]:
    """A process that anyone may kill; returns when it has its memory, or is gone."""
    hog = subprocess.Popen(
        # The protection of this process is inherited: give it up before the memory is taken.
        ["sh", "-c", f"echo 0 > /proc/self/oom_score_adj; {HOG_COMMAND}"],
        stdout=subprocess.PIPE,
    )
    assert hog.stdout is not None
    if not hog.stdout.readline():
        # Killed. Its end is waited for: one more hog in between would fill what it gives back, to
        # the brim, where an I/O flusher waits for memory and never calls the OOM killer itself.
        hog.wait()
    return hog


def meminfo() -> dict[str, int]:
    """/proc/meminfo, KiB."""
    lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in lines}


def pressure() -> None:
    """Write more than memory holds to a file system on the engine's own device."""
    run("insmod", f"{MODULES}/{os.uname().release}/kernel/drivers/block/nbd.ko")
    FILE_SYSTEM.mkdir()
    for name, percent in DIRTY_PERCENT.items():
        Path(f"/proc/sys/vm/{name}").write_text(str(percent))
    with pair_on_disk(DEVICE_BYTES) as pair:
        run("nbd-client", "-unix", str(pair.alpha.config.export_unix), DEVICE)
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1", DEVICE)
        run("mount", "-t", "ext4", DEVICE, str(FILE_SYSTEM))
        written, dirty_kib, free_kib = fill(FILE_SYSTEM / "big")
        run("umount", str(FILE_SYSTEM))
        run("e2fsck", "-fn", DEVICE)
        run("mount", "-t", "ext4", "-o", "ro", DEVICE, str(FILE_SYSTEM))
        read = digest(FILE_SYSTEM / "big")
        run("umount", str(FILE_SYSTEM))
        run("nbd-client", "-d", DEVICE)
        states = {engine.name: engine.state() for engine in pair.both}
        pair.alpha.command("drain")
    facts: Facts = {
        "written": written,
        "read": read,
        "dirty_kib_most": dirty_kib,
        "free_kib_least": free_kib,
        "written_kib": WRITTEN_BYTES // 1024,
        "total_kib": meminfo()["MemTotal"],
        "states": states,
    }
    tell("pressure", facts)


def fill(path: Path) -> tuple[str, int, int]:
    """Write WRITTEN_BYTES and sync; returns their SHA-256, most dirty and least free KiB seen."""
    source, hashed, dirty, free = random.Random(1), hashlib.sha256(), [0], [meminfo()["MemFree"]]
    with path.open("wb") as file:
        for _ in range(WRITTEN_BYTES // MIB):
            chunk = source.randbytes(MIB)
            hashed.update(chunk)
            file.write(chunk)
            now = meminfo()
            dirty.append(now["Dirty"] + now["Writeback"])
            free.append(now["MemFree"])
        file.flush()
        os.fsync(file.fileno())
    return hashed.hexdigest(), max(dirty), min(free)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


PROGRAMS: dict[str, Callable[[], None]] = {p.__name__: p for p in (oom, pressure)}

if __name__ == "__main__":
    # A disk of the host has another name; this stops a hand that forgot where it is.
    assert Path(DISK).is_block_device(), "this runs in a guest"
    PROGRAMS[sys.argv[1]]()
