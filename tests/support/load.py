"""A client that writes and remembers what was acknowledged, so that a loss cannot go unseen.

Owns its NBD connections, a thread for each, and the ledger: for each slot the content that was
acknowledged last and every content that was sent since (its outcome is unknown when the
connection broke). Each content is made from slot and number, so a block that holds anything
else, torn or stale, is found. Several connections, because an engine may serve the requests of
one connection one after the other (docs/adr 0014).
"""

import contextlib
import random
import struct
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import nbd

SLOT_BYTES = 4096
CONNECTIONS = 4
STAMP = struct.Struct("<QQ")


def content(slot: int, number: int) -> bytes:
    """The bytes of a slot after write `number`; zeros before the first."""
    if number == 0:
        return bytes(SLOT_BYTES)
    return STAMP.pack(slot, number) * (SLOT_BYTES // STAMP.size)


class Load:
    """Writes 4 KiB blocks at random places, `depth` in flight, each slot by one request at a time.

    The requests in flight are spread over four connections, fewer if there are fewer.

    `acknowledged[slot]` is the number of its last acknowledged write, `sent[slot]` that of the
    last one sent.
    """

    def __init__(
        self, uri: str, *, first: int = 0, slots: int = 1024, depth: int = 8, seed: int = 1
    ) -> None:
        self.first = first
        self.slots = slots
        self.depth = depth
        self.uri = uri
        self.acknowledged: dict[int, int] = {}
        self.sent: dict[int, int] = {}
        self.count = 0
        self.error = ""
        self._random = random.Random(seed)
        self._number = 0
        self._busy: set[int] = set()
        self._stopping = threading.Event()
        self._progress = threading.Condition()
        self._threads: list[threading.Thread] = []

    def start(self, uri: str | None = None) -> "Load":
        """Begin to write; a load that was stopped may go on, also somewhere else."""
        self.uri = uri or self.uri
        self.error = ""
        self._stopping.clear()
        self._busy.clear()
        count = min(CONNECTIONS, self.depth)
        depths = [self.depth // count + (n < self.depth % count) for n in range(count)]
        handles = [nbd.NBD() for _ in depths]
        for handle in handles:
            handle.connect_uri(self.uri)
        self._threads = [
            threading.Thread(target=self._run, args=each, daemon=True)
            for each in zip(handles, depths, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> "Load":
        """Wait for what is in flight, and end."""
        self._stopping.set()
        return self.ended()

    def ended(self, bound_s: float = 60.0) -> "Load":
        """Wait for the end: asked for, or because the server went away."""
        assert self._threads
        until = monotonic() + bound_s
        for thread in self._threads:
            thread.join(max(0, until - monotonic()))
            assert not thread.is_alive(), "the client still waits for an answer"
        return self

    def wait(self, more: int, bound_s: float = 60.0) -> None:
        """Until `more` further writes were acknowledged.

        Raises:
            TimeoutError: they were not, in time; the text says whether the connection broke.
        """
        with self._progress:
            target = self.count + more
            until = monotonic() + bound_s
            while self.count < target:
                left = until - monotonic()
                if left <= 0 or self.error:
                    raise TimeoutError(f"{self.count} of {target} acknowledged; {self.error}")
                self._progress.wait(left)

    def _run(self, handle: nbd.NBD, depth: int) -> None:
        mine: set[int] = set()
        try:
            while mine or not self._stopping.is_set():
                while len(mine) < depth and not self._stopping.is_set():
                    self._submit(handle, mine)
                handle.poll(100)
        except nbd.Error as error:
            self._failed(str(error))
        finally:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()
            with self._progress:
                self._progress.notify_all()

    def _failed(self, error: str) -> None:
        """The first error counts, and ends the load on every connection."""
        with self._progress:
            self.error = self.error or error
            self._progress.notify_all()
        self._stopping.set()

    def _take(self, mine: set[int]) -> tuple[int, int, int]:
        """A slot that no request is at work on, the number of its next write, and the flags."""
        with self._progress:
            while (slot := self.first + self._random.randrange(self.slots)) in self._busy:
                pass
            self._busy.add(slot)
            mine.add(slot)
            self._number += 1
            self.sent[slot] = self._number
            fua = nbd.CMD_FLAG_FUA if self._random.random() < 0.03 else 0
            return slot, self._number, fua

    def _submit(self, handle: nbd.NBD, mine: set[int]) -> None:
        slot, number, flags = self._take(mine)

        def done(error: Any) -> int:
            failed = int(getattr(error, "value", error) or 0)
            mine.discard(slot)
            if failed:  # the outcome is unknown, so the slot stays taken until the next start
                self._failed(f"errno {failed}")
                return 1
            with self._progress:
                self.acknowledged[slot] = number
                self.count += 1
                self._busy.discard(slot)
                self._progress.notify_all()
            return 1

        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(content(slot, number))),
                          slot * SLOT_BYTES, completion=done, flags=flags)  # fmt: skip

    # --- judgement --------------------------------------------------------------------------

    def losses(self, image: Path) -> list[str]:
        """Slots whose bytes are neither the last acknowledged ones nor any sent later."""
        found = []
        with image.open("rb") as file:
            for slot in range(self.first, self.first + self.slots):
                file.seek(slot * SLOT_BYTES)
                problem = self._problem(slot, file.read(SLOT_BYTES))
                if problem:
                    found.append(problem)
        return found

    def _problem(self, slot: int, block: bytes) -> str:
        least, most = self.acknowledged.get(slot, 0), self.sent.get(slot, 0)
        if block == content(slot, least):
            return ""
        owner, number = STAMP.unpack(block[: STAMP.size])
        if owner == slot and least < number <= most and block == content(slot, number):
            return ""
        return f"slot {slot}: holds {owner}/{number}, acknowledged {least}, sent {most}"

    def assert_kept(self, *images: Path) -> None:
        """Nothing acknowledged is missing from any of these images."""
        for image in images:
            losses = self.losses(image)
            assert not losses, f"{image}: {len(losses)} lost:\n" + "\n".join(losses[:10])
