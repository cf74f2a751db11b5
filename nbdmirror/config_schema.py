"""The keys of `<mirror>.toml`: types, defaults, units, ranges.

Owns: what each key on its own may be, and the table `KEYS` that the documentation and the error
report are held against. Must never: read a file, or judge keys against each other.
"""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from nbdmirror.limits import (
    ACK_TIMEOUT_MS,
    EXTENT_BYTES_DEFAULT,
    EXTENT_BYTES_MAX,
    EXTENT_BYTES_MIN,
    FLUSH_BYTES,
    FLUSH_INTERVAL_MS,
    FREEZE_LIMIT_MS,
    GIB,
    KIB,
    MIB,
    REGION_BYTES_DEFAULT,
    REGION_BYTES_MAX,
    REGION_BYTES_MIN,
    RESYNC_CHUNK_BYTES,
    SILENCE_MS,
    SOCKET_PATH_BYTES_MAX,
    TIB,
)

NAME_CHARS_MAX: Final = 63
NODE_ID_MAX: Final = 255
THREADS_MAX: Final = 64
CONNECTIONS_MAX: Final = 1024
ACK_TIMEOUT_MS_MAX: Final = 60_000
FLUSH_INTERVAL_MS_MIN: Final = 10
FLUSH_INTERVAL_MS_MAX: Final = 60_000
FLUSH_BYTES_MAX: Final = 4 * GIB
RESYNC_RATE_BYTES_MAX: Final = 1 * TIB
FREEZE_LIMIT_MS_MAX: Final = 3_600_000
PATH_BYTES_MAX: Final = 4096

_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{NAME_CHARS_MAX - 1}}}")
NODE_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9.-]{{0,{NAME_CHARS_MAX - 1}}}")
_SIZE: Final = re.compile(r"([0-9]{1,20}) ?(B|KiB|MiB|GiB|TiB)?")
_UNITS: Final = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}

ARBITER_CHOICE: Final = """\
it decides who may go on when the two nodes cannot see each other, so it has no default:
  "none"        both may go on alone; a split brain is found when they meet again, and then the
                writes of one side are given up: promise (c) does not hold
  "ping"        the node that still sees the router goes on; not safe when both see it
  "etcd"        safe in every partition; needs an etcd
  "s3", "azure-blob"  as etcd, with one object in a store that has conditional writes
  Only "none" is implemented now."""


def parse_size(value: object) -> int:
    """Bytes from a whole number, or from text like "64MiB". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a size is a whole number of bytes or text like "4KiB", "64MiB", "1GiB"')
    return int(match[1]) * _UNITS[match[2] or "B"]


def format_size(size_bytes: int) -> str:
    """The shortest exact form that parse_size() takes."""
    for unit, factor in _UNITS.items():
        if size_bytes and size_bytes % factor == 0 and factor > 1:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


@dataclass(frozen=True, slots=True)
class Address:
    """A numeric IP address and a TCP port; `str()` gives the form that parse_address() takes."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(value: object) -> Address:
    """An Address from "10.1.0.1:7789" or "[fd00::1]:7789". Raises ValueError."""
    host, colon, port = str(value).rpartition(":")
    if not colon:
        raise ValueError("the port is missing")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError as error:
        raise ValueError("host names are not looked up") from error
    if bracketed != (ip.version == 6):
        raise ValueError("an IPv6 address stands in brackets")
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65_535:
        raise ValueError("a port is a number from 1 to 65535")
    return Address(str(ip), int(port))


def _peer_address(value: object) -> Address:
    address = parse_address(value)
    ip = ipaddress.ip_address(address.host)
    if ip.is_unspecified or ip.is_multicast:
        raise ValueError("the other node dials this address")
    return address


def parse_path(value: object) -> Path:
    """A Path from text like "/var/lib/x". Raises ValueError."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("a path is text and begins with /")
    if len(os.fsencode(value)) > PATH_BYTES_MAX:
        raise ValueError("the path is too long")
    return Path(value)


def _socket_path(value: object) -> Path:
    path = parse_path(value)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError("the system takes no longer names for sockets")
    return path


def _arbiter(value: object) -> str:
    if value != "none":
        raise ValueError(ARBITER_CHOICE)
    return "none"


def _mirror(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("not a name")
    return value


def _power_of_two(value: object) -> int:
    size = parse_size(value)
    if size <= 0 or size & (size - 1):
        raise ValueError("not a power of two")
    return size


def _rate(value: object) -> int:
    rate = parse_size(value)
    if 0 < rate < RESYNC_CHUNK_BYTES:
        raise ValueError("slower than one resync block a second")
    return rate


def _key(default: Any, unit: str, expected: str, meaning: str) -> Any:
    extra: dict[str, JsonValue] = {"unit": unit, "expected": expected}
    return Field(default, description=meaning, json_schema_extra=extra)


def _count(default: Any, low: int, high: int, unit: str, meaning: str) -> Any:
    extra: dict[str, JsonValue] = {"unit": unit, "expected": f"{low} to {high}"}
    return Field(default, ge=low, le=high, description=meaning, json_schema_extra=extra)


def _size(default: Any, low: int, high: int, remark: str, meaning: str) -> Any:
    expected = f"{format_size(low)} to {format_size(high)}{remark}"
    extra: dict[str, JsonValue] = {"unit": "size", "expected": expected}
    return Field(default, ge=low, le=high, description=meaning, json_schema_extra=extra)


_Path = Annotated[Path, BeforeValidator(parse_path)]
_SocketPath = Annotated[Path, BeforeValidator(_socket_path)]
_Size = Annotated[int, BeforeValidator(parse_size)]
_PowerOfTwo = Annotated[int, BeforeValidator(_power_of_two)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NodeSection(_Section):
    """`[node.<name>]`"""

    id: int = _count(..., 1, NODE_ID_MAX, "number", "tells the two nodes apart on disk")
    address: Annotated[Address, BeforeValidator(_peer_address)] = _key(
        ..., "address", "IP:port or [IPv6]:port", "where this node takes the peer channel"
    )
    data_dir: _Path | None = _key(
        None, "path", "an absolute path", "overrides paths.data_dir on this node"
    )
    run_dir: _Path | None = _key(
        None, "path", "an absolute path", "overrides paths.run_dir on this node"
    )


class DeviceSection(_Section):
    """`[device]`: fixed at creation; both nodes must have the same."""

    extent: _PowerOfTwo = _size(
        EXTENT_BYTES_DEFAULT,
        EXTENT_BYTES_MIN,
        EXTENT_BYTES_MAX,
        ", a power of two",
        "the unit of the dirty map",
    )
    region: _PowerOfTwo = _size(
        REGION_BYTES_DEFAULT,
        REGION_BYTES_MIN,
        REGION_BYTES_MAX,
        ", a power of two",
        "the unit of the write-intent log",
    )


class EngineSection(_Section):
    """`[engine]`"""

    threads: int = _count(
        0,
        0,
        THREADS_MAX,
        "count",
        "nbdkit's threads for each connection; 0: 4, or 1 where this nbdkit is older than 1.34.0",
    )
    connections_max: int = _count(32, 1, CONNECTIONS_MAX, "count", "NBD clients at once")
    ack_timeout_ms: int = _count(
        ACK_TIMEOUT_MS,
        SILENCE_MS,
        ACK_TIMEOUT_MS_MAX,
        "ms",
        "a write that the peer has not acknowledged after this freezes",
    )
    flush_interval_ms: int = _count(
        FLUSH_INTERVAL_MS,
        FLUSH_INTERVAL_MS_MIN,
        FLUSH_INTERVAL_MS_MAX,
        "ms",
        "how often both nodes flush in the background",
    )
    flush_bytes: _Size = _size(
        FLUSH_BYTES, MIB, FLUSH_BYTES_MAX, "", "written bytes after which both flush earlier"
    )
    resync_rate: Annotated[int, BeforeValidator(_rate)] = _size(
        0,
        0,
        RESYNC_RATE_BYTES_MAX,
        f"; 0 is unlimited, else at least {format_size(RESYNC_CHUNK_BYTES)}",
        "most bytes per second that a resync copies",
    )
    freeze_limit_ms: int = _count(
        FREEZE_LIMIT_MS,
        SILENCE_MS,
        FREEZE_LIMIT_MS_MAX,
        "ms",
        "how long writes stay frozen for an answer; not below ack_timeout_ms",
    )
    on_freeze: Literal["ask", "alone"] = _key(
        "ask",
        "word",
        '"ask" or "alone"',
        "who answers a freeze: whoever commands the engine, or the engine itself with `alone`",
    )
    lock_memory: bool = _key(
        default=True,
        unit="yes or no",
        expected="true or false",
        meaning="keep the engine out of swap (mlockall)",
    )


class ExportSection(_Section):
    """`[export]`: where NBD clients connect. Plain NBD knows no passwords."""

    unix: _SocketPath | None = _key(
        None,
        "path",
        f"an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes",
        "Unix socket; default nbd.sock in run_dir",
    )
    tcp: Annotated[Address, BeforeValidator(parse_address)] | None = _key(
        None, "address", "IP:port or [IPv6]:port", "TCP socket besides; whoever reaches it writes"
    )


class PathsSection(_Section):
    """`[paths]`"""

    data_dir: _Path | None = _key(
        None,
        "path",
        "an absolute path",
        "holds `data` and `meta`; default /var/lib/nbdmirror/ and the mirror's name",
    )
    run_dir: _Path | None = _key(
        None,
        "path",
        "an absolute path",
        "holds the sockets; default /run/nbdmirror/ and the mirror's name",
    )


class ConfigFile(_Section):
    """The whole file."""

    mirror: Annotated[str, BeforeValidator(_mirror)] = _key(
        ...,
        "name",
        f"1 to {NAME_CHARS_MAX} of a-z, 0-9 and -, not beginning with -",
        "the mirror's name",
    )
    key_file: _Path = _key(
        ..., "path", "an absolute path", "the key that both nodes share, byte for byte"
    )
    arbiter: Annotated[str, BeforeValidator(_arbiter)] = _key(
        ..., "word", '"none"', "what breaks the tie when the nodes cannot see each other"
    )
    node: dict[str, NodeSection] = _key(..., "", "exactly two tables [node.<name>]", "the nodes")
    device: DeviceSection = DeviceSection()
    engine: EngineSection = EngineSection()
    export: ExportSection = ExportSection()
    paths: PathsSection = PathsSection()


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key as docs/configuration.md lists it. `default` is "required", "none" or the value."""

    key: str
    default: str
    unit: str
    expected: str
    meaning: str


def _default_text(default: object, *, required: bool, unit: str) -> str:
    if required:
        return "required"
    if default is None:
        return "none"
    if unit == "size" and isinstance(default, int):
        return f'"{format_size(default)}"'
    return f'"{default}"' if isinstance(default, str) else str(default).lower()


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[KeyInfo]:
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        section = info.annotation
        if name == "node":
            yield from _keys_of(NodeSection, "node.<name>.")
        elif isinstance(section, type) and issubclass(section, _Section):
            yield from _keys_of(section, f"{key}.")
        else:
            extra = info.json_schema_extra
            assert isinstance(extra, dict), key
            unit = str(extra["unit"])
            default = _default_text(info.default, required=info.is_required(), unit=unit)
            yield KeyInfo(key, default, unit, str(extra["expected"]), str(info.description))


KEYS: Final[Mapping[str, KeyInfo]] = {info.key: info for info in _keys_of(ConfigFile, "")}
SECTIONS: Final = ("node", "device", "engine", "export", "paths")
