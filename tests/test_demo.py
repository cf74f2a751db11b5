"""The demo's proof: what it counts has to be able to come out wrong."""

import hashlib
import importlib
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).resolve().parents[1] / "packaging" / "demo"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo's module; it is a directory that is run, not a package."""
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("load")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def mirrored(directory: Path) -> Path:
    """A directory as the demo leaves it: two files, three rows."""
    for name in ("a", "b"):
        (directory / name).write_bytes(name.encode())
    database = sqlite3.connect(directory / "rows.db")
    database.execute("CREATE TABLE row (number INTEGER PRIMARY KEY, payload BLOB)")
    database.executemany("INSERT INTO row VALUES (?, ?)", [(n, b"%d" % n) for n in (1, 2, 3)])
    database.commit()
    database.close()
    return directory / "rows.db"


def counted(load: ModuleType, directory: Path) -> tuple[list[bool], list[bool]]:
    copied = load.Copied({name: digest(name.encode()) for name in ("a", "b")}, 2)
    commits = [load.Commit(n, digest(b"%d" % n), 0) for n in (1, 2, 3)]
    found = load.count(directory, directory / "rows.db", copied, commits)
    assert found.integrity == "ok"
    return found.files, found.commits


def test_everything_there_is_good(load: ModuleType, tmp_path: Path) -> None:
    """Breaks in the field: the demo cries loss where nothing is lost."""
    mirrored(tmp_path)
    assert counted(load, tmp_path) == ([True, True], [True, True, True])


def test_what_is_missing_or_changed_is_seen(load: ModuleType, tmp_path: Path) -> None:
    """Breaks in the field: the demo says that all of it held while a write is lost."""
    database = sqlite3.connect(mirrored(tmp_path))
    database.execute("DELETE FROM row WHERE number = 2")
    database.execute("UPDATE row SET payload = x'00' WHERE number = 3")
    database.commit()
    database.close()
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"c")
    assert counted(load, tmp_path) == ([False, False], [True, False, False])


def test_a_line_under_way_is_no_acknowledgement(load: ModuleType, tmp_path: Path) -> None:
    """Breaks in the field: half a line of the ledger counts as a commit nobody acknowledged."""
    ledger = tmp_path / "commits"
    ledger.write_text("1 aa 5\n2 bb 6\n3 c")
    assert [each.number for each in load.read_commits(ledger)] == [1, 2]
    assert load.read_commits(tmp_path / "none") == []


def test_the_copier_stops_at_the_first_failure(tmp_path: Path) -> None:
    """Breaks in the field: files that were never durable are in the ledger."""
    (tmp_path / "list").write_text(f"{DEMO}/load.py\n{tmp_path}/missing\n{DEMO}/nodes.py\n")
    done = subprocess.run(
        [sys.executable, DEMO / "copier.py", tmp_path / "list", tmp_path / "to", tmp_path / "done"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    source = DEMO / "load.py"
    line = f"{digest(source.read_bytes())} {source.stat().st_size} {str(source).lstrip('/')}\n"
    assert (tmp_path / "done").read_text() == line
    assert (tmp_path / "to" / str(source).lstrip("/")).read_bytes() == source.read_bytes()
