"""`nbdmirror kept`: what this node's copy held when it was given up after a split brain.

Owns the words about it. Showing and exporting read the files, also while an engine runs; whatever
changes what is kept is the engine's, and where none runs, admin's.
"""

from pathlib import Path
from typing import Any

import click

from nbdmirror import admin
from nbdmirror.config import Config
from nbdmirror.control_client import ControlClient
from nbdmirror.errors import ConfigError, UnreachableError
from nbdmirror.kept import Image, path_beside
from nbdmirror.limits import KEEP_BYTES_MAX
from nbdmirror_cli.engine import COMMAND_TIMEOUT_S, _command, _confirm
from nbdmirror_cli.options import SizeType, Source, config_options, json_option, print_json
from nbdmirror_cli.view import bytes_text, print_table

_yes_option = click.option("--yes", is_flag=True, help="Do not ask; for scripts.")


@click.group("kept")
def kept_group() -> None:
    """Show, export or discard what this node's copy held when it was given up.

    After a split brain `nbdmirror second --force` gives one copy up. What it held is kept, extent
    by extent, before it is overwritten, and stays until it is discarded here.
    """


@kept_group.command("show")
@config_options
@json_option
def show(source: Source, *, as_json: bool) -> None:
    """Say how much is kept, of which generation, and whether the image is complete."""
    config = source.load(with_key=False)
    with Image.open(path_beside(config.data_file)) as image:
        facts = image.facts()
    facts |= _from_engine(config)
    if as_json:
        print_json(facts)
    else:
        print_table(f"kept on node {config.me.name}", _rows(facts))


def _from_engine(config: Config) -> dict[str, Any]:
    """What only a running engine knows; nothing of it where none runs."""
    try:
        with ControlClient(config.control_socket, COMMAND_TIMEOUT_S) as client:
            state = client.call("state")
    except UnreachableError:
        return {"limit_bytes": config.engine.keep_bytes, "problem": "", "resync_waits": ""}
    kept = state.get("kept") or {}
    return {
        "limit_bytes": kept.get("limit_bytes", config.engine.keep_bytes),
        "problem": kept.get("problem", ""),
        "resync_waits": state.get("resync_waits", ""),
    }


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    whole = "all of it is there" if facts["complete"] else (
        "not complete: the space was used up, and later writes changed extents that are not kept; "
        "what the resync overwrote is all there"
    )  # fmt: skip
    rows = [
        ("image", whole),
        ("generation", str(facts["generation"])),
        ("this side wrote", f"up to {bytes_text(facts['own_bytes'])} before it was given up"),
        ("the other wrote", f"up to {bytes_text(facts['peer_bytes'])} before that"),
        ("extents", f"{facts['extents']} changed since, their old content is kept"),
        ("space", f"{bytes_text(facts['used_bytes'])} of {bytes_text(facts['limit_bytes'])}"),
        ("file", str(facts["path"])),
        ("problem", str(facts["problem"])),
        ("resync waits", str(facts["resync_waits"])),
    ]
    return [(name, text) for name, text in rows if text]


@kept_group.command("export")
@config_options
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--partial", is_flag=True, help="Also where the image is not complete: `kept show` says so."
)
@json_option
def export(source: Source, file: Path, *, partial: bool, as_json: bool) -> None:
    """Write the copy as it was when it was given up into FILE, a sparse image of the device.

    Works while the engine runs. FILE must not exist. Mount or inspect it read-only, for example
    with `qemu-nbd --read-only` or a read-only loop device.
    """
    config = source.load(with_key=False)
    with Image.open(path_beside(config.data_file)) as image:
        size = image.export(file, partial=partial)
        facts = image.facts()
    if as_json:
        print_json({"file": str(file), "bytes": size, **facts})
        return
    note = "" if facts["complete"] else " (not complete, see `nbdmirror kept show`)"
    click.echo(f"wrote {file}: {bytes_text(size)}, the copy as it was when it was given up{note}")


@kept_group.command("limit")
@config_options
@click.argument("size", type=SizeType())
@json_option
def limit(source: Source, size: int, *, as_json: bool) -> None:
    """Let SIZE be kept from now on; a resync that waits for space goes on.

    Lasts until the engine ends: `keep_bytes` in [engine] of the configuration is for longer.
    """
    if size > KEEP_BYTES_MAX:
        raise ConfigError(f"{size} bytes: at most {KEEP_BYTES_MAX} are kept")
    config = source.load(with_key=False)
    with ControlClient(config.control_socket, COMMAND_TIMEOUT_S) as client:
        answer = _command(client, client.call("state"), "kept-limit", bytes=size)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"up to {bytes_text(size)} are kept, until this engine ends")


@kept_group.command("discard")
@config_options
@_yes_option
@json_option
def discard(source: Source, *, yes: bool, as_json: bool) -> None:
    """Forget what this node's copy held when it was given up; a resync that waits goes on.

    If the resync is not done yet, whatever it has not overwritten so far is overwritten unkept.
    """
    config = source.load(with_key=False)
    path = path_beside(config.data_file)
    _confirm(f"What is kept in {path} is lost for good.", "Discard it?", yes=yes)
    try:
        with ControlClient(config.control_socket, COMMAND_TIMEOUT_S) as client:
            answer = _command(client, client.call("state"), "kept-discard")
    except UnreachableError:
        # No engine: the lock of the metadata says whether that is so.
        admin.discard_kept(config)
        answer = {"kept": None}
    if as_json:
        print_json(answer)
    else:
        click.echo("kept discard: nothing of it is kept any more")
