"""Names from outside that are no names: refused in words that cannot do harm themselves."""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import ValidationError

from nbdmirror.config import load
from nbdmirror.errors import ConfigError
from nbdmirror.token_exchange import Offer
from nbdmirror_cli import options
from tests.unit.test_config import GOOD, key, write

__all__ = ["key"]

HOSTILE = {
    "traversal": "../x",
    "deep traversal": "a/../../etc/shadow",
    "slash": "a/b",
    "dot": ".",
    "dots": "..",
    "shell": ";id",
    "shell in the middle": "a;id",
    "substitution": "$(id)",
    "backquotes": "`id`",
    "pipe": "a|id",
    "option": "-rf",
    "long option": "--host=x",
    "nul": "a\0b",
    "line": "a\nb",
    "return": "a\rb",
    "escape": "\x1b[2Jx",
    "space": "a b",
    "empty": "",
    "4 KiB": "x" * 4096,
    "accent": "n\u00e4me",
    "lookalike": "d\u0435mo",
    "right to left": "a\u202eb",
    "invisible": "de\u200bmo",
    "percent": "%n",
    "star": "*",
}
CHECKER = '[[checker]]\nname = "one"\nkind = "{kind}"\n{rest}\n'
# Where a name stands, with % for it.
NAMES = {
    "mirror": GOOD.replace('mirror = "demo"', "mirror = %"),
    "node": GOOD.replace("[node.alpha]", "[node.%]"),
    "preferred": GOOD.replace("[node.alpha]", "preferred = %\n[node.alpha]"),
    "arbiter": GOOD.replace('arbiter = "none"', "arbiter = %"),
    "mount.type": GOOD + "[mount]\ntype = %\n",
    "checker.name": GOOD + '[[checker]]\nname = %\nkind = "unit"\nunit = "a.service"\n',
    "checker.kind": GOOD + '[[checker]]\nname = "one"\nkind = %\n',
    "unknown key": GOOD + '[engine]\n% = "x"\n',
    "address": GOOD.replace('"10.1.0.1:7789"', "%"),
    "program": GOOD + "[application]\nstart = [%]\n",
    "key_file": GOOD.replace('"{key}"', "%"),
    "data_dir": GOOD + "[paths]\ndata_dir = %\n",
    "mount.point": GOOD + "[mount]\npoint = %\n",
}
LINE_CHARS_MAX = 1000


def report(key: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(key, text), "beta")
    return str(caught.value)


def lines_that_do_harm(text: str) -> Iterator[str]:
    """Lines that steer a terminal, or bury the rest of a report."""
    for line in text.split("\n"):
        if not line.isprintable() or len(line) > LINE_CHARS_MAX:
            yield line[:200]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", NAMES)
def test_what_is_no_name_is_refused_in_harmless_words(key: Path, place: str, name: str) -> None:
    """Breaks in the field: a name in a configuration that somebody else prepared leads out of the
    directories of the mirror, runs a command, or hides what the report of mistakes says.
    """
    text = NAMES[place].replace("%", json.dumps(HOSTILE[name]))
    assert not list(lines_that_do_harm(report(key, text)))


# What the kernel, systemd or mount would take: names with other rules.
LOOSER = {
    "interface": GOOD + '[[virtual_address]]\naddress = "10.1.0.9/24"\ninterface = %\n',
    "checker.interface": GOOD + CHECKER.format(kind="interface", rest="interface = %"),
    "units": GOOD + "[application]\nunits = [%]\n",
    "checker.unit": GOOD + CHECKER.format(kind="unit", rest="unit = %"),
    "options": GOOD + "[mount]\noptions = [%]\n",
    "path": GOOD + CHECKER.format(kind="filesystem", rest="path = %"),
    "export.unix": GOOD + "[export]\nunix = %\n",
}
DANGEROUS = ("traversal", "slash", "nul", "line", "escape", "empty", "4 KiB", "space")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (p, n)
        for p in LOOSER
        for n in DANGEROUS
        if p != "options" or n not in ("traversal", "slash")
    ],
)
def test_names_of_other_programs_are_no_paths_and_no_lines(
    key: Path, place: str, name: str
) -> None:
    """Breaks in the field: the name of an interface or a unit becomes a path or a second argument
    of a program that runs as root.
    """
    text = LOOSER[place].replace("%", json.dumps(HOSTILE[name]))
    assert not list(lines_that_do_harm(report(key, text)))


def test_the_report_is_harmless_where_a_bad_value_is_there_twice(key: Path) -> None:
    """Breaks in the field: the rules for several keys repeat what the rule for one has refused."""
    bad = json.dumps("\x1b[2J" + "x" * 4096)
    checkers = 2 * f'[[checker]]\nname = {bad}\nkind = "unit"\nunit = "a.service"\n'
    addresses = 2 * f"[[virtual_address]]\naddress = {bad}\n"
    nodes = f"[node.{bad}]\nid = 2\naddress = {bad}\nheartbeats = [{bad}]\n"
    mount = f'preferred = {bad}\n[mount]\nattach = "none"\npoint = {bad}\n'
    text = GOOD.replace("[node.alpha]", f"{mount}{nodes}[node.alpha]") + checkers + addresses
    assert not list(lines_that_do_harm(report(key, text)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_peer_cannot_invite_into_a_hostile_name(name: str) -> None:
    """Breaks in the field: who joins with a token that somebody forged writes a configuration, a
    key and data outside of the directories of mirrors.
    """
    good = {
        "mirror": "demo",
        "inviter": "alpha",
        "configuration": "",
        "key": "00" * 32,
        "size_bytes": 1 << 30,
        "sparse": False,
    }
    assert Offer.model_validate_json(json.dumps(good)).mirror == "demo"
    for field in ("mirror", "inviter", "key"):
        with pytest.raises(ValidationError):
            Offer.model_validate_json(json.dumps({**good, field: HOSTILE[name]}))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_mirror_named_on_the_command_line_stays_in_its_directory(name: str) -> None:
    """Breaks in the field: `nbdmirror -m ../x` of a script that takes the name from elsewhere reads
    a configuration that anybody could write.
    """
    with pytest.raises((ConfigError, click.UsageError)) as caught:
        options.find_config(None, HOSTILE[name])
    told = caught.value.format_message() if isinstance(caught.value, click.UsageError) else ""
    assert not list(lines_that_do_harm(told or str(caught.value)))
