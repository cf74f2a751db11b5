"""`nbdmirror metadata`: the files of a node while its engine is stopped."""

from typing import Any

import click

from nbdmirror import admin
from nbdmirror.config import format_size
from nbdmirror.errors import MetadataError
from nbdmirror_cli.options import (
    SizeType,
    Source,
    config_options,
    json_option,
    print_json,
    replace_record_option,
)
from nbdmirror_cli.view import bytes_text, plain, print_table, printable


@click.group("metadata")
def metadata_group() -> None:
    """Create, show and check the data and metadata files of this node."""


@metadata_group.command("create")
@config_options
@click.option(
    "--size",
    type=SizeType(),
    help='Size of the device, like "10GiB"; the same on both nodes. With --adopt: default '
    "the size of the file.",
)
@click.option(
    "--join",
    is_flag=True,
    help="This is the second node: its copy is blank and comes from the other one.",
)
@click.option(
    "--adopt",
    is_flag=True,
    help="Keep the content of an existing file `data` in the data directory.",
)
@click.option(
    "--sparse",
    is_flag=True,
    help="Reserve no space: cheaper, but writes can then fail for lack of it.",
)
@replace_record_option
@json_option
def create(source: Source, size: int | None, *, join: bool, as_json: bool, **how: Any) -> None:
    """Make this node's files; nothing that exists is overwritten.

    Run it without --join on the node that has the data (or either, if both begin empty), and with
    --join on the other one.

    With --join and --adopt the existing file is kept only as a starting point: whatever differs in
    it is overwritten with the data of the other node.
    """
    if size is None and not how["adopt"]:
        raise click.UsageError("--size is needed; only --adopt can take it from the file")
    config = source.load(with_key=True)
    made = admin.create(config, size, join=join, **how)
    if as_json:
        print_json(admin.superblock_facts(made))
        return
    size_text = format_size(made.device_bytes)
    click.echo(
        f"made {config.metadata_file}: mirror {config.mirror}, {size_text}, node {made.node_id}"
    )
    if join:
        click.echo("This copy is blank: it is filled when the other node's engine is met.")
    else:
        options = f"{source.words} --join --size {size_text}{' --sparse' if how['sparse'] else ''}"
        click.echo(f"Next, on {config.peer.name}: nbdmirror metadata create {options}")


@metadata_group.command("show")
@config_options
@json_option
def show(source: Source, *, as_json: bool) -> None:
    """Show what the metadata file says. While an engine runs, `engine state` is newer."""
    facts = admin.show(source.load(with_key=False).metadata_file)
    if as_json:
        print_json(facts)
        return
    print_table(f"metadata of mirror {facts['mirror_name']}", _rows(facts))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in facts.items():
        if key == "notes":
            text = "\n".join(map(str, value)) or "-"
        elif key.endswith("_bytes"):
            text = bytes_text(value)
        else:
            text = plain(value)
        rows.append((key.replace("_", " "), text))
    return rows


@metadata_group.command("check")
@config_options
@json_option
@click.pass_context
def check(context: click.Context, source: Source, *, as_json: bool) -> None:
    """Decode all of the metadata; say what is damaged and what that means. Repairs nothing.

    The engine must be stopped. Exit code 12 when something is damaged. Files and directories that
    other users can reach are warnings; with them alone the exit code is 0.
    """
    config = source.load(with_key=False)
    report = admin.check(config.metadata_file, config.me.run_dir)
    if as_json:
        print_json(report.as_dict())
    else:
        for finding in report.findings:
            head = "" if finding.severity == "damage" else f"{finding.severity}: "
            click.echo(printable(f"{head}{finding.part}: {finding.problem}"))
            click.echo(printable(f"    means: {finding.meaning}"))
            if finding.remedy:
                click.echo(printable(f"    remedy: {finding.remedy}"))
        if not report.damaged:
            click.echo(printable(f"{report.path}: no damage"))
    if report.damaged:
        context.exit(MetadataError.exit_code)
