"""S3: one object of a bucket, written under a condition on its ETag.

Owns the two requests, through aiobotocore, and what their answers mean. The record's counter makes
each content, and with it each ETag, the only one of its kind. Must never: let a library send a
write twice: botocore's retries are off, aiohttp's as well (`once.py`), and redirects are refused.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import create_loader

from nbdmirror.arbiters.conditional import (
    ConditionalStore,
    Expected,
    Place,
    identity_of,
    shortened,
)
from nbdmirror.arbiters.once import connector_arguments, once
from nbdmirror.config_arbiters import S3Section
from nbdmirror.core.record import RECORD_BYTES_MAX
from nbdmirror.errors import ArbiterError

AWS: Final = "aws"
_CLEAR_NO: Final = (412, "PreconditionFailed")
_NO_SUCH_KEY: Final = (404, "NoSuchKey")
_REFUSED: Final = frozenset({401, 403})
_REMEDIES: Final = {
    "NoSuchBucket": "make the bucket, or correct s3.bucket",
    "ConditionalRequestConflict": "another write is on its way; read the record",
    "PermanentRedirect": "the bucket is elsewhere; correct s3.region and s3.endpoint",
    "TemporaryRedirect": "the bucket is elsewhere; correct s3.region and s3.endpoint",
    "AuthorizationHeaderMalformed": "correct s3.region",
    "NotImplemented": "this store has no conditional writes; use another one as arbiter",
    "RequestTimeTooSkewed": "set the clock of this server",
}


class _OneRequest:
    """aiohttp's session, as aiobotocore uses it; one request is one request."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, *positional: Any, **named: Any) -> aiohttp.ClientResponse:
        named |= {"allow_redirects": False, "middlewares": (once,)}
        return await self._session.request(*positional, **named)


class _Http(AIOHTTPSession):  # type: ignore[misc]  # no types upstream
    async def _get_session(self, proxy_url: Any) -> _OneRequest:
        return _OneRequest(await super()._get_session(proxy_url))


@dataclass(slots=True)
class _Client:
    """A client and how many calls use it: one that is to be replaced is closed by the last."""

    client: Any
    resources: AsyncExitStack
    users_count: int = 0
    is_stale: bool = False

    async def close_if_unused(self) -> None:
        if self.is_stale and not self.users_count:
            await self.resources.aclose()


class S3Store(ConditionalStore):
    """One object."""

    WRONG_VERSION = f'"{"0" * 32}"'

    def __init__(self, section: S3Section, place: Place) -> None:
        at = section.endpoint or f"AWS, region {section.region}"
        where = f"S3 at {at}, bucket {section.bucket}, object {place.key}"
        super().__init__(place, where, section.timeout_ms)
        self._section = section
        _models()
        self._session = self._new_session()
        self._client: _Client | None = None
        self._opening = asyncio.Lock()

    async def identity(self) -> bytes:
        """See RecordStore. No question to the store: names of buckets are names of things."""
        section = self._section
        assert section.bucket is not None
        return identity_of("s3", section.endpoint or AWS, section.bucket, self._place.key)

    async def _get(self) -> Expected | None:
        async with self._connected() as client:
            try:
                answer = await client.get_object(Bucket=self._section.bucket, Key=self._place.key)
            except ClientError as error:
                if _answer(error) == _NO_SUCH_KEY:
                    return None
                raise self._translated(error) from None
            async with answer["Body"] as body:
                data = b""
                while piece := await body.read(RECORD_BYTES_MAX + 1 - len(data)):
                    data += piece
            return Expected(_etag(answer), data)

    async def _put(self, key: str, expected: Expected | None, data: bytes) -> bool:
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected.version}
        bucket = self._section.bucket
        async with self._connected() as client:
            try:
                await client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
            except ClientError as error:
                gone = _answer(error) == _NO_SUCH_KEY and expected is not None
                if _answer(error) == _CLEAR_NO or gone:
                    return False
                raise self._translated(error) from None
            return True

    async def _closed(self) -> None:
        if self._client is not None:
            self._client.is_stale = True
            await self._client.close_if_unused()

    def _explain(self, error: Exception) -> str | None:
        if isinstance(error, BotoCoreError | aiohttp.ClientError | OSError):
            return (
                f"{shortened(error)}; look at s3.endpoint and at the credentials (s3."
                "credentials_file and s3.profile, or where AWS's own tools look)"
            )
        return None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        async with self._opening:
            if self._client is None or self._client.is_stale:
                resources = AsyncExitStack()
                made = await resources.enter_async_context(self._new_client())
                made.meta.events.register("before-call.s3", _as_if_redirected)
                self._client = _Client(made, resources)
            client = self._client
        client.users_count += 1
        try:
            yield client.client
        finally:
            client.users_count -= 1
            await client.close_if_unused()

    def _translated(self, error: ClientError) -> ArbiterError:
        """What an answer that is neither yes nor no means."""
        status, code = _answer(error)
        code = shortened(code)
        remedy = _REMEDIES.get(code, "nothing is known; look at the state of the store")
        if status in _REFUSED and code not in _REMEDIES:
            remedy = (
                "correct the credentials, and let them read and write the object and the one "
                "beside it (s3:GetObject, s3:PutObject; without s3:ListBucket a missing object "
                "looks forbidden)"
            )
            # The next call reads the credentials anew. Calls that run keep what they have.
            if self._client is not None:
                self._client.is_stale = True
            self._session = self._new_session()
        return ArbiterError(f"HTTP {status} {code}: {remedy}")

    def _new_session(self) -> Any:
        file = self._section.credentials_file
        # With a profile named, variables of the environment count for nothing.
        session = AioSession(profile=self._section.profile or ("default" if file else None))
        session.register_component("data_loader", _models())
        if file is not None:
            session.set_config_variable("credentials_file", str(file))
        return session

    def _new_client(self) -> Any:
        section, bound_s = self._section, self._timeout_ms / 1000
        config = AioConfig(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=bound_s,
            read_timeout=bound_s,
            # Without None aiobotocore puts a time in, and aiohttp refuses it beside force_close.
            connector_args={**connector_arguments(), "keepalive_timeout": None},
            http_session_cls=_Http,
            proxies={},  # a variable of somebody's shell decides nothing about the arbiter
            # Servers other than AWS's know no checksums at the end of a body.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if section.endpoint else "auto"},
        )
        return self._session.create_client(
            "s3",
            region_name=section.region,
            endpoint_url=section.endpoint,
            verify=str(section.ca_file) if section.ca_file else None,
            config=config,
        )


@cache
def _models() -> Any:
    """What botocore knows about S3, read once for all stores.

    It takes 0.25 s and 15 MiB (measured on a virtual machine with two cores), and stops the event
    loop: at the opening of a store, not in its first call, whose time it would use up.
    """
    session = AioSession()
    session.register_component("data_loader", create_loader())
    session.warm_up_loader_caches("s3")
    return session.get_component("data_loader")


def _as_if_redirected(params: dict[str, Any], **_: Any) -> None:
    """Keep botocore from a second request where the bucket is in another region: it follows once.

    The region is the operator's to correct. Beside retries this is the only repetition it knows.
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _answer(error: ClientError) -> tuple[int, str]:
    """Status and code together: a box in between may answer with the same status."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))


def _etag(answer: Any) -> str:
    etag = answer.get("ETag")
    if not isinstance(etag, str) or not etag:
        raise ArbiterError("the answer has no ETag, so nothing can be written under a condition")
    return etag
