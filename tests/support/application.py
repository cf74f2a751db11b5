"""An application on the mirror: ext4 on the export, and SQLite that commits numbered rows.

Owns one attachment (nbdfuse, loop device, mount) and one writing process, and the ledger of the
commits that it acknowledged, which is kept here and so outside of the mirror. Run as a program it
is the writer: `python -m tests.support.application DATABASE JOURNAL_MODE FIRST`. Must never:
report a number before its commit has returned, or leave a device or mount behind.
"""

import contextlib
import hashlib
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any, Self

from tests.support.pair import ROOT, Engine
from tests.support.powercut import run

BOUND_S = 120.0
FAILED = 3
PAYLOAD_BYTES = (100, 3000)


def payload(number: int) -> bytes:
    """The content of a row."""
    low, high = PAYLOAD_BYTES
    digest = hashlib.sha256(str(number).encode()).digest()
    return (digest * (high // len(digest) + 1))[: low + number * 7919 % (high - low)]


# --- the writer -------------------------------------------------------------------------------


def write_rows(path: str, journal_mode: str, first: int) -> int:
    """Commit rows from `first` on until SIGTERM; one line for each that was acknowledged."""
    stopping: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        database = sqlite3.connect(path, isolation_level=None)
        (mode,) = database.execute(f"PRAGMA journal_mode={journal_mode}").fetchone()
        assert mode == journal_mode
        # FULL, and the unlink of a rollback journal is synced, too: it is what commits. With FULL
        # alone the last commit may be rolled back after a power cut (seen here, and documented).
        database.execute("PRAGMA synchronous=EXTRA")
        database.execute("CREATE TABLE IF NOT EXISTS row (number INTEGER PRIMARY KEY, data BLOB)")
        number = first
        while not stopping:
            database.execute("INSERT INTO row VALUES (?, ?)", (number, payload(number)))
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
            number += 1
        database.close()
    except (sqlite3.Error, OSError) as error:
        sys.stderr.write(f"writer: {error}\n")
        return FAILED
    return 0


class Writer:
    """One life of the writer; adds what is acknowledged to a ledger."""

    def __init__(self, database: Path, journal_mode: str, ledger: list[int]) -> None:
        first = ledger[-1] + 1 if ledger else 1
        self.ledger = ledger
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(database), journal_mode, str(first)],
            stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.ledger.append(int(line))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait(self, more: int) -> None:
        """Until `more` further commits were acknowledged."""
        until = monotonic() + BOUND_S
        with self._changed:
            target = len(self.ledger) + more
            while len(self.ledger) < target:
                left = until - monotonic()
                assert left > 0, f"{len(self.ledger)} of {target} commits"
                assert self._process.poll() is None, f"the writer ended: {self._process.returncode}"
                self._changed.wait(min(left, 1))

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end, and for the last line of the ledger; returns its exit code."""
        code = self._process.wait(BOUND_S)
        self._thread.join(BOUND_S)
        assert not self._thread.is_alive()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


def require_rows(database: Path, ledger: list[int]) -> int:
    """Every acknowledged row is there, and at most one that was in flight; returns how many.

    Raises:
        AssertionError: one is missing or different, or SQLite finds its database damaged.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
        assert sound == "ok", sound
        rows = connection.execute("SELECT number, data FROM row ORDER BY number").fetchall()
    numbers = [number for number, _ in rows]
    missing = sorted(set(ledger) - set(numbers))
    assert not missing, f"{len(missing)} acknowledged commits are lost, first {missing[0]}"
    assert len(set(numbers) - set(ledger)) <= 1, "more rows than were ever begun"
    assert all(data == payload(number) for number, data in rows), "a row is not what was committed"
    return len(rows)


# --- the file system --------------------------------------------------------------------------


class Attached:
    """The export of a primary as a mounted ext4, for the time of a `with`."""

    def __init__(self, engine: Engine, directory: Path, *, make: bool = False) -> None:
        self.mountpoint = directory / "fs"
        self.device = ""
        self._fuse_at = directory / "fuse"
        self._engine = engine
        self._make = make
        self._fuse: subprocess.Popen[bytes] | None = None
        self._mounted = False

    @property
    def database(self) -> Path:
        """Where the writer writes."""
        return self.mountpoint / "rows.sqlite"

    def __enter__(self) -> Self:
        for path in (self.mountpoint, self._fuse_at):
            path.mkdir(parents=True, exist_ok=True)
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def _attach(self) -> None:
        ready = self._fuse_at.with_suffix(".pid")
        ready.unlink(missing_ok=True)
        file = self._fuse_at / "device"
        fuse = subprocess.Popen(
            ["nbdfuse", "--pidfile", str(ready), str(file), self._engine.uri],
            stderr=subprocess.DEVNULL,  # it says so at length when its server dies
        )
        self._fuse = fuse
        self._engine.wait_state(
            lambda _: ready.exists() or fuse.poll() is not None, "nbdfuse is ready", BOUND_S
        )
        self.device = run("losetup", "--find", "--show", str(file))
        if self._make:
            run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0", self.device)
        run("mount", "-t", "ext4", "-o", "noatime", self.device, str(self.mountpoint))
        self._mounted = True

    def check(self) -> None:
        """Unmount in order and have the file system checked: nothing to repair."""
        self.unmount()
        run("e2fsck", "-fn", self.device)

    def unmount(self) -> None:
        """Unmount; also after its device died."""
        if self._mounted:
            run("umount", str(self.mountpoint))
            self._mounted = False

    def __exit__(self, *_: object) -> None:
        self._detach()

    def _detach(self) -> None:
        self.unmount()
        if self.device:
            run("losetup", "--detach", self.device)
            self.device = ""
        if self._fuse is not None:
            with contextlib.suppress(RuntimeError):  # a dead one may be gone already
                run("umount", "--lazy", str(self._fuse_at))
            self._fuse.wait(BOUND_S)
            self._fuse = None


if __name__ == "__main__":
    sys.exit(write_rows(sys.argv[1], sys.argv[2], int(sys.argv[3])))
