"""The receiving end of the bare sketch: applies what arrives, in order, and checks nothing of it.

usage: python receiver.py FILE PORT

Reads straight from the socket on a uvloop thread, as the product does, and acknowledges once for
all that one read brought. It must never be taken for more than a yardstick.
"""

import asyncio
import os
import socket
import struct
import sys

import uvloop

HEADER = struct.Struct(">QQQ")  # number, offset, length
ACK = struct.Struct(">Q")
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
BUFFER_BYTES = 4 * 1024 * 1024
READ_BYTES_MIN = 64 * 1024


class Receiver:
    """One connection and the file that it writes."""

    def __init__(self, file: int, connection: socket.socket) -> None:
        self.file = file
        self.connection = connection
        self.buffer = bytearray(BUFFER_BYTES)
        self.view = memoryview(self.buffer)
        self.head = self.tail = 0

    def readable(self) -> None:
        count = self.connection.recv_into(self.view[self.tail :])
        if not count:
            os._exit(0)
        self.tail += count
        last = self.apply()
        if last:
            self.connection.send(ACK.pack(last))

    def apply(self) -> int:
        """Write every frame that is complete; returns the last one's number, 0 if none is."""
        view, at, last = self.view, self.head, 0
        while at + HEADER.size <= self.tail:
            number, offset, length = HEADER.unpack_from(view, at)
            start = at + HEADER.size
            if start + length > self.tail:
                break
            os.pwrite(self.file, view[start : start + length], offset)
            at, last = start + length, number
        if at == self.tail:
            at = self.tail = 0
        elif BUFFER_BYTES - self.tail < READ_BYTES_MIN or at > BUFFER_BYTES // 2:
            rest = bytes(view[at : self.tail])
            view[: len(rest)] = rest
            at, self.tail = 0, len(rest)
        self.head = at
        return last


def main(path: str, port: int) -> None:
    file = os.open(path, os.O_RDWR)
    listener = socket.create_server(("127.0.0.1", port))
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    connection.settimeout(0)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.add_reader(connection.fileno(), Receiver(file, connection).readable)
    loop.run_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
