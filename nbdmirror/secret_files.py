"""Files with secrets: the mirror's key, passwords, keys and signatures for the arbiter's store.

Owns what makes such a file fit to be believed: a plain file, nobody else's, for its owner alone.
Must never: put a byte of one into a message.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Final

from nbdmirror.errors import ConfigError, RefusedError, StoreError
from nbdmirror.files import open_regular

SECRET_MODES: Final = (0o600, 0o400)


def read_secret(path: Path, low: int, high: int, remedy: str) -> bytes:
    """All of the file, `low` to `high` bytes.

    `remedy`: what to do where there is no such file.

    Raises:
        ConfigError: there is none, or it is not fit; never with a byte of it.
    """
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except (RefusedError, StoreError) as error:
        raise ConfigError(_why_not(path, error, remedy)) from error
    try:
        status = os.fstat(descriptor)
        secret = os.read(descriptor, high + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    wrong = []
    if mode not in SECRET_MODES:
        wrong.append(f"its mode is {mode:04o}, expected 0600 or 0400 (`chmod 0600`)")
    if status.st_uid not in {0, os.geteuid()}:
        wrong.append(f"it belongs to user {status.st_uid}, expected root or who runs this")
    if not low <= len(secret) <= high:
        wrong.append(f"its length is not within {low} to {high} bytes")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return secret


def _why_not(path: Path, error: RefusedError | StoreError, remedy: str) -> str:
    if not isinstance(error, StoreError):
        if path.is_symlink():
            return "it is a symbolic link; name the file itself, so that it cannot be exchanged"
        return "it is no plain file; expected one that holds the key"
    if error.number == errno.ENOENT:
        return f"there is no such file; {remedy}"
    if error.number in {errno.EACCES, errno.EPERM}:
        return f"user {os.geteuid()} may not read it; run this as its owner, or as root"
    return f"cannot be read: {os.strerror(error.number)}"
