"""The NBD clients of this process, as sockets: nbdkit offers no call to disconnect one.

Owns the search for accepted connections among this process's descriptors. Shutting one down makes
nbdkit close its handle; the descriptor itself stays nbdkit's.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
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

    One that nbdkit closes meanwhile is gone already. `how` as for shutdown(2). With SHUT_RD nbdkit
    takes no further request, sends the replies that it still has, and closes; SHUT_RDWR cuts them
    off.
    """
    count = 0
    for descriptor in _sockets():
        with contextlib.suppress(OSError), _borrowed(descriptor) as sock:
            accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if not accepts and _is_of(sock, listening):
                sock.shutdown(how)
                count += 1
    return count


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
    found: list[int] = []
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, not paths
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                found.append(int(entry))
    return found


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object over a descriptor that is not ours to close. OSError: it is closed."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        yield sock
