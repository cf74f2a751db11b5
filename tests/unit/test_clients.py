"""The search for the clients' connections, while clients come and go as they like."""

import os
import socket
from pathlib import Path

import pytest

from nbdmirror import clients
from nbdmirror.clients import shut


def closed(_: socket.socket) -> int:
    """The number of a descriptor that was closed since it was listed."""
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    return reading


def no_socket(_: socket.socket) -> int:
    """The number of a descriptor that is something else by now."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def still_listening(listener: socket.socket) -> int:
    """The listening socket, which must outlive every client."""
    return os.dup(listener.fileno())


@pytest.mark.parametrize("make", [closed, no_socket, still_listening])
def test_a_descriptor_that_is_no_client_is_left_alone(tmp_path: Path, make: object) -> None:
    """Breaks in the field: one client that hangs up in the wrong microsecond, and a demotion has
    no answer, or the engine has no clock any more.
    """
    assert callable(make)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        descriptor = make(listener)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
        assert not shut(descriptor, [(socket.AF_UNIX, listener.getsockname())], socket.SHUT_RDWR)
        assert len(os.listdir("/proc/self/fd")) == before, "nothing leaks"  # noqa: PTH208
        if make is not closed:
            os.close(descriptor)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))


def test_a_client_is_shut_out(tmp_path: Path) -> None:
    """Breaks in the field: a client of the old primary outlives its term."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client.connect(str(tmp_path / "s"))
        accepted, _ = listener.accept()
        with accepted:
            at = [(socket.AF_UNIX, listener.getsockname())]
            assert shut(accepted.fileno(), at, socket.SHUT_RDWR)
            client.settimeout(10)
            assert client.recv(1) == b""


def test_a_client_that_leaves_meanwhile_spares_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a demotion under load ends with no answer, and its other clients stay."""
    path = str(tmp_path / "nbd.sock")
    gone = 1 << 20
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(gone)
    listed = clients._sockets
    # A list that is older than what it lists.
    monkeypatch.setattr(clients, "_sockets", lambda: [gone, *listed()])
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)
        accepted, _ = server.accept()
        with accepted:
            assert clients.disconnect_clients([(socket.AF_UNIX, path)], socket.SHUT_RDWR) == 1
            client.settimeout(60)
            assert client.recv(1) == b""
