"""Options that many commands share: which mirror, which node, JSON or not.

Owns how a command finds its configuration. Must never read the key for a command that needs none.
"""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from nbdmirror.config import Config, load, parse_size
from nbdmirror.core.messages import printable
from nbdmirror.errors import ConfigError

CONFIG_DIRECTORY: Final = Path("/etc/nbdmirror")
CONFIG_VARIABLE: Final = "NBDMIRROR_CONFIG"
NODE_VARIABLE: Final = "NBDMIRROR_NODE"
SHOWN_CHARS_MAX: Final = 63
FILE_NAME_BYTES_MAX: Final = 250  # 255 of the system, less ".toml"
FIRST_STEP: Final = "`nbdmirror create NAME` makes a mirror, `nbdmirror join -` its second node"
_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Source:
    """Where a command finds its configuration."""

    path: Path
    node: str | None

    def load(self, *, with_key: bool) -> Config:
        """Read and check it. Raises ConfigError."""
        return load(self.path, self.node, with_key=with_key)

    @property
    def words(self) -> str:
        """The options that name it on the other node, too."""
        if self.path.parent == CONFIG_DIRECTORY and self.path.suffix == ".toml":
            return f"-m {shlex.quote(self.path.stem)}"
        return f"-c {shlex.quote(str(self.path))}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options and variables name; nothing is looked up before it is asked for."""

    path: Path | None
    mirror: str | None
    node: str | None

    @property
    def named(self) -> bool:
        """Whether a mirror was named at all."""
        return self.path is not None or self.mirror is not None

    def source(self) -> Source:
        """The configuration that is meant. Raises ConfigError, UsageError."""
        return Source(find_config(self.path, self.mirror), self.node)


def config_options(command: _Command) -> _Command:
    """Add -m, -c and --node; the command gets `source`, and does not run without one."""
    return _mirror_options(command, "source", Wanted.source)


def late_config_options(command: _Command) -> _Command:
    """The same options; the command gets `wanted`, and looks the configuration up itself."""
    return _mirror_options(command, "wanted", lambda wanted: wanted)


def _mirror_options(command: _Command, name: str, made: Callable[[Wanted], object]) -> _Command:
    def collect(context: click.Context, _: click.Parameter, node: str | None) -> object:
        path, mirror = context.params.pop("config_file"), context.params.pop("mirror")
        return made(Wanted(path, mirror, node))

    for option in (
        click.option(
            "--node",
            name,
            metavar="NAME",
            envvar=NODE_VARIABLE,
            callback=collect,
            help="Be this node of the configuration; default: the name of this host.",
        ),
        click.option(
            "-m",
            "--mirror",
            metavar="NAME",
            is_eager=True,
            shell_complete=_mirrors,
            help="Use /etc/nbdmirror/NAME.toml; goes before -c.",
        ),
        click.option(
            "-c",
            "--config",
            "config_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            envvar=CONFIG_VARIABLE,
            is_eager=True,
            help="Use this configuration file.",
        ),
    ):
        command = option(command)
    return command


def _mirrors(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """For completion: the mirrors of this server."""
    return [each for each in _names() if each.startswith(begun)]


def _names() -> list[str]:
    return sorted(each.stem for each in CONFIG_DIRECTORY.glob("*.toml"))


def find_config(path: Path | None, mirror: str | None) -> Path:
    """The configuration file that the options mean. Raises ConfigError, UsageError."""
    if mirror is not None:
        strange = "/" in mirror or mirror.startswith(".") or not mirror.isprintable()
        if strange or len(os.fsencode(mirror)) > FILE_NAME_BYTES_MAX:
            shown = printable(mirror)[:SHOWN_CHARS_MAX]
            raise click.UsageError(f"-m {shown}: a name is expected; a file is named with -c")
        return _existing(mirror)
    if path is not None:
        return path
    found = sorted(CONFIG_DIRECTORY.glob("*.toml"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"which mirror? Name it with -m: {', '.join(_names())}")
    raise ConfigError(
        f"there is no configuration in {CONFIG_DIRECTORY}: {FIRST_STEP}; a file elsewhere is named "
        "with -c"
    )


def _existing(mirror: str) -> Path:
    """The file of a mirror; one that may not be looked at is told of when it is read."""
    path = CONFIG_DIRECTORY / f"{mirror}.toml"
    try:
        path.stat()
    except FileNotFoundError:
        names = _names()
        known = f"here are: {', '.join(names)}" if names else f"here is none: {FIRST_STEP}"
        raise ConfigError(f"there is no mirror {mirror} ({path}); {known}") from None
    except OSError:
        pass
    return path


replace_record_option = click.option(
    "--replace-record",
    is_flag=True,
    help="What an arbiter with a memory holds of an earlier mirror counts no more.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for programs; its keys stay."
)


# What helps against each kind of error, whatever its reason; the reasons have the particulars.
REMEDIES: Final = {
    "UsageError": "see --help",
    "ConfigError": "mend the configuration; `nbdmirror config check` lists every mistake",
    "MetadataError": "`nbdmirror metadata check` says what is damaged and what that means",
    "StaleCommandError": "look at `nbdmirror engine state` and decide again",
    "UnreachableError": "start what is not running (the reason says how), or ask again",
}


def error_facts(kind: str, reason: str, exit_code: int) -> dict[str, Any]:
    """What commands print as JSON of an error. Its keys stay."""
    remedy = REMEDIES.get(kind, "")
    facts = {"kind": kind, "reason": reason, "remedy": remedy, "exit_code": exit_code}
    return {"error": facts}


class SizeType(click.ParamType[int]):
    """A size on the command line, as in the configuration."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes from "10GiB"."""
        text = int(value) if str(value).isdecimal() else value
        try:
            return parse_size(text)
        except ValueError as error:
            return self.fail(f"{value!r}: {error}", param, ctx)


def print_json(value: object) -> None:
    """The one form of JSON that commands print: indented, keys in our order."""
    click.echo(json.dumps(value, indent=2))
