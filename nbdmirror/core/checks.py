"""Checksums and keyed hashes.

Owns: the one place that computes a CRC-32C or a BLAKE3 hash, and the reference that both are held
against. A CRC finds accidents, never an attacker; where two nodes compare data that may differ on
purpose, or where equality decides that nothing is copied, the keyed hash is used. Must never: hold
a key, or be given one that is also used for anything else.
"""

from typing import Final, TypeAlias

import blake3
import crc32c as _hardware
import crcmod.predefined
from crcmod.crcmod import _usingExtension

from nbdmirror.limits import HASH_BYTES

# The same type as in ports.py, which is above this module: it imports the superblock.
ReadBuffer: TypeAlias = bytes | bytearray | memoryview

HASH_KEY_BYTES: Final = 32

_reference = crcmod.predefined.mkPredefinedCrcFun("crc-32c")


def crc32c(data: ReadBuffer, seed: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720 B.4) of contiguous `data`, 0..2**32-1.

    `seed` is the CRC of what came before: crc32c(b, crc32c(a)) == crc32c(a + b).
    """
    return _hardware.crc32c(data, seed)


def crc32c_reference(data: bytes, seed: int = 0) -> int:
    """The same function from an independent implementation (crcmod), for tests and self-checks."""
    return int(_reference(data, seed))


def crcmod_is_compiled() -> bool:
    """Whether crcmod runs as C. Built without a compiler it silently becomes 100 times slower."""
    return bool(_usingExtension)


def keyed_hash(key: bytes, data: ReadBuffer) -> bytes:
    """Keyed BLAKE3 of `data`, 16 bytes. `key` is exactly 32 bytes."""
    assert len(key) == HASH_KEY_BYTES, "a BLAKE3 key has 32 bytes"
    return blake3.blake3(data, key=key).digest(length=HASH_BYTES)


def keyed_hash_of_two(key: bytes, first: ReadBuffer, second: ReadBuffer) -> bytes:
    """keyed_hash(key, first + second), without joining them.

    Give the long one first: BLAKE3 hashes four aligned pieces of 1 KiB at once, so 56 bytes before
    4 KiB make it take twice as long.
    """
    assert len(key) == HASH_KEY_BYTES, "a BLAKE3 key has 32 bytes"
    hasher = blake3.blake3(first, key=key)
    hasher.update(second)
    return hasher.digest(length=HASH_BYTES)
