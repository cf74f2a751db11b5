"""Copies files to the mirror, each one made durable before it is called copied.

Run as a process: `copier.py LIST DIRECTORY LEDGER`. The ledger is outside the mirror; a line
(SHA-256, bytes, path) is written only after fsync of the file and of its directory returned. Ends
with 0 when all are copied, with 3 when the file system fails. Must never write a line earlier.
"""

# ruff: noqa: INP001 - a directory that is run

import hashlib
import os
import sys
from pathlib import Path
from typing import Final

FAILED: Final = 3


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy(source: Path, target: Path) -> tuple[str, int]:
    """Copy one file; returns its SHA-256 and size when it is durable."""
    data = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(target.parent)
    return hashlib.sha256(data).hexdigest(), len(data)


def main(list_path: Path, directory: Path, ledger_path: Path) -> int:
    """Copy everything on the list."""
    with ledger_path.open("a", buffering=1) as ledger:
        for line in list_path.read_text().splitlines():
            relative = line.lstrip("/")
            try:
                digest, size = copy(Path(line), directory / relative)
            except OSError as error:
                sys.stderr.write(f"copier: {error}\n")
                return FAILED
            ledger.write(f"{digest} {size} {relative}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
