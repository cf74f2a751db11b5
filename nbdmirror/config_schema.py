"""The keys of `<mirror>.toml`: types, defaults, units, ranges.

Owns: what each key on its own may be, and the table `KEYS` that the documentation and the error
report are held against. Must never: read a file, or judge keys against each other.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field

from nbdmirror.config_arbiters import AzureBlobSection, EtcdSection, S3Section
from nbdmirror.config_cluster import (
    LIST_MAX,
    ApplicationSection,
    CheckerSection,
    ControllerSection,
    MountSection,
    PingSection,
    ProbeSection,
    VirtualAddressSection,
)
from nbdmirror.config_fields import (
    NAME,
    NAME_CHARS_MAX,
    AbsolutePath,
    Address,
    AnyAddress,
    PeerAddress,
    Section,
    Size,
    SocketPath,
    count_field,
    format_size,
    key_field,
    parse_size,
    size_field,
)
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.limits import (
    ACK_TIMEOUT_MS,
    CHECKERS_MAX,
    EXTENT_BYTES_DEFAULT,
    EXTENT_BYTES_MAX,
    EXTENT_BYTES_MIN,
    FLUSH_BYTES,
    FLUSH_INTERVAL_MS,
    FREEZE_LIMIT_MS,
    GIB,
    KEEP_BYTES,
    KEEP_BYTES_MAX,
    MIB,
    READ_LEASE_MS,
    READ_LEASE_MS_MAX,
    READ_LEASE_MS_MIN,
    REGION_BYTES_DEFAULT,
    REGION_BYTES_MAX,
    REGION_BYTES_MIN,
    RESYNC_CHUNK_BYTES,
    SILENCE_MS,
    SOCKET_PATH_BYTES_MAX,
    TIB,
    VIRTUAL_ADDRESSES_MAX,
)

NODE_ID_MAX: Final = 255
_USER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
THREADS_MAX: Final = 64
CONNECTIONS_MAX: Final = 1024
ACK_TIMEOUT_MS_MAX: Final = 60_000
FLUSH_INTERVAL_MS_MIN: Final = 10
FLUSH_INTERVAL_MS_MAX: Final = 60_000
FLUSH_BYTES_MAX: Final = 4 * GIB
RESYNC_RATE_BYTES_MAX: Final = 1 * TIB
FREEZE_LIMIT_MS_MAX: Final = 3_600_000

ARBITER_CHOICE: Final = """\
it decides who may go on when the two nodes cannot see each other, so it has no default:
  "none"        both may go on alone; a split brain is found when they meet again, and then the
                writes of one side are given up: promise (c) does not hold
  "ping"        the node that still sees the router goes on; not safe when both see it
  "etcd"        safe in every partition; needs an etcd
  "s3"          as etcd, with one object of a bucket that has conditional writes
  "azure-blob"  as etcd, with one blob of a storage account"""
ARBITERS: Final = tuple(kind.word for kind in ArbiterKind)


def _arbiter(value: object) -> str:
    if value not in ARBITERS:
        raise ValueError(ARBITER_CHOICE)
    return str(value)


def _mirror(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError("not a name")
    return value


def _power_of_two(value: object) -> int:
    size = parse_size(value)
    if size <= 0 or size & (size - 1):
        raise ValueError("not a power of two")
    return size


_PowerOfTwo = Annotated[int, BeforeValidator(_power_of_two)]


def _rate(value: object) -> int:
    rate = parse_size(value)
    if 0 < rate < RESYNC_CHUNK_BYTES:
        raise ValueError("slower than one resync block a second")
    return rate


def _user(value: object) -> str:
    if not isinstance(value, str) or not (value == "" or _USER.fullmatch(value)):
        raise ValueError("not a name")
    if value == "root":
        raise ValueError('is no user without rights; where root starts the engine, "" is root')
    return value


class NodeSection(Section):
    """`[node.<name>]`"""

    id: int = count_field(..., 1, NODE_ID_MAX, "number", "tells the two nodes apart on disk")
    address: PeerAddress = key_field(
        ..., "address", "IP:port or [IPv6]:port", "where this node takes the peer channel"
    )
    heartbeats: list[PeerAddress] = key_field(
        [],
        "list",
        f"up to {LIST_MAX} of IP:port or [IPv6]:port",
        "where this node takes heartbeats (UDP), one for each network, in the same order on both "
        "nodes; default: the address of the peer channel",
    )
    probe: AnyAddress | None = key_field(
        None, "address", "IP:port or [IPv6]:port", "overrides probe.address on this node"
    )
    data_dir: AbsolutePath | None = key_field(
        None, "path", "an absolute path", "overrides paths.data_dir on this node"
    )
    run_dir: AbsolutePath | None = key_field(
        None, "path", "an absolute path", "overrides paths.run_dir on this node"
    )


class DeviceSection(Section):
    """`[device]`: fixed at creation; both nodes must have the same."""

    extent: _PowerOfTwo = size_field(
        EXTENT_BYTES_DEFAULT,
        EXTENT_BYTES_MIN,
        EXTENT_BYTES_MAX,
        ", a power of two",
        "the unit of the dirty map",
    )
    region: _PowerOfTwo = size_field(
        REGION_BYTES_DEFAULT,
        REGION_BYTES_MIN,
        REGION_BYTES_MAX,
        ", a power of two",
        "the unit of the write-intent log",
    )


class EngineSection(Section):
    """`[engine]`"""

    threads: int = count_field(
        0,
        0,
        THREADS_MAX,
        "count",
        "nbdkit's threads for each connection; 0: 4, or 1 where this nbdkit is older than 1.34.0",
    )
    connections_max: int = count_field(32, 1, CONNECTIONS_MAX, "count", "NBD clients at once")
    ack_timeout_ms: int = count_field(
        ACK_TIMEOUT_MS,
        SILENCE_MS,
        ACK_TIMEOUT_MS_MAX,
        "ms",
        "a write that the peer has not acknowledged after this freezes",
    )
    flush_interval_ms: int = count_field(
        FLUSH_INTERVAL_MS,
        FLUSH_INTERVAL_MS_MIN,
        FLUSH_INTERVAL_MS_MAX,
        "ms",
        "how often both nodes flush in the background",
    )
    flush_bytes: Size = size_field(
        FLUSH_BYTES, MIB, FLUSH_BYTES_MAX, "", "written bytes after which both flush earlier"
    )
    resync_rate: Annotated[int, BeforeValidator(_rate)] = size_field(
        0,
        0,
        RESYNC_RATE_BYTES_MAX,
        f"; 0 is unlimited, else at least {format_size(RESYNC_CHUNK_BYTES)}",
        "most bytes per second that a resync copies",
    )
    keep_bytes: Size = size_field(
        KEEP_BYTES,
        0,
        KEEP_BYTES_MAX,
        "; 0 keeps nothing",
        "most that is kept of a copy that is given up after a split brain",
    )
    freeze_limit_ms: int = count_field(
        FREEZE_LIMIT_MS,
        SILENCE_MS,
        FREEZE_LIMIT_MS_MAX,
        "ms",
        "how long writes stay frozen for an answer; not below ack_timeout_ms",
    )
    read_lease_ms: int = count_field(
        READ_LEASE_MS,
        READ_LEASE_MS_MIN,
        READ_LEASE_MS_MAX,
        "ms",
        "with an arbiter that has a memory: how long after an echo of its peer a primary answers "
        "reads; with a margin shorter than controller.silence_ms",
    )
    reads: Literal["lease", "confirm"] = key_field(
        "lease",
        "word",
        '"lease" or "confirm"',
        "with an arbiter that has a memory: by a lease, or (where a hypervisor may stop this "
        "machine's clock) each after an echo of its own",
    )
    integrity: Literal["crc", "mac"] = key_field(
        "crc",
        "word",
        '"crc" or "mac"',
        "what every frame between the nodes carries: a check, or a keyed code besides, which an "
        "attacker on the connection cannot make; if one node says mac, both use it",
    )
    tls: Literal["off", "on"] = key_field(
        "off",
        "word",
        '"off" or "on"',
        "on: the channel between the nodes is encrypted (TLS 1.3), so that nobody on the way reads "
        "or changes what they send; both nodes must have the same",
    )
    tls_certificate: AbsolutePath | None = key_field(
        None,
        "path",
        "an absolute path",
        "certificate (PEM) of this node, with those between it and tls_ca; with tls_key; default: "
        "one that the node makes for itself",
    )
    tls_key: AbsolutePath | None = key_field(
        None, "path", "an absolute path", "key (PEM) of tls_certificate"
    )
    tls_ca: AbsolutePath | None = key_field(
        None,
        "path",
        "an absolute path",
        "certificates (PEM) by which both nodes judge each other's, besides the mirror's key; "
        "default: the key alone counts",
    )
    on_freeze: Literal["ask", "alone"] = key_field(
        "ask",
        "word",
        '"ask" or "alone"',
        "who answers a freeze: whoever commands the engine, or the engine itself with `alone`",
    )
    user: Annotated[str, BeforeValidator(_user)] = key_field(
        "",
        "name",
        '"", or a user of this host other than root, with a group of its own',
        'whom the engine runs as, without any right; "": who starts it. For this file alone: the '
        "nodes need not have the same",
    )
    lock_memory: bool = key_field(
        default=True,
        unit="yes or no",
        expected="true or false",
        meaning="keep the engine out of swap (mlockall)",
    )


class ExportSection(Section):
    """`[export]`: where NBD clients connect. Plain NBD knows no passwords."""

    unix: SocketPath | None = key_field(
        None,
        "path",
        f"an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes",
        "Unix socket; default nbd.sock in run_dir",
    )
    tcp: AnyAddress | None = key_field(
        None, "address", "IP:port or [IPv6]:port", "TCP socket besides; whoever reaches it writes"
    )


class PathsSection(Section):
    """`[paths]`"""

    data_dir: AbsolutePath | None = key_field(
        None,
        "path",
        "an absolute path",
        "holds `data` and `meta`; default /var/lib/nbdmirror/ and the mirror's name",
    )
    run_dir: AbsolutePath | None = key_field(
        None,
        "path",
        "an absolute path",
        "holds the sockets; default /run/nbdmirror/ and the mirror's name",
    )


class ConfigFile(Section):
    """The whole file."""

    mirror: Annotated[str, BeforeValidator(_mirror)] = key_field(
        ...,
        "name",
        f"1 to {NAME_CHARS_MAX} of a-z, 0-9 and -, not beginning with -",
        "the mirror's name",
    )
    key_file: AbsolutePath = key_field(
        ..., "path", "an absolute path", "the key that both nodes share, byte for byte"
    )
    arbiter: Annotated[str, BeforeValidator(_arbiter)] = key_field(
        ...,
        "word",
        ", ".join(f'"{word}"' for word in ARBITERS),
        "what breaks the tie when the nodes cannot see each other",
    )
    takeover: Literal["automatic", "operator"] = key_field(
        "automatic",
        "word",
        '"automatic" or "operator"',
        "operator: a secondary never takes over by itself",
    )
    preferred: str = key_field(
        "none",
        "name",
        '"none", "last", or the name of a node',
        "which node is primary when both could be: whichever is now, the last one, or this one",
    )
    node: dict[str, NodeSection] = key_field(
        ..., "", "exactly two tables [node.<name>]", "the nodes"
    )
    device: DeviceSection = DeviceSection()
    engine: EngineSection = EngineSection()
    export: ExportSection = ExportSection()
    paths: PathsSection = PathsSection()
    ping: PingSection = PingSection()
    etcd: EtcdSection = EtcdSection()
    s3: S3Section = S3Section()
    azure_blob: AzureBlobSection = Field(AzureBlobSection(), alias="azure-blob")
    controller: ControllerSection = ControllerSection()
    probe: ProbeSection = ProbeSection()
    mount: MountSection = MountSection()
    application: ApplicationSection = ApplicationSection()
    virtual_address: list[VirtualAddressSection] = Field([], max_length=VIRTUAL_ADDRESSES_MAX)
    checker: list[CheckerSection] = Field([], max_length=CHECKERS_MAX)


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key as docs/configuration.md lists it. `default` is "required", "none" or the value."""

    key: str
    default: str
    unit: str
    expected: str
    meaning: str


# Tables that may be there several times: `[[name]]`.
LISTS: Final = ("virtual_address", "checker")


def _default_text(default: object, *, required: bool, unit: str) -> str:
    if required:
        return "required"
    if default is None:
        return "none"
    if unit == "size" and isinstance(default, int):
        return f'"{format_size(default)}"'
    if isinstance(default, list):
        return json.dumps(default)
    return f'"{default}"' if isinstance(default, str | Address) else str(default).lower()


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[KeyInfo]:
    for name, info in model.model_fields.items():
        key = f"{prefix}{info.alias or name}"
        section = info.annotation
        if name == "node":
            yield from _keys_of(NodeSection, "node.<name>.")
        elif isinstance(section, type) and issubclass(section, Section):
            yield from _keys_of(section, f"{key}.")
        elif name in LISTS:
            yield from _keys_of(get_args(section)[0], f"{key}.")
        else:
            extra = info.json_schema_extra
            assert isinstance(extra, dict), key
            unit = str(extra["unit"])
            default = _default_text(info.default, required=info.is_required(), unit=unit)
            yield KeyInfo(key, default, unit, str(extra["expected"]), str(info.description))


KEYS: Final[Mapping[str, KeyInfo]] = {info.key: info for info in _keys_of(ConfigFile, "")}
SECTIONS: Final = (
    *("node", "device", "engine", "export", "paths"),
    *("ping", "etcd", "s3", "azure-blob", "controller", "probe", "mount", "application", *LISTS),
)
