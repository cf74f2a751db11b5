"""`nbdmirror config`: check and show a configuration."""

import json
import re
from pathlib import Path
from typing import Any, Final

import click

from nbdmirror.config import KEYS, Address, Config, format_size
from nbdmirror.core.cluster.promise import no_promise_c
from nbdmirror.errors import ConfigError
from nbdmirror_cli.options import Source, config_options, error_facts, json_option, print_json
from nbdmirror_cli.tls import certificate_remark
from nbdmirror_cli.view import print_table


@click.group("config")
def config_group() -> None:
    """Check and show the configuration of a mirror."""


@config_group.command("check")
@config_options
@json_option
@click.pass_context
def check(context: click.Context, source: Source, *, as_json: bool) -> None:
    """Check the configuration and the key file; list every mistake at once.

    Nothing is changed and nothing is asked of the network. Exit code 11 when there are mistakes.
    """
    try:
        config = source.load(with_key=True)
    except ConfigError as error:
        if not as_json:
            raise
        print_json(
            {
                "path": str(source.path),
                "mistakes": list(error.mistakes or [str(error)]),
                "remarks": [],
                **error_facts("ConfigError", str(error), error.exit_code),
            }
        )
        context.exit(error.exit_code)
    remarks = [no_promise_c(config.arbiter.word), *certificate_remark(config)]
    if as_json:
        print_json({"path": str(config.source), "mistakes": [], "remarks": remarks})
        return
    click.echo(
        f"{config.source}: no mistakes. Mirror {config.mirror}, this node is {config.me.name} "
        f"({config.me.address}), the other one {config.peer.name} ({config.peer.address})."
    )
    for remark in remarks:
        click.echo(f"Note: {remark}")


@config_group.command("show")
@config_options
@json_option
def show(source: Source, *, as_json: bool) -> None:
    """Show the configuration with every default filled in. The key is never shown."""
    facts = config_facts(source.load(with_key=False))
    if as_json:
        print_json(facts)
        return
    print_table(f"mirror {facts['mirror']}", list(flat(facts)))


# These keys of a table are sizes, and shown as the file has them.
_SIZES: Final = frozenset({"flush_bytes", "resync_rate", "extent", "region", "free_min"})


def config_facts(config: Config) -> dict[str, Any]:
    """What is in force on this node, under the names of the file."""
    return {
        "mirror": config.mirror,
        "key_file": str(config.key_file),
        "arbiter": config.arbiter.word,
        "takeover": config.takeover,
        "preferred": config.preferred,
        "me": config.me.name,
        "node": {
            node.name: {
                "id": node.id,
                "address": str(node.address),
                "heartbeats": [str(each) for each in node.heartbeats],
                "probe": str(node.probe) if node.probe else None,
                "data_dir": str(node.data_dir),
                "run_dir": str(node.run_dir),
            }
            for node in (config.me, config.peer)
        },
        "device": _table(config.device.model_dump()),
        "engine": _table(config.engine.model_dump()),
        "export": {
            "unix": str(config.export_unix),
            "tcp": str(config.export_tcp) if config.export_tcp else None,
        },
        "ping": _table(dict(config.ping)),
        "etcd": _table(dict(config.etcd)),
        "s3": _table(dict(config.s3)),
        "azure-blob": _table(dict(config.azure_blob)),
        "controller": _table(dict(config.controller)),
        "probe": {"address": str(config.probe) if config.probe else None},
        "mount": _table(dict(config.mount)),
        "application": _table(dict(config.application)),
        "virtual_address": [_table(dict(each)) for each in config.virtual_addresses],
        "checker": [_checker(dict(each)) for each in config.checkers],
    }


def _table(section: dict[str, Any]) -> dict[str, Any]:
    return {key: _value(key, value) for key, value in section.items()}


def _value(key: str, value: Any) -> Any:
    """As the file has it."""
    if isinstance(value, Address | Path):
        return str(value)
    # `region` is a size of the device, and a place of a store.
    return format_size(value) if key in _SIZES and isinstance(value, int) else value


def _checker(section: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that belong to other kinds: the meaning of such a key begins with one."""
    kinds = set(re.findall(r'"(\w+)"', KEYS["checker.kind"].expected)) - {section["kind"]}
    return {
        key: value
        for key, value in _table(section).items()
        if KEYS[f"checker.{key}"].meaning.partition(":")[0] not in kinds
    }


def flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of (dotted key, text); several tables of one name have numbers."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, each in enumerate(value, 1):
                rows += flat(each, f"{prefix}{key}[{number}].")
        elif isinstance(value, bool | list):
            rows.append((f"{prefix}{key}", json.dumps(value)))  # as the file has it
        else:
            rows.append((f"{prefix}{key}", "-" if value is None else str(value)))
    return rows
