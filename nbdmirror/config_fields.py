"""What the sections of a configuration file are made of: sizes, addresses, paths, bounded counts.

Owns the parsing of one value and the way a key carries its unit and its range for the documents.
Must never know which keys there are.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from nbdmirror.limits import GIB, KIB, MIB, SOCKET_PATH_BYTES_MAX, TIB

NAME_CHARS_MAX: Final = 63
PATH_BYTES_MAX: Final = 4096
NAME: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{NAME_CHARS_MAX - 1}}}")
NODE_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9.-]{{0,{NAME_CHARS_MAX - 1}}}")
_SIZE: Final = re.compile(r"([0-9]{1,20}) ?(B|KiB|MiB|GiB|TiB)?")
_UNITS: Final = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}


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
    """A numeric IP address and a port; `str()` gives the form that parse_address() takes."""

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


def parse_peer_address(value: object) -> Address:
    """An Address that the other node can send to. Raises ValueError."""
    address = parse_address(value)
    ip = ipaddress.ip_address(address.host)
    if ip.is_unspecified or ip.is_multicast:
        raise ValueError("the other node dials this address")
    return address


def parse_path(value: object) -> Path:
    """A Path from text like "/var/lib/x". Raises ValueError."""
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("a path is text and begins with /")
    if not value.isprintable():
        # A zero ends a path for the system, and others steer the terminal that shows it.
        raise ValueError("a path has no characters that cannot be printed")
    if len(os.fsencode(value)) > PATH_BYTES_MAX:
        raise ValueError("the path is too long")
    return Path(value)


def parse_socket_path(value: object) -> Path:
    """A Path that a Unix socket can have. Raises ValueError."""
    path = parse_path(value)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError("the system takes no longer names for sockets")
    return path


def key_field(default: Any, unit: str, expected: str, meaning: str) -> Any:
    """A key of any kind."""
    extra: dict[str, JsonValue] = {"unit": unit, "expected": expected}
    return Field(default, description=meaning, json_schema_extra=extra)


def count_field(default: Any, low: int, high: int, unit: str, meaning: str) -> Any:
    """A key that is a whole number from `low` to `high`."""
    extra: dict[str, JsonValue] = {"unit": unit, "expected": f"{low} to {high}"}
    return Field(default, ge=low, le=high, description=meaning, json_schema_extra=extra)


def size_field(default: Any, low: int, high: int, remark: str, meaning: str) -> Any:
    """A key that is a size from `low` to `high`."""
    expected = f"{format_size(low)} to {format_size(high)}{remark}"
    extra: dict[str, JsonValue] = {"unit": "size", "expected": expected}
    return Field(default, ge=low, le=high, description=meaning, json_schema_extra=extra)


AbsolutePath = Annotated[Path, BeforeValidator(parse_path)]
SocketPath = Annotated[Path, BeforeValidator(parse_socket_path)]
Size = Annotated[int, BeforeValidator(parse_size)]
AnyAddress = Annotated[Address, BeforeValidator(parse_address)]
PeerAddress = Annotated[Address, BeforeValidator(parse_peer_address)]


class Section(BaseModel):
    """Base of all tables of the file: frozen, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
