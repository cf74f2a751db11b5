"""What all stores with a memory have in common: bounds, proof, errors; each dialect adds two calls.

Owns the order of a proof, the bound on each call (in a proof: on each request), and the text of
every error. A dialect gives `_get` and `_put`, each of them one request that is sent once. Must
never: send a write a second time, or let an exception of a library or a secret out.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from nbdmirror.arbiters.port import IDENTITY_BYTES, Held
from nbdmirror.core.messages import printable
from nbdmirror.core.record import Record, decode, encode
from nbdmirror.errors import ArbiterError, ConfigError
from nbdmirror.limits import ARBITER_SECRET_BYTES_MAX
from nbdmirror.secret_files import read_secret

IDENTITY_CONTEXT: Final = "nbdmirror arbiter store 1"
PROOF: Final = b"nbdmirror tries here whether a write under a wrong condition is refused.\n"
DETAIL_CHARS_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Place:
    """One record: of which mirror, under which name, and what to call the object beside it."""

    mirror_id: bytes
    key: str
    node_id: int

    @property
    def proof_key(self) -> str:
        """Where this node tries wrong conditions: one object for each node, used again."""
        return f"{self.key}.proof-{self.node_id}"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a write is bound to: the store's word for a content, and the content."""

    version: str
    data: bytes


def identity_of(*parts: str) -> bytes:
    """IDENTITY_BYTES for these parts, in their order; no two lists of parts look alike."""
    digest = blake3(derive_key_context=IDENTITY_CONTEXT)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(4, "big") + data)
    return digest.digest(length=IDENTITY_BYTES)


def secret_line(key: str, path: Path) -> str:
    """The one line of a file with a secret, read anew each time: it may have been changed.

    Raises:
        ArbiterError: there is none.
    """
    try:
        data = read_secret(path, 1, ARBITER_SECRET_BYTES_MAX, "put it there, with mode 0600")
        line = data.decode("utf-8").strip()
    except ConfigError as error:
        raise ArbiterError(f'{key} = "{path}": {error}') from error
    except UnicodeDecodeError:  # its text would show a byte of the secret
        raise ArbiterError(f'{key} = "{path}": is not text in UTF-8') from None
    if not line or not line.isprintable():
        raise ArbiterError(f'{key} = "{path}": holds no line, or more than one; expected one')
    return line


class ConditionalStore(ABC):
    """A RecordStore, made of a read and a write under a condition."""

    # A version that the store never gives, in the form it takes.
    WRONG_VERSION: str

    def __init__(self, place: Place, where: str, timeout_ms: int) -> None:
        self._place = place
        self._where = where
        self._timeout_ms = timeout_ms

    @property
    def where(self) -> str:
        """The store and the place in it."""
        return self._where

    @abstractmethod
    async def identity(self) -> bytes:
        """See RecordStore."""

    @abstractmethod
    async def _get(self) -> Expected | None:
        """What the record's place holds, with at most RECORD_BYTES_MAX + 1 of its bytes."""

    @abstractmethod
    async def _put(self, key: str, expected: Expected | None, data: bytes) -> bool:
        """Write if `key` still holds `expected`; False only where the store clearly said no."""

    async def _closed(self) -> None:  # noqa: B027 - a dialect without connections has none
        """Let go of what the dialect holds."""

    def _explain(self, error: Exception) -> str | None:
        """What an exception of the dialect's library means; None if that is not known."""
        return None if not isinstance(error, OSError) else str(error)

    async def read(self) -> Held | None:
        """See RecordStore."""
        async with self._asking("read"):
            return await self._read()

    async def swap(self, held: Held | None, record: Record) -> bool:
        """See RecordStore."""
        assert record.mirror_id == self._place.mirror_id
        assert held is None or held.record.counter < record.counter
        async with self._asking("write"):
            return await self._put(self._place.key, _expected(held), encode(record))

    async def prove(self, held: Held) -> Held:
        """See RecordStore.

        The wrong condition comes first: a store that takes it must not be given the record, over
        which it would write whatever it is asked to. Each request has the whole time-out: a claim
        consists of single ones, and a store that answers each in time lets this node claim.
        """
        await self._prove_refusals()
        for _ in range(2):
            async with self._asking("proof"):
                written = await self._put(self._place.key, _expected(held), encode(held.record))
            async with self._asking("proof"):
                now = await self._read()
                if now is not None and written:
                    return now
                if now is None or now.record != held.record:
                    raise ArbiterError("the record changed while it was proved; read it again")
            # The same content under another version: the other node proved meanwhile.
            held = now
        raise self._failed(
            "proof",
            "the record cannot be written under the condition that it is what it is; look whether "
            "something else writes there",
        )

    async def close(self) -> None:
        """See RecordStore."""
        async with self._asking("close"):
            await self._closed()

    async def _read(self) -> Held | None:
        found = await self._get()
        if found is None:
            return None
        record = decode(found.data, self._place.mirror_id)
        if encode(record) != found.data:
            # A write can be bound to the content only if equal records are equal bytes.
            raise ArbiterError(
                "the record is not in the form that this program writes: something else wrote it; "
                "look what, and put back what was there"
            )
        return Held(found.version, record)

    async def _prove_refusals(self) -> None:
        # The first time it is missing, and the first write makes it.
        if await self._tried(None) and await self._tried(None):
            raise self._useless("there is nothing yet")
        if await self._tried(Expected(self.WRONG_VERSION, PROOF)):
            raise self._useless("it holds what it does not hold")

    async def _tried(self, expected: Expected | None) -> bool:
        async with self._asking("proof"):
            return await self._put(self._place.proof_key, expected, PROOF)

    def _useless(self, condition: str) -> ArbiterError:
        return self._failed(
            "proof",
            f'a write to {self._place.proof_key} under the wrong condition "{condition}" was done: '
            "this store ignores conditions and would let both nodes win; it must not be used as "
            "arbiter. Use another store, or a version of this one that has conditional writes",
        )

    @asynccontextmanager
    async def _asking(self, what: str) -> AsyncIterator[None]:
        """One bound for all of a call, name look-up included, and one form for every error."""
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                yield
        except TimeoutError as error:
            raise self._failed(
                what,
                f"no answer within {self._timeout_ms} ms; look whether the store runs and can be "
                "reached, or raise timeout_ms",
            ) from error
        except ArbiterError as error:
            raise self._failed(what, str(error)) from error
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a library raises, nothing is known
            # Chained to nothing: a library's exception may hold a signature or a password.
            raise self._failed(what, self._explain(error) or type(error).__name__) from None

    def _failed(self, what: str, why: str) -> ArbiterError:
        return ArbiterError(f"{self.where}: {what}: {why}")


def _expected(held: Held | None) -> Expected | None:
    return None if held is None else Expected(held.version, encode(held.record))


def shortened(text: object) -> str:
    """Text from outside, fit for a message."""
    return printable(str(text))[:DETAIL_CHARS_MAX]
