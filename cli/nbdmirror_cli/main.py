"""The entry point `nbdmirror`: the groups of commands, and the one map from errors to exit codes.

Exit codes: 0 done; 2 wrong usage; 10 to 23 the `exit_code` of the error class in
nbdmirror/errors.py; 130 interrupted. `status --quiet` and `doctor` have codes of their own.
"""

import json
import os
import sys
from collections.abc import Sequence

import click

from nbdmirror import __version__
from nbdmirror.errors import NbdMirrorError
from nbdmirror_cli.arbiter import arbiter_group
from nbdmirror_cli.cluster import COMMANDS
from nbdmirror_cli.completion import completion
from nbdmirror_cli.config import config_group
from nbdmirror_cli.create import create, invite, join
from nbdmirror_cli.doctor import doctor
from nbdmirror_cli.engine import engine_group
from nbdmirror_cli.kept import kept_group
from nbdmirror_cli.metadata import metadata_group
from nbdmirror_cli.options import error_facts
from nbdmirror_cli.tls import tls_group
from nbdmirror_cli.view import printable

INTERRUPTED = 130
HELP_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=HELP_SETTINGS)
@click.version_option(__version__, prog_name="nbdmirror")
def nbdmirror() -> None:
    """Run a synchronous two-node mirror of one block device, served over NBD.

    \b
    To begin:
      nbdmirror create demo            on the server that has the data; prints a token and waits
      nbdmirror join -                 on the other server; asks for the token
      nbdmirrord -m demo               the controller, on both; in the foreground, or as a unit
      nbdmirror start -m demo          on both: the node runs, also after a reboot
      nbdmirror status -m demo         what this node is, and whether it is ready

    \b
    Then:
      nbdmirror explain -m demo        why it is what it is, and what to type
      nbdmirror swap -m demo           exchange the roles
      nbdmirror doctor                 what this machine lacks

    `metadata` and `engine` are the way by hand, without a controller, and for emergencies.

    Every command finds its mirror by -m NAME (/etc/nbdmirror/NAME.toml) or -c FILE; without
    either, the only file in /etc/nbdmirror is taken.
    """


for _command in (create, invite, join):
    nbdmirror.add_command(_command)
nbdmirror.add_command(config_group)
nbdmirror.add_command(metadata_group)
nbdmirror.add_command(engine_group)
for _command in (*COMMANDS, arbiter_group, kept_group, tls_group, doctor, completion):
    nbdmirror.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. The only place that maps errors to codes.

    With --json what went wrong is an object, too, and on standard output: a program reads one
    stream and never has to take text apart.
    """
    try:
        result = nbdmirror.main(args=list(arguments), prog_name="nbdmirror", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # Whoever read our output went away. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (click.ClickException, click.Abort, KeyboardInterrupt, NbdMirrorError) as error:
        return _tell(error, as_json="--json" in arguments)
    return result if isinstance(result, int) else 0


def _tell(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    if isinstance(error, click.ClickException):
        kind, reason, code = "UsageError", error.format_message(), error.exit_code
    elif isinstance(error, NbdMirrorError):
        kind, reason, code = type(error).__name__, printable(str(error)), error.exit_code
    else:
        kind, reason, code = "Interrupted", "interrupted", INTERRUPTED
    if as_json:
        click.echo(json.dumps(error_facts(kind, reason, code)))  # one line, as of `events --json`
    elif isinstance(error, click.ClickException):
        error.show()  # with the usage of the command
    else:
        click.echo(f"nbdmirror: {reason}", err=True)
    return code


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
