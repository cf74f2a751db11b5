"""A client that keeps many requests in flight, in a process of its own, so that it can be killed.

Owns one process and its connections. Run as a program it is the client:
`python -m tests.support.flood URI`. It remembers nothing; load.py has the client with a ledger.
"""

import subprocess
import sys
from typing import Any, Self

import nbd

from tests.support.pair import ROOT

CONNECTIONS = 4
DEPTH = 16
REQUEST_BYTES = 64 << 10
# The first part of the device is for the requests of others.
OFFSET_BYTES = 8 << 20
SLOTS = 64
BOUND_S = 60.0


class Flood:
    """One life of the client; ends with the `with` at the latest."""

    def __init__(self, uri: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, uri],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def begun(self) -> Self:
        """Wait until everything that it may have in flight was sent."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"sent\n"
        return self

    def kill(self) -> None:
        """SIGKILL: its connections break with requests in flight and replies unread."""
        self._process.kill()
        self.ended()

    def ended(self) -> int:
        """Wait for its end; returns its exit code."""
        return self._process.wait(BOUND_S)


def submit(handle: nbd.NBD, number: int) -> None:
    """The request `number`: of four, one is a write. The replies are more than a socket holds."""
    offset = OFFSET_BYTES + number * 7 % SLOTS * REQUEST_BYTES

    def done(_: Any) -> int:
        return 1

    if number % 4 == 3:
        handle.aio_pwrite(nbd.Buffer(REQUEST_BYTES), offset, completion=done)
    else:
        handle.aio_pread(nbd.Buffer(REQUEST_BYTES), offset, completion=done)


def main(uri: str) -> int:
    """Keep all connections full until the server, or a signal, ends it."""
    handles = [nbd.NBD() for _ in range(CONNECTIONS)]
    for handle in handles:
        handle.connect_uri(uri)
    number, told = 0, False
    try:
        while True:
            for handle in handles:
                while handle.aio_in_flight() < DEPTH:
                    submit(handle, number)
                    number += 1
                handle.poll(1)
            if not told:
                sys.stdout.write("sent\n")
                sys.stdout.flush()
                told = True
    except nbd.Error:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
