"""How many threads a connection gets from which nbdkit (docs/adr 0014)."""

import shutil
from pathlib import Path

import pytest

from nbdmirror.errors import ConfigError
from nbdmirror.launcher import threads, version_of

MENDED = ("nbdkit 1.34.0", "nbdkit 1.34.4 (nbdkit-1.34.4-1.fc38)", "nbdkit 1.42.2", "nbdkit 2.0.0")
BREAKS = ("nbdkit 1.32.5", "nbdkit 1.33.12", "nbdkit 1.9.10", "nbdkit one", "")


def says(directory: Path, text: str) -> str:
    """A program that answers `--version` so; returns its path."""
    program = directory / "nbdkit"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = --version ] && echo '{text}'\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("version", MENDED)
def test_a_mended_nbdkit_gets_what_was_asked_for(tmp_path: Path, version: str) -> None:
    """If this fails, a new nbdkit is as slow as an old one."""
    nbdkit = says(tmp_path, version)
    assert [threads(wanted, nbdkit) for wanted in (0, 1, 4, 64)] == [4, 1, 4, 64]


@pytest.mark.parametrize("version", BREAKS)
def test_one_that_its_clients_can_end_gets_one_thread(tmp_path: Path, version: str) -> None:
    """If this fails, a client that is killed ends the engine, and every other client with it."""
    nbdkit = says(tmp_path, version)
    assert [threads(wanted, nbdkit) for wanted in (0, 1)] == [1, 1]
    with pytest.raises(ConfigError, match=r"engine\.threads = 2: .*remove the line, or set 1"):
        threads(2, nbdkit)


def test_one_that_cannot_be_asked_gets_one_thread(tmp_path: Path) -> None:
    """If this fails, an nbdkit that does not answer is taken for a good one."""
    assert threads(0, str(tmp_path / "absent")) == 1


def test_the_installed_one_can_be_asked() -> None:
    """If this fails, the version of this machine is not understood, and nobody notices."""
    nbdkit = shutil.which("nbdkit")
    assert nbdkit is not None
    assert len(version_of(nbdkit)) == 3
