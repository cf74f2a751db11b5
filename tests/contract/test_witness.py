"""The witness: two lives of a page cache never look like one."""

import os
import subprocess
from pathlib import Path

import pytest

from nbdmirror.witness import BOOT_ID_FILE_VARIABLE, BootIdentity, read_boot_identity


def identity_of(path: Path) -> BootIdentity:
    """The identity behind a file that is opened for it."""
    with path.open("rb") as file:
        return read_boot_identity(file.fileno())


def test_the_same_life_is_recognised_or_doubted(tmp_path: Path) -> None:
    """If this fails, every restart of an engine needs its peer, or a reused mount id is trusted."""
    path = tmp_path / "data"
    path.touch()
    first, second = identity_of(path), identity_of(path)
    assert first.boot_id == second.boot_id
    assert (first == second) == (first.doubt == "")


def test_another_boot_is_another_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a node that lost its page cache with its power is promoted."""
    path, boot = tmp_path / "data", tmp_path / "boot_id"
    path.touch()
    monkeypatch.setenv(BOOT_ID_FILE_VARIABLE, str(boot))
    boot.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    first = identity_of(path)
    assert first.boot_id.hex() == "0123456789abcdef0123456789abcdef"
    boot.write_text("11234567-89ab-cdef-0123-456789abcdef\n")
    second = identity_of(path)
    assert first.boot_id != second.boot_id
    assert first.mount_id != second.mount_id


@pytest.mark.parametrize("content", [None, "", "not an id"])
def test_without_a_boot_id_nothing_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """If this fails, two boots without an id look like one."""
    path, boot = tmp_path / "data", tmp_path / "boot_id"
    path.touch()
    if content is not None:
        boot.write_text(content)
    monkeypatch.setenv(BOOT_ID_FILE_VARIABLE, str(boot))
    first, second = identity_of(path), identity_of(path)
    assert "no boot id" in first.doubt
    assert first.boot_id != second.boot_id
    assert first.mount_id != second.mount_id


def test_another_mount_is_another_life(tmp_path: Path, require_root: None) -> None:
    """If this fails, writes that an unmount could not write back are believed to be there."""
    seen = []
    for _ in range(2):
        subprocess.run(["mount", "-t", "tmpfs", "nbdmirror-test", tmp_path], check=True)
        try:
            (tmp_path / "data").touch()
            seen.append(identity_of(tmp_path / "data"))
        finally:
            subprocess.run(["umount", "-l", tmp_path], check=True)  # a failed test holds files open
    assert seen[0].boot_id == seen[1].boot_id
    assert seen[0].mount_id != seen[1].mount_id


def test_no_mount_is_no_crash() -> None:
    """If this fails, a file system without the answer keeps the engine from starting."""
    read, write = os.pipe()
    os.close(write)
    os.close(read)
    assert "mount id" in read_boot_identity(read).doubt
