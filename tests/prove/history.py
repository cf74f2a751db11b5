"""A client whose every answer is remembered, and what an image may hold by what was answered.

Owns a fixed course of operations over a few windows of the device, on two connections with several
requests in flight, overlapping; and the judgement of an image, sector by sector. Every write stamps
its sectors with its number. An operation without an answer, or with an error, may have happened or
not; one that was acknowledged has, and hides what had ended before it began.
"""

import contextlib
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

import nbd

SECTOR: Final = 512
# Around the border of two regions, inside one, and at both ends of the device (16 MiB).
WINDOWS: Final = tuple(
    (at // SECTOR, 64) for at in (0, (4 << 20) - (16 << 10), 9 << 20, (16 << 20) - (32 << 10))
)
CONNECTIONS: Final = 2
DEPTH: Final = 3
OPERATIONS_COUNT: Final = 120
KINDS: Final = ("write",) * 8 + ("fua",) * 3 + ("flush",) * 2 + ("zero",) * 2 + ("trim",)


@dataclass
class Operation:
    """One request. `began` and `ended` are places in the order of all that happened."""

    kind: str
    first: int
    count: int
    number: int = 0
    began: int = -1
    ended: int = -1

    @property
    def acknowledged(self) -> bool:
        """Whether its success was heard of."""
        return self.ended >= 0

    def covers(self, sector: int) -> bool:
        """Whether it changes this sector."""
        return self.kind != "flush" and self.first <= sector < self.first + self.count

    def leaves(self, sector: int) -> bytes:
        """What it puts there."""
        if self.kind in ("zero", "trim"):
            return bytes(SECTOR)
        return (self.number << 32 | sector).to_bytes(8, "big") * (SECTOR // 8)

    def buffer(self) -> bytearray:
        """What a write sends."""
        sectors = range(self.first, self.first + self.count)
        return bytearray(b"".join(map(self.leaves, sectors)))


def course(seed: int, count: int = OPERATIONS_COUNT) -> list[Operation]:
    """The same operations for the same seed."""
    dice = random.Random(seed)
    operations = []
    for _ in range(count):
        start, sectors = dice.choice(WINDOWS)
        first = dice.randrange(sectors)
        length = min(dice.choice((1, 1, 3, 8, 8, 16, 32)), sectors - first)
        operations.append(Operation(dice.choice(KINDS), start + first, length))
    return operations


class History:
    """What was asked and answered since the images were last equal and judged."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.checked = 0
        self.error = ""
        self._base: dict[int, bytes] = dict.fromkeys(sectors_of_windows(), bytes(SECTOR))
        self._lock = threading.Lock()
        self._tick = 0
        self._number = 0
        self._threads: list[threading.Thread] = []

    # --- asking ---------------------------------------------------------------------------------

    def start(self, uri: str, operations: Sequence[Operation]) -> None:
        """Send them over all connections."""
        self.error = ""
        self._threads = []
        parts = [operations[n::CONNECTIONS] for n in range(CONNECTIONS)]
        handles = []
        for _ in range(CONNECTIONS):
            handle = nbd.NBD()
            handle.connect_uri(uri)
            handles.append(handle)
        self._threads = [
            threading.Thread(target=self._run, args=(handle, part), daemon=True)
            for handle, part in zip(handles, parts, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within that time."""
        until = monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, handle: nbd.NBD, operations: Sequence[Operation]) -> None:
        flying: set[int] = set()
        left = list(operations)[::-1]
        try:
            while (left or flying) and not (self.error and not flying):
                while left and len(flying) < DEPTH and not self.error:
                    self._submit(handle, left.pop(), flying)
                handle.poll(50)
        except nbd.Error as error:
            self.error = self.error or str(error)
        finally:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()

    def _submit(self, handle: nbd.NBD, operation: Operation, flying: set[int]) -> None:
        with self._lock:
            self._number += 1
            self._tick += 1
            operation.number, operation.began = self._number, self._tick
            self.operations.append(operation)
        flying.add(operation.number)

        def done(error: Any) -> int:
            failed = int(getattr(error, "value", error) or 0)
            flying.discard(operation.number)
            with self._lock:
                if failed:
                    self.error = self.error or f"errno {failed}"
                else:
                    self._tick += 1
                    operation.ended = self._tick
            return 1

        at, length = operation.first * SECTOR, operation.count * SECTOR
        if operation.kind in ("write", "fua"):
            flags = nbd.CMD_FLAG_FUA if operation.kind == "fua" else 0
            buffer = nbd.Buffer.from_bytearray(operation.buffer())
            handle.aio_pwrite(buffer, at, completion=done, flags=flags)
        elif operation.kind == "flush":
            handle.aio_flush(completion=done)
        elif operation.kind == "zero":
            handle.aio_zero(length, at, completion=done)
        else:
            handle.aio_trim(length, at, completion=done)

    @property
    def answered(self) -> int:
        """How many were acknowledged since the last judgement."""
        with self._lock:
            return sum(each.acknowledged for each in self.operations)

    # --- judging --------------------------------------------------------------------------------

    def power_was_lost(self) -> None:
        """The last copy of what nobody had flushed is gone: from here on it may be there or not.

        No flush that comes later makes it durable. All clients have ended.
        """
        with self._lock:
            gone = [
                each for each in self.operations
                if each.acknowledged and each.kind not in ("flush", "fua")
                and not self._flushed(each, sys.maxsize)
            ]  # fmt: skip
            for each in gone:
                each.ended = -1

    def now(self) -> int:
        """The place of the newest answer."""
        with self._lock:
            return self._tick

    def losses(
        self, image: Path, *, only_durable: bool = False, until: int | None = None
    ) -> list[str]:
        """Sectors that hold what they may not.

        `only_durable`: what was acknowledged without a flush after it may be gone. `until`: what
        was answered later may be missing, too.
        """
        last = sys.maxsize if until is None else until
        with image.open("rb") as file:
            return [
                problem
                for sector in sectors_of_windows()
                if (problem := self._problem(sector, read(file, sector), last, only_durable))
            ]

    def _problem(self, sector: int, found: bytes, last: int, only_durable: bool) -> str:
        touching = [each for each in self.operations if each.covers(sector)]
        firm = [each for each in touching if 0 <= each.ended <= last]
        if only_durable:
            firm = [each for each in firm if each.kind == "fua" or self._flushed(each, last)]
        newest = max((each.began for each in firm), default=-1)
        allowed = [each for each in touching if not each.acknowledged or each.ended >= newest]
        if any(found == each.leaves(sector) for each in allowed):
            return ""
        if newest < 0 and found == self._base[sector]:
            return ""
        numbers = [each.number for each in allowed]
        held = int.from_bytes(found[:4], "big")
        return f"sector {sector}: holds write {held}, allowed {numbers} (durable: {only_durable})"

    def _flushed(self, one: Operation, last: int) -> bool:
        """Whether a flush began after it had ended, and succeeded by then."""
        return any(
            each.kind == "flush" and 0 <= each.ended <= last and each.began > one.ended
            for each in self.operations
        )

    def settle(self, image: Path) -> None:
        """Judged and equal: from here on this is what was there before."""
        with image.open("rb") as file:
            self._base = {sector: read(file, sector) for sector in sectors_of_windows()}
        self.checked += sum(each.acknowledged for each in self.operations)
        self.operations.clear()


def sectors_of_windows() -> list[int]:
    """Every sector that a course may touch."""
    return [start + n for start, count in WINDOWS for n in range(count)]


def read(file: Any, sector: int) -> bytes:
    """One sector of an image."""
    file.seek(sector * SECTOR)
    return bytes(file.read(SECTOR))
