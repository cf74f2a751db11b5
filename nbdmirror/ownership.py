"""Whose the files of a mirror on this node are: the engine's own user's, or root's.

Owns owner and mode of the data directory and of `data`, `meta`, `kept` and `tls.pem` in it, where
`engine.user` is set, and their way back to root. Must never: follow a link, touch a file that this
mirror did not make, or give away a file while anybody else could exchange it.

Handed over, the files belong to the user, and the directory stays root's: mode 1770, with the
user's group. The engine makes and removes files of its own there (`kept`), and can neither remove
nor replace what is root's (`controller.json`), nor change the directory.

How a file is given away. First the directory is closed (1700: nobody but root, and the sticky bit
says that this is under way): from then on nobody else changes a name in it. Then each file is
opened without following links, has to be plain, of one name (a second one could be another
program's file), and root's, the user's, or the user's before. At last the directory is opened.
Whatever ends that in the midst of it, the next start begins anew.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdmirror import engine_user
from nbdmirror.config import Config
from nbdmirror.core.superblock import choose
from nbdmirror.engine_user import Account
from nbdmirror.errors import ConfigError, RefusedError, StoreError
from nbdmirror.files import FILE_MODE, open_regular, path_error
from nbdmirror.metastore import FileMetaStore

# The metadata last: its owner says whose all of them were.
FILES: Final = ("data", "kept", "tls.pem", "meta")
OPEN_MODE: Final = stat.S_ISVTX | 0o770
CLOSED_MODE: Final = stat.S_ISVTX | 0o700
PLAIN_MODE: Final = 0o700
OTHERS_MAY_WRITE: Final = 0o022
ROOT: Final = Account("root", 0, 0)


def settle(config: Config, user: Account | None) -> None:
    """Make the files that user's; without one root's again, where they were given to one.

    Nothing is done where they are already, or where this process does not run as root.

    Raises:
        ConfigError: the user cannot get there. RefusedError: what is there is not this mirror's to
        give. MetadataError, StoreError: it cannot be read or changed.
    """
    directory = config.me.data_dir
    if not directory.exists():
        return  # the engine says so
    if user is not None:
        if not _is_handed(directory, user):
            require_settled(config, user)
            _give(directory, user, OPEN_MODE)
        engine_user.require_reach(user, enter=directory)
    elif os.geteuid() == 0 and _has_form(directory):
        _give(directory, ROOT, PLAIN_MODE)


def require_settled(config: Config, user: Account) -> None:
    """Whether the files can become that user's. Changes nothing.

    Raises:
        ConfigError: the user cannot get there. RefusedError: what is there is not this mirror's to
        give. MetadataError, StoreError: it cannot be read.
    """
    directory = config.me.data_dir
    there = next(each for each in (directory, *directory.parents) if each.exists())
    _require_way(there)
    engine_user.require_reach(user, enter=directory.parent if there == directory else there)
    if there != directory:
        return
    former = _former(directory)
    for path in _present(directory):
        with _opened(path) as descriptor:
            _require_ours(path, os.fstat(descriptor), user, former)
    _require_this_mirror(config)


def _require_way(directory: Path) -> None:
    """Whoever can put another directory in the place of one gets its files chosen by root."""
    if directory.is_symlink():
        raise RefusedError(
            f"{directory} is a symbolic link; with engine.user set, name the directory itself"
        )
    real = directory.resolve(strict=True)
    for each in (real, *real.parents):
        status = each.stat()
        mode = stat.S_IMODE(status.st_mode)
        # In a sticky directory only the owner of a name can exchange it.
        open_to_others = mode & OTHERS_MAY_WRITE and not mode & stat.S_ISVTX
        if status.st_uid != 0 or (each != real and open_to_others):
            what = "is open to other users" if status.st_uid == 0 else "is not root's"
            raise RefusedError(
                f"{each} (mode {mode:04o}, user {status.st_uid}) {what}, who could exchange what "
                "lies in it; with engine.user set every directory on the way is root's: "
                f"`chown root {each}; chmod go-w {each}`"
            )


def _present(directory: Path) -> list[Path]:
    return [path for name in FILES if os.path.lexists(path := directory / name)]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The plain file itself. Raises RefusedError, StoreError."""
    descriptor = open_regular(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _require_ours(path: Path, status: os.stat_result, user: Account, former: int) -> None:
    if status.st_nlink != 1:
        raise RefusedError(
            f"{path} has {status.st_nlink} names, and is not given to {user.name}: another one may "
            f"be another program's; `find -xdev -samefile {path}` finds them"
        )
    if status.st_uid not in {0, user.uid, former}:
        raise RefusedError(
            f"{path} belongs to user {status.st_uid}, neither root nor {user.name}, and is not "
            f"given away; if it is this mirror's: `chown root {path}`"
        )


def _require_this_mirror(config: Config) -> None:
    """The metadata says whose the directory is; where it is missing, the engine says so."""
    path = config.metadata_file
    if not os.path.lexists(path):
        return
    meta = FileMetaStore.open_to_read(path, locked=False)
    try:
        sb = choose(*meta.read_slots()).superblock
    finally:
        meta.close()
    if (sb.mirror_name, sb.node_id) != (config.mirror, config.me.id):
        raise RefusedError(
            f"{path} belongs to node {sb.node_id} of {sb.mirror_name}, not to node {config.me.id} "
            f"of {config.mirror}: nothing there is given to {config.engine.user}"
        )


# --- the forms -----------------------------------------------------------------------------------


def is_given(directory: os.stat_result, owner: int) -> bool:
    """Whether a directory is open to the group of that user alone, as `settle` leaves it."""
    try:
        group = pwd.getpwuid(owner).pw_gid
    except KeyError:
        return False
    form = (directory.st_mode, directory.st_uid, directory.st_gid)
    return form == (stat.S_IFDIR | OPEN_MODE, 0, group)


def _has_form(directory: Path) -> bool:
    """Whether its files were given to a user, or that is under way."""
    status = directory.lstat()
    ours = stat.S_IMODE(status.st_mode) in (OPEN_MODE, CLOSED_MODE)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and ours


def _former(directory: Path) -> int:
    """The user whose the files were until now; root's number where they are nobody's own."""
    if not _has_form(directory):
        return 0
    try:
        return (directory / "meta").lstat().st_uid
    except OSError:
        return 0


def _is_handed(directory: Path, user: Account) -> bool:
    status = directory.lstat()
    form = (status.st_mode, status.st_uid, status.st_gid)
    if form != (stat.S_IFDIR | OPEN_MODE, 0, user.gid):
        return False
    wanted = (stat.S_IFREG | FILE_MODE, user.uid, user.gid, 1)
    for path in _present(directory):
        status = path.lstat()
        if (status.st_mode, status.st_uid, status.st_gid, status.st_nlink) != wanted:
            return False
    return True


def _give(directory: Path, owner: Account, mode: int) -> None:
    """See the module; `mode` is what the directory has in the end."""
    former = _former(directory)
    with _held(directory) as held:
        _set(held, directory, ROOT, CLOSED_MODE)
        for path in _present(directory):
            with _opened(path) as descriptor:
                _require_ours(path, os.fstat(descriptor), owner, former)
                _set(descriptor, path, owner, FILE_MODE)
        _set(held, directory, replace(ROOT, gid=owner.gid), mode)


@contextmanager
def _held(directory: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(directory, flags)
    except OSError as error:
        raise path_error(error, str(directory), "it has to be a directory") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _set(descriptor: int, path: Path, owner: Account, mode: int) -> None:
    try:
        # The owner first: a change of it may take bits of the mode away.
        os.fchown(descriptor, owner.uid, owner.gid)
        os.fchmod(descriptor, mode)
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.EROFS}:
            raise ConfigError(
                f"{path}: its owner cannot be changed ({error.strerror}): a file system without "
                'owners, or without the right to change them; set engine.user = ""'
            ) from error
        raise StoreError(error.errno or errno.EIO, f"chown {path}") from error
