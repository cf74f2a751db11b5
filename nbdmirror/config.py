"""The configuration of one mirror, as one node sees it.

Owns: reading the file (`config_schema` has its keys), what keys must be together, the key file's
checks, and the one report that lists every mistake at once. Must never: use a default for what only
the operator can decide (the arbiter), put the key into a message, or look anything up on the
network: addresses are numbers.
"""

import difflib
import ipaddress
import json
import re
import socket
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from nbdmirror import engine_user
from nbdmirror.config_arbiters import (
    AzureBlobSection,
    EtcdSection,
    S3Section,
    arbiter_problems,
)
from nbdmirror.config_checks import cluster_problems
from nbdmirror.config_cluster import (
    ApplicationSection,
    CheckerSection,
    ControllerSection,
    MountSection,
    PingSection,
    VirtualAddressSection,
)
from nbdmirror.config_fields import (
    NAME_CHARS_MAX,
    NODE_NAME,
    Address,
    format_size,
    parse_address,
    parse_size,
)
from nbdmirror.config_files import (
    TlsFiles,
    arbiter_file_problems,
    file_problems,
    files_of,
    lookup,
    own_certificate,
    path_at,
    socket_problems,
    tls_file_problems,
    tls_problems,
)
from nbdmirror.config_schema import (
    ARBITER_CHOICE,
    KEYS,
    LISTS,
    SECTIONS,
    ConfigFile,
    DeviceSection,
    EngineSection,
)
from nbdmirror.core.messages import printable
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.errors import ConfigError
from nbdmirror.limits import KEY_BYTES_MAX, KEY_BYTES_MIN, MIB
from nbdmirror.secret_files import read_secret

__all__ = ["KEYS", "Address", "Config", "Node", "format_size", "load", "parse_size"]

CONFIG_BYTES_MAX: Final = 1 * MIB
SHOWN_CHARS_MAX: Final = 200
SHOWN_BITS_MAX: Final = 128
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_.-]+")
# pydantic's findings in the words of the file; others have texts of their own.
_WORDS: Final = {
    "model_type": "not a table",
    "dict_type": "not a table",
    "int_type": "not a whole number",
    "bool_type": "neither true nor false",
    "string_type": "not text",
    "literal_error": "none of the words",
    "greater_than_equal": "too small",
    "less_than_equal": "too large",
}


@dataclass(frozen=True, slots=True)
class Node:
    """One of the two nodes, every default filled in."""

    name: str
    id: int
    address: Address
    data_dir: Path
    run_dir: Path
    heartbeats: tuple[Address, ...]
    probe: Address | None


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration. `key` is the shared secret, never shown; b"" if not asked for."""

    source: Path
    mirror: str
    key_file: Path
    key: bytes = field(repr=False)
    arbiter: ArbiterKind
    me: Node
    peer: Node
    device: DeviceSection
    engine: EngineSection
    export_unix: Path
    export_tcp: Address | None
    takeover: str
    preferred: str
    ping: PingSection
    etcd: EtcdSection
    s3: S3Section
    azure_blob: AzureBlobSection
    controller: ControllerSection
    mount: MountSection
    application: ApplicationSection
    virtual_addresses: tuple[VirtualAddressSection, ...]
    checkers: tuple[CheckerSection, ...]
    tls_files: TlsFiles | None = field(default=None, repr=False)
    """What those that TLS needs hold, where they were handed over: see handing.py."""

    @property
    def data_file(self) -> Path:
        """The backing file of this node."""
        return self.me.data_dir / "data"

    @property
    def metadata_file(self) -> Path:
        """The metadata file of this node."""
        return self.me.data_dir / "meta"

    @property
    def tls_certificate(self) -> Path:
        """The certificate of this node."""
        return self.engine.tls_certificate or own_certificate(self.me.data_dir)

    @property
    def tls_key(self) -> Path:
        """Its key; in the same file where this node made both."""
        return self.engine.tls_key or own_certificate(self.me.data_dir)

    @property
    def probe(self) -> Address | None:
        """Where this node answers load balancers."""
        return self.me.probe

    @property
    def control_socket(self) -> Path:
        """Where the engine takes commands."""
        return self.me.run_dir / "engine.sock"

    @property
    def controller_socket(self) -> Path:
        """Where the controller takes commands."""
        return self.me.run_dir / "controller.sock"

    @property
    def switches_file(self) -> Path:
        """What the controller of this node remembers: the operator's switches and its counts."""
        return self.me.data_dir / "controller.json"


def load(path: Path, node: str | None = None, *, with_key: bool = True) -> Config:
    """Read and check a configuration; `node` is the name of this node, by default the host's.

    `with_key=False` leaves the key file alone: a client of the control socket needs no secret.

    Raises:
        ConfigError: its text lists every mistake: key, value, what is expected.
    """
    return of_text(read_text(path), path, node, with_key=with_key)


def of_text(
    text: bytes, path: Path, node: str | None, *, with_key: bool = True, key: bytes = b""
) -> Config:
    """As `load`, of the text of a file. `key`: it was read already, and so was what else is secret.

    Raises:
        ConfigError: as load().
    """
    raw = _parsed_toml(text, path)
    problems: list[str] = []
    parsed: ConfigFile | None = None
    try:
        parsed = ConfigFile.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(dict(item), raw) for item in error.errors()]
    problems += _node_problems(raw)
    problems += _cross_problems(raw)
    problems += cluster_problems(raw)
    problems += arbiter_problems(raw)
    problems += tls_problems(raw)
    name = _my_name(raw, node, problems)
    problems += file_problems(raw, path)
    look = with_key and not key
    if look:
        problems += socket_problems(raw, name)
        problems += arbiter_file_problems(raw)
        problems += tls_file_problems(raw)
        problems += engine_user.problems(raw, name)
    key_file = path_at(raw, "key_file")
    if look and key_file is not None:
        try:
            key = _read_key(key_file)
        except ConfigError as error:
            problems.append(str(error))
    if problems or parsed is None:
        problems = [printable(problem) for problem in problems]  # paths hold what they like
        lines = "\n".join(f"- {problem}" for problem in problems)
        count = len(problems)
        head = f"{path}: {count} mistake{'s' if count > 1 else ''}"
        raise ConfigError(f"{head}\n{lines}", problems)
    return _build(path, parsed, name, key)


def running_controller(path: Path, node: str | None = None) -> Path | None:
    """Where the controller of a mirror listens whose file has mistakes by now; None if nowhere.

    It runs with what it read before, and an operator has to reach it all the same.
    """
    try:
        raw = _read_toml(path)
    except ConfigError:
        raw = {}
    raw.setdefault("mirror", path.stem)
    socket_path = files_of(raw, _my_name(raw, node, []))["controller.sock in run_dir"]
    return socket_path if socket_path.is_socket() else None


def _build(path: Path, parsed: ConfigFile, name: str, key: bytes) -> Config:
    nodes = {each: _node(parsed, each) for each in parsed.node}
    me = nodes.pop(name)
    (peer,) = nodes.values()
    return Config(
        source=path,
        mirror=parsed.mirror,
        key_file=parsed.key_file,
        key=key,
        arbiter=ArbiterKind.of_word(parsed.arbiter),
        me=me,
        peer=peer,
        device=parsed.device,
        engine=parsed.engine,
        export_unix=parsed.export.unix or me.run_dir / "nbd.sock",
        export_tcp=parsed.export.tcp,
        takeover=parsed.takeover,
        preferred=parsed.preferred,
        ping=parsed.ping,
        etcd=parsed.etcd,
        s3=parsed.s3,
        azure_blob=parsed.azure_blob,
        controller=parsed.controller,
        mount=parsed.mount,
        application=parsed.application,
        virtual_addresses=tuple(parsed.virtual_address),
        checkers=tuple(parsed.checker),
    )


def _node(parsed: ConfigFile, name: str) -> Node:
    section, paths = parsed.node[name], parsed.paths
    data_dir = section.data_dir or paths.data_dir or Path("/var/lib/nbdmirror", parsed.mirror)
    run_dir = section.run_dir or paths.run_dir or Path("/run/nbdmirror", parsed.mirror)
    heartbeats = tuple(section.heartbeats) or (section.address,)
    probe = section.probe or parsed.probe.address
    return Node(name, section.id, section.address, data_dir, run_dir, heartbeats, probe)


def user_now(config: Config) -> str:
    """`engine.user` as the file has it by now; as it was read where it cannot be read any more."""
    try:
        value = lookup(_read_toml(config.source), ("engine", "user"))
    except ConfigError:
        return config.engine.user
    return value if isinstance(value, str) else ""


def read_text(path: Path) -> bytes:
    """A file of a configuration. Raises ConfigError: it cannot be read, or is too large."""
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: more than {CONFIG_BYTES_MAX} bytes; this is another file")
    return text


def _read_toml(path: Path) -> dict[str, Any]:
    return _parsed_toml(read_text(path), path)


def _parsed_toml(text: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode("utf-8"))
    except ValueError as error:  # TOMLDecodeError says line and column
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: lists or tables nested too deep; none needs three") from error


def _read_key(path: Path) -> bytes:
    """The shared key. Raises ConfigError; its text never holds a byte of it."""
    remedy = (
        "make it once with `head -c 32 /dev/urandom` under umask 077, and copy it to the other node"
    )
    try:
        return read_secret(path, KEY_BYTES_MIN, KEY_BYTES_MAX, remedy)
    except ConfigError as error:
        raise ConfigError(f"key_file = {_toml(str(path))}: {error}") from error


def _toml(value: object) -> str:
    """A value as the file has it, bounded, and without what could steer a terminal."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > SHOWN_BITS_MAX:
        return "a very long number"  # Python refuses to write one of more than 4300 digits
    if isinstance(value, str | bool | int | float):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)  # date and time
    text = printable(text)
    return text if len(text) <= SHOWN_CHARS_MAX else f"{text[:SHOWN_CHARS_MAX]}..."


def _dotted(steps: Iterable[object]) -> str:
    """A key as the file has it; what is not bare stands in quotes."""
    return ".".join(
        step if _BARE_KEY.fullmatch(step) and len(step) <= SHOWN_CHARS_MAX else _toml(step)
        for step in map(str, steps)
    )


def _generic(location: tuple[str | int, ...]) -> str:
    """The name in KEYS of what was found at a place of the file."""
    if location[0] == "node" and len(location) > 1:
        location = (location[0], "<name>", *location[2:])
    elif location[0] in LISTS and len(location) > 1:
        location = (location[0], *location[2:])
    # What is wrong inside of a list is the list's matter.
    return ".".join(step for step in location if isinstance(step, str))


def _problem(error: dict[str, Any], raw: dict[str, Any]) -> str:
    """One line of the report from one of pydantic's findings."""
    location = tuple(error["loc"])
    key, shown = _generic(location), _dotted(location)
    info = KEYS.get(key)
    if error["type"] == "extra_forbidden":
        parent = key.rpartition(".")[0]
        known = [k for k in (*KEYS, *SECTIONS) if k.rpartition(".")[0] == parent]
        near = difflib.get_close_matches(key, known, n=1)
        hint = (
            f"did you mean {near[0].rpartition('.')[2]}?"
            if near
            else f"known here: {', '.join(known)}"
        )
        return f"{shown}: unknown key; {hint}"
    if error["type"] == "missing":
        if key == "arbiter":
            return f"arbiter: is not set; {ARBITER_CHOICE}"
        expected = info.expected if info else "exactly two tables [node.<name>]"
        return f"{shown}: is not set; expected {expected}"
    why = _WORDS.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ")
    value = f"{shown} = {_toml(lookup(raw, location))}"
    if info is None:
        if error["type"] == "value_error":  # the model's own sentence says what is expected
            return f"{shown}: {why}"
        return f"{value}: {why}; expected a table [{shown}]"
    return f"{value}: {why}; expected {info.expected}"


def _node_problems(raw: dict[str, Any]) -> list[str]:
    """What the two tables [node.*] must be together; each on its own is the model's matter."""
    nodes = raw.get("node")
    if not isinstance(nodes, dict):
        return []  # the model says so
    problems = [
        f"node.{_dotted([name])}: not a node's name; "
        f"expected 1 to {NAME_CHARS_MAX} of a-z, 0-9, . and -"
        for name in nodes
        if not NODE_NAME.fullmatch(name)
    ]
    if len(nodes) != 2:
        names = _names(nodes)
        problems.append(f"node: {len(nodes)} tables ({names}); expected exactly two [node.<name>]")
        return problems
    first, second = nodes.values()
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return problems
    for key in ("id", "address"):
        values = [each.get(key) for each in (first, second)]
        if values[0] is not None and _same(*values):
            shown = _toml(values[0])
            if values[0] != values[1]:
                shown += f" (as {_toml(values[1])}, too)"
            problems.append(f"node: both have {key} = {shown}; expected one of its own for each")
    return problems


def _same(one: object, other: object) -> bool:
    """Whether two values mean the same: an address has many spellings."""
    try:
        addresses = [parse_address(each) for each in (one, other)]
    except ValueError:
        return one == other
    ips = [ipaddress.ip_address(each.host) for each in addresses]
    plain = [getattr(ip, "ipv4_mapped", None) or ip for ip in ips]
    return addresses[0].port == addresses[1].port and plain[0] == plain[1]


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(_dotted([name]) for name in nodes) or "none"


def _cross_problems(raw: dict[str, Any]) -> list[str]:
    """What other keys must be together. Looks only at values that are right on their own."""
    problems = []
    limit, ack = (_engine_ms(raw, key) for key in ("freeze_limit_ms", "ack_timeout_ms"))
    if limit < ack:
        problems.append(
            f"engine.freeze_limit_ms = {limit}: a freeze would end before it begins; "
            f"expected at least ack_timeout_ms ({ack})"
        )
    tcp = _port(raw, "export", "tcp")
    nodes = raw.get("node")
    problems += [
        f"export.tcp = {_toml(lookup(raw, ('export', 'tcp')))}: the port is that of "
        f"node.{_dotted([name])}.address; expected another port"
        for name in (nodes if isinstance(nodes, dict) else ())
        if tcp and tcp == _port(raw, "node", name, "address")
    ]
    return problems


def _engine_ms(raw: dict[str, Any], key: str) -> int:
    value = lookup(raw, ("engine", key))
    default = EngineSection.model_fields[key].default
    assert isinstance(default, int), key
    return value if isinstance(value, int) else default


def _port(raw: dict[str, Any], *location: str) -> int:
    """The port of the address at `location`, 0 if there is no right one."""
    try:
        return parse_address(lookup(raw, location)).port
    except ValueError:
        return 0


def _my_name(raw: dict[str, Any], node: str | None, problems: list[str]) -> str:
    """The table of this node; adds to `problems` when there is none."""
    nodes = raw.get("node")
    if not isinstance(nodes, dict):
        return ""  # the model says so
    host = socket.gethostname().lower()
    wanted = [node] if node is not None else [host, host.partition(".")[0]]
    for name in wanted:
        if name in nodes:
            return name
    how = "asked for" if node is not None else "the name of this host"
    problems.append(
        f"node: no table [node.{_dotted(wanted[:1])}] ({how}); there are: {_names(nodes)}; "
        "name this node with --node"
    )
    return ""
