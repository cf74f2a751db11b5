"""The application: commits numbered rows to SQLite on the mirror, as fast as it can.

Run as a process: `writer.py DATABASE LEDGER`. The ledger is outside the mirror; a line (number,
SHA-256 of the payload, monotonic time in ns) is written only after the commit was acknowledged.
Says "open" when it has its database. Ends with 0 after SIGTERM, with 3 when the database fails.
Must never write a line earlier.
"""

# ruff: noqa: INP001 - a directory that is run

import hashlib
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any, Final

FAILED: Final = 3
PAYLOAD_BYTES: Final = (100, 1500)


def open_database(path: Path) -> sqlite3.Connection:
    """A database whose commits survive a power cut."""
    database = sqlite3.connect(path, isolation_level=None, timeout=30)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE IF NOT EXISTS row (number INTEGER PRIMARY KEY, payload BLOB)")
    return database


def main(database_path: Path, ledger_path: Path) -> int:
    """Commit until told to stop."""
    stopping: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    low, high = PAYLOAD_BYTES
    with ledger_path.open("a", buffering=1) as ledger:
        try:
            database = open_database(database_path)
            (last,) = database.execute("SELECT coalesce(max(number), 0) FROM row").fetchone()
            number = int(last)
            sys.stdout.write("open\n")
            sys.stdout.flush()
            while not stopping:
                number += 1
                payload = os.urandom(low + number * 7919 % (high - low))
                database.execute("BEGIN IMMEDIATE")
                database.execute("INSERT INTO row VALUES (?, ?)", (number, payload))
                database.execute("COMMIT")
                digest = hashlib.sha256(payload).hexdigest()
                ledger.write(f"{number} {digest} {time.monotonic_ns()}\n")
            database.close()
        except (sqlite3.Error, OSError) as error:
            sys.stderr.write(f"writer: {error}\n")
            return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
