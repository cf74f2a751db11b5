"""Opening the metadata: what a node knows before it does anything.

`open_metadata` is pure: bytes in, judgement out. `settle` then makes that judgement durable,
before the first session, role or write: whoever opens metadata without the clean mark turns hot
regions into dirty extents first (rule 2).
"""

from collections.abc import Iterable
from dataclasses import replace

from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.durable import Opened
from nbdmirror.core.intentlog import IntentLog
from nbdmirror.core.keeping import load
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path
from nbdmirror.core.superblock import Flags, Superblock, choose, log_generations


def open_metadata(
    slots: tuple[bytes, bytes],
    ring: bytes,
    pages: Iterable[bytes],
    boot_id: bytes,
    mount_id: bytes,
) -> Opened:
    """Judge what is on disk.

    Raises:
        MetadataError: no slot can be trusted, or the file is of something else.
    """
    chosen = choose(*slots)
    sb = chosen.superblock
    geometry = sb.geometry()
    notes = list(chosen.notes)
    dirty = DirtyMap(geometry, sb.map_id)
    bad = dirty.load(pages)
    if bad:
        notes.append(f"dirty map: {len(bad)} of {geometry.page_count} pages damaged: all dirty")
    log = IntentLog(geometry, sb.map_id)
    loaded = log.load(ring, log_generations(sb), sb.own_txn)
    if loaded.damaged:
        notes.append(f"{loaded.reason}: everything is dirty")
        dirty.mark_all(suspect=True)
    else:
        for region in loaded.hot:
            dirty.mark_region(region, suspect=True)
    clean = bool(sb.flags & Flags.CLEAN)
    if not clean:
        # Whoever was killed over a failed sync left pages that the cache shows and the disk lacks.
        dirty.doubt_saved()
    same_life = sb.boot_id == boot_id and sb.mount_id == mount_id and any(boot_id)
    survived = (clean or same_life) and not sb.flags & (Flags.CACHE_LOST | Flags.FAILED)
    # Damage is no sign of a quiet life: such a node has to meet its peer first.
    survived = survived and not loaded.damaged and not bad
    return Opened(
        superblock=sb,
        dirty=dirty,
        log=log,
        fell_back=chosen.fell_back or bool(sb.flags & Flags.FELL_BACK),
        cache_survived=survived,
        boot_id=boot_id,
        mount_id=mount_id,
        log_damaged=loaded.damaged,
        notes=tuple(notes),
    )


def settle(node: Node, opened: Opened) -> Path:
    """Make the judgement durable; the engine serves nobody before this has returned.

    Raises:
        StoreError: the metadata cannot be written.
    """
    if node.keep.file is not None:
        yield from load(node, node.keep.file)
    yield from node.save_pages(node.dirty.unsaved_pages())

    def edit(sb: Superblock) -> Superblock:
        flags = sb.flags & ~Flags.CLEAN
        if opened.fell_back:
            flags |= Flags.FELL_BACK
        if not opened.cache_survived:
            # Stored, because a clean stop of this engine would make the next one forget it.
            return replace(sb, flags=flags | Flags.CACHE_LOST)
        return replace(sb, flags=flags, boot_id=opened.boot_id, mount_id=opened.mount_id)

    # Always: what a killed engine wrote last may be in one slot, and in the page cache only. It was
    # read and will be relied upon, so it has to outlive a power cut first.
    yield from node.change(edit, always=True)
    # Only now: between its first and last block a crash may leave a ring that looks sound.
    if opened.log_damaged:
        commits = node.log.begin_rebuild(node.sb.generation)
        yield (node.meta.write_blocks, [(c.offset, c.block) for c in commits])
        node.log.end_commit(commits[-1])
