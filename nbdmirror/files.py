"""What the data file, the metadata file and the key file have in common.

Owns: opening a regular file without being led elsewhere, writing all of a buffer, a new file that
is there whole or not at all, making names durable, and the translation of an OSError into the
project's errors. Must never: know what a file is for.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbdmirror.errors import ConfigError, NbdMirrorError, OutOfSpaceError, RefusedError, StoreError
from nbdmirror.limits import SOCKET_PATH_BYTES_MAX

FILE_MODE: Final = 0o600
SPACE_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def store_error(error: OSError, where: str) -> StoreError:
    """The project's error for an OSError: OutOfSpaceError for a full disk or quota."""
    number = error.errno or errno.EIO
    return (OutOfSpaceError if number in SPACE_ERRNOS else StoreError)(number, where)


def path_error(error: OSError, what: str, remedy: str) -> NbdMirrorError:
    """The project's error for a place that the configuration names and that does not serve."""
    if error.errno in SPACE_ERRNOS:
        return store_error(error, f"{what} (no room there)")
    return ConfigError(f"{what}: {error.strerror or error}; {remedy}")


def require_socket_path(path: Path) -> None:
    """Whether a Unix socket can have that path.

    Raises:
        ConfigError: it is too long.
    """
    count = len(os.fsencode(path))
    if count > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"{path} has {count} bytes; the path of a socket has at most {SOCKET_PATH_BYTES_MAX}: "
            "name a shorter directory"
        )


def open_regular(path: Path, flags: int) -> int:
    """Open an existing regular file, close-on-exec, never through a symbolic link.

    Raises:
        RefusedError: it is a symbolic link or not a regular file.
        StoreError: the system refuses, with its errno.
    """
    try:
        # O_NONBLOCK: opening a FIFO or a device by mistake must neither wait nor act.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedError(
                f"{path} is a symbolic link; name the file itself, so that it cannot be exchanged"
            ) from error
        raise store_error(error, f"open {path}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a block device" if stat.S_ISBLK(mode) else "no regular file"
        raise RefusedError(
            f"{path} is {what}; for now only a regular file is taken "
            "(a device has no reserved space, no holes and no exclusive owner here)"
        )
    os.set_blocking(descriptor, True)
    return descriptor


def remove_socket(path: Path) -> None:
    """Remove the Unix socket that a dead process left at `path`; never anything else.

    Raises:
        RefusedError: something else has that name. OSError: the system refuses.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise RefusedError(
            f"{path} is there and is no socket, so it is not removed: name another path, or move "
            "it out of the way"
        )
    path.unlink(missing_ok=True)


def write_all(descriptor: int, block: bytes | memoryview, offset: int) -> None:
    """pwrite until everything is written. Raises OSError."""
    view = memoryview(block)
    while view:
        count = os.pwrite(descriptor, view, offset)
        if count == 0:
            raise OSError(errno.EIO, "no progress")
        view = view[count:]
        offset += count


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes, mode: int, undo: list[Callable[[], None]]) -> None:
    """A new file, whole and durable under its name or not there; nothing is overwritten.

    `undo` gets what takes it away again.

    Raises:
        RefusedError: something has that name. ConfigError, OutOfSpaceError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(
            draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), mode)  # whatever the umask is
                os.fsync(file.fileno())
            os.link(draft, path)
            undo.append(path.unlink)
        finally:
            draft.unlink()
        sync_directory(path.parent)
    except FileExistsError as error:
        raise RefusedError(f"{path} exists and is not overwritten: move it away") from error
    except OSError as error:
        remedy = "run this as root, or name another directory"
        raise path_error(error, f"write {path}", remedy) from error
