"""The bare sketch: what a mirrored write costs when nothing is safe. Only a yardstick for bench/.

nbdkit runs this file. It has the transport of the product (the calling thread sends, a uvloop
thread takes the acknowledgements, buffers of the same size, kept thread states) and none of its
safety: no range locks, intent log, checks, metadata, window, session or role. It must never grow
any, and never hold data that anybody wants back.
"""

import asyncio
import contextlib
import os
import select
import socket
import struct
import threading
from _thread import LockType, allocate_lock
from typing import Any

import nbdkit
import uvloop

from nbdmirror.threads import keep

API_VERSION = 2
HEADER = struct.Struct(">QQQ")  # number, offset, length
ACK = struct.Struct(">Q")  # everything up to this number was applied
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024

_parameters: dict[str, str] = {}
_state: "Sketch"


class Sketch:
    """One file here, one connection to the receiver, and who waits for which number."""

    def __init__(self, path: str, port: int) -> None:
        self.file = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.file).st_size
        self.peer = socket.create_connection(("127.0.0.1", port))
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.peer.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        self.peer.settimeout(0)
        self.number = 0
        self.waiting: dict[int, LockType] = {}
        self.acknowledged = 0
        self.partial = b""
        self.lock = allocate_lock()

    def write(self, buf: Any, offset: int) -> None:
        done = allocate_lock()
        done.acquire()
        with self.lock:
            self.number += 1
            self.waiting[self.number] = done
            self.send([HEADER.pack(self.number, offset, len(buf)), buf])
        os.pwrite(self.file, buf, offset)
        done.acquire()

    def send(self, parts: list[Any]) -> None:
        while parts:
            sent = 0
            with contextlib.suppress(BlockingIOError):
                sent = self.peer.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = memoryview(parts[0])[sent:]
                select.select([], [self.peer], [])

    def readable(self) -> None:
        data = self.partial + self.peer.recv(65536)
        whole = len(data) // ACK.size * ACK.size
        self.partial = data[whole:]
        if whole:
            (last,) = ACK.unpack_from(data, whole - ACK.size)
            for number in range(self.acknowledged + 1, last + 1):
                self.waiting.pop(number).release()
            self.acknowledged = last

    def run(self) -> None:
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.add_reader(self.peer.fileno(), self.readable)
        loop.run_forever()


def config(key: str, value: str) -> None:
    _parameters[key] = value


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    global _state  # noqa: PLW0603 - nbdkit has no place for it
    _state = Sketch(_parameters["file"], int(_parameters["port"]))
    threading.Thread(target=_state.run, daemon=True).start()


def open(readonly: bool) -> int:  # noqa: A001, ARG001, FBT001 - nbdkit's signature
    return 1


def get_size(_handle: int) -> int:
    return _state.size


def pread(_handle: int, buf: Any, offset: int, _flags: int) -> None:
    keep()
    os.preadv(_state.file, [buf], offset)


def pwrite(_handle: int, buf: Any, offset: int, _flags: int) -> None:
    keep()
    _state.write(buf, offset)
