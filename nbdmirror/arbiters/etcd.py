"""etcd, version 3.4 or newer, through its gateway for JSON.

Owns the requests and what their answers mean. A transaction compares revision and content of the
key: after a restore from a backup revisions are given a second time. Must never: send a transaction
to a second member after the first may have got it, follow a redirect, or believe an answer of
another cluster than `identity` told of.
"""

import asyncio
import base64
import json
import ssl
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from nbdmirror.arbiters.conditional import (
    ConditionalStore,
    Expected,
    Place,
    identity_of,
    secret_line,
    shortened,
)
from nbdmirror.arbiters.once import new_session
from nbdmirror.config_arbiters import EtcdSection
from nbdmirror.core.record import RECORD_BYTES_MAX
from nbdmirror.errors import ArbiterError

# A record in base64 with its key, and room for what etcd says around it.
ANSWER_BYTES_MAX: Final = 4 * (RECORD_BYTES_MAX + 1) // 3 + 4096
# No member got anything: there was no connection.
_NOT_SENT: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_FAILED: Final = (aiohttp.ClientError, TimeoutError, OSError)
_OK: Final = 200
_UNAUTHENTICATED: Final = 16  # codes of gRPC, which the gateway passes on
_PERMISSION_DENIED: Final = 7
# These two have the code of a wrong argument. Nothing was done in either case.
_OLD_TOKENS: Final = ("revision of auth store is old", "invalid auth token")
_NO_USER: Final = ("user name is empty", "user name not found")

Json = dict[str, Any]


class EtcdStore(ConditionalStore):
    """One key of one etcd cluster."""

    WRONG_VERSION = str((1 << 62) - 1)

    def __init__(self, section: EtcdSection, place: Place) -> None:
        shown = ", ".join(section.endpoints)
        super().__init__(place, f"etcd at {shown}, key {place.key}", section.timeout_ms)
        self._section = section
        self._endpoints = list(section.endpoints)  # the one that answered last comes first
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None
        self._token: str | None = None
        self._cluster: str | None = None

    async def identity(self) -> bytes:
        """See RecordStore. From here on only this cluster is believed."""
        async with self._asking("identity"):
            self._cluster = None
            answer = await self._call("kv/range", {"key": _text(self._place.key)}, is_read=True)
            self._cluster = _cluster_of(answer)
            return identity_of("etcd", self._cluster, self._place.key)

    async def _get(self) -> Expected | None:
        question = {"key": _text(self._place.key), "serializable": False}
        answer = await self._call("kv/range", question, is_read=True)
        found = answer.get("kvs", [])
        if not found:
            return None
        value = base64.b64decode(found[0].get("value", ""), validate=True)
        return Expected(_revision(found[0]["mod_revision"]), value)

    async def _put(self, key: str, expected: Expected | None, data: bytes) -> bool:
        name = _text(key)
        compare: list[Json] = [{"key": name, "target": "VERSION", "version": "0"}]
        if expected is not None:
            compare = [
                {"key": name, "target": "MOD", "mod_revision": expected.version},
                {"key": name, "target": "VALUE", "value": _text(expected.data)},
            ]
        put = {"request_put": {"key": name, "value": _text(data)}}
        question = {
            "compare": [{"result": "EQUAL", **each} for each in compare],
            "success": [put],
            "failure": [],
        }
        answer = await self._call("kv/txn", question, is_read=False)
        succeeded = answer.get("succeeded", False)
        # What is false is left out; a put that was done is named.
        if not isinstance(succeeded, bool) or succeeded != bool(answer.get("responses")):
            raise ArbiterError("the answer contradicts itself; nothing is known")
        return succeeded

    async def _closed(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _explain(self, error: Exception) -> str | None:
        if isinstance(error, ssl.SSLError | ssl.CertificateError):
            return f"TLS: {shortened(error)}"
        if isinstance(error, aiohttp.ClientError | OSError):
            return shortened(error)
        if isinstance(error, ValueError | KeyError | TypeError | AttributeError | IndexError):
            return "the answer is none of etcd's; look what listens there"
        return None

    async def _call(self, path: str, question: Json, *, is_read: bool) -> Json:
        """One question; a lapsed token is made anew once, because nothing was done under it."""
        for is_second in (False, True):
            headers = {}
            if self._section.user is not None:
                self._token = self._token or await self._new_token(self._section.user)
                headers["Authorization"] = self._token
            status, answer = await self._send(path, question, headers, is_read=is_read)
            if status == _OK:
                self._require_cluster(answer)
                return answer
            if is_second or not headers or not _token_has_lapsed(answer):
                raise ArbiterError(_why(status, answer))
            self._token = None
        raise AssertionError("unreachable")

    async def _new_token(self, user: str) -> str:
        file = self._section.password_file
        assert file is not None  # the configuration has both or neither
        password = secret_line("etcd.password_file", file)
        question = {"name": user, "password": password}
        status, answer = await self._send("auth/authenticate", question, {}, is_read=True)
        token = answer.get("token")
        if status == _OK and isinstance(token, str):
            return token
        raise ArbiterError(
            f"user {user} is not let in ({_said(answer)}); look at etcd.user and "
            "etcd.password_file, and whether etcd has authentication switched on"
        )

    async def _send(
        self, path: str, question: Json, headers: Mapping[str, str], *, is_read: bool
    ) -> tuple[int, Json]:
        """The first answer. Each member gets its share of the time to take the connection."""
        share_s = self._timeout_ms / 1000 / len(self._endpoints)
        failures = []
        for endpoint in list(self._endpoints):
            try:
                async with asyncio.timeout(share_s if is_read else None):
                    result = await self._post(f"{endpoint}/v3/{path}", question, headers, share_s)
            except _NOT_SENT as error:
                self._read_certificates()
                failures.append(f"{endpoint}: {self._explain(error)}")
            except _FAILED as error:
                self._read_certificates()
                why = self._explain(error) or type(error).__name__
                if not is_read:
                    raise ArbiterError(
                        f"{endpoint}: {why}; what was sent may have been done"
                    ) from error
                failures.append(f"{endpoint}: {why}")
            else:
                if is_read and result[0] >= 500:
                    failures.append(f"{endpoint}: {_why(*result)}")
                    continue
                self._endpoints.remove(endpoint)
                self._endpoints.insert(0, endpoint)
                return result
        raise ArbiterError(f"no member answers: {'; '.join(failures)}")

    async def _post(
        self, url: str, question: Json, headers: Mapping[str, str], connect_s: float
    ) -> tuple[int, Json]:
        if self._session is None:
            self._session = self._new_session()
        async with self._session.post(
            url,
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json", **headers},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
        ) as response:
            body = await _bounded_body(response.content)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            if response.status == _OK:
                raise ArbiterError("the answer is none of etcd's; look what listens there")
            answer = {}  # an error page of something in between
        return response.status, answer

    def _new_session(self) -> aiohttp.ClientSession:
        if any(each.startswith("https://") for each in self._endpoints):
            self._tls = ssl.create_default_context(cafile=self._section.ca_file)
            self._read_certificates()
        return new_session(self._tls)

    def _read_certificates(self) -> None:
        """Once, and after each failure: a certificate that has run out may have a successor."""
        section = self._section
        if self._tls is None:
            return
        try:
            if section.ca_file is not None:
                self._tls.load_verify_locations(section.ca_file)
            if section.cert_file is not None:
                self._tls.load_cert_chain(section.cert_file, section.key_file, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ArbiterError(
                f"certificates: {shortened(error)}; look at etcd.ca_file, etcd.cert_file and "
                "etcd.key_file (PEM, without a password)"
            ) from error

    def _require_cluster(self, answer: Json) -> None:
        found = _cluster_of(answer)
        if self._cluster is not None and found != self._cluster:
            raise ArbiterError(
                f"this is cluster {found}, the identity was that of cluster {self._cluster}; "
                "expected endpoints of one cluster"
            )


async def _bounded_body(content: aiohttp.StreamReader) -> bytes:
    body = b""
    while piece := await content.read(ANSWER_BYTES_MAX + 1 - len(body)):
        body += piece
        if len(body) > ANSWER_BYTES_MAX:
            raise ArbiterError(
                f"the answer has more than {ANSWER_BYTES_MAX} bytes: something else than a record "
                "lies in its place, or this is no etcd"
            )
    return body


def _text(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def _revision(value: Any) -> str:
    """A revision: the gateway writes 64 bits as text."""
    number = int(value)
    if number <= 0:
        raise ValueError("no revision")
    return str(number)


def _cluster_of(answer: Json) -> str:
    """Every answer has a header; without one it is not etcd that answered."""
    header = answer.get("header")
    found = header.get("cluster_id") if isinstance(header, dict) else None
    if not isinstance(found, str) or not found.isdecimal():
        raise ArbiterError("the answer names no cluster, so it is none of etcd's")
    return found


def _said(answer: Json) -> str:
    return shortened(answer.get("message") or answer.get("error") or "no word why")


def _token_has_lapsed(answer: Json) -> bool:
    said = _said(answer)
    return answer.get("code") == _UNAUTHENTICATED or any(each in said for each in _OLD_TOKENS)


def _why(status: int, answer: Json) -> str:
    said = _said(answer)
    if answer.get("code") == _PERMISSION_DENIED:
        remedy = "; give the user of [etcd] the right to read and write the key and those beside it"
    elif any(each in said for each in _NO_USER):
        remedy = "; set etcd.user and etcd.password_file"
    else:
        remedy = "; look at etcd's own log and state"
    return f"HTTP {status}: {said}{remedy}"
