"""House rules that no linter of the set knows, checked over the text and syntax of the repository.

Owns the limits of docs/style.md. Each rule is a function from one file to its findings, and each
has a sample that breaks it: a rule that finds nothing in its sample is itself a defect.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
LINE_CHARS_MAX = 100
DATED = {"nbdmirror/certificate.py"}  # a certificate has dates, and they decide nothing
TABLE_LINES_MIN = 5  # a literal this long is a table
TEXT_SUFFIXES = {".py", ".pyi", ".sh", ".md", ".toml", ".lock", ".service", ".conf", ".txt", ".fio"}

# Written in two parts, so that the rule does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w./})$-])/(?:" + "wo" + r"rk|ro" + r"ot|tmp/v)(?![\w-])")
REGISTRY_HOST = re.compile(
    r"(?:py" + r"pi\.org|python" + r"hosted\.org|deb\." + r"debian\.org|npm" + r"js\.org)|"
    r"^\s*--(?:index" + r"-url|extra-index" + r"-url|find" + r"-links)\b",
    re.MULTILINE,
)
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
PRAGMA = re.compile(r"\s*# (?:noqa|type: ignore).*")  # ruff does not count them either
SKIPS = {"skip", "skipif", "xfail", "importorskip", "skipTest", "SkipTest"}


@dataclass(frozen=True)
class File:
    """One file: its path relative to the repository, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of a Python file."""
        return ast.parse(self.text, filename=self.path)

    @property
    def is_test(self) -> bool:
        """Whether it belongs to the tests."""
        return self.path.startswith("tests/")


Finding = tuple[int, str]
Rule = Callable[[File], Iterator[Finding]]


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, _dotted(node.func)


def _imported_names(
    tree: ast.AST, modules: tuple[str, ...], names: set[str]
) -> Iterator[tuple[int, str]]:
    """`from module import name`: the ways round a rule about `module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in names)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _span(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _half_lines(file: File) -> set[int]:
    """Numbers of the lines that count half: docstrings, comments, tables at module level."""
    half = {n for n, line in enumerate(file.text.splitlines(), 1) if line.lstrip().startswith("#")}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Expr) and _is_docstring(node):
            half.update(_span(node))
    for statement in file.tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            literals = (ast.Dict, ast.List, ast.Tuple, ast.Set)
            found = any(isinstance(node, literals) for node in ast.walk(statement.value))
            if found and len(_span(statement)) >= TABLE_LINES_MIN:
                half.update(_span(statement))
    return half


def module_length(file: File) -> Iterator[Finding]:
    """A module has at most 500 lines; essays and tables count half."""
    half = len(_half_lines(file))
    weight = len(file.text.splitlines()) - half + (half + 1) // 2
    if weight > MODULE_LINES_MAX:
        yield 1, f"{weight} lines (essays and tables at half), over {MODULE_LINES_MAX}"


def function_length(file: File) -> Iterator[Finding]:
    """A function has at most 70 lines."""
    for function in _functions(file.tree):
        if len(_span(function)) > FUNCTION_LINES_MAX:
            yield function.lineno, f"{function.name} has {len(_span(function))} lines"


def line_length(file: File) -> Iterator[Finding]:
    """A line has at most 100 characters."""
    for number, whole in enumerate(file.text.splitlines(), 1):
        line = PRAGMA.sub("", whole)
        if len(line) > LINE_CHARS_MAX:
            yield number, f"{len(line)} characters"


def module_docstring(file: File) -> Iterator[Finding]:
    """A module opens by saying what it owns and what it must never do."""
    if file.text.strip() and not ast.get_docstring(file.tree):
        yield 1, "no module docstring"


def no_print(file: File) -> Iterator[Finding]:
    """The package reports by events and exceptions; stdout is nbdkit's or the operator's."""
    if file.path.startswith("nbdmirror/"):
        for node, name in _calls(file.tree):
            if name == "print":
                yield node.lineno, "print"


def no_wall_clock(file: File) -> Iterator[Finding]:
    """Wall clocks jump: no decision and no measurement may hang on one."""
    if file.path in DATED:
        return
    clocks = re.compile(
        r"(^|\.)(time\.time|time\.time_ns|datetime\.(now|utcnow|today)|date\.today)$"
    )
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and clocks.search(_dotted(node)):
            yield node.lineno, _dotted(node)
    yield from _imported_names(file.tree, ("time",), {"time", "time_ns"})


def docstring_of_tests(file: File) -> Iterator[Finding]:
    """A test says what breaks in the field if it fails."""
    for function in _functions(file.tree):
        if file.is_test and function.name.startswith("test_") and not ast.get_docstring(function):
            yield function.lineno, f"{function.name} has no docstring"


def no_skip(file: File) -> Iterator[Finding]:
    """A test that does not run is a test that passes when the product is broken."""
    if not file.is_test:
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute):
            parts = _dotted(node).split(".")
            if parts[0] in ("pytest", "unittest") and parts[-1] in SKIPS:
                yield node.lineno, ".".join(parts)
    yield from _imported_names(file.tree, ("pytest", "unittest"), SKIPS)


def no_sleep(file: File) -> Iterator[Finding]:
    """A test that sleeps is either slow or flaky; asyncio.sleep(0) only yields."""
    if not file.is_test:
        return
    for call, name in _calls(file.tree):
        zero = bool(call.args) and isinstance(call.args[0], ast.Constant) and not call.args[0].value
        if name == "time.sleep" or (name == "asyncio.sleep" and not zero):
            yield call.lineno, name
    yield from _imported_names(file.tree, ("time", "asyncio"), {"sleep"})


def _by_pattern(pattern: re.Pattern[str], file: File) -> Iterator[Finding]:
    for match in pattern.finditer(file.text):
        yield file.text.count("\n", 0, match.start()) + 1, match.group().strip()


def no_machine_path(file: File) -> Iterator[Finding]:
    """A path of the machine it was written on works nowhere else."""
    yield from _by_pattern(MACHINE_PATH, file)


def no_registry_host(file: File) -> Iterator[Finding]:
    """Where packages come from is the installing site's choice; hashes say which they are."""
    yield from _by_pattern(REGISTRY_HOST, file)


def nothing_unfinished(file: File) -> Iterator[Finding]:
    """What is not done is in an issue or a decision record, not in a comment."""
    if not file.path.endswith((".md", ".lock")):
        yield from _by_pattern(UNFINISHED, file)


TEXT_RULES: tuple[Rule, ...] = (no_machine_path, no_registry_host, nothing_unfinished)
PYTHON_RULES: tuple[Rule, ...] = (
    module_length,
    function_length,
    line_length,
    module_docstring,
    no_print,
    no_wall_clock,
    docstring_of_tests,
    no_skip,
    no_sleep,
)

SAMPLES: dict[Rule, tuple[str, str]] = {
    module_length: ("nbdmirror/a.py", '"""A."""\n' + "a = 1\n" * 500),
    function_length: ("nbdmirror/a.py", "def f():\n" + "    a = 1\n" * 70),
    line_length: ("nbdmirror/a.py", "a = '" + "x" * 96 + "'\n"),
    module_docstring: ("nbdmirror/a.py", "a = 1\n"),
    no_print: ("nbdmirror/a.py", "print(1)\n"),
    no_wall_clock: ("nbdmirror/a.py", "import time\nt = time.time()\n"),
    docstring_of_tests: ("tests/test_a.py", "def test_a():\n    pass\n"),
    no_skip: ("tests/test_a.py", "import pytest\n\n@pytest.mark.skip\ndef test_a(): ...\n"),
    no_sleep: ("tests/test_a.py", "import time\ntime.sleep(1)\n"),
    no_machine_path: ("docs/a.md", "see /ro" + "ot/a"),
    no_registry_host: ("a.lock", "--index" + "-url https://somewhere"),
    nothing_unfinished: ("nbdmirror/a.py", "# TO" + "DO: later\n"),
}

NEAR_MISSES: dict[Rule, tuple[str, str]] = {
    module_length: ("nbdmirror/a.py", '"""A.\n' + "b\n" * 600 + '"""\n' + "a = 1\n" * 150),
    function_length: ("nbdmirror/a.py", "def f():\n" + "    a = 1\n" * 69),
    line_length: ("nbdmirror/a.py", "a = '" + "x" * 94 + "'  # noqa: A001 - a reason\n"),
    no_print: ("cli/nbdmirror_cli/a.py", "print(1)\n"),
    no_wall_clock: ("nbdmirror/a.py", "import time\nt = time.monotonic()\n"),
    no_skip: ("tests/test_a.py", "def skip(n): ...\n\nskip(1)\n"),
    no_sleep: ("tests/test_a.py", "import asyncio\nasyncio.sleep(0)\n"),
    no_machine_path: ("docs/a.md", "{tmp_path}/wo" + "rk and net/ro" + "ot"),
}


def _files() -> list[File]:
    # Only what may be committed: no hidden directories (.git, .venv, caches) but .ci.
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if any(p.startswith(".") and p not in (".ci", ".gitignore") for p in parts):
            continue
        if path.is_file() and (path.suffix in TEXT_SUFFIXES or parts[0] == ".ci"):
            found.append(File("/".join(parts), path.read_text(encoding="utf-8")))
    return found


FILES = _files()


@pytest.mark.parametrize("rule", TEXT_RULES + PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_the_repository_is_tidy(rule: Rule) -> None:
    """Breaks in the field: nothing at once; the code becomes too hard to read to be trusted."""
    files = [f for f in FILES if rule in TEXT_RULES or f.path.endswith(".py")]
    found = [f"{f.path}:{line}: {text}" for f in files for line, text in rule(f)]
    assert not found, "\n".join([str(rule.__doc__), *found])


@pytest.mark.parametrize("rule", TEXT_RULES + PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_each_rule_finds_its_sample(rule: Rule) -> None:
    """Breaks in the field: a rule that finds nothing lets everything through unseen."""
    path, text = SAMPLES[rule]
    assert list(rule(File(path, text)))


@pytest.mark.parametrize("rule", NEAR_MISSES, ids=lambda rule: rule.__name__)
def test_a_near_miss_is_no_finding(rule: Rule) -> None:
    """Breaks in the field: a rule that cries wolf is switched off, and then it guards nothing."""
    path, text = NEAR_MISSES[rule]
    assert not list(rule(File(path, text)))


def test_the_walk_sees_the_repository() -> None:
    """Breaks in the field: a walk that finds no files calls any repository tidy."""
    assert {"nbdmirror/errors.py", "tests/test_tidy.py", "packaging/setup.sh"} <= {
        file.path for file in FILES
    }
