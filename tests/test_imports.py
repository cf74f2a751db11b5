"""The import rules that hold whatever import-linter can see, read from the syntax of each file.

Complements the contracts in pyproject.toml (layers, pure core): those need importable packages;
these also cover imports inside functions, the plugin, and the two packages that must not know each
other. Owns the list of what the core may not touch.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Clocks, chance, files, threads, sockets: whatever the simulator could not replay from a seed.
IMPURE = {
    "asyncio",
    "click",
    "concurrent",
    "datetime",
    "fcntl",
    "io",
    "logging",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "queue",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "uuid",
    "uvloop",
}

# The CLI talks to a live engine through the control socket, to the files of a stopped one through
# admin, and starts one through the launcher. All else would act behind an engine's back.
CLI_MAY_IMPORT = (
    "nbdmirror.admin",
    "nbdmirror.certificate",  # an engine reads it once, at its start
    "nbdmirror.config",
    "nbdmirror.config_files",
    "nbdmirror.control_client",
    "nbdmirror.controller.traces",
    "nbdmirror.core",
    "nbdmirror.creation",
    "nbdmirror.engine_user",
    "nbdmirror.errors",
    "nbdmirror.invitation",
    "nbdmirror.kept",
    "nbdmirror.launcher",
    "nbdmirror.limits",
    "nbdmirror.metastore",
    "nbdmirror.token_exchange",
)


def _modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports_of(source: str) -> Iterator[str]:
    """Every module named by an import statement, wherever it stands; for `from` with its names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def _imports(folder: str) -> Iterator[tuple[str, str]]:
    for path in _modules(folder):
        for name in imports_of(path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT).as_posix(), name


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def test_the_reader_sees_every_form_of_import() -> None:
    """Breaks in the field: an import the reader misses takes a clock into the core unseen."""
    source = "import a.b as c\nfrom d import e\ndef f():\n    from g.h import i\n    import j\n"
    assert sorted(imports_of(source)) == ["a.b", "d.e", "g.h.i", "j"]


def test_the_core_is_pure() -> None:
    """Breaks in the field: the simulator replays another program than the one that is shipped."""
    found = [
        f"{p}: {name}" for p, name in _imports("nbdmirror/core") if name.split(".")[0] in IMPURE
    ]
    assert not found, found
    assert _modules("nbdmirror/core")


def test_the_core_knows_nothing_above_it() -> None:
    """Breaks in the field: state on which safety hangs is changed by code without a simulator."""
    below = ("nbdmirror.core", "nbdmirror.errors", "nbdmirror.limits")
    ours = [(p, n) for p, n in _imports("nbdmirror/core") if _within(n, ("nbdmirror",))]
    assert not [f"{p}: {n}" for p, n in ours if not _within(n, below)]


def test_the_package_does_not_know_its_users() -> None:
    """Breaks in the field: an engine dies at start because the CLI or a test kit is not there."""
    users = ("nbdmirror_cli", "nbdmirror_plugin", "cli", "plugin", "tests", "bench", "pytest")
    assert not [f"{p}: {n}" for p, n in _imports("nbdmirror") if _within(n, users)]


def test_the_cli_stays_in_front_of_the_engine() -> None:
    """Breaks in the field: a command changes data or metadata behind the back of a live engine."""
    ours = [(p, n) for p, n in _imports("cli") if _within(n, ("nbdmirror",))]
    allowed = (*CLI_MAY_IMPORT, "nbdmirror.__version__")
    assert not [f"{p}: {n}" for p, n in ours if not _within(n, allowed)]


def test_folders_are_not_import_names() -> None:
    """Breaks in the field: `cli` and `plugin` shadow, or are shadowed by, a user's own modules."""
    everywhere = [i for folder in ("nbdmirror", "cli", "plugin", "tests") for i in _imports(folder)]
    assert not [f"{p}: {n}" for p, n in everywhere if _within(n, ("cli", "plugin"))]
    assert not [f for f in ("cli/__init__.py", "plugin/__init__.py") if (ROOT / f).exists()]
