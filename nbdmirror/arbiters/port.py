"""The port of an arbiter with a memory: one record, linearizable reads, compare-and-swap.

Each store of the project (`etcd`, `s3`, `azure-blob`) passes `tests/contract/test_record_stores.py`
against a real server. Nothing here repeats a request by itself: whoever claims has to know what was
sent (rule 11), and settles by reading. Every call is bounded by the store's `timeout_ms`; a proof,
which consists of several requests, by that for each of them.
"""

from typing import Final, Protocol

from nbdmirror.core.record import Held, Record

__all__ = ["IDENTITY_BYTES", "Held", "Record", "RecordStore"]

IDENTITY_BYTES: Final = 32


class RecordStore(Protocol):
    """One record in one store. All methods raise ArbiterError, which names the store and why.

    After an ArbiterError of `swap` nothing is known: the write may have been done, may be done
    later, or never.
    """

    @property
    def where(self) -> str:
        """The store and the place in it, for people; without secrets."""
        ...

    async def identity(self) -> bytes:
        """IDENTITY_BYTES that another store, or another place in this one, does not have.

        Both nodes find the same, whichever way they have to the store.
        """
        ...

    async def read(self) -> Held | None:
        """The newest content, whoever wrote it, through whichever end; None if there is none."""
        ...

    async def swap(self, held: Held | None, record: Record) -> bool:
        """Write `record` if the store still holds `held` (None: nothing).

        True: it was written. False: it was not, and this request never will be; the store holds
        something else.
        """
        ...

    async def prove(self, held: Held) -> Held:
        """That this node could claim: the same content can be written, under the condition that it
        is there, and a write under a wrong condition is refused.

        Returns what is held afterwards. The wrong condition is tried beside the record, never on
        it. Raises ArbiterError, also if the store takes the wrong condition for a right one: such a
        store lets two nodes win.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
