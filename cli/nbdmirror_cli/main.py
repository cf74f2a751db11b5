"""The entry point `nbdmirror`: the groups of commands, and the one map from errors to exit codes.

Exit codes: 0 done; 2 wrong usage; 10 to 23 the `exit_code` of the error class in
nbdmirror/errors.py; 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

import click

from nbdmirror import __version__
from nbdmirror.errors import NbdMirrorError
from nbdmirror_cli.config import config_group
from nbdmirror_cli.engine import engine_group
from nbdmirror_cli.metadata import metadata_group

INTERRUPTED = 130
HELP_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=HELP_SETTINGS)
@click.version_option(__version__, prog_name="nbdmirror")
def nbdmirror() -> None:
    """Run a synchronous two-node mirror of one block device, served over NBD.

    \b
    To begin, on the node that has (or will have) the data, then on the other one:
      nbdmirror config check -m demo
      nbdmirror metadata create -m demo --size 10GiB
      nbdmirror metadata create -m demo --size 10GiB --join     (on the other node)
      nbdmirror engine run -m demo                              (on both)
      nbdmirror engine promote -m demo                          (on one)

    Every command finds its mirror by -m NAME (/etc/nbdmirror/NAME.toml) or -c FILE; without
    either, the only file in /etc/nbdmirror is taken.
    """


nbdmirror.add_command(config_group)
nbdmirror.add_command(metadata_group)
nbdmirror.add_command(engine_group)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. The only place that maps errors to codes."""
    try:
        result = nbdmirror.main(args=list(arguments), prog_name="nbdmirror", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("nbdmirror: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output went away. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NbdMirrorError as error:
        click.echo(f"nbdmirror: {error}", err=True)
        return error.exit_code
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
