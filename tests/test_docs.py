"""The documents against the program: links, commands, names, exit codes, the list of rules.

Owns what can be checked by a machine in a page of prose. It must never judge wording; but a name, a
command or a number in a document is a promise to a reader who has nothing else at hand.
"""

import ast
import errno
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from nbdmirror import errors
from nbdmirror.config_schema import ConfigFile
from nbdmirror.errors import NbdMirrorError
from nbdmirror_cli.main import nbdmirror as command_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RULES_COUNT = 22

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
REPOSITORY_PATH = re.compile(
    r"(?<![\w/.$}-])((?:nbdmirror|cli|plugin|tests|docs|packaging|bench|\.ci)/[\w./-]*[\w/])"
)
TEST_NAME = re.compile(r"\btest_\w+\b(?!\.py)")
# `nbdmirror/core/io.py` (`write`, `read`)
NAMES_IN_FILE = re.compile(r"`([\w/]+\.py)`\s+\(((?:`\w+`(?:,\s+)?)+)\)")


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", text)


def commands(text: str) -> Iterator[str]:
    """Every `nbdmirror ...` that a reader could type: shell blocks and code spans."""
    for language, body in BLOCK.findall(text):
        if language == "sh":
            for line in body.splitlines():
                if line.startswith("nbdmirror "):
                    yield line.partition("#")[0].strip()
    yield from (s for s in CODE_SPAN.findall(prose(text)) if s.startswith("nbdmirror "))


def mistake(line: str) -> str:
    """What is wrong with a command, or ""."""
    command: click.Command = command_line
    words = shlex.split(line)[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
    arguments = sum(isinstance(p, click.Argument) for p in command.params)
    takes_value = False
    for word in words:
        if takes_value:
            takes_value = False
        elif arguments and (word == "-" or not word.startswith("-")):
            arguments -= 1
        elif word not in options and word not in {"--help", "-h"}:
            return f"no option {word}"
        else:
            option = options.get(word)
            takes_value = isinstance(option, click.Option) and not option.is_flag
    return "a value is missing" if takes_value else ""


@cache
def defined_tests() -> frozenset[str]:
    """Every test function, and every test module's name."""
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        names.add(path.stem)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    return frozenset(names)


def read(path: Path) -> str:
    """The text of a page."""
    return path.read_text(encoding="utf-8")


def of_page(path: Path) -> str:
    """The id of a test."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_links_lead_somewhere(page: Path) -> None:
    """Breaks in the field: the remedy that a page points to cannot be found at night."""
    targets = [t for t in LINK.findall(prose(read(page))) if not t.startswith(("http", "mailto:"))]
    dead = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_commands_exist(page: Path) -> None:
    """Breaks in the field: an operator types what the page says and gets a usage error."""
    wrong = [f"{line}: {why}" for line in commands(read(page)) if (why := mistake(line))]
    assert not wrong


def test_every_command_is_in_the_guide() -> None:
    """Breaks in the field: a command exists that no page explains, so nobody dares to use it."""
    guide = read(ROOT / "docs" / "user-guide.md")
    shown = {tuple(line.split()[1:3]) for line in commands(guide)}
    wanted = {
        (group, name)
        for group, sub in command_line.commands.items()
        if isinstance(sub, click.Group)
        for name in sub.commands
    }
    assert len(wanted) > 10
    assert not wanted - shown


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_paths_exist(page: Path) -> None:
    """Breaks in the field: whoever checks a rule of safety looks into a file that is gone."""
    named = set(REPOSITORY_PATH.findall(read(page)))
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_named_tests_exist(page: Path) -> None:
    """Breaks in the field: a rule is called tested by a test that was renamed away."""
    named = set(TEST_NAME.findall(read(page)))
    assert not named - defined_tests()


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_named_functions_are_in_their_files(page: Path) -> None:
    """Breaks in the field: the code has moved on and the page sends its reader astray."""
    wrong = []
    for file, names in NAMES_IN_FILE.findall(read(page)):
        source = read(ROOT / file)
        wrong += [
            f"{file}: {name}"
            for name in CODE_SPAN.findall(names)
            if not re.search(rf"\b(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE)
        ]
    assert not wrong


def test_every_rule_has_its_section() -> None:
    """Breaks in the field: a rule of safety is dropped from the list and nobody misses it."""
    sections = re.split(r"^### ", read(ROOT / "docs" / "safety.md"), flags=re.MULTILINE)[1:]
    assert [int(each.partition(".")[0]) for each in sections] == list(range(1, RULES_COUNT + 1))
    for each in sections:
        for part in ("- Status: ", "- Code: ", "- Shown by: "):
            assert part in each, each.partition("\n")[0]


def test_rules_named_in_the_code_exist() -> None:
    """Breaks in the field: a refusal names a rule that the operator cannot look up."""
    named = {
        int(number)
        for path in (ROOT / "nbdmirror").rglob("*.py")
        for number in re.findall(r"\brule (\d+)", read(path), re.IGNORECASE)
    }
    assert len(named) > 10
    assert named <= set(range(1, RULES_COUNT + 1))


def test_every_exit_code_is_in_the_guide() -> None:
    """Breaks in the field: a script meets a code that the guide gives another meaning."""
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", read(ROOT / "docs" / "user-guide.md"), re.MULTILINE)
    classes = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, NbdMirrorError)
    }
    assert {name: int(code) for code, name in rows} == classes


def test_every_errno_is_in_the_guide() -> None:
    """Breaks in the field: a client reports a number that no page explains."""
    guide = read(ROOT / "docs" / "user-guide.md").partition("## Errors at the client")[2]
    shown = set(re.findall(r"`(E[A-Z]+)`", guide.partition("## ")[0]))
    given = {
        errno.errorcode[kind.nbd_errno]
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, NbdMirrorError)
    }
    assert given | {"EOPNOTSUPP"} == shown - {"EPERM", "EROFS"}


def test_the_promise_has_one_wording() -> None:
    """Breaks in the field: one page promises more than the other, and the reader believes that."""

    def lines(page: Path) -> list[str]:
        items = re.findall(
            r"^- (\([abc]\) .*?\.)(?=\n(?!  ))", read(page), re.MULTILINE | re.DOTALL
        )
        return [" ".join(item.split()) for item in items]

    promised = lines(ROOT / "README.md")
    assert [line[:3] for line in promised] == ["(a)", "(b)", "(c)"]
    assert lines(ROOT / "docs" / "safety.md") == promised
    assert "**`none` and `ping` have none and do not give (c).**" in " ".join(
        read(ROOT / "README.md").split()
    )


def test_the_first_configuration_is_the_documented_one() -> None:
    """Breaks in the field: a reader begins with a file that the program refuses."""
    page = read(ROOT / "docs" / "configuration.md")
    block = next(body for language, body in BLOCK.findall(page) if language == "toml")
    assert ConfigFile.model_validate(tomllib.loads(block)).arbiter == "none"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nbdmirror engine fly", "no command fly"),
        ("nbdmirror engine state --colour", "no option --colour"),
        ("nbdmirror metadata create --size", "a value is missing"),
        ("nbdmirror engine promote -m demo --force", ""),
        ("nbdmirror engine", ""),
    ],
)
def test_a_wrong_command_is_found(line: str, why: str) -> None:
    """Breaks in the field: a finder that finds nothing lets every wrong command through."""
    assert list(commands(f"```sh\n{line}   # why\n```\n")) == [line]
    assert mistake(line) == why


def test_the_finders_find() -> None:
    """Breaks in the field: as above, for links, paths and names."""
    assert LINK.findall("see [a](b.md#c)") == ["b.md#c"]
    assert REPOSITORY_PATH.findall("`nbdmirror/a.py`, /var/lib/nbdmirror/demo, tests/b.") == [
        "nbdmirror/a.py",
        "tests/b",
    ]
    assert TEST_NAME.findall("`test_a_b`, `tests/test_c.py`") == ["test_a_b"]
    assert NAMES_IN_FILE.findall("`a/b.py` (`c`, `d`), x") == [("a/b.py", "`c`, `d`")]
    assert len(defined_tests()) > 100
    assert {"README.md", "docs/safety.md"} <= {of_page(page) for page in PAGES}
