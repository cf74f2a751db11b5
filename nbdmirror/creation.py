"""Making the files of a new mirror on one server: configuration, key, data and metadata.

Owns the text of a first configuration, the choice of ports that no other mirror of this server has,
and the writing of all files or none. Must never: overwrite a file, leave a part behind when a later
step fails, choose the arbiter, or put the key into a text.
"""

import contextlib
import errno
import ipaddress
import os
import secrets
import socket
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from nbdmirror import admin
from nbdmirror.config import CONFIG_BYTES_MAX, Config, load
from nbdmirror.config_fields import (
    NAME,
    NODE_NAME,
    Address,
    format_size,
    parse_address,
    parse_peer_address,
)
from nbdmirror.config_schema import ARBITER_CHOICE, ARBITERS
from nbdmirror.config_text import header, toml, with_key
from nbdmirror.core.superblock import Superblock
from nbdmirror.errors import ConfigError, RefusedError
from nbdmirror.file_system import MAKE_FILE_SYSTEM, make_file_system
from nbdmirror.files import path_error, sync_directory, write_new
from nbdmirror.limits import PROBE_PORT
from nbdmirror.token_exchange import Offer

__all__ = [
    "ARBITERS",
    "ARBITER_CHOICE",
    "MAKE_FILE_SYSTEM",
    "PEER_PORT",
    "Made",
    "Place",
    "Plan",
    "make",
    "take",
]

PEER_PORT: Final = 7789
PORT_MAX: Final = 65_535
PORTS_TRIED: Final = 1000
KEY_BYTES: Final = 32
CONFIG_MODE: Final = 0o644
KEY_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o755
CONFIGURATIONS_MAX: Final = 256
LISTS_OF_STORES: Final = frozenset({"endpoints"})
_ARBITER_NOTES: Final = {
    "none": "both may go on alone; a split brain is found when they meet again",
    "ping": "the node that still sees one of the addresses of [ping] goes on",
    "etcd": "the one that an etcd lets, by a compare-and-swap",
    "s3": "the one that an object of a bucket lets, by a conditional write",
    "azure-blob": "the one that a blob lets, by a conditional write",
}
# Those whose tables `render` can write.


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every choice of an operator about a new mirror. Sizes in bytes; None: not wanted.

    `size_bytes`: None only with `adopt`. `heartbeats`: pairs (of this node, of the peer) for
    further networks. `data_dir`, `run_dir`: for both nodes. `store`: keys and values of the table
    that an arbiter with a memory has. `replace_record`: see admin.create. `engine_user`: "" is who
    starts the engine.
    """

    mirror: str
    node: str
    address: Address
    peer: str
    peer_address: Address
    arbiter: str
    ping_addresses: tuple[str, ...] = ()
    store: tuple[tuple[str, str], ...] = ()
    replace_record: bool = False
    size_bytes: int | None
    mount_point: str | None = None
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    virtual_addresses: tuple[str, ...] = ()
    probe_port: int = PROBE_PORT
    heartbeats: tuple[tuple[Address, Address], ...] = ()
    data_dir: Path | None = None
    run_dir: Path | None = None
    engine_user: str = ""
    sparse: bool = False
    adopt: bool = False
    file_system: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of this server go, and whose they are; None is what the file says."""

    config_dir: Path
    data_dir: Path | None = None
    run_dir: Path | None = None
    engine_user: str | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What is there now."""

    config: Config
    superblock: Superblock


# --- names, addresses, ports ---------------------------------------------------------------------


def require_names(mirror: str, *nodes: str) -> None:
    """Raises ConfigError if one is no name."""
    if not NAME.fullmatch(mirror):
        raise ConfigError(
            f"{mirror!r} is no name of a mirror: expected up to 63 of a-z, 0-9 and -, not "
            "beginning with -"
        )
    for node in nodes:
        if not NODE_NAME.fullmatch(node):
            raise ConfigError(
                f"{node!r} is no name of a node: expected up to 63 of a-z, 0-9, . and -"
            )


def endpoint(text: str) -> tuple[str, int | None]:
    """Host and port of "10.1.0.1", "10.1.0.1:7789", "fd00::1" or "[fd00::1]:7789".

    Raises:
        ConfigError: it is none of these.
    """
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))), None
    except ValueError:
        pass
    try:
        address = parse_address(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r}: {error}; expected a numeric address like 10.1.0.1:{PEER_PORT}"
        ) from error
    return address.host, address.port


@dataclass(frozen=True, slots=True)
class Taken:
    """What the other mirrors of this server use: probe ports and peer addresses, each with whom."""

    probe_ports: dict[int, str]
    peers: dict[Address, str]


def taken(config_dir: Path, mirror: str) -> Taken:
    """Read the other configurations; one that cannot be read has no ports."""
    probes: dict[int, str] = {}
    peers: dict[Address, str] = {}
    for path, raw in _configurations(config_dir):
        if path.stem == mirror:
            continue
        probe = _table(raw, "probe").get("address", f"0.0.0.0:{PROBE_PORT}")
        with contextlib.suppress(ValueError):
            probes[parse_address(probe).port] = str(path)
        for node in _table(raw, "node").values():
            values = [node.get("address"), *node.get("heartbeats", [])]
            for value in values:
                with contextlib.suppress(ValueError):
                    peers[parse_address(value)] = str(path)
    return Taken(probes, peers)


def _configurations(config_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(config_dir.glob("*.toml"))[:CONFIGURATIONS_MAX]:
        try:
            with path.open("rb") as file:
                raw = tomllib.loads(file.read(CONFIG_BYTES_MAX).decode("utf-8"))
        except (OSError, ValueError):
            continue
        nodes = raw.get("node")
        if isinstance(nodes, dict):  # of a shape that can be looked through
            raw["node"] = {
                name: {**each, "heartbeats": list(_list(each.get("heartbeats")))}
                for name, each in nodes.items()
                if isinstance(each, dict)
            }
        yield path, raw


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def why_taken(port: int, ports: dict[int, str]) -> str:
    """Who has the probe port on this server, "" if nobody has."""
    if port in ports:
        return f"is that of {ports[port]}"
    return "" if _can_listen("0.0.0.0", port) else "is taken by another program of this server"  # noqa: S104 - the probe's default, tried and closed


def _can_listen(host: str, port: int) -> bool:
    """Whether a program could listen there now. An address of another server says nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))  # fails beside a listener; bound alone it is in nobody's way
        except OSError as error:
            return error.errno not in {errno.EADDRINUSE, errno.EACCES}
    return True


def free_probe_port(others: Taken, first: int = PROBE_PORT) -> int:
    """The first probe port from `first` on that nobody has. Raises ConfigError: none near."""
    for port in range(first, min(first + PORTS_TRIED, PORT_MAX + 1)):
        if not why_taken(port, others.probe_ports):
            return port
    raise ConfigError(f"no free port from {first} on: name one with `--probe-port`")


def require_probe_port(port: int, others: Taken) -> None:
    """Raises RefusedError with the next free one if somebody has it."""
    if why := why_taken(port, others.probe_ports):
        raise RefusedError(
            f"port {port} of the probe {why}; each mirror has one of its own: "
            f"the next free one is {free_probe_port(others, port + 1)} (`--probe-port`)"
        )


def free_peer_port(hosts: Sequence[str], others: Taken) -> int:
    """The first port from 7789 on that no other mirror has at these hosts, nor a program here."""
    for port in range(PEER_PORT, PEER_PORT + PORTS_TRIED):
        known = any(Address(host, port) in others.peers for host in hosts)
        if not known and all(_can_listen(host, port) for host in hosts):
            return port
    raise ConfigError(f"no free port from {PEER_PORT} on: name one with `--address IP:port`")


def require_peer_addresses(addresses: Sequence[Address], others: Taken) -> None:
    """Raises RefusedError if another mirror has one of them, ConfigError if it is none."""
    for address in addresses:
        try:
            parse_peer_address(str(address))
        except ValueError as error:
            raise ConfigError(f"{address}: {error}; expected an address of one node") from error
        if address in others.peers:
            hosts = [each.host for each in addresses]
            raise RefusedError(
                f"{address} is that of {others.peers[address]}; each mirror has a port of its own "
                f"there: the next free one is {free_peer_port(hosts, others)}"
            )


def on_this_machine(address: Address) -> bool:
    """Whether the host part is an address of this machine. No port is used."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((address.host, 0))
        except OSError:
            return False
    return True


# --- the text of a configuration -----------------------------------------------------------------


def key_file(config_dir: Path, mirror: str) -> Path:
    """Where the key lies."""
    return config_dir.absolute() / f"{mirror}.key"


def render(plan: Plan, config_dir: Path) -> str:
    """The configuration file, the same on both nodes, every choice with a word of explanation."""
    note = _ARBITER_NOTES.get(plan.arbiter, "")
    size = "of the adopted file" if plan.size_bytes is None else format_size(plan.size_bytes)
    lines = [
        f"# The mirror {plan.mirror}: one block device on two servers.",
        "# This file is the same on both nodes. Each finds its own table by the name of its host,",
        "# or by --node. `nbdmirror config check` finds mistakes, `config show` every default.",
        f"# The size of the device, {size}, is fixed at creation and lies in the metadata.",
        "",
        f"mirror = {toml(plan.mirror)}",
        f"key_file = {toml(str(key_file(config_dir, plan.mirror)))}   # the secret of both nodes",
        "",
        "# Who may go on when the two nodes cannot see each other:",
        f"# {note}.",
        f"arbiter = {toml(plan.arbiter)}",
    ]
    if plan.ping_addresses:
        lines += ["", "[ping]", f"addresses = {toml(plan.ping_addresses)}"]
    if plan.store:
        lines += ["", "# Its secrets are files, on both nodes.", f"[{plan.arbiter}]"]
        lines += _store(plan.store)
    first = (plan.address, *(mine for mine, _ in plan.heartbeats))
    second = (plan.peer_address, *(theirs for _, theirs in plan.heartbeats))
    lines += _node(plan.node, 1, first)
    lines += _node(plan.peer, 2, second)
    lines += _directories(plan)
    if plan.engine_user:
        lines += [
            "",
            "# Whom the engine runs as, without any right; each node may have another one here.",
            "[engine]",
            f"user = {toml(plan.engine_user)}",
        ]
    lines += [
        "",
        "# A load balancer asks http://NODE:PORT/ready; each mirror of a server has its own port.",
        "[probe]",
        f"address = {toml(f'0.0.0.0:{plan.probe_port}')}",
    ]
    if plan.mount_point is not None:
        lines += [
            "",
            "# Where the file system is mounted, on the primary alone.",
            "[mount]",
            f"point = {toml(plan.mount_point)}",
        ]
        lines += [f"type = {toml(plan.file_system)}"] if plan.file_system else []
    if plan.start or plan.stop:
        lines += [
            "",
            "# What runs on the primary; no shell takes the words apart.",
            "[application]",
        ]
        lines += [f"start = {toml(plan.start)}"] if plan.start else []
        lines += [f"stop = {toml(plan.stop)}"] if plan.stop else []
    for address in plan.virtual_addresses:
        lines += ["", "# Follows the primary.", "[[virtual_address]]", f"address = {toml(address)}"]
    return "\n".join(lines) + "\n"


def _store(given: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of the arbiter's table; a key that is there more than once has a list."""
    values: dict[str, list[str]] = {}
    for key, value in given:
        values.setdefault(key, []).append(value)
    return [f"{key} = {_store_value(key, each)}" for key, each in values.items()]


def _store_value(key: str, values: list[str]) -> str:
    if key in LISTS_OF_STORES or len(values) > 1:
        return toml(tuple(values))
    return values[0] if values[0].isdecimal() else toml(values[0])


def _node(name: str, number: int, addresses: Sequence[Address]) -> list[str]:
    lines = ["", header(name), f"id = {number}", f"address = {toml(str(addresses[0]))}"]
    if len(addresses) > 1:
        lines.append("# One for each network, in the same order on both nodes.")
        lines.append(f"heartbeats = {toml([str(each) for each in addresses])}")
    return lines


def _directories(plan: Plan) -> list[str]:
    given = (("data_dir", plan.data_dir), ("run_dir", plan.run_dir))
    lines = [f"{key} = {toml(str(path.absolute()))}" for key, path in given if path is not None]
    return ["", "[paths]", *lines] if lines else []


# --- all files or none ---------------------------------------------------------------------------


def make(plan: Plan, place: Place) -> Made:
    """The first server: a new key, the configuration, the files of the device; or nothing.

    Raises:
        RefusedError: something that would have to be overwritten is there.
        ConfigError: a choice that does not fit; every mistake is listed.
        StoreError: the system refuses; OutOfSpaceError when there is no room.
    """
    text = render(plan, place.config_dir)

    def metadata(config: Config) -> Superblock:
        return admin.create(
            config,
            plan.size_bytes,
            join=False,
            adopt=plan.adopt,
            sparse=plan.sparse,
            fill=partial(make_file_system, plan.file_system) if plan.file_system else None,
            replace_record=plan.replace_record,
        )

    return _all_or_nothing(
        place.config_dir, plan.mirror, (text, secrets.token_bytes(KEY_BYTES), plan.node), metadata
    )


def take(given: Offer, place: Place, node: str | None) -> Made:
    """The second server: the same configuration and key, and a blank copy; or nothing.

    `node`: be this one of the two; None: the one that is not the inviter.

    Raises:
        RefusedError: something that would have to be overwritten is there, or a port is taken.
        ConfigError, StoreError: as make().
    """
    require_names(given.mirror)
    me = _other_node(given, node)
    text = given.configuration
    own_key = str(key_file(place.config_dir, given.mirror))
    if _raw(given).get("key_file") != own_key:
        text = with_key(text, (), "key_file", own_key)
    for key, path in (("data_dir", place.data_dir), ("run_dir", place.run_dir)):
        if path is not None:
            text = with_key(text, ("node", me), key, str(path.absolute()))
    if place.engine_user is not None:
        text = with_key(text, ("engine",), "user", place.engine_user)

    def metadata(config: Config) -> Superblock:
        _require_ports(config, taken(place.config_dir, given.mirror))
        return admin.create(config, given.size_bytes, join=True, adopt=False, sparse=given.sparse)

    return _all_or_nothing(
        place.config_dir, given.mirror, (text, bytes.fromhex(given.key), me), metadata
    )


def _raw(given: Offer) -> dict[str, Any]:
    try:
        return tomllib.loads(given.configuration)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration of {given.inviter} is not valid TOML") from error


def _other_node(given: Offer, node: str | None) -> str:
    nodes = _table(_raw(given), "node")
    others = [name for name in nodes if name != given.inviter]
    if len(nodes) != 2 or len(others) != 1:
        raise ConfigError(f"the configuration of {given.inviter} does not have it and one other")
    if node is not None and node != others[0]:
        raise RefusedError(
            f"node {node} is not free: {given.inviter} invites, so this server is {others[0]}"
        )
    return others[0]


def _require_ports(config: Config, others: Taken) -> None:
    """Ports that are free on the first server may be taken on the second one."""
    if config.probe is not None and config.probe.port in others.probe_ports:
        raise RefusedError(
            f"port {config.probe.port} of the probe is that of "
            f"{others.probe_ports[config.probe.port]} on this server; write another one into "
            "[probe] of the first server, free on both (here: "
            f"{free_probe_port(others, config.probe.port + 1)}), and make a new token there with "
            "`nbdmirror invite`"
        )
    require_peer_addresses([config.me.address], others)


def _all_or_nothing(
    config_dir: Path,
    mirror: str,
    content: tuple[str, bytes, str],
    metadata: Callable[[Config], Superblock],
) -> Made:
    text, key, node = content
    config_file = config_dir.absolute() / f"{mirror}.toml"
    secret = key_file(config_dir, mirror)
    for path in (config_file, secret):
        if os.path.lexists(path):
            raise RefusedError(
                f"{path} exists and is not overwritten: there is a mirror {mirror} here already "
                "(`nbdmirror config show`), or a rest of one; move the file away or take another "
                "name"
            )
    undo: list[Callable[[], None]] = []
    try:
        _make_directory(config_dir.absolute(), undo)
        write_new(secret, key, KEY_MODE, undo)
        write_new(config_file, _encoded(text), CONFIG_MODE, undo)
        config = load(config_file, node)
        return Made(config, metadata(config))
    except BaseException as error:
        for step in reversed(undo):
            with contextlib.suppress(OSError):  # the first error is the one to tell
                step()
        if isinstance(error, ConfigError):
            raise ConfigError(f"nothing was made. {error}", error.mistakes) from error
        raise


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("a value is no UTF-8 text; a configuration holds nothing else") from error


def _make_directory(directory: Path, undo: list[Callable[[], None]]) -> None:
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        for each in reversed(missing):
            each.mkdir(mode=DIRECTORY_MODE)
            undo.append(each.rmdir)
            sync_directory(each.parent)
    except OSError as error:
        raise path_error(error, f"make {directory}", "run this as root") from error
