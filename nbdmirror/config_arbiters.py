"""The keys of `<mirror>.toml` that arbiters with a memory read: where the record lies, who may ask.

Owns: what each of these keys on its own may be, what those of one table must be together, and which
of them name files. Must never: open a file, look a name up, or hold a secret: secrets are files.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from nbdmirror.config_fields import AbsolutePath, Section, count_field, key_field, parse_path
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.limits import (
    ARBITER_ENDPOINTS_MAX,
    ARBITER_TIMEOUT_MS,
    ARBITER_TIMEOUT_MS_MAX,
    ARBITER_TIMEOUT_MS_MIN,
)

URL_CHARS_MAX: Final = 1024
PREFIX_CHARS_MAX: Final = 200
PREFIX: Final = "nbdmirror/"
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PREFIX: Final = re.compile(rf"[A-Za-z0-9_.=/-]{{0,{PREFIX_CHARS_MAX}}}")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_CONTAINER: Final = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?!-)){1,61}[a-z0-9]")
_REGION: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_WORD: Final = re.compile(r"[^\x00-\x20\x7f]{1,255}")
_URL_EXPECTED: Final = "http://... or https://..."
_PREFIX_EXPECTED: Final = f"up to {PREFIX_CHARS_MAX} of A-Z, a-z, 0-9, _, ., =, / and -"


def _split(value: object) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of an address; no part of it that a store has no use for."""
    if not isinstance(value, str) or len(value) > URL_CHARS_MAX:
        raise ValueError("not an address")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError("not an address") from error
    if parts.scheme not in {"http", "https"}:
        raise ValueError("it begins with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a user or a password does not belong into an address")
    if parts.query or parts.fragment or "?" in value or "#" in value:
        raise ValueError("nothing with ? or # belongs into an address; a signature has a file")
    host = parts.hostname or ""
    if not _is_host(host) or port == 0:
        raise ValueError("no host, or no port, that can be reached")
    return parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme], parts.path


def _is_host(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return _HOST.fullmatch(host) is not None


def _plain(scheme: str, host: str, port: int, path: str = "") -> str:
    """One spelling for all that mean the same: lower case, the port named, no slash at the end."""
    shown = f"[{ipaddress.ip_address(host)}]" if ":" in host else host.lower()
    return f"{scheme}://{shown}:{port}{path}"


def parse_endpoint(value: object) -> str:
    """An address without a path, like "https://10.1.0.9:2379", in its one spelling.

    Raises:
        ValueError: it is none.
    """
    scheme, host, port, path = _split(value)
    if path not in {"", "/"}:
        raise ValueError("nothing comes after the port")
    return _plain(scheme, host, port)


def parse_account_url(value: object) -> str:
    """The address of an account, in its one spelling; a path only with the account's name.

    Raises:
        ValueError: it is none.
    """
    scheme, host, port, path = _split(value)
    if not re.fullmatch(r"/?|/[a-z0-9]{3,24}/?", path):
        raise ValueError("after the port comes nothing, or the name of the account")
    return _plain(scheme, host, port, path.rstrip("/"))


def is_clear_text_abroad(url: str) -> bool:
    """Whether what is sent there can be read on a network."""
    parts = urlsplit(url)
    try:
        return parts.scheme == "http" and not ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.scheme == "http"


def _endpoints(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > ARBITER_ENDPOINTS_MAX:
        raise ValueError(f"a list of at most {ARBITER_ENDPOINTS_MAX} addresses")
    found = [parse_endpoint(each) for each in value]
    if len(set(found)) != len(found):
        raise ValueError("an address is there twice")
    return found


def _matching(pattern: re.Pattern[str], what: str) -> BeforeValidator:
    def check(value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"not {what}")
        return value

    return BeforeValidator(check)


def _prefix(value: object) -> str:
    # Clients and proxies rewrite addresses with //, /./ and /../; a key must stay one key.
    if not isinstance(value, str) or not _PREFIX.fullmatch(value):
        raise ValueError("not the beginning of a key")
    segments = value.split("/")
    if "" in segments[:-1] or {".", ".."} & set(segments):
        raise ValueError("no part between two / is empty, . or .., and it begins with no /")
    return value


def _etcd_prefix(value: object) -> str:
    # etcd sends keys in the body; /registry/... is a usual form there.
    text = value.removeprefix("/") if isinstance(value, str) else value
    _prefix(text)
    return str(value)


def _timeout() -> Any:
    return count_field(
        ARBITER_TIMEOUT_MS,
        ARBITER_TIMEOUT_MS_MIN,
        ARBITER_TIMEOUT_MS_MAX,
        "ms",
        "bound of one question to the store as a whole; a failover within 5 s needs 1000 or less",
    )


def _file(meaning: str) -> Any:
    return key_field(None, "path", "an absolute path", meaning)


def _ca_file() -> Any:
    return _file("certificates (PEM) that sign the store's; default: those of the system")


_Prefix = Annotated[str, BeforeValidator(_prefix)]
_BEGINNING: Final = "what the name of the record begins with; the mirror's name and id follow"


class EtcdSection(Section):
    """`[etcd]`: one key of an etcd, version 3.4 or newer."""

    endpoints: Annotated[list[str], BeforeValidator(_endpoints)] = key_field(
        [],
        "list",
        f"up to {ARBITER_ENDPOINTS_MAX} of {_URL_EXPECTED}, without a path",
        "where the members of one etcd cluster take clients",
    )
    prefix: Annotated[str, BeforeValidator(_etcd_prefix)] = key_field(
        PREFIX, "text", _PREFIX_EXPECTED, _BEGINNING
    )
    ca_file: AbsolutePath | None = _ca_file()
    cert_file: AbsolutePath | None = _file("certificate (PEM) of this client; with key_file")
    key_file: AbsolutePath | None = _file("key (PEM) of cert_file")
    user: Annotated[str, _matching(_WORD, "a name")] | None = key_field(
        None, "name", "up to 255 characters without spaces", "user of etcd; with password_file"
    )
    password_file: AbsolutePath | None = _file("its password, on one line")
    timeout_ms: int = _timeout()


class S3Section(Section):
    """`[s3]`: one object of a bucket with conditional writes."""

    endpoint: Annotated[str, BeforeValidator(parse_endpoint)] | None = key_field(
        None, "text", f"{_URL_EXPECTED}, without a path", "the S3 server; default: that of AWS"
    )
    bucket: Annotated[str, _matching(_BUCKET, "the name of a bucket")] | None = key_field(
        None, "name", "3 to 63 of A-Z, a-z, 0-9, ., _ and -", "an existing bucket"
    )
    prefix: _Prefix = key_field(PREFIX, "text", _PREFIX_EXPECTED, _BEGINNING)
    region: Annotated[str, _matching(_REGION, "the name of a region")] = key_field(
        "us-east-1", "name", "up to 63 of a-z, 0-9 and -", "region of the bucket"
    )
    ca_file: AbsolutePath | None = _ca_file()
    credentials_file: AbsolutePath | None = _file(
        "credentials in the form of ~/.aws/credentials; default: where AWS's own tools look"
    )
    profile: Annotated[str, _matching(_WORD, "a name")] | None = key_field(
        None, "name", "up to 255 characters without spaces", "section of the credentials"
    )
    timeout_ms: int = _timeout()


class AzureBlobSection(Section):
    """`[azure-blob]`: one block blob of a storage account."""

    account_url: Annotated[str, BeforeValidator(parse_account_url)] | None = key_field(
        None,
        "text",
        "https://ACCOUNT.blob.core.windows.net, or http://HOST:PORT/ACCOUNT",
        "the storage account",
    )
    container: Annotated[str, _matching(_CONTAINER, "the name of a container")] | None = key_field(
        None, "name", "3 to 63 of a-z, 0-9 and single -", "an existing container"
    )
    prefix: _Prefix = key_field(PREFIX, "text", _PREFIX_EXPECTED, _BEGINNING)
    ca_file: AbsolutePath | None = _ca_file()
    key_file: AbsolutePath | None = _file("key of the account, on one line; or sas_file")
    sas_file: AbsolutePath | None = _file(
        "shared access signature that may read, create and write, on one line; or key_file"
    )
    timeout_ms: int = _timeout()


# Files whose content nobody else may read; of these two tables and [s3].
SECRETS: Final = (
    ("etcd", "key_file"),
    ("etcd", "password_file"),
    ("s3", "credentials_file"),
    ("azure-blob", "key_file"),
    ("azure-blob", "sas_file"),
)
FILES: Final = (
    ("etcd", "ca_file"),
    ("etcd", "cert_file"),
    ("s3", "ca_file"),
    ("azure-blob", "ca_file"),
    *SECRETS,
)
# What a store cannot do without, and what an operator is asked for.
_NEEDED: Final = {
    ArbiterKind.PING.word: (("ping", "addresses", "the address of a router that both nodes see"),),
    ArbiterKind.ETCD.word: (("etcd", "endpoints", 'a list like ["http://10.1.0.9:2379"]'),),
    ArbiterKind.S3.word: (("s3", "bucket", "the name of an existing bucket"),),
    ArbiterKind.AZURE_BLOB.word: (
        ("azure-blob", "account_url", "an address like https://ACCOUNT.blob.core.windows.net"),
        ("azure-blob", "container", "the name of an existing container"),
    ),
}


def arbiter_problems(raw: dict[str, Any]) -> list[str]:
    """What the tables of arbiters must be together, one line for each mistake."""
    arbiter = raw.get("arbiter")
    return [
        *_missing(raw, arbiter if isinstance(arbiter, str) else ""),
        *_pairs(raw),
        *_azure_credentials(raw, arbiter),
        *_clear_text(raw),
    ]


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _missing(raw: dict[str, Any], arbiter: str) -> Iterator[str]:
    for table, key, expected in _NEEDED.get(arbiter, ()):
        if not _table(raw, table).get(key):
            why = f'arbiter = "{arbiter}" {"asks them" if key == "addresses" else "needs it"}'
            yield f"{table}.{key}: is not set, and {why}; expected {expected}"


def _pairs(raw: dict[str, Any]) -> Iterator[str]:
    etcd = _table(raw, "etcd")
    for one, other in (("cert_file", "key_file"), ("user", "password_file")):
        for there, lacking in ((one, other), (other, one)):
            if there in etcd and lacking not in etcd:
                yield f"etcd.{lacking}: is not set, and etcd.{there} is; expected both or neither"


def _azure_credentials(raw: dict[str, Any], arbiter: object) -> Iterator[str]:
    azure = _table(raw, "azure-blob")
    given = [key for key in ("key_file", "sas_file") if key in azure]
    if len(given) == 2:
        yield "azure-blob.sas_file: is set, and azure-blob.key_file as well; expected one of them"
    elif not given and arbiter == ArbiterKind.AZURE_BLOB.word:
        yield (
            "azure-blob.key_file: is not set, nor is azure-blob.sas_file; expected the path of a "
            "file with the account's key, or with a shared access signature"
        )


def _urls(raw: dict[str, Any], table: str) -> list[str]:
    """The addresses of a store, as far as they are right."""
    section = _table(raw, table)
    endpoints = section.get("endpoints")
    found = []
    for value in [
        *(endpoints if isinstance(endpoints, list) else []),
        section.get("endpoint"),
        section.get("account_url"),
    ]:
        try:
            found.append(_plain(*_split(value)))
        except ValueError:
            continue
    return found


def _clear_text(raw: dict[str, Any]) -> Iterator[str]:
    """Files that speak of TLS where there is none, and secrets that anybody could read."""
    for table, key in FILES:
        urls = _urls(raw, table)
        if key not in _table(raw, table):
            continue
        if (key == "ca_file" or (table == "etcd" and key != "password_file")) and any(
            url.startswith("http://") for url in urls
        ):
            yield f"{table}.{key}: is set, but an address begins with http://; expected https://"
        if key in {"password_file", "sas_file"} and any(map(is_clear_text_abroad, urls)):
            yield (
                f"{table}.{key}: would be sent over http://, readable by everybody on the way; "
                "expected https://"
            )


def arbiter_files(raw: dict[str, Any]) -> dict[str, Any]:
    """Every file that the tables of arbiters name rightly, under its key."""
    found = {}
    for table, key in FILES:
        try:
            found[f"{table}.{key}"] = parse_path(_table(raw, table).get(key))
        except ValueError:
            continue
    return found
