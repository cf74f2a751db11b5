"""The keys of `<mirror>.toml` that the controller reads: who decides, what is watched and started.

Owns: what each of these keys on its own may be, and what those of one table must be together. Must
never: read a file, or look at the machine. `config_schema` puts these tables into the file.
"""

import ipaddress
import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from nbdmirror.config_fields import (
    AbsolutePath,
    AnyAddress,
    Section,
    Size,
    count_field,
    key_field,
    parse_address,
    size_field,
)
from nbdmirror.limits import (
    ACTION_WINDOW_H,
    ACTIONS_MAX,
    CHECK_INTERVAL_MS,
    CHECK_INTERVAL_MS_MAX,
    CHECK_INTERVAL_MS_MIN,
    CHECK_TIMEOUT_MS,
    HEARTBEAT_MS,
    HEARTBEAT_MS_MAX,
    HEARTBEAT_MS_MIN,
    PING_TIMEOUT_MS,
    PING_TIMEOUT_MS_MAX,
    PING_TIMEOUT_MS_MIN,
    PROBE_PORT,
    SCRIPT_TIMEOUT_S,
    SCRIPT_TIMEOUT_S_MAX,
    SILENCE_MS,
    SILENCE_MS_MAX,
    TIB,
)

LIST_MAX: Final = 16
WORD_CHARS_MAX: Final = 4096
INTERFACE_CHARS_MAX: Final = 15  # IFNAMSIZ of Linux, without its closing zero
CHECKER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")
_OPTION: Final = re.compile(r"[A-Za-z0-9_.:=/+-]{1,255}")
URL: Final = re.compile(r"https?://[^\s/?#]+[^\s]*")


def _command(value: object) -> list[str]:
    """A program and its arguments; no shell takes them apart."""
    if not isinstance(value, list) or not value or len(value) > LIST_MAX:
        raise ValueError(f"a command is a list of 1 to {LIST_MAX} words")
    if any(not isinstance(each, str) or "\0" in each or not each for each in value):
        raise ValueError("each word of a command is text that is not empty")
    if sum(map(len, value)) > WORD_CHARS_MAX:
        raise ValueError("the command is too long")
    if not value[0].startswith("/"):
        raise ValueError("the program is an absolute path; nothing is searched for")
    return value


def _no_command(value: object) -> list[str]:
    return [] if value == [] else _command(value)


def _matching(pattern: re.Pattern[str], what: str) -> Any:
    def check(value: list[str]) -> list[str]:
        wrong = [each for each in value if not pattern.fullmatch(each)]
        if wrong or len(value) > LIST_MAX or len(set(value)) != len(value):
            raise ValueError(f"up to {LIST_MAX} different {what}")
        return value

    return AfterValidator(check)


def _hosts(value: object) -> list[str]:
    """Numeric IP addresses in their usual spelling."""
    if not isinstance(value, list) or len(value) > LIST_MAX:
        raise ValueError(f"a list of at most {LIST_MAX} addresses")
    try:
        return [str(ipaddress.ip_address(each)) for each in value]
    except ValueError as error:
        raise ValueError("each one is a numeric IP address") from error


def _interface_address(value: object) -> str:
    """Like "10.0.0.100/24": an address with the length of its network's prefix."""
    try:
        made = ipaddress.ip_interface(value) if isinstance(value, str) and "/" in value else None
    except ValueError as error:
        raise ValueError("no IP address with a prefix length") from error
    if made is None or made.ip.is_unspecified or made.ip.is_multicast or made.ip.is_loopback:
        raise ValueError("no IP address with a prefix length")
    return str(made)


def _interface(value: object) -> str:
    """As the kernel takes one; it is no path, and no text that steers a terminal."""
    fits = isinstance(value, str) and re.fullmatch(r"[^\s/:]{1,15}", value)
    if not isinstance(value, str) or not fits or value in {".", ".."} or not value.isprintable():
        raise ValueError("not the name of a network interface")
    return value


def _unit(value: object) -> str:
    if not isinstance(value, str) or not UNIT.fullmatch(value):
        raise ValueError("not the name of a unit")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,31}", value):
        raise ValueError("not a word")
    return value


def _checker_name(value: object) -> str:
    if not isinstance(value, str) or not CHECKER_NAME.fullmatch(value):
        raise ValueError("not a name")
    return value


def _url(value: object) -> str:
    if not isinstance(value, str) or not URL.fullmatch(value) or len(value) > WORD_CHARS_MAX:
        raise ValueError("not an address of a page")
    return value


_Command = Annotated[list[str], BeforeValidator(_no_command)]
_Hosts = Annotated[list[str], BeforeValidator(_hosts)]
_Interface = Annotated[str, BeforeValidator(_interface)]
_COMMAND: Final = "a list: the program as an absolute path, then its arguments"


class PingSection(Section):
    """`[ping]`: what the arbiter `ping` asks."""

    addresses: _Hosts = key_field(
        [], "list", f"up to {LIST_MAX} IP addresses", "routers or hosts that answer ICMP echoes"
    )
    timeout_ms: int = count_field(
        PING_TIMEOUT_MS,
        PING_TIMEOUT_MS_MIN,
        PING_TIMEOUT_MS_MAX,
        "ms",
        "silence of all addresses for so long is a no",
    )


class ControllerSection(Section):
    """`[controller]`"""

    heartbeat_ms: int = count_field(
        HEARTBEAT_MS, HEARTBEAT_MS_MIN, HEARTBEAT_MS_MAX, "ms", "how often heartbeats are sent"
    )
    silence_ms: int = count_field(
        SILENCE_MS,
        SILENCE_MS,
        SILENCE_MS_MAX,
        "ms",
        "a peer that is silent for so long on every network is lost; at least 5 heartbeats",
    )
    actions_max: int = count_field(
        ACTIONS_MAX,
        0,
        100,
        "count",
        "automatic actions of checkers within actions_window_h; the next one stops the node. "
        "0: no bound",
    )
    actions_window_h: int = count_field(
        ACTION_WINDOW_H, 1, 24 * 31, "hours", "over how long actions are counted"
    )


class ProbeSection(Section):
    """`[probe]`: the page that a load balancer asks for."""

    address: AnyAddress | None = key_field(
        parse_address(f"0.0.0.0:{PROBE_PORT}"),
        "address",
        "IP:port or [IPv6]:port",
        "where `/ready` is answered; one port for each mirror of a server",
    )


class MountSection(Section):
    """`[mount]`: the device and the file system, while this node is primary."""

    attach: Literal["auto", "kernel", "fuse", "none"] = key_field(
        "auto",
        "word",
        '"auto", "kernel", "fuse" or "none"',
        "how the export becomes a device; auto: the kernel's NBD client, else nbdfuse and a loop "
        "device; nothing is attached without a point",
    )
    point: AbsolutePath | None = key_field(
        None, "path", "an absolute path", "where the file system is mounted"
    )
    type: Annotated[str, BeforeValidator(_word)] = key_field(
        "ext4", "word", "a file system of this kernel", "type for mount"
    )
    options: Annotated[list[str], _matching(_OPTION, "options of mount")] = key_field(
        ["noatime"], "list", "a list of words", "options for mount"
    )


class ApplicationSection(Section):
    """`[application]`: what runs on the primary."""

    start: _Command = key_field(
        [], "list", _COMMAND, "starts the application; returns when it is up"
    )
    stop: _Command = key_field(
        [],
        "list",
        _COMMAND,
        'stops it; called again with the word "force" when it fails or takes too long',
    )
    units: Annotated[list[str], _matching(UNIT, "names of units")] = key_field(
        [], "list", "a list of names", "systemd units, started in this order after `start`"
    )
    start_timeout_s: int = count_field(
        SCRIPT_TIMEOUT_S, 1, SCRIPT_TIMEOUT_S_MAX, "s", "bound of the start, then it has failed"
    )
    stop_timeout_s: int = count_field(
        SCRIPT_TIMEOUT_S, 1, SCRIPT_TIMEOUT_S_MAX, "s", "bound of the graceful stop"
    )
    force_timeout_s: int = count_field(
        60, 1, SCRIPT_TIMEOUT_S_MAX, "s", "bound of the forced stop, then its processes are killed"
    )


class VirtualAddressSection(Section):
    """`[[virtual_address]]`: one address that follows the primary."""

    address: Annotated[str, BeforeValidator(_interface_address)] = key_field(
        ..., "address", "IP/prefix length", "the address and the length of its network's prefix"
    )
    interface: _Interface | None = key_field(
        None,
        "name",
        f"up to {INTERFACE_CHARS_MAX} characters",
        "network interface; default: the one that has an address in the same network",
    )


# Which keys say what a kind of checker looks at; the first of them is required.
CHECKER_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "process": ("pattern", "count_min", "count_max"),
    "unit": ("unit",),
    "tcp": ("address",),
    "http": ("url", "status"),
    "ping": ("hosts",),
    "interface": ("interface",),
    "address": ("held",),
    "filesystem": ("path", "free_min"),
    "command": ("command",),
}


_KINDS: Final = ", ".join(f'"{each}"' for each in CHECKER_KEYS)


class CheckerSection(Section):
    """`[[checker]]`: one thing that is watched, and what is done when it is down."""

    name: Annotated[str, BeforeValidator(_checker_name)] = key_field(
        ..., "name", "1 to 63 of a-z, 0-9, _, . and -", "its name in status and log"
    )
    kind: Literal[
        "process", "unit", "tcp", "http", "ping", "interface", "address", "filesystem", "command"
    ] = key_field(..., "word", _KINDS, "what is watched")
    action: Literal["restart", "stopstart", "swap", "wait", "stop", "tell"] = key_field(
        "restart",
        "word",
        '"restart", "stopstart", "swap", "wait", "stop" or "tell"',
        "what is done when it is down",
    )
    when: Literal["before", "primary", "secondary", "always"] = key_field(
        "primary",
        "word",
        '"before", "primary", "secondary" or "always"',
        "before: what a start of the application waits for; else in which role it is watched",
    )
    interval_ms: int = count_field(
        CHECK_INTERVAL_MS,
        CHECK_INTERVAL_MS_MIN,
        CHECK_INTERVAL_MS_MAX,
        "ms",
        "from one check to the next",
    )
    timeout_ms: int = count_field(
        CHECK_TIMEOUT_MS,
        CHECK_INTERVAL_MS_MIN,
        CHECK_INTERVAL_MS_MAX,
        "ms",
        "a check without an answer after this has failed",
    )
    rise: int = count_field(1, 1, 100, "count", "successes in a row until it is up")
    fall: int = count_field(2, 1, 100, "count", "failures in a row until it is down")
    pattern: str | None = key_field(
        None, "text", "a regular expression", "process: looked for in name and command line"
    )
    count_min: int = count_field(1, 0, 10_000, "count", "process: at least so many")
    count_max: int = count_field(0, 0, 10_000, "count", "process: at most so many; 0: no bound")
    unit: Annotated[str, BeforeValidator(_unit)] | None = key_field(
        None, "name", "a systemd unit", "unit: has to be active"
    )
    address: AnyAddress | None = key_field(
        None, "address", "IP:port or [IPv6]:port", "tcp: has to take a connection"
    )
    url: Annotated[str, BeforeValidator(_url)] | None = key_field(
        None, "text", "http://... or https://...", "http: has to answer with `status`"
    )
    status: int = count_field(200, 100, 599, "code", "http: the expected status")
    hosts: _Hosts = key_field(
        [], "list", f"up to {LIST_MAX} IP addresses", "ping: one of them has to answer"
    )
    interface: _Interface | None = key_field(
        None, "name", "a network interface", "interface: has to be up, with a carrier"
    )
    held: Annotated[str, BeforeValidator(_interface_address)] | None = key_field(
        None, "address", "IP/prefix length", "address: has to be on an interface of this node"
    )
    path: AbsolutePath | None = key_field(
        None, "path", "an absolute path", "filesystem: has to be mounted there, and writable"
    )
    free_min: Size = size_field(0, 0, TIB, "", "filesystem: at least so much free")
    command: _Command = key_field([], "list", _COMMAND, "command: has to end with exit code 0")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        """What a kind needs is there, and nothing that belongs to another kind."""
        own = CHECKER_KEYS[self.kind]
        if not getattr(self, own[0]):
            raise ValueError(f'kind = "{self.kind}" needs the key {own[0]}')
        others = {key for kind, keys in CHECKER_KEYS.items() if kind != self.kind for key in keys}
        strange = sorted((others - set(own)) & self.model_fields_set)
        if strange:
            raise ValueError(f'kind = "{self.kind}" has no key {", ".join(strange)}')
        if self.when == "before" and self.action not in {"wait", "tell"}:
            raise ValueError('when = "before" takes action = "wait" or "tell" alone')
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from error
        return self
