"""The simulator's disk behind plain calls, so that it keeps the contract that real files keep.

Owns the driving: a call is one path in a world of its own, run to its end. It must never add to or
take from what the simulated ports do.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.superblock import Superblock
from tests.sim.disk import SimFile, SimMeta, SimStore, format_meta
from tests.sim.world import World

CALL_MS = 10_000


def drive(world: World, call: Callable[..., Any], *arguments: Any) -> Any:
    """Make one call of a simulated port; returns its result, raises its error."""
    ended: list[tuple[Any, Exception | None]] = []

    def path() -> Path:
        return (yield (call, *arguments))

    world.spawn(world.life, "call", path(), lambda value, error: ended.append((value, error)))
    assert world.run(world.now_ms + CALL_MS, lambda: bool(ended)), f"{call} never returned"
    value, error = ended[0]
    if error is not None:
        raise error
    return value


class SimulatedStore:
    """`Store` over a simulated file."""

    def __init__(self, device_bytes: int, *, can_trim: bool, can_fast_zero: bool) -> None:
        self.world = World(1)
        self.file = SimFile(self.world, "data")
        self.can_trim = can_trim
        self._port = SimStore(
            self.file, device_bytes, can_trim=can_trim, can_fast_zero=can_fast_zero
        )

    def pread(self, buffer: WriteBuffer, offset: int) -> None:
        """As the port."""
        drive(self.world, self._port.pread, buffer, offset)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """As the port."""
        drive(self.world, self._port.pwrite, buffer, offset)

    def pwrite_durable(self, buffer: ReadBuffer, offset: int) -> None:
        """As the port."""
        drive(self.world, self._port.pwrite_durable, buffer, offset)

    def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """As the port."""
        drive(self.world, self._port.zero, offset, length, may_trim)

    def trim(self, offset: int, length: int) -> None:
        """As the port."""
        drive(self.world, self._port.trim, offset, length)

    def fdatasync(self) -> None:
        """As the port."""
        drive(self.world, self._port.fdatasync)

    def data_runs(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """As the port."""
        runs: Sequence[tuple[int, int]] = drive(self.world, self._port.data_runs, offset, length)
        return runs

    def close(self) -> None:
        """Nothing to give back."""


class SimulatedMeta:
    """`MetaStore` over a simulated file, with what an opening reads."""

    def __init__(self, world: World, file: SimFile, size_bytes: int) -> None:
        self.world = world
        self.file = file
        self._port = SimMeta(file, size_bytes)
        self.read_slots = self._port.read_slots
        self.read_ring = self._port.read_ring
        self.read_map = self._port.read_map

    @classmethod
    def create(cls, superblock: Superblock) -> "SimulatedMeta":
        """A fresh file, opened."""
        world = World(1)
        file = SimFile(world, "meta")
        format_meta(file, superblock, superblock.geometry())
        return cls(world, file, superblock.geometry().metadata_bytes)

    def reopened(self) -> "SimulatedMeta":
        """What the next engine opens."""
        return SimulatedMeta(self.world, self.file, self._port.size_bytes)

    def write_superblock(self, superblock: Superblock) -> None:
        """As the port."""
        drive(self.world, self._port.write_superblock, superblock)

    def write_blocks(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """As the port."""
        drive(self.world, self._port.write_blocks, blocks)

    def close(self) -> None:
        """Nothing to give back."""
