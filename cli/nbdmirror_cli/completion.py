"""`nbdmirror completion`: the script by which a shell completes commands, options and mirrors."""

from typing import Final

import click
from click.shell_completion import get_completion_class

from nbdmirror_cli.options import json_option, print_json

# What click derives from the program's name; the shell sets it when it asks.
VARIABLE: Final = "_NBDMIRROR_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
def completion(shell: str, *, as_json: bool) -> None:
    """Print the script that lets a shell complete commands, options and the names of mirrors.

    \b
      bash:  eval "$(nbdmirror completion bash)"         in ~/.bashrc
      zsh:   eval "$(nbdmirror completion zsh)"          in ~/.zshrc
      fish:  nbdmirror completion fish | source          in ~/.config/fish/config.fish
    """
    made = get_completion_class(shell)
    assert made is not None, shell
    root = click.get_current_context().find_root().command
    script = made(root, {}, "nbdmirror", VARIABLE).source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
