"""An engine that cannot start says so in one line and ends; it hangs never and deletes nothing."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmirror.errors import ConfigError, OutOfSpaceError
from tests.support.fixtures import MakePair
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


@pytest.fixture
def created(make_pair: MakePair) -> Pair:
    """A pair whose files are made and whose engines do not run."""
    return make_pair().create()


@pytest.mark.parametrize("victim", ["data", "meta", "key"])
def test_a_file_in_the_sockets_place_is_not_deleted(created: Pair, victim: str) -> None:
    """Breaks in the field: a slip in export.unix deletes the only copy, or the key."""
    alpha = created.alpha
    config = alpha.config
    path = {"data": config.data_file, "meta": config.metadata_file, "key": created.root / "key"}
    victim_path = path[victim]
    before = victim_path.stat()
    # Under another name, which no comparison of paths in the configuration can see.
    name = created.root / "a-name"
    name.hardlink_to(victim_path)
    alpha.config_path.write_text(created.config_text("alpha") + f'[export]\nunix = "{name}"\n')
    assert alpha.start_refused() == ConfigError.exit_code
    assert str(name) in alpha.log()
    assert name.stat().st_ino == before.st_ino, "it has its name still"


def directory(path: Path) -> None:
    """A directory has the name."""
    path.mkdir(parents=True)


def link(path: Path) -> None:
    """A symbolic link that leads to itself has the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path)


def plain(path: Path) -> None:
    """A plain file has the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("run", plain),
        ("run", link),
        ("run/launcher.lock", directory),
        ("run/launcher.lock", link),
        ("run/nbd.sock", directory),
        ("run/engine.sock", directory),
        ("run/engine.sock", plain),
    ],
)
def test_a_place_that_is_taken(created: Pair, name: str, make: Callable[[Path], None]) -> None:
    """Breaks in the field: the engine holds its metadata, serves nobody, and says nothing; or the
    operator gets a traceback and looks for a defect.
    """
    alpha = created.alpha
    path = created.root / "alpha" / name
    make(path)
    assert alpha.start_refused() == ConfigError.exit_code
    (_,) = [each for each in alpha.log().splitlines() if each.startswith("nbdmirror: ")]
    assert str(path) in alpha.log()
    assert path.exists() or path.is_symlink()


def test_no_room_for_the_control_socket(created: Pair, require_root: None) -> None:
    """Breaks in the field: a full /run, and an engine that hangs at its start for ever."""
    alpha = created.alpha
    run = alpha.config.me.run_dir
    run.mkdir(mode=0o700)
    inodes = "nr_inodes=3,mode=700"  # the directory, the lock, the clients' socket
    subprocess.run(["mount", "-t", "tmpfs", "-o", inodes, "nbdmirror-test", run], check=True)
    try:
        assert alpha.start_refused() == OutOfSpaceError.exit_code
        assert f"{run / 'engine.sock'} (no room there)" in alpha.log()
    finally:
        subprocess.run(["umount", "-l", run], check=True)


def test_a_path_that_no_socket_can_have(created: Pair) -> None:
    """Breaks in the field: a long run_dir, and an engine that nobody can command."""
    alpha = created.alpha
    text = created.config_text("alpha")
    long = created.root / ("x" * 90)
    text = text.replace(str(created.root / "alpha" / "run"), str(long))
    alpha.config_path.write_text(text + f'[export]\nunix = "{created.root}/nbd.sock"\n')
    assert alpha.start_refused() == ConfigError.exit_code
    assert str(long / "engine.sock") in alpha.log()
    assert "more than 107" in alpha.log()
    assert not long.exists()
