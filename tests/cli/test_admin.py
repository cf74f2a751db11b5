"""Creating, showing and checking the files of a node."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmirror import admin
from nbdmirror.config import Config, load
from nbdmirror.core.superblock import DataState, Flags, choose
from nbdmirror.errors import (
    ConfigError,
    MetadataError,
    OutOfSpaceError,
    RefusedError,
    StoreError,
)
from nbdmirror.limits import LOG_OFFSET_BYTES, MAP_OFFSET_BYTES
from nbdmirror.metastore import FileMetaStore
from nbdmirror.store import FileStore
from tests.contract.conftest import file_size_limit

MIB = 1024 * 1024


@pytest.fixture
def alpha(base: Path) -> Config:
    """The configuration as the first node sees it."""
    return load(base / "demo.toml", "alpha")


@pytest.fixture
def beta(base: Path) -> Config:
    """The configuration as the second node sees it."""
    return load(base / "demo.toml", "beta")


def spoil(path: Path, offset: int) -> None:
    """Turn one byte over."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_two_new_nodes_belong_together(alpha: Config, beta: Config) -> None:
    """If this fails, a new pair refuses each other, or copies a whole device of zeros."""
    first = admin.create(alpha, 8 * MIB, join=False, adopt=False, sparse=False)
    second = admin.create(beta, 8 * MIB, join=True, adopt=False, sparse=True)
    assert first.mirror_id == second.mirror_id
    assert first.node_uuid != second.node_uuid
    assert first.map_id != second.map_id
    assert (first.data_state, second.data_state) == (DataState.UPTODATE, DataState.BLANK)
    assert any(first.generation)
    assert not any(second.generation)
    assert first.flags == Flags.ALONE | Flags.CLEAN | Flags.ZEROED
    assert second.flags == Flags.CLEAN | Flags.ZEROED | Flags.SPARSE
    for config, made in ((alpha, first), (beta, second)):
        meta = FileMetaStore.open(config.metadata_file)
        assert choose(*meta.read_slots()).superblock == made
        meta.close()
        assert config.data_file.stat().st_size == 8 * MIB
        assert not admin.check(config.metadata_file).damaged


def test_another_key_or_name_is_another_mirror(alpha: Config) -> None:
    """If this fails, nodes of two mirrors take each other for peers."""
    ids = {
        admin.derive_mirror_id(alpha.key, "demo"),
        admin.derive_mirror_id(alpha.key, "other"),
        admin.derive_mirror_id(b"x" * 32, "demo"),
    }
    assert len(ids) == 3


def test_adopted_data_is_kept_and_not_called_zero(alpha: Config) -> None:
    """If this fails, "nothing to copy" is decided over a node that has data."""
    alpha.me.data_dir.mkdir()
    alpha.data_file.write_bytes(b"precious".ljust(2 * MIB, b"."))
    made = admin.create(alpha, None, join=False, adopt=True, sparse=False)
    assert made.device_bytes == 2 * MIB
    assert made.data_state is DataState.UPTODATE
    assert not made.flags & Flags.ZEROED
    assert alpha.data_file.read_bytes().startswith(b"precious.")


def test_nothing_is_overwritten(alpha: Config) -> None:
    """If this fails, a repeated command destroys a mirror."""
    admin.create(alpha, 2 * MIB, join=False, adopt=False, sparse=True)
    before = alpha.metadata_file.read_bytes()
    for join in (False, True):
        with pytest.raises(RefusedError, match="not overwritten"):
            admin.create(alpha, 2 * MIB, join=join, adopt=False, sparse=True)
    assert alpha.metadata_file.read_bytes() == before
    alpha.metadata_file.unlink()
    with pytest.raises(RefusedError, match="adopt"):
        admin.create(alpha, 2 * MIB, join=False, adopt=False, sparse=True)
    assert alpha.data_file.stat().st_size == 2 * MIB


def test_a_half_done_creation_is_undone(alpha: Config) -> None:
    """If this fails, the second try after a full disk is refused because of the first."""
    with file_size_limit(2 * MIB), pytest.raises(StoreError):
        admin.create(alpha, 4 * MIB, join=False, adopt=False, sparse=False)
    assert not alpha.me.data_dir.exists()
    with file_size_limit(MAP_OFFSET_BYTES), pytest.raises(StoreError, match="meta"):
        admin.create(alpha, 1 * MIB, join=False, adopt=False, sparse=False)
    assert not alpha.me.data_dir.exists()


def test_a_full_disk_names_the_way_without_space(
    alpha: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, whoever lacks the space does not learn that there is a way without."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfSpaceError, match=r"reserve 1048576 bytes .*`--sparse`.*ENOSPC"):
        admin.create(alpha, MIB, join=False, adopt=False, sparse=False)
    assert not alpha.me.data_dir.exists()
    with pytest.raises(OutOfSpaceError) as caught:  # the metadata is never sparse
        admin.create(alpha, MIB, join=False, adopt=False, sparse=True)
    assert "--sparse" not in str(caught.value)


def test_an_adopted_file_survives_a_failed_creation(alpha: Config) -> None:
    """If this fails, the undoing of a creation deletes the operator's data."""
    alpha.me.data_dir.mkdir()
    alpha.data_file.write_bytes(b"x" * MIB)
    with file_size_limit(MAP_OFFSET_BYTES), pytest.raises(StoreError, match="meta"):
        admin.create(alpha, None, join=False, adopt=True, sparse=True)
    assert alpha.data_file.read_bytes() == b"x" * MIB


def test_impossible_devices_are_refused_before_anything_is_made(alpha: Config) -> None:
    """If this fails, a typing error in the size leaves files behind."""
    for size in (0, 1000, MIB + 1, 1 << 60):
        with pytest.raises(ConfigError, match="device_bytes"):
            admin.create(alpha, size, join=False, adopt=False, sparse=True)
    with pytest.raises(ConfigError, match="size"):
        admin.create(alpha, None, join=False, adopt=False, sparse=True)
    with pytest.raises(MetadataError, match="adopted"):
        admin.create(alpha, None, join=False, adopt=True, sparse=True)
    assert not alpha.me.data_dir.exists()


def test_check_names_each_damage_and_repairs_nothing(alpha: Config) -> None:
    """If this fails, an operator trusts a damaged node, or the check destroys the evidence."""
    admin.create(alpha, 2 * MIB, join=False, adopt=False, sparse=True)
    path = alpha.metadata_file
    spoil(path, 20)
    spoil(path, LOG_OFFSET_BYTES + 1)
    spoil(path, MAP_OFFSET_BYTES + 100)
    os.truncate(alpha.data_file, MIB)
    before = path.read_bytes()
    report = admin.check(path)
    assert [finding.part for finding in report.findings] == [
        "superblock slot 0",
        "superblock",
        "intent log",
        "dirty map page 0",
        "data",
    ]
    assert "neither promoted nor a source" in report.findings[1].meaning
    assert report.facts["dirty_bytes"] == 2 * MIB
    assert path.read_bytes() == before


def test_check_and_show_tell_what_is_lost(alpha: Config) -> None:
    """If this fails, the worst damage of all is a traceback."""
    admin.create(alpha, 2 * MIB, join=False, adopt=False, sparse=True)
    path = alpha.metadata_file
    for slot in (0, 32 * 1024):
        spoil(path, slot + 20)
    report = admin.check(path)
    assert report.damaged
    assert "it does not start" in report.findings[-1].meaning
    with pytest.raises(MetadataError, match=r"move the metadata file away.*--join --adopt"):
        admin.show(path)
    os.truncate(path, 4096)
    assert [finding.part for finding in admin.check(path).findings] == ["file"]
    path.unlink()
    assert admin.check(path).damaged


def test_the_remedy_for_lost_metadata_works(alpha: Config) -> None:
    """Breaks in the field: the way back that the text names is refused, or makes a stale copy the
    source of the mirror.
    """
    admin.create(alpha, 2 * MIB, join=False, adopt=False, sparse=True)
    for slot in (0, 32 * 1024):
        spoil(alpha.metadata_file, slot + 20)
    remedy = admin.check(alpha.metadata_file).findings[-1].problem
    assert "move the metadata file away" in remedy
    with pytest.raises(RefusedError, match="not overwritten"):
        admin.create(alpha, None, join=True, adopt=True, sparse=True)
    alpha.metadata_file.rename(alpha.metadata_file.with_name("damaged"))
    assert "--join --adopt" in remedy
    made = admin.create(alpha, None, join=True, adopt=True, sparse=True)
    assert (made.data_state, made.flags & Flags.ALONE) == (DataState.BLANK, Flags(0))


def spoil_data_link(config: Config) -> None:
    """Exchange the data file for a link to it."""
    config.data_file.rename(config.data_file.with_name("elsewhere"))
    config.data_file.symlink_to("elsewhere")


def spoil_run_dir(config: Config) -> None:
    """Let the directory of the sockets be a link into one that everybody writes to."""
    wide = config.me.data_dir.parent / "wide"
    (wide / "run").mkdir(parents=True)
    wide.chmod(0o777)
    config.me.run_dir.symlink_to(wide / "run")


@pytest.mark.parametrize(
    ("spoil_it", "parts"),
    [
        (lambda config: config.data_file.chmod(0o666), ["data: 0666"]),
        (lambda config: config.metadata_file.chmod(0o640), ["meta: 0640"]),
        (lambda config: config.me.data_dir.chmod(0o777), ["data_dir: 0777"]),
        (lambda config: os.chown(config.me.data_dir, 12345, 0), ["data_dir: user 12345"]),
        (lambda config: os.chown(config.data_file, 12345, 0), ["data: user 12345"]),
        (
            lambda config: (config.me.data_dir / "copy").hardlink_to(config.data_file),
            ["data: 2 names"],
        ),
        (spoil_run_dir, ["run_dir: is a symbolic link", "run_dir: 0777"]),
    ],
)
def test_check_warns_of_what_others_can_reach(
    beta: Config, require_root: None, spoil_it: Callable[[Config], object], parts: list[str]
) -> None:
    """Breaks in the field: another user of the host writes into the mirror, or exchanges its files,
    and the check calls it well.
    """
    beta.me.data_dir.parent.chmod(0o700)
    admin.create(beta, 2 * MIB, join=True, adopt=False, sparse=True)
    assert admin.check(beta.metadata_file, beta.me.run_dir).findings == ()
    spoil_it(beta)
    report = admin.check(beta.metadata_file, beta.me.run_dir)
    assert not report.damaged
    assert len(report.findings) == len(parts), report.findings
    for finding, wanted in zip(report.findings, parts, strict=True):
        part, _, words = wanted.partition(": ")
        assert (finding.part, finding.severity) == (part, "warning")
        assert words in finding.problem
        assert finding.remedy


def test_check_refuses_what_the_engine_refuses(beta: Config) -> None:
    """If this fails, the check says "no damage" and the engine does not start."""
    admin.create(beta, 2 * MIB, join=True, adopt=False, sparse=True)
    spoil_data_link(beta)
    (finding,) = admin.check(beta.metadata_file).findings
    assert (finding.part, finding.severity) == ("data", "damage")
    assert "symbolic link" in finding.problem
    with pytest.raises(RefusedError, match="symbolic link"):
        FileStore.open(beta.data_file, 2 * MIB, sparse=True)


def test_check_leaves_a_running_engine_alone(alpha: Config) -> None:
    """If this fails, a check reads pages that are being written and reports damage that is none."""
    admin.create(alpha, 2 * MIB, join=False, adopt=False, sparse=True)
    meta = FileMetaStore.open(alpha.metadata_file)
    with pytest.raises(RefusedError, match="locked"):
        admin.check(alpha.metadata_file)
    assert admin.show(alpha.metadata_file)["held_by_pid"] == os.getpid()
    meta.close()
    assert admin.show(alpha.metadata_file)["held_by_pid"] is None
