"""What is kept of a copy that was given up, in the simulator: its file, and whether it is true.

Owns the port over a simulated file, and the check K1: at any moment, also after a kill or a power
cut, the kept image is the copy as it was when it was given up, block by block.
"""

import errno
from typing import TYPE_CHECKING, Any

from nbdmirror.core.checks import crc32c
from nbdmirror.core.kept import (
    ENTRY_BYTES,
    MARK_OFFSET_BYTES,
    Judge,
    Kept,
    decode_entry,
    decode_header,
)
from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.superblock import Flags
from nbdmirror.errors import MetadataError, RefusedError, StoreError
from nbdmirror.limits import META_BLOCK_BYTES
from tests.sim.disk import (
    BLOCK_BYTES,
    ZERO_BLOCK,
    Blocks,
    Change,
    DiskOp,
    SimFile,
    sync_op,
    write_op,
)
from tests.sim.world import ViolationError

if TYPE_CHECKING:
    from tests.sim.host import Host


class SimKept:
    """The port, over the file of one host; a new one for each life."""

    def __init__(self, host: "Host") -> None:
        self.host = host
        self.file = host.kept

    def open(self) -> bool:
        """Whether it is there."""
        return self.host.kept_exists

    def create(self, header: bytes, size: int) -> Any:
        """Under its name when it is whole."""
        return self._create(header)

    def _create(self, header: bytes) -> Path:
        if self.host.kept_exists:
            raise RefusedError("kept: there already")
        empty(self.file)
        yield (write_op, self.file, Change(0, len(header), header))
        yield (sync_op, self.file)
        self.host.kept_exists = True

    def pread(self, buffer: WriteBuffer, offset: int) -> Any:
        """Fill the buffer when it completes."""

        def effect() -> None:
            number = self.file.error("read")
            if number:
                raise StoreError(number, f"read {self.file.name}")
            buffer[:] = self.file.read(offset, len(buffer))

        return DiskOp(0, effect)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> Any:
        """Into the cache."""
        return write_op(self.file, Change(offset, offset + len(buffer), bytes(buffer)))

    def fdatasync(self) -> Any:
        """Everything that completed before is durable."""
        return sync_op(self.file)

    def remove(self) -> None:
        """It is gone."""
        if self.file.error("remove"):
            raise StoreError(errno.EIO, f"remove {self.file.name}")
        self.host.kept_exists = False
        self.host.kept_truth = None
        empty(self.file)


def empty(file: SimFile) -> None:
    """Nothing is in it, and nothing is on its way."""
    file.cache, file.durable = {}, {}
    file.pending.clear()
    file.started.clear()
    file.failed = False
    file.version += 1


def remember(host: "Host", image: str) -> None:
    """From this moment on the image has to be what the copy is now."""
    if Flags.FAILED not in host.sb.flags:
        host.kept_truth = (image, dict(host.data.cache))


def check(host: "Host", when: str) -> bool:
    """K1. Returns whether there was something to compare."""
    if not host.kept_exists or host.kept_truth is None:
        return False
    image, truth = host.kept_truth
    file = host.kept
    try:
        header = decode_header(file.read(0, META_BLOCK_BYTES))
    except MetadataError as error:
        raise ViolationError(f"K1 {when}: {host.name}: {error}") from error
    if header.image_id.hex() != image:
        return False
    kept = Kept(SimKept(host), host.geometry, header)
    kept.closed = any(file.read(MARK_OFFSET_BYTES, META_BLOCK_BYTES))
    contents = index_of(file, kept, when, host.name)
    compare(host, kept, contents, truth, when)
    return True


def index_of(file: SimFile, kept: Kept, when: str, name: str) -> dict[int, bytes]:
    """Extent: its kept content, read as an engine would that starts now."""
    judge = Judge(kept, 0)
    contents: dict[int, bytes] = {}
    slot = 0
    while any(piece := file.read(kept.entry_at(slot), ENTRY_BYTES * 128)):
        for number in range(128):
            block = piece[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES]
            judge.take(decode_entry(kept.header.image_id, slot + number, block))
        slot += 128
    if damage := judge.damage():
        raise ViolationError(f"K1 {when}: {name}: {damage}")
    tail = judge.tail()
    for number, entry in enumerate(tail):
        content = file.read(kept.content_at(entry.extent), BLOCK_BYTES)
        if not entry.zeros and crc32c(content) != entry.content_crc:
            kept.forget(tail[number:])
            break
    slots = iter(range(slot))
    for number in slots:
        if number >= kept.count:
            break
        at = kept.entry_at(number)
        entry_ = decode_entry(kept.header.image_id, number, file.read(at, ENTRY_BYTES))
        assert entry_ is not None
        content = ZERO_BLOCK if entry_.zeros else file.read(
            kept.content_at(entry_.extent), BLOCK_BYTES)  # fmt: skip
        if crc32c(content) != entry_.content_crc:
            raise ViolationError(f"K1 {when}: {name}: extent {entry_.extent} is damaged")
        contents[entry_.extent] = content
    return contents


def compare(host: "Host", kept: Kept, contents: dict[int, bytes], truth: Blocks, when: str) -> None:
    """The image against what it has to be; of a closed one only what is kept."""
    cache = host.data.cache
    looked_at = contents.keys() if kept.closed else truth.keys() | cache.keys() | contents.keys()
    for block in sorted(looked_at):
        has = contents.get(block, cache.get(block, ZERO_BLOCK))
        if has != truth.get(block, ZERO_BLOCK):
            raise ViolationError(
                f"K1 {when}: block {block} of the copy that {host.name} gave up is lost"
                f" ({'kept' if block in contents else 'not kept'})"
            )
