"""Speaking for an engine that is dead (rule 16): only while its lock on the metadata is held here.

Owns the one change that a controller may make to metadata: to mark this copy as outdated, after the
peer has answered "I stay". Uses the engine's own metadata code. Must never be used beside a living
engine; the lock sees to that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from nbdmirror.config import Config
from nbdmirror.core.leave import left, reason_not_to_speak
from nbdmirror.core.superblock import choose
from nbdmirror.errors import RefusedError
from nbdmirror.metastore import FileMetaStore


class DeadEngine:
    """The metadata of an engine that is dead. All methods block for a few milliseconds."""

    def __init__(self, meta: FileMetaStore) -> None:
        self._meta = meta
        chosen = choose(*meta.read_slots())
        self._fell_back = chosen.fell_back
        self._sb = chosen.superblock

    @property
    def generation(self) -> str:
        """The line of writes that this copy belongs to."""
        return self._sb.generation.hex()

    def require_leaving(self) -> None:
        """Whether this copy may be marked as behind: it was one of a pair in sync, and no more.

        Raises:
            RefusedError: it holds a right of its own, a step is pending, or it is not up to date.
        """
        reason = reason_not_to_speak(self._sb, fell_back=self._fell_back)
        if reason:
            raise RefusedError(f"no word for the dead engine: {reason}")

    def mark_outdated(self) -> None:
        """Durably outdated, in both slots.

        Raises:
            StoreError: the metadata could not be written; nothing was said.
        """
        self.require_leaving()
        sb = replace(left(self._sb), sequence=self._sb.sequence + 1)
        self._meta.write_superblock(sb)
        self._sb = sb


@contextmanager
def dead_engine(config: Config) -> Iterator[DeadEngine]:
    """The metadata under its lock.

    Raises:
        RefusedError: an engine holds the lock. MetadataError, StoreError: it cannot be read.
    """
    meta = FileMetaStore.open(config.metadata_file)
    try:
        yield DeadEngine(meta)
    finally:
        meta.close()
