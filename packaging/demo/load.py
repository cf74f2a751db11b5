"""The load and its proof: which files, the two processes, their ledgers, and the count afterwards.

Owns the ledgers, which are outside the mirror. Must never take a row or a file for present because
it should be: everything is read back from the mirror and compared by checksum.
"""

# ruff: noqa: INP001, S603 - a directory that is run; processes of ours

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from progress import MB, DemoError

ROOTS: Final = ("/usr/share", "/usr/lib")
FILE_BYTES_MIN: Final = 1024
FILE_BYTES_MAX: Final = 1024 * 1024
SMALL_BYTES: Final = 64 * 1024
FILES_COUNT: Final = 2_500
FILES_BYTES: Final = 226 * MB
MORE_COUNT: Final = 50
ENOUGH_COUNT: Final = 2_000
ENOUGH_BYTES: Final = 200 * MB
END_TIMEOUT_S: Final = 60.0
COUNT_TIMEOUT_S: Final = 120.0
HERE: Final = Path(__file__).resolve().parent


def real_files() -> Iterator[tuple[int, str]]:
    """(bytes, path) of the plain files that a Debian system has, in a fixed order."""
    for root in ROOTS:
        for directory, names, files in os.walk(root):
            names.sort()
            for name in sorted(files):
                path = f"{directory}/{name}"
                with contextlib.suppress(OSError):
                    found = os.lstat(path)
                    fits = FILE_BYTES_MIN <= found.st_size <= FILE_BYTES_MAX
                    if stat.S_ISREG(found.st_mode) and fits and "\n" not in path:
                        yield found.st_size, path


def choose_files() -> tuple[list[str], list[str]]:
    """FILES_COUNT files of FILES_BYTES together, and some more for later.

    Small and large ones in turn, so that both sums come out on any machine.

    Raises:
        DemoError: this machine has not that many.
    """
    small: list[tuple[int, str]] = []
    large: list[tuple[int, str]] = []
    # By checksum of the path: files of all kinds, and the same ones each time.
    for size, path in sorted(real_files(), key=lambda f: hashlib.sha256(f[1].encode()).digest()):
        (small if size < SMALL_BYTES else large).append((size, path))
    small.reverse()
    large.reverse()
    chosen: list[str] = []
    total = 0
    while len(chosen) < FILES_COUNT + MORE_COUNT:
        behind = total * FILES_COUNT <= len(chosen) * FILES_BYTES
        pile = (large or small) if behind else (small or large)
        if not pile:
            raise DemoError(f"{len(chosen)} files under {ROOTS}: not enough for the demo")
        size, path = pile.pop()
        total += size
        chosen.append(path)
    return chosen[:FILES_COUNT], chosen[FILES_COUNT:]


@dataclass(frozen=True)
class Copied:
    """What the ledger of the copier says."""

    files: dict[str, str]
    bytes_count: int

    def reached(self, part: float) -> bool:
        """Whether this is `part` of the load that the demo promises."""
        enough = len(self.files) >= part * ENOUGH_COUNT
        return enough and self.bytes_count >= part * ENOUGH_BYTES


def read_copied(ledger: Path) -> Copied:
    """Checksum by path of every file that was durable; whole lines only."""
    files, total = {}, 0
    for line in complete_lines(ledger):
        digest, size, path = line.split(" ", 2)
        files[path] = digest
        total += int(size)
    return Copied(files, total)


@dataclass(frozen=True)
class Commit:
    """One acknowledged commit."""

    number: int
    digest: str
    at_ns: int


def read_commits(ledger: Path) -> list[Commit]:
    """Every acknowledged commit, in order."""
    found = []
    for line in complete_lines(ledger):
        number, digest, at_ns = line.split()
        found.append(Commit(int(number), digest, int(at_ns)))
    return found


def complete_lines(path: Path) -> list[str]:
    """The lines that were written to their end; the last piece may be under way."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Process:
    """The copier or the prober, as a process of its own on one of the hosts."""

    def __init__(self, enter: tuple[str, ...], name: str, *arguments: object) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [*enter, sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def running(self) -> bool:
        """Whether it still works."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Let it finish what it does, then end.

        Raises:
            DemoError: it had failed before.
        """
        self._process.terminate()
        code, said = self.ended()
        if code != 0:
            raise DemoError(f"{self.name} failed: {said}")

    def ended(self) -> tuple[int, str]:
        """Wait for its end; returns exit code and what it said."""
        try:
            _, said = self._process.communicate(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{self.name} does not end") from None
        return self._process.returncode, said.decode(errors="replace").strip()

    def end_now(self) -> None:
        """SIGKILL, for when the demo ends early."""
        if self.running():
            self._process.kill()


@dataclass(frozen=True)
class Count:
    """What was found on the mirror, against the ledgers."""

    files: list[bool]  # one for each line of the ledger: present, with the same content
    commits: list[bool]
    rows_count: int
    integrity: str


def count(directory: Path, database_path: Path, copied: Copied, commits: list[Commit]) -> Count:
    """Read everything back and compare."""
    files = [digest_of(directory / path) == want for path, want in copied.files.items()]
    database = sqlite3.connect(database_path, timeout=30)
    try:
        rows = {
            number: hashlib.sha256(payload).hexdigest()
            for number, payload in database.execute("SELECT number, payload FROM row")
        }
        (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
    finally:
        database.close()
    good = [rows.get(each.number) == each.digest for each in commits]
    return Count(files, good, len(rows), str(integrity))


def count_there(
    enter: tuple[str, ...], directory: Path, copied: Copied, commits: list[Commit]
) -> Count:
    """The same on a host: what it reads is what its own mount shows.

    Raises:
        DemoError: it cannot be counted.
    """
    given = {"files": copied.files, "commits": [[c.number, c.digest, c.at_ns] for c in commits]}
    done = subprocess.run(
        [*enter, sys.executable, str(HERE / "load.py"), str(directory)], input=json.dumps(given),
        capture_output=True, text=True, timeout=COUNT_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise DemoError(f"counting failed: {done.stderr.strip()[-500:]}")
    return Count(**json.loads(done.stdout))


def main(directory: Path) -> int:
    """Count what standard input names, and print what was found."""
    given = json.load(sys.stdin)
    commits = [Commit(*each) for each in given["commits"]]
    copied = Copied(given["files"], 0)
    found = count(directory, directory / "rows.db", copied, commits)
    sys.stdout.write(json.dumps(asdict(found)))
    return 0


def digest_of(path: Path) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
