"""A new mirror with a file system on it: made before there is anything to copy."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror import creation
from nbdmirror.core.superblock import Flags
from nbdmirror.creation import Place
from nbdmirror.errors import ConfigError
from tests.unit.test_creation import plan

SIZE = 320 << 20  # xfs takes no less than 300 MiB


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: sockets are named in it."""
    path = Path(tempfile.mkdtemp(prefix="nbdm-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_the_device_has_the_file_system_and_its_space(directory: Path, kind: str) -> None:
    """Breaks in the field: the first start cannot mount; or the space that was reserved is given
    back by mkfs, and a write fails much later.
    """
    wanted = plan(directory, size_bytes=SIZE, file_system=kind, mount_point="/srv/demo")
    made = creation.make(wanted, Place(directory))
    image = made.config.data_file
    said = subprocess.run(["blkid", "-o", "value", "-s", "TYPE", image], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert said.stdout.strip() == kind
    assert made.config.mount.type == kind
    assert image.stat().st_blocks * 512 >= SIZE
    # What is in it has to be copied: it does not pass for a file of zeros.
    assert Flags.ZEROED not in made.superblock.flags


def test_a_failed_mkfs_leaves_nothing(directory: Path) -> None:
    """Breaks in the field: the second attempt is refused because of the remains of the first."""
    with pytest.raises(ConfigError, match=r"--mkfs xfs: mkfs\.xfs failed"):
        creation.make(plan(directory, size_bytes=1 << 20, file_system="xfs"), Place(directory))
    assert not list(directory.glob("*.toml"))
    assert not [each for each in directory.rglob("*") if each.is_file()]
