"""The exceptions of the project, by who is to blame and what the NBD client sees.

One class, one errno, one exit code: `plugin/` and the CLI read them here and nowhere else. A
message names the thing, the value and the remedy; it never holds a secret.
"""

import errno
from collections.abc import Sequence
from typing import ClassVar


class NbdMirrorError(Exception):
    """Base of all errors that are expected to happen."""

    nbd_errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = 10


class ConfigError(NbdMirrorError):
    """The configuration, the key or an argument is wrong; the text lists every mistake.

    `mistakes`: the same one by one, where there is a list.
    """

    exit_code: ClassVar[int] = 11

    def __init__(self, text: str, mistakes: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.mistakes = tuple(mistakes)


class MetadataError(NbdMirrorError):
    """Metadata is missing, damaged, foreign or newer than this program."""

    exit_code: ClassVar[int] = 12


class RefusedError(NbdMirrorError):
    """A command that the metadata or the rules forbid; the text says why and what would help."""

    exit_code: ClassVar[int] = 13


class NoRoomToKeepError(RefusedError):
    """What a copy held that was given up cannot be kept, so it is not overwritten (rule 19)."""

    exit_code: ClassVar[int] = 25


class StaleCommandError(RefusedError):
    """A command decided under another engine instance or role epoch."""

    exit_code: ClassVar[int] = 14


class UnreachableError(NbdMirrorError):
    """The engine's control socket cannot be reached or does not answer in time."""

    exit_code: ClassVar[int] = 15


class NotPrimaryError(NbdMirrorError):
    """A client request met a node that is not (or no longer) primary."""

    nbd_errno: ClassVar[int] = errno.ESHUTDOWN
    exit_code: ClassVar[int] = 16


class StoreError(NbdMirrorError):
    """The backing file or the metadata file failed with an errno of the system.

    `number` is that errno; `where` says which call on which file.
    """

    exit_code: ClassVar[int] = 17

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"{where}: {errno.errorcode.get(number, number)}")
        self.number = number
        self.where = where


class OutOfSpaceError(StoreError):
    """The backing file system is full and nobody else could take the write."""

    nbd_errno: ClassVar[int] = errno.ENOSPC
    exit_code: ClassVar[int] = 18


class NotSupportedError(NbdMirrorError):
    """An operation that the two nodes agreed not to offer (a trim that does not read as zeros)."""

    nbd_errno: ClassVar[int] = errno.EINVAL
    exit_code: ClassVar[int] = 19


class PeerProtocolError(NbdMirrorError):
    """The peer sent what the protocol does not allow. The session ends, the data stays."""

    exit_code: ClassVar[int] = 20


class AuthenticationError(PeerProtocolError):
    """The other end does not hold the mirror's key."""

    exit_code: ClassVar[int] = 21


class PeerRefusedError(PeerProtocolError):
    """Peer and node do not fit together (mirror, size, version, settings, history)."""

    exit_code: ClassVar[int] = 22


class SessionLostError(NbdMirrorError):
    """The session with the peer ended while a path was waiting for it."""

    exit_code: ClassVar[int] = 23


class ArbiterError(NbdMirrorError):
    """The arbiter gave no clear answer, or what it holds cannot be believed. Nothing is known."""

    exit_code: ClassVar[int] = 24
