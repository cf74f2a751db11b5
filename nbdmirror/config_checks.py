"""What the controller's keys of a configuration must be together, one line for each mistake.

Owns these rules alone. Looks only at values that are right on their own: the others are told by the
model of the file. Must never: read a file, or raise on a raw value of any shape.
"""

import ipaddress
from collections.abc import Iterator
from typing import Any

from nbdmirror.config_cluster import CHECKER_KEYS, ControllerSection
from nbdmirror.config_fields import NAME_CHARS_MAX, Address, parse_address
from nbdmirror.core.messages import printable
from nbdmirror.limits import READ_LEASE_DRIFT_SHARE, READ_LEASE_MS_MIN

HEARTBEATS_OF_SILENCE = 5


def cluster_problems(raw: dict[str, Any]) -> list[str]:
    """Every mistake that concerns more than one key."""
    return [
        *_heartbeat_problems(raw),
        *_lease_problems(raw),
        *_choice_problems(raw),
        *_twice(raw, "checker", "name"),
        *_twice(raw, "virtual_address", "address"),
        *_address_problems(raw),
        *_mount_problems(raw),
    ]


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _tables(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = raw.get(name)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _nodes(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: each for name, each in _table(raw, "node").items() if isinstance(each, dict)}


def _heartbeat_problems(raw: dict[str, Any]) -> Iterator[str]:
    lists = {name: each.get("heartbeats", []) for name, each in _nodes(raw).items()}
    counts = {name: len(each) for name, each in lists.items() if isinstance(each, list)}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {_shown(name)}" for name, count in counts.items())
        yield f"node: heartbeats: {shown}; expected as many on both nodes, one for each network"
    section = _table(raw, "controller")
    period = _number(section, "heartbeat_ms")
    silence = _number(section, "silence_ms")
    if silence < HEARTBEATS_OF_SILENCE * period:
        yield (
            f"controller.silence_ms = {silence}: shorter than {HEARTBEATS_OF_SILENCE} heartbeats "
            f"of {period} ms; expected at least {HEARTBEATS_OF_SILENCE * period}"
        )


def _lease_problems(raw: dict[str, Any]) -> Iterator[str]:
    """Rule 17: a lease that is over before the silence is costs a take-over nothing.

    It is told without an arbiter that has a memory, too: the key is there, and would count then.
    """
    section = _table(raw, "controller")
    silence, period = _number(section, "silence_ms"), _number(section, "heartbeat_ms")
    share = READ_LEASE_DRIFT_SHARE
    most = max((silence - period) * share // (share + 1), READ_LEASE_MS_MIN)
    lease = _table(raw, "engine").get("read_lease_ms")
    if isinstance(lease, int) and not isinstance(lease, bool) and lease > most:
        yield (
            f"engine.read_lease_ms = {lease}: with a margin of a {share}th and one heartbeat of "
            f"{period} ms longer than controller.silence_ms ({silence}), so that a take-over would "
            f"wait for it; expected at most {most}"
        )


def _number(section: dict[str, Any], key: str) -> int:
    value = section.get(key)
    default = ControllerSection.model_fields[key].default
    assert isinstance(default, int), key
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _choice_problems(raw: dict[str, Any]) -> Iterator[str]:
    preferred = raw.get("preferred", "none")
    names = list(_nodes(raw))
    if isinstance(preferred, str) and names and preferred not in {"none", "last", *names}:
        yield (
            f'preferred = "{_shown(preferred)}": no such node; expected "none", "last" or one of: '
            f"{', '.join(map(_shown, names))}"
        )


def _shown(text: str) -> str:
    """As a line can have it."""
    return printable(text)[:NAME_CHARS_MAX]


def _twice(raw: dict[str, Any], table: str, key: str) -> Iterator[str]:
    seen: set[str] = set()
    for each in _tables(raw, table):
        value = each.get(key)
        if not isinstance(value, str):
            continue
        plain = value.partition("/")[0]
        if plain in seen:
            shown = f'{table}.{key} = "{_shown(value)}"'
            yield f"{shown}: there twice; expected one of its own for each"
        seen.add(plain)


def _address_problems(raw: dict[str, Any]) -> Iterator[str]:
    """No address that is a node's own follows the primary."""
    own: dict[str, str] = {}
    for name, node in _nodes(raw).items():
        beats = node.get("heartbeats", [])
        for each in [node.get("address"), *(beats if isinstance(beats, list) else [])]:
            address = _address(each)
            if address is not None:
                own[address.host] = name
    for each in _tables(raw, "virtual_address"):
        value = each.get("address")
        try:
            host = str(ipaddress.ip_interface(value).ip) if isinstance(value, str) else ""
        except ValueError:
            continue
        if host in own:
            yield (
                f'virtual_address.address = "{_shown(str(value))}": is the own address of node '
                f"{_shown(own[host])}; "
                "expected one that neither node has"
            )
    probe = _address(_table(raw, "probe").get("address"))
    export = _address(_table(raw, "export").get("tcp"))
    if probe is not None and export is not None and probe.port == export.port:
        yield f"probe.address: port {probe.port} is that of export.tcp; expected another one"


def _address(value: object) -> Address | None:
    try:
        return parse_address(value)
    except ValueError:
        return None


def _mount_problems(raw: dict[str, Any]) -> Iterator[str]:
    point = _table(raw, "mount").get("point")
    if _table(raw, "mount").get("attach") == "none" and point:
        yield f'mount.point = "{_shown(str(point))}": nothing is mounted with mount.attach = "none"'
    for each in _tables(raw, "checker"):
        kind = each.get("kind")
        if kind not in CHECKER_KEYS:
            continue
        low, high = each.get("count_min", 1), each.get("count_max", 0)
        if isinstance(low, int) and isinstance(high, int) and 0 < high < low:
            yield f"checker.count_max = {high}: less than count_min ({low})"
