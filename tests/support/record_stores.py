"""The stores of an arbiter's record, as the tests open them: one Kind for each dialect.

Owns the sections and secret files that fit the servers of `stores.py`. Must never: know what a
test asks.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from nbdmirror.arbiters.azure_blob import AzureBlobStore
from nbdmirror.arbiters.conditional import ConditionalStore, Place
from nbdmirror.arbiters.etcd import EtcdStore
from nbdmirror.arbiters.s3 import S3Store
from nbdmirror.config_arbiters import AzureBlobSection, EtcdSection, S3Section
from nbdmirror.core.record import NOBODY, Record
from tests.support.stores import (
    ACCESS_KEY,
    ACCOUNT,
    ACCOUNT_KEY,
    BUCKET,
    CONTAINER,
    S3,
    SECRET_KEY,
    Azurite,
    Etcd,
    Server,
    sas,
)

GOODBYE_S = 5.0
TIMEOUT_MS = 10_000  # the most that can be configured: the machine may be slow
G1, G2, G3 = (bytes([n]) * 16 for n in (1, 2, 3))
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Let it run to its end, in an event loop of its own, and its connections to theirs."""

    async def whole() -> T:
        try:
            return await main
        finally:
            # TLS connections wait for the other end's goodbye, which a closed loop never hears.
            until, loop = monotonic() + GOODBYE_S, asyncio.get_running_loop()
            sockets = loop._selector.get_map()  # type: ignore[attr-defined]  # no other way to see
            while len(sockets) > 1 and monotonic() < until:  # noqa: ASYNC110 - one is the loop's own
                await asyncio.sleep(0)

    return asyncio.run(whole())


def secret_file(directory: Path, text: str) -> str:
    """The path of a file that holds a secret, as it should."""
    path = directory / f"secret-{secrets.token_hex(4)}"
    path.touch(0o600)
    path.write_text(text)
    return str(path)


@dataclass(frozen=True)
class Kind:
    """One dialect: its server, and a store for an address of that."""

    serve: Callable[[], Server]
    make: Callable[[str, Path, Place, dict[str, Any]], ConditionalStore]
    # What this dialect calls the place around its record, and one that does not exist.
    elsewhere: dict[str, Any]


def _etcd(url: str, _: Path, place: Place, changes: dict[str, Any]) -> ConditionalStore:
    return EtcdStore(EtcdSection(**{"endpoints": [url], **changes}), place)


def credentials(access_key: str = ACCESS_KEY, profile: str = "default") -> str:
    """A file of credentials for S3."""
    return f"[{profile}]\naws_access_key_id = {access_key}\naws_secret_access_key = {SECRET_KEY}\n"


def _s3(url: str, directory: Path, place: Place, changes: dict[str, Any]) -> ConditionalStore:
    given = {"endpoint": url, "bucket": BUCKET, **changes}
    if "credentials_file" not in given:
        given["credentials_file"] = secret_file(directory, credentials())
    return S3Store(S3Section(**given), place)


def _azure(url: str, directory: Path, place: Place, changes: dict[str, Any]) -> ConditionalStore:
    given = {"account_url": f"{url}/{ACCOUNT}", "container": CONTAINER, **changes}
    if changes.get("signed") == "sas":
        # The account's key signs the conditions as well; a signature of this kind does not.
        given["sas_file"] = secret_file(directory, sas())
    elif not {"key_file", "sas_file"} & set(given):
        given["key_file"] = secret_file(directory, f"{ACCOUNT_KEY}\n")
    given.pop("signed", None)
    return AzureBlobStore(AzureBlobSection(**given), place)


KINDS = {
    "etcd": Kind(Etcd, _etcd, {"prefix": "other/"}),
    "s3": Kind(S3, _s3, {"bucket": "no-such-bucket"}),
    "azure-blob": Kind(Azurite, _azure, {"container": "no-such-container"}),
}


@dataclass
class Scene:
    """One mirror's record in one running store. `url`: where the stores of this scene ask."""

    kind: Kind
    server: Server
    directory: Path
    mirror_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    @asynccontextmanager
    async def opened(
        self, url: str | None = None, node_id: int = 1, mirror: str = "demo", **changes: Any
    ) -> AsyncIterator[ConditionalStore]:
        """A store, as one node opens it."""
        key = f"{changes.get('prefix', 'nbdmirror/')}{mirror}-{self.mirror_id.hex()}.json"
        changes.setdefault("timeout_ms", TIMEOUT_MS)
        place = Place(self.mirror_id, key, node_id)
        store = self.kind.make(url or self.server.url, self.directory, place, changes)
        try:
            yield store
        finally:
            await store.close()

    def first(self) -> Record:
        """The record with which a mirror begins: node 1 owns it."""
        return Record(self.mirror_id, 1, G1, 1)

    def joint(self, after: Record) -> Record:
        """The record of a pair in sync."""
        return after.next(G2, NOBODY)
