"""A small application: an HTTP server that says on which node it runs.

    served.py PORT

Returns when it listens, as a start script has to; the server stays behind. Needs nothing but
Python's own modules, and knows the node from the environment that a controller gives to scripts.
"""

import os
import socket
import sys

HEAD_BYTES_MAX = 65_536
SILENT_S = 2.0


def answer(connection: socket.socket, body: bytes) -> None:
    """One request, one answer, whatever was asked for."""
    with connection:
        connection.settimeout(SILENT_S)
        try:
            head = b""
            while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES_MAX:
                received = connection.recv(HEAD_BYTES_MAX)
                if not received:
                    return
                head += received
            start = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(start % len(body) + body)
        except OSError:  # the client is gone, or silent
            return


def main(port: int) -> None:
    """Listen, then serve in a process of its own."""
    with socket.create_server(("0.0.0.0", port)) as listener:
        if os.fork():
            return
        os.setsid()
        body = os.environ["NBDMIRROR_NODE"].encode()
        while True:
            connection, _ = listener.accept()
            answer(connection, body)


if __name__ == "__main__":
    main(int(sys.argv[1]))
