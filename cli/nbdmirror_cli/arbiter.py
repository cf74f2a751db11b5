"""`nbdmirror arbiter`: what the arbiter of this mirror says, and the move to another one.

Owns the words about it; whether a move may begin is for the controller.
"""

import click

from nbdmirror_cli.engine import _confirm as confirm
from nbdmirror_cli.options import Source, config_options, json_option, print_json
from nbdmirror_cli.orders import controller, yes_option
from nbdmirror_cli.status_view import part, word
from nbdmirror_cli.view import plain, print_table, printable

MOVE_S = 30.0
GONE = (
    "The record in the old store is not closed. If that store comes back before both nodes ask the "
    "new one, both may be let go on, and the writes of one side are lost."
)


@click.group("arbiter")
def arbiter_group() -> None:
    """Show the arbiter, or move this mirror to another one while it runs."""


@arbiter_group.command("show")
@config_options
@json_option
def show(source: Source, *, as_json: bool) -> None:
    """Say where the record is, whom it names, and whether this node could claim."""
    with controller(source) as client:
        facts = part(client.call("status"), "arbiter")
    if as_json:
        print_json(facts)
        return
    record = part(facts, "record")
    rows = {
        **{key: value for key, value in facts.items() if key != "record"},
        **{f"record {key}": value for key, value in record.items()},
    }
    print_table("arbiter", [(key.replace("_", " "), plain(rows[key])) for key in rows])


@arbiter_group.command("move")
@config_options
@click.option(
    "--old-is-gone",
    is_flag=True,
    help="The old store is gone for good: do not wait for its record to be closed.",
)
@yes_option
@json_option
def move(source: Source, *, old_is_gone: bool, yes: bool, as_json: bool) -> None:
    """Ask the arbiter that the configuration file names now; type it on both nodes.

    First put the new arbiter into the file on both nodes, and nothing else. Both have to be in
    sync. The application goes on; until both nodes are done, nobody could go on alone. It may be
    typed again at any time.
    """
    if old_is_gone:
        confirm(GONE, "Move all the same?", yes=yes)
    with controller(source, MOVE_S) as client:
        facts = client.call("arbiter-move", old_is_gone=old_is_gone)
    if as_json:
        print_json(facts)
    else:
        click.echo(printable(word(facts, "done")))
