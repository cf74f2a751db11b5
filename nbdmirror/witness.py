"""The witness: did the page cache of this node survive since it last looked?

Owns: the two identifiers that a superblock stores when the node was last in sync, and how they are
read from the system. Must never: let two different lives of a page cache compare equal. In doubt
the cache is lost, so every doubt is answered with fresh random bytes: they equal nothing.

The page cache of a file lives as long as the boot and the mount under it. A boot has an id. A mount
has one that is never reused only since Linux 6.8 (STATX_MNT_ID_UNIQUE); the older, reused one could
name another mount after `umount` and `mount`. On an older kernel a node whose engine was killed
therefore needs a resync with its peer, however small, before it may be promoted. The same holds
where the engine gets a mount namespace of its own at each start (`PrivateMounts=` and its
relatives in a systemd unit): each start is then another mount.
"""

import ctypes
import os
import struct
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blake3 import blake3

BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
BOOT_ID_FILE_VARIABLE: Final = "NBDMIRROR_BOOT_ID_FILE"
ID_BYTES: Final = 16

# linux/stat.h: struct statx, and the fields used of it.
STATX_MNT_ID_UNIQUE: Final = 0x4000
AT_EMPTY_PATH: Final = 0x1000
_STATX_BYTES: Final = 256
_MASK = struct.Struct("=I")  # at 0
_DEVICE_AND_MOUNT: Final = struct.Struct("=IIQ")  # dev_major, dev_minor, mnt_id
_DEVICE_AND_MOUNT_OFFSET_BYTES: Final = 136
_CONTEXT: Final = "nbdmirror 2026 mount id"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class BootIdentity:
    """Which life of the page cache this is; 16 bytes each.

    `doubt` says why an identifier is random and will never compare equal, or is "".
    """

    boot_id: bytes
    mount_id: bytes
    doubt: str = field(default="", compare=False)


def boot_id_override() -> str:
    """What an operator has to know where the kernel is not asked, or "". For tests only."""
    path = os.environ.get(BOOT_ID_FILE_VARIABLE)
    if not path:
        return ""
    return (
        f"{BOOT_ID_FILE_VARIABLE}={path} stands for the kernel's boot id: after a power failure a "
        "copy that lost writes may be believed (rule 12); never set it outside of a test"
    )


def read_boot_identity(descriptor: int) -> BootIdentity:
    """The identity of the page cache behind an open file. Never fails: doubt is an answer."""
    boot_id, boot_doubt = _boot_id()
    mount_id, mount_doubt = _mount_id(descriptor, boot_id)
    return BootIdentity(boot_id, mount_id, "; ".join(filter(None, (boot_doubt, mount_doubt))))


def _boot_id() -> tuple[bytes, str]:
    path = Path(os.environ.get(BOOT_ID_FILE_VARIABLE) or BOOT_ID_FILE)
    try:
        return uuid.UUID(path.read_text(encoding="ascii").strip()).bytes, ""
    except (OSError, ValueError) as error:
        return os.urandom(ID_BYTES), f"no boot id in {path}: {error}"


def _mount_id(descriptor: int, boot_id: bytes) -> tuple[bytes, str]:
    try:
        device_major, device_minor, mount = _unique_mount(descriptor)
    except OSError as error:
        return os.urandom(ID_BYTES), f"no unique mount id (Linux 6.8 has one): {error.strerror}"
    known = struct.pack(">IIQ", device_major, device_minor, mount) + boot_id
    return blake3(known, derive_key_context=_CONTEXT).digest(ID_BYTES), ""


def _unique_mount(descriptor: int) -> tuple[int, int, int]:
    """(major, minor, mount id that is never reused within a boot). Raises OSError."""
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(descriptor, b"", AT_EMPTY_PATH, STATX_MNT_ID_UNIQUE, answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    (mask,) = _MASK.unpack_from(answer.raw)
    if not mask & STATX_MNT_ID_UNIQUE:
        raise OSError(0, "the kernel does not know it")
    major, minor, mount = _DEVICE_AND_MOUNT.unpack_from(answer.raw, _DEVICE_AND_MOUNT_OFFSET_BYTES)
    return int(major), int(minor), int(mount)
