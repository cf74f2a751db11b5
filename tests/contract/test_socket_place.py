"""The place of a Unix socket: what may be removed from it, asked of a real file system."""

import socket
from pathlib import Path

import pytest

from nbdmirror.errors import ConfigError, RefusedError
from nbdmirror.files import remove_socket, require_socket_path
from nbdmirror.limits import SOCKET_PATH_BYTES_MAX


def test_an_old_socket_is_removed_and_nothing_is_no_error(tmp_path: Path) -> None:
    """Breaks in the field: after a crash the engine does not start again."""
    path = tmp_path / "sock"
    remove_socket(path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    remove_socket(path)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["plain", "directory", "link to a socket"])
def test_nothing_but_a_socket_is_removed(tmp_path: Path, kind: str) -> None:
    """Breaks in the field: what came there after the configuration was checked is deleted, and it
    was the only copy.
    """
    path = tmp_path / "sock"
    if kind == "plain":
        path.write_bytes(b"data")
    elif kind == "directory":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(tmp_path / "other"))
        path.symlink_to(tmp_path / "other")
    with pytest.raises(RefusedError, match="is there and is no socket"):
        remove_socket(path)
    assert path.is_symlink() or path.exists()


def test_a_path_of_a_socket_has_an_end() -> None:
    """Breaks in the field: an engine that nobody can command."""
    fits = Path("/" + "x" * (SOCKET_PATH_BYTES_MAX - 1))
    require_socket_path(fits)
    with pytest.raises(ConfigError, match="at most 107"):
        require_socket_path(Path(f"{fits}x"))
    with socket.socket(socket.AF_UNIX) as made, pytest.raises(OSError, match="too long"):
        made.bind(f"{fits}x")
