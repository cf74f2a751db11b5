"""Somebody in the middle of two nodes that speak TLS: both channels end at him, none at the other.

Owns its listening socket and a thread for each connection. It has a certificate of its own, and
passes on every byte that it decrypts. It does not have the mirror's key.
"""

import contextlib
import select
import socket
import ssl
import threading

from nbdmirror.tls import TlsSetup

CHUNK_BYTES = 65536
BOUND_S = 20.0


class Middleman:
    """Takes the calls for `target`. `relayed`: the bytes that he read in the clear."""

    def __init__(self, setup: TlsSetup) -> None:
        self.target: tuple[str, int] | None = None
        self.relayed = 0
        self._setup = setup
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                taken, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(taken,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, taken: socket.socket) -> None:
        assert self.target is not None
        with contextlib.suppress(OSError), taken:
            taken.settimeout(BOUND_S)
            with (
                self._setup.listening.wrap_socket(taken, server_side=True) as inner,
                socket.create_connection(self.target, BOUND_S) as called,
                self._setup.dialing.wrap_socket(called) as outer,
            ):
                self._relay(inner, outer)

    def _relay(self, inner: ssl.SSLSocket, outer: ssl.SSLSocket) -> None:
        other = {inner: outer, outer: inner}
        while True:
            for ready in select.select(list(other), [], [], BOUND_S)[0]:
                more = True
                while more:
                    piece = ready.recv(CHUNK_BYTES)
                    if not piece:
                        return
                    self.relayed += len(piece)
                    other[ready].sendall(piece)
                    more = ready.pending() > 0

    def close(self) -> None:
        """No more calls; those that there are end with the nodes."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(BOUND_S)
