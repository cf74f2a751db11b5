"""`nbdmirror config`: check and show a configuration."""

from typing import Any

import click

from nbdmirror.config import Config, format_size
from nbdmirror.errors import ConfigError
from nbdmirror_cli.options import Source, config_options, error_facts, json_option, print_json
from nbdmirror_cli.view import no_promise_c, print_table


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
    remark = no_promise_c(config.arbiter.name.lower())
    if as_json:
        print_json({"path": str(config.source), "mistakes": [], "remarks": [remark]})
        return
    click.echo(
        f"{config.source}: no mistakes. Mirror {config.mirror}, this node is {config.me.name} "
        f"({config.me.address}), the other one {config.peer.name} ({config.peer.address})."
    )
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


def config_facts(config: Config) -> dict[str, Any]:
    """What is in force on this node, under the names of the file."""
    sizes = {
        name: format_size(getattr(config.engine, name)) for name in ("flush_bytes", "resync_rate")
    }
    return {
        "mirror": config.mirror,
        "key_file": str(config.key_file),
        "arbiter": config.arbiter.name.lower(),
        "me": config.me.name,
        "node": {
            node.name: {
                "id": node.id,
                "address": str(node.address),
                "data_dir": str(node.data_dir),
                "run_dir": str(node.run_dir),
            }
            for node in (config.me, config.peer)
        },
        "device": {
            "extent": format_size(config.device.extent),
            "region": format_size(config.device.region),
        },
        "engine": {**config.engine.model_dump(), **sizes},
        "export": {
            "unix": str(config.export_unix),
            "tcp": str(config.export_tcp) if config.export_tcp else None,
        },
    }


def flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            rows.append((f"{prefix}{key}", str(value).lower()))  # as the file has it
        else:
            rows.append((f"{prefix}{key}", "-" if value is None else str(value)))
    return rows
