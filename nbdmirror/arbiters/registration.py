"""The record at the birth of a mirror: made by the node that creates it, found by the one that
joins.

Owns what both check before a file is touched. The creator owns the record, under its first
generation: it is alone from birth (rule 9). Must never replace a record by itself: it may be that
of a mirror that serves.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from nbdmirror.arbiters.choose import open_store
from nbdmirror.arbiters.port import Held, RecordStore
from nbdmirror.config import Config
from nbdmirror.core.record import NOBODY, Record
from nbdmirror.core.superblock import Superblock
from nbdmirror.errors import ArbiterError, RefusedError

T = TypeVar("T")


def identity_for(config: Config, mirror_id: bytes, *, join: bool, replace: bool) -> bytes:
    """The identity of the store, if a mirror may be made there.

    Raises:
        RefusedError: there is a record already, or none of the mirror that is joined.
        ArbiterError: the store cannot be asked.
    """

    async def look(store: RecordStore) -> bytes:
        identity, held = await store.identity(), await store.read()
        if join and held is None:
            raise RefusedError(
                f"{store.where} holds no record of this mirror: make it on the other node first, "
                "with the same arbiter"
            )
        if not join and held is not None and not replace:
            raise RefusedError(found(store, held))
        return identity

    return _asked(config, mirror_id, look)


def look(config: Config, mirror_id: bytes) -> tuple[bytes, Record | None]:
    """The identity of the store, and its record. Raises ArbiterError."""

    async def read(store: RecordStore) -> tuple[bytes, Record | None]:
        identity, held = await store.identity(), await store.read()
        return identity, held.record if held is not None else None

    return _asked(config, mirror_id, read)


def register(config: Config, superblock: Superblock, *, replace: bool) -> None:
    """Name the node of this superblock, with its first generation, as the owner.

    Raises:
        RefusedError: there is a record that is not to be replaced. ArbiterError: no clear answer.
    """

    async def write(store: RecordStore) -> None:
        held = await store.read()
        if held is not None and not replace:
            raise RefusedError(found(store, held))
        counter = held.record.counter + 1 if held is not None else 1
        generation, owner = superblock.generation, superblock.node_id
        record = Record(superblock.mirror_id, counter, generation, owner)
        if not await store.swap(held, record):
            raise ArbiterError(
                f"{store.where}: somebody else wrote the record of this mirror at this moment"
            )

    _asked(config, superblock.mirror_id, write)


def found(store: RecordStore, held: Held) -> str:
    """The refusal of a second creation."""
    record = held.record
    owner = f"node {record.owner}" if record.owner != NOBODY else "both nodes"
    return (
        f"{store.where} holds a record of this mirror already, of {owner}, with counter "
        f"{record.counter}: if the mirror lives on another node, join it; if nothing of it is "
        "left, `--replace-record` begins anew, and whoever still has a copy never goes on alone "
        "with it"
    )


def _asked(
    config: Config, mirror_id: bytes, ask: Callable[[RecordStore], Coroutine[Any, Any, T]]
) -> T:
    async def asked() -> T:
        store = open_store(config, mirror_id)
        try:
            return await ask(store)
        finally:
            await store.close()

    return asyncio.run(asked())
