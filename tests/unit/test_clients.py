"""The search for the clients' sockets among this process's descriptors."""

import os
import socket
from pathlib import Path

import pytest

from nbdmirror import clients


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
