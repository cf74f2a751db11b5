"""The ports of the core: what a path may ask of the world.

A path is a generator. It yields `(callable, *arguments)`, a call to one of these ports; whoever
drives the path performs the call *outside* the engine's lock and sends the result back in, or
throws the `NbdMirrorError` that the call raised. Everything between two yields runs under the
engine's lock, so the interleavings at the yields are the only ones there are. Methods marked
"direct" return at once and may be called by a path without yielding.
"""

from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeAlias

from nbdmirror.core.superblock import Superblock

ReadBuffer: TypeAlias = bytes | bytearray | memoryview
WriteBuffer: TypeAlias = bytearray | memoryview
Call: TypeAlias = tuple[Any, ...]
Path: TypeAlias = Generator[Call, Any, Any]


class Waiter(Protocol):
    """One path waits, another wakes it, once."""

    result: Any

    def wait(self, timeout_s: float | None = None) -> bool:
        """Yielded. True when woken, False when the time ran out."""
        ...

    def wake(self, result: Any = None) -> None:
        """Direct. Stores the result and wakes the waiting path; a second call changes nothing."""
        ...


class Store(Protocol):
    """The backing file. All are yielded; all raise StoreError (or OutOfSpaceError)."""

    def pread(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill the whole buffer from `offset`."""
        ...

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole buffer at `offset`, into the page cache."""
        ...

    def pwrite_durable(self, buffer: ReadBuffer, offset: int) -> None:
        """Like pwrite; durable when it returns (RWF_DSYNC)."""
        ...

    def zero(self, offset: int, length: int, may_trim: bool) -> None:  # noqa: FBT001 - NBD's flag
        """Make the range read as zeros."""
        ...

    def trim(self, offset: int, length: int) -> None:
        """Give the space back; the range reads as zeros afterwards."""
        ...

    def fdatasync(self) -> None:
        """All writes that returned before are durable. Once it failed, it fails for ever."""
        ...

    def data_runs(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """(start, end) of the parts of the range that may hold anything but zeros, ascending."""
        ...


class MetaStore(Protocol):
    """The metadata file. All are yielded; all raise StoreError."""

    def write_superblock(self, superblock: Superblock) -> None:
        """Write it to both slots in turn, each durable; returns when both are."""
        ...

    def write_blocks(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Write (offset, 4 KiB block) pairs and make them durable with one sync."""
        ...


class KeptFile(Protocol):
    """The file of what is kept of a copy that was given up. All are yielded; all raise StoreError
    (or OutOfSpaceError).
    """

    def open(self) -> bool:
        """Use the file that is there; False if there is none."""
        ...

    def create(self, header: bytes, size: int) -> None:
        """Make it with its header, `size` bytes long and otherwise a hole, durably, or not at all.

        Never over another one.
        """
        ...

    def pread(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill the whole buffer from `offset`."""
        ...

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole buffer at `offset`, into the page cache."""
        ...

    def fdatasync(self) -> None:
        """All writes that returned before are durable."""
        ...

    def remove(self) -> None:
        """It is gone, durably."""
        ...


class Link(Protocol):
    """The sending half of the peer channel, for one session."""

    def kick(self) -> None:
        """Yielded. Put queued frames on the wire, as far as the socket takes them."""
        ...

    def drain(self) -> bool:
        """Yielded. Wait until what was queued has left, or the session ended; bounded.

        False when something is still here.
        """
        ...

    def close(self, reason: str) -> None:
        """Direct. No byte leaves or arrives after this; queued frames are dropped."""
        ...


class Shell(Protocol):
    """What the core needs from whoever runs it. All direct."""

    def waiter(self) -> Waiter:
        """A fresh waiter."""
        ...

    def spawn(self, name: str, path: Path) -> None:
        """Drive `path` beside the caller."""
        ...

    def pace(self, count: int) -> None:
        """Yielded. Wait as long as the configured resync rate asks for after `count` bytes."""
        ...

    def spawn_replica(self, path: Path) -> None:
        """Drive the replica path: on the thread that receives frames, as far as nothing blocks."""
        ...

    def now_ms(self) -> int:
        """CLOCK_BOOTTIME, rounded down: it goes on while the machine sleeps, and nobody sets it."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Unpredictable in production, seeded in the simulator."""
        ...

    def emit(self, kind: str, **facts: object) -> None:
        """Tell whoever follows the events of this engine."""
        ...
