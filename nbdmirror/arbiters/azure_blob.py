"""Azure Blob Storage: one block blob, written under a condition on its ETag.

Owns the two requests, through Azure's own client, and what their answers mean. Must never: let a
library send a write twice: the client's retries and redirects are off, and aiohttp's retries
(`once.py`).
"""

import base64
import binascii
import ssl
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import AzureError, HttpResponseError
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob.aio import BlobServiceClient

from nbdmirror.arbiters.conditional import (
    ConditionalStore,
    Expected,
    Place,
    identity_of,
    secret_line,
    shortened,
)
from nbdmirror.arbiters.once import new_session
from nbdmirror.config_arbiters import AzureBlobSection
from nbdmirror.core.record import RECORD_BYTES_MAX
from nbdmirror.errors import ArbiterError

_NOT_FOUND: Final = "BlobNotFound"
# Status and code together: other refusals share the status (412 LeaseIdMissing) and say nothing
# about what the blob holds.
_CLEAR_NO: Final = frozenset({(412, "ConditionNotMet"), (409, "BlobAlreadyExists")})
_REFUSED: Final = frozenset({401, 403})
_REMEDIES: Final = {
    "ContainerNotFound": "make the container, or correct azure-blob.container",
    "ContainerBeingDeleted": "make the container anew, or correct azure-blob.container",
    "LeaseIdMissing": "somebody holds a lease on the blob; break it",
    "BlobImmutableDueToPolicy": "a policy forbids changes; use a container without one",
    "InvalidRange": "something empty lies in the record's place; look what, and remove it",
    "InvalidBlobType": "something else than a block blob lies in its place; remove it",
}


class AzureBlobStore(ConditionalStore):
    """One blob."""

    WRONG_VERSION = '"0x8D0000000000000"'

    def __init__(self, section: AzureBlobSection, place: Place) -> None:
        assert section.account_url is not None
        assert section.container is not None
        where = (
            f"Azure Blob Storage at {section.account_url}, container {section.container}, "
            f"blob {place.key}"
        )
        super().__init__(place, where, section.timeout_ms)
        self._section = section
        self._url, self._container = section.account_url, section.container
        self._client: BlobServiceClient | None = None
        self._session: aiohttp.ClientSession | None = None

    async def identity(self) -> bytes:
        """See RecordStore. No question to the store: names of accounts are names of things."""
        return identity_of("azure-blob", self._url, self._container, self._place.key)

    async def _get(self) -> Expected | None:
        blob = self._connected().get_blob_client(self._container, self._place.key)
        try:
            found = await blob.download_blob(offset=0, length=RECORD_BYTES_MAX + 1)
            data = await found.readall()
        except HttpResponseError as error:
            if (error.status_code, _code(error)) == (404, _NOT_FOUND):
                return None
            raise self._translated(error) from None
        return Expected(_etag(found.properties.etag), data)

    async def _put(self, key: str, expected: Expected | None, data: bytes) -> bool:
        blob = self._connected().get_blob_client(self._container, key)
        condition: dict[str, Any] = {"match_condition": MatchConditions.IfMissing}
        if expected is not None:
            condition = {
                "match_condition": MatchConditions.IfNotModified,
                "etag": expected.version,
            }
        try:
            await blob.upload_blob(data, length=len(data), overwrite=True, **condition)
        except HttpResponseError as error:
            answer = (error.status_code, _code(error))
            gone = answer == (404, _NOT_FOUND) and expected is not None
            if answer in _CLEAR_NO or gone:
                return False
            raise self._translated(error) from None
        return True

    async def _closed(self) -> None:
        session, self._client, self._session = self._session, None, None
        if session is not None:
            await session.close()

    def _explain(self, error: Exception) -> str | None:
        if isinstance(error, binascii.Error):
            return "azure-blob.key_file holds no key of an account; expected one in base64"
        if isinstance(error, AzureError | aiohttp.ClientError | OSError):
            return f"{shortened(_cause(error))}; look at azure-blob.account_url"
        return None

    def _connected(self) -> BlobServiceClient:
        if self._client is None:
            if self._session is None:
                self._session = self._new_session()
            bound_s = self._timeout_ms / 1000
            self._client = BlobServiceClient(
                self._url,
                credential=self._credential(),
                transport=AioHttpTransport(session=self._session, session_owner=False),
                retry_total=0,
                permit_redirects=False,
                connection_timeout=bound_s,
                read_timeout=bound_s,
                # Proxies too: a variable of somebody's shell decides nothing about the arbiter.
                use_env_settings=False,
            )
        return self._client

    def _credential(self) -> AzureNamedKeyCredential | AzureSasCredential:
        section = self._section
        if section.key_file is not None:
            parts = urlsplit(self._url)
            name = parts.path.strip("/") or (parts.hostname or "").partition(".")[0]
            key = secret_line("azure-blob.key_file", section.key_file)
            base64.b64decode(key, validate=True)  # the client would take it, and sign with less
            return AzureNamedKeyCredential(name, key)
        assert section.sas_file is not None  # the configuration has one of them
        return AzureSasCredential(
            secret_line("azure-blob.sas_file", section.sas_file).removeprefix("?")
        )

    def _new_session(self) -> aiohttp.ClientSession:
        tls: ssl.SSLContext | None = None
        if self._section.ca_file is not None:
            try:
                tls = ssl.create_default_context(cafile=self._section.ca_file)
            except (OSError, ValueError) as error:
                raise ArbiterError(
                    f'azure-blob.ca_file = "{self._section.ca_file}": {shortened(error)}; expected '
                    "certificates (PEM)"
                ) from error
        return new_session(tls, auto_decompress=False)

    def _translated(self, error: HttpResponseError) -> ArbiterError:
        """What an answer that is neither yes nor no means."""
        status, code = error.status_code, shortened(_code(error))
        remedy = _REMEDIES.get(code, "nothing is known; look at the state of the store")
        if status in _REFUSED:
            remedy = (
                "correct azure-blob.key_file, or renew azure-blob.sas_file (it has to allow read, "
                "create and write); look at the account's firewall and at the clock of this server"
            )
            self._client = None  # the next call reads the file anew
        return ArbiterError(f"HTTP {status} {code}: {remedy}")


def _code(error: HttpResponseError) -> str:
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code) or "")


def _cause(error: Exception) -> Exception:
    """What is below the client's wrapping: whole objects of aiohttp are in its text otherwise."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, Exception) else error


def _etag(etag: Any) -> str:
    if not isinstance(etag, str) or not etag:
        raise ArbiterError("the answer has no ETag, so nothing can be written under a condition")
    return etag
