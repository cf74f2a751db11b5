"""The NBD clients of this process, as sockets: nbdkit offers no call to disconnect one.

Owns the search for accepted connections among this process's descriptors. Shutting one down makes
nbdkit close its handle; the descriptor itself stays nbdkit's.
"""

import contextlib
import os
import socket
import stat
from typing import Any

LISTEN_FDS_START = 3


def listening_addresses() -> list[Any]:
    """The addresses of the sockets that nbdkit got by activation."""
    addresses: list[Any] = []
    for descriptor in _sockets():
        with contextlib.suppress(OSError), _borrowed(descriptor) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                addresses.append((sock.family, sock.getsockname()))
    return addresses


def disconnect_clients(listening: list[Any], how: int) -> int:
    """Shut down every connection accepted on one of these addresses; returns how many.

    `how` as for shutdown(2). With SHUT_RD nbdkit takes no further request, sends the replies that
    it still has, and closes; SHUT_RDWR cuts them off.
    """
    return sum(shut(descriptor, listening, how) for descriptor in _sockets())


def shut(descriptor: int, listening: list[Any], how: int) -> bool:
    """Shut one connection down, if it was accepted on one of these addresses.

    A client hangs up whenever it likes, so the descriptor may be closed by now, or be something
    else: then nothing happens.
    """
    try:
        with _borrowed(descriptor) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            if not _is_of(sock, listening):
                return False
            sock.shutdown(how)
            return True
    except OSError:
        return False


def _is_of(sock: socket.socket, listening: list[Any]) -> bool:
    name = sock.getsockname()
    for family, address in listening:
        if sock.family != family or not name:
            continue
        if family == socket.AF_UNIX and name == address:
            return True
        if family != socket.AF_UNIX and name[1] == address[1]:
            return True
    return False


def _sockets() -> list[int]:
    """Descriptors that are sockets; none where they cannot be listed (no descriptor is left)."""
    found: list[int] = []
    try:
        entries = os.listdir("/proc/self/fd")  # noqa: PTH208 - names, not paths
    except OSError:
        return found
    for entry in entries:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                found.append(int(entry))
    return found


class _borrowed:  # noqa: N801 - used like a function
    """A socket object over a descriptor that is not ours to close.

    Raises:
        OSError: it is closed, or no socket any more.
    """

    def __init__(self, descriptor: int) -> None:
        copy = os.dup(descriptor)
        try:
            self._socket = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            raise

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.close()
