"""`nbdmirror kept`, and what the other commands say of a split brain and of what is kept."""

import json
from pathlib import Path

import pytest

from nbdmirror import errors
from nbdmirror.config import load
from nbdmirror.core.kept import Header, Kept, encode_header, encode_mark
from nbdmirror.core.superblock import choose
from nbdmirror.kept import FileKept, path_beside
from nbdmirror.limits import META_BLOCK_BYTES, MIB
from nbdmirror.metastore import FileMetaStore
from tests.cli.conftest import FakeEngine
from tests.cli.test_commands import Shell, rows_of

SPLIT = {
    "waits": True, "found_s": 60, "parted_s": 7200, "own_bytes": 3 << 20, "peer_bytes": 2 << 20,
    "keep_limit_bytes": 1 << 30,
}  # fmt: skip
KEPT = {"complete": True, "used_bytes": 1 << 20, "limit_bytes": 1 << 30, "problem": ""}


@pytest.fixture
def shell(base: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A command line."""
    return Shell(base, capsys)


@pytest.fixture
def kept(shell: Shell) -> Path:
    """The file of what is kept, on a node whose copy is given up and was not overwritten yet."""
    assert shell("metadata", "create", "--size", "8MiB", "--sparse") == 0
    config = load(shell.base / "demo.toml", "alpha")
    config.data_file.write_bytes(b"x" * 8 * MIB)
    meta = FileMetaStore.open_to_read(config.metadata_file, locked=False)
    sb = choose(*meta.read_slots()).superblock
    meta.close()
    path = path_beside(config.data_file)
    header = Header(
        node_id=1, extent_bytes=sb.extent_bytes, device_bytes=sb.device_bytes,
        mirror_id=sb.mirror_id, node_uuid=sb.node_uuid, image_id=b"i" * 16,
        generation=b"g" * 16, own_bytes=3 << 20, peer_bytes=2 << 20,
    )  # fmt: skip
    file = FileKept(path)
    file.create(encode_header(header), Kept(file, sb.geometry(), header).size_bytes)
    file.close()
    return path


def test_what_is_kept_is_shown(shell: Shell, kept: Path) -> None:
    """If this fails, nobody knows whether the writes of last night can be had back."""
    assert shell("kept", "show") == 0
    rows = rows_of(shell.out)
    assert rows["image"] == "all of it is there"
    assert rows["generation"] == "67" * 16
    assert "3.0 MiB" in rows["this side wrote"]
    assert "of 1.0 GiB" in rows["space"]
    assert shell("kept", "show", "--json") == 0
    facts = json.loads(shell.out)
    assert (facts["complete"], facts["path"], facts["extents"]) == (True, str(kept), 0)
    with kept.open("r+b") as file:
        file.seek(META_BLOCK_BYTES)
        file.write(encode_mark(b"i" * 16))
    assert shell("kept", "show") == 0
    assert "not complete" in shell.out


def test_an_export_is_the_whole_device(shell: Shell, kept: Path, tmp_path: Path) -> None:
    """If this fails, what comes back cannot be mounted, or takes the place of something else."""
    image = tmp_path / "image"
    assert shell("kept", "export", str(image)) == 0
    assert f"wrote {image}: 8.0 MiB" in shell.out
    assert image.read_bytes() == b"x" * 8 * MIB
    assert shell("kept", "export", str(image)) == errors.RefusedError.exit_code
    assert "not overwritten" in shell.err
    kept.write_bytes(b"rot" * 5000)
    other = tmp_path / "other"
    assert shell("kept", "export", str(other)) == errors.MetadataError.exit_code
    assert not other.exists()


def test_nothing_kept_is_said(shell: Shell) -> None:
    """If this fails, an operator looks for an image that never was."""
    for words in (("show",), ("export", "image")):
        assert shell("kept", *words) == errors.RefusedError.exit_code
        assert "it has given no copy up" in shell.err


def test_limit_and_discard_are_the_engines(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, a file is removed under a running engine, or the resync waits on."""
    assert shell("kept", "limit", "20GiB") == 0
    sent = engine.requests[-1]
    assert (sent["command"], sent["args"], sent["epoch"]) == ("kept-limit", {"bytes": 20 << 30}, 3)
    assert shell("kept", "limit", "17TiB") == errors.ConfigError.exit_code
    assert shell("kept", "discard") == 2, "nobody is there to confirm it"
    assert "is lost for good" in shell.err
    assert shell("kept", "discard", "--yes", "--json") == 0
    assert engine.requests[-1]["command"] == "kept-discard"


def test_discard_without_an_engine(shell: Shell, kept: Path) -> None:
    """If this fails, the space of an old image comes back only when the mirror runs."""
    assert shell("kept", "limit", "1GiB") == errors.UnreachableError.exit_code
    assert shell("kept", "discard", "--yes") == 0
    assert not kept.exists()
    assert shell("metadata", "check") == 0
    assert shell("kept", "discard", "--yes") == errors.RefusedError.exit_code


def test_a_discard_beside_an_engine_that_hangs_is_refused(shell: Shell, kept: Path) -> None:
    """If this fails, what a hung engine is about to overwrite is kept nowhere."""
    meta = FileMetaStore.open(load(shell.base / "demo.toml", "alpha").metadata_file)
    try:
        assert shell("kept", "discard", "--yes") == errors.RefusedError.exit_code
        assert "locked by process" in shell.err
        assert kept.exists()
    finally:
        meta.close()


def test_a_copy_is_given_up_by_hand(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, one word gives up the better copy, or the engine is told another thing."""
    assert shell("engine", "give-up", "--yes") == errors.RefusedError.exit_code
    assert "demote it first" in shell.err
    engine.state.update(role="none", flags=["split"], split=SPLIT, is_kept=True)
    assert shell("engine", "give-up") == 2
    assert "up to 3.0 MiB" in shell.err
    assert shell("engine", "give-up", "--yes") == 0
    assert "what it holds is kept" in shell.out
    sent = engine.requests[-1]
    assert (sent["command"], sent["args"]) == ("give-up", {"keep": True})
    assert shell("engine", "give-up", "--yes", "--no-keep") == 0
    assert "Nothing of it is kept" in shell.err
    assert engine.requests[-1]["args"] == {"keep": False}


def test_the_state_says_how_far_apart_they_are(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, an operator chooses a copy and does not know what the choice costs."""
    engine.state.update(split=SPLIT, kept=KEPT, resync_waits="no room")
    assert shell("engine", "state") == 0
    rows = rows_of(shell.out)
    said = rows["split brain"]
    for word in ("this side wrote up to 3.0 MiB", "other one up to 2.0 MiB", "found 60 s ago"):
        assert word in said
    assert "7200 s ago" in shell.out
    assert "1.0 MiB (1048576) of 1.0 GiB" in rows["kept"]
    assert rows["resync waits"] == "no room"
