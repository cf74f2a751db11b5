"""The command line: exit codes, words, and what is sent to the engine."""

import inspect
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from nbdmirror import admin, errors
from nbdmirror.config import load
from nbdmirror.core.superblock import Flags
from nbdmirror.errors import NbdMirrorError
from nbdmirror_cli import options
from nbdmirror_cli.main import nbdmirror, run
from tests.cli.conftest import STATE, FakeEngine

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


class Shell:
    """Runs command lines for alpha and keeps what they print."""

    def __init__(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base = base
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str, node: str = "alpha") -> int:
        code = run([*words, "-c", str(self.base / "demo.toml"), "--node", node])
        self.out, self.err = self._capsys.readouterr()
        return code


@pytest.fixture
def shell(base: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A command line."""
    return Shell(base, capsys)


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command."""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))
    else:
        yield path


# These begin without a configuration, so nothing can be missing in one.
WITHOUT_CONFIG = {("completion",), ("create",), ("join",)}
# These print nothing that a program would read.
WITHOUT_JSON = {("engine", "run"), ("completion",)}


@pytest.mark.parametrize("words", list(leaves(nbdmirror)))
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, an operator at night meets a command that does not say what it does."""
    assert run([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert words in WITHOUT_CONFIG or "--config" in text
    assert words in WITHOUT_JSON or "--json" in text
    help_text = inspect.cleandoc(str(nbdmirror_command(words).help))
    assert len(help_text) > 20


def nbdmirror_command(words: tuple[str, ...]) -> click.Command:
    """The command behind the words."""
    command: click.Command = nbdmirror
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return command


def test_exit_codes_are_documented_and_differ() -> None:
    """If this fails, a script takes one failure for another."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, NbdMirrorError)
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & {0, 1, 2, 130}
    text = DOCUMENT.read_text(encoding="utf-8")
    named = {code for code in codes if f"| {code} |" in text}
    assert named | set(range(16, 24)) == set(codes)


def test_a_new_mirror_from_the_command_line(shell: Shell) -> None:
    """If this fails, the first steps of the documentation do not work."""
    assert shell("config", "check") == 0
    assert "no mistakes" in shell.out
    assert "does not give (c)" in shell.out
    assert shell("metadata", "create", "--size", "8MiB") == 0
    again = f"metadata create -c {shell.base}/demo.toml --join --size 8MiB"
    assert shell.out.splitlines()[-1].endswith(again)
    assert shell("metadata", "create", "--size", "8MiB", "--join", node="beta") == 0
    assert shell("metadata", "create", "--size", "8MiB") == errors.RefusedError.exit_code
    assert "not overwritten" in shell.err
    assert shell("metadata", "check") == 0
    assert shell("metadata", "show") == 0
    assert "uptodate" in shell.out
    assert shell("metadata", "show", "--json", node="beta") == 0
    assert json.loads(shell.out)["data_state"] == "blank"


def test_damage_has_an_exit_code(shell: Shell) -> None:
    """If this fails, monitoring takes a damaged node for a healthy one."""
    assert shell("metadata", "create", "--size", "8MiB", "--sparse") == 0
    (shell.base / "alpha" / "data").unlink()
    assert shell("metadata", "check") == errors.MetadataError.exit_code
    assert "means: the engine refuses to start" in shell.out
    assert shell("metadata", "check", "--json") == errors.MetadataError.exit_code
    assert json.loads(shell.out)["damaged"] is True


def test_mistakes_have_an_exit_code(shell: Shell) -> None:
    """If this fails, a deployment goes on with a configuration that cannot work."""
    assert shell("config", "check", node="gamma") == errors.ConfigError.exit_code
    assert "there are: alpha, beta" in shell.err
    assert shell("metadata", "create") == 2
    assert "--size" in shell.err
    assert shell("metadata", "create", "--size", "8MB") == 2
    assert shell("engine", "state") == errors.UnreachableError.exit_code
    assert "engine run" in shell.err
    assert run(["nonsense"]) == 2


def test_the_configuration_shown_has_no_secret(shell: Shell) -> None:
    """If this fails, a pasted `config show` gives the mirror away."""
    assert shell("config", "show", "--json") == 0
    assert json.loads(shell.out)["node"]["beta"]["address"] == "127.0.0.2:17789"
    assert "kkkk" not in shell.out
    assert shell("config", "show") == 0
    assert "kkkk" not in shell.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["mirrored", "(a) a write", "(b) an acknowledged", "does not give (c)"]),
        ({"session": None, "right_alone": True}, ["alone", "one copy", "does not give (c)"]),
        (
            {"frozen": True, "session": None, "question": "frozen", "frozen_reason": "link lost"},
            ["frozen", "link lost", "WAITS FOR", "engine alone", "engine demote"],
        ),
        (
            {
                "session": {"number": "01", "phase": "resync", "peer_primary": False},
                "resync": {"total_bytes": 400, "examined_bytes": 100, "copied_bytes": 50},
            },
            ["resync", "25.0 %", "one copy"],
        ),
        ({"role": "none", "session": None}, ["waiting", "none by this node"]),
        ({"failed": "fdatasync: EIO", "session": None}, ["failed", "EIO"]),
        ({"session": 3, "resync": 4, "dirty_bytes": "?", "new": [1]}, ["new", "does not give (c)"]),
        ({"refusal": "\x1b[2Jother mirror"}, ["other mirror"]),
        (
            {"refusal": "peer: Split brain: nodes 1 and 2 each went on"},
            ["Split brain", "on the node whose copy is given up", "engine give-up"],
        ),
    ],
)
def test_the_state_says_what_holds(
    shell: Shell, engine: FakeEngine, change: dict[str, Any], words: list[str]
) -> None:
    """If this fails, an operator believes in a second copy that is not there."""
    engine.state.update(change)
    assert shell("engine", "state") == 0
    missing = [word for word in words if word not in shell.out]
    assert not missing, shell.out
    assert "\x1b" not in shell.out
    if engine.state["session"] != STATE["session"]:
        assert "(a) a write" not in shell.out


@pytest.mark.parametrize(
    "name", ["promote", "demote", "alone", "reconnected", "resync", "drain", "stop"]
)
def test_a_command_is_bound_to_what_was_seen(shell: Shell, engine: FakeEngine, name: str) -> None:
    """If this fails, a command reaches an engine that has changed its role meanwhile."""
    assert shell("engine", name, "--json") == 0
    assert json.loads(shell.out) == STATE
    asked, sent = engine.requests
    assert asked["command"] == "state"
    assert (sent["command"], sent["instance"], sent["epoch"]) == (name, "ab" * 16, 3)
    assert not sent["args"].get("force")


def test_a_refusal_is_told_with_its_code(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, a refused promotion looks like one that was done."""

    def refuse(request: dict[str, Any]) -> list[Any]:
        if request["command"] == "state":
            return engine.answer(request)
        body = {"kind": "StaleCommandError", "reason": "look again", "remedy": ""}
        return [{"id": request["id"], "error": body}]

    engine.script = refuse
    assert shell("engine", "promote") == errors.StaleCommandError.exit_code
    assert "look again" in shell.err


@pytest.mark.parametrize(
    "words", [w for w in leaves(nbdmirror) if w not in WITHOUT_CONFIG | WITHOUT_JSON]
)
def test_an_error_is_json_where_json_was_asked_for(
    base: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """If this fails, a program that asked for JSON gets prose, or nothing, when it matters."""
    arguments: dict[tuple[str, ...], tuple[str, ...]] = {
        ("metadata", "create"): ("--size", "1MiB"),
        ("kept", "export"): ("image",),
        ("kept", "limit"): ("1MiB",),
    }
    more = arguments.get(words, ())
    code = run([*words, *more, "--json", "-c", str(base / "missing.toml")])
    out, err = capsys.readouterr()
    assert (code, err) == (errors.ConfigError.exit_code, "")
    error = json.loads(out)["error"]
    assert set(error) == {"kind", "reason", "remedy", "exit_code"}
    assert (error["kind"], error["exit_code"]) == ("ConfigError", code)
    assert "missing.toml" in error["reason"]
    assert run([*words, "--json", "--no-such-option"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"


def test_each_kind_of_error_is_named_in_json(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, a program takes one failure for another."""
    body = {"kind": "StaleCommandError", "reason": "look again", "remedy": ""}
    engine.script = lambda request: [{"id": request["id"], "error": body}]
    assert shell("engine", "state", "--json") == errors.StaleCommandError.exit_code
    error = json.loads(shell.out)["error"]
    assert (error["kind"], error["reason"]) == ("StaleCommandError", "state: look again")
    assert "engine state" in error["remedy"]
    assert shell("engine", "state", "--json", node="beta") == errors.UnreachableError.exit_code
    assert json.loads(shell.out)["error"]["kind"] == "UnreachableError"


def test_mistakes_are_a_list_in_json(shell: Shell) -> None:
    """If this fails, a deployment can show its operator only that something is wrong."""
    path = shell.base / "demo.toml"
    path.write_text(path.read_text(encoding="utf-8") + "colour = 1\n[engine]\nthreads = 65\n")
    assert shell("config", "check", "--json") == errors.ConfigError.exit_code
    facts = json.loads(shell.out)
    assert [line.partition(" ")[0] for line in facts["mistakes"]] == [
        "node.beta.colour:",
        "engine.threads",
    ]
    assert facts["error"]["exit_code"] == errors.ConfigError.exit_code
    path.write_text("=")
    assert shell("config", "check", "--json") == errors.ConfigError.exit_code
    (mistake,) = json.loads(shell.out)["mistakes"]
    assert "not valid TOML" in mistake


@pytest.mark.parametrize(
    ("words", "state", "loss"),
    [
        (("promote", "--force"), "inconsistent", "in the middle of a resync"),
        (("promote", "--force"), "outdated", "known to be behind"),
        (("promote", "--force"), "blank", "everything is lost"),
        (("promote", "--force"), "from-the-future", "not known"),
        (("discard",), "uptodate", "All 1.0 GiB"),
    ],
)
def test_a_loss_is_named_and_confirmed(
    shell: Shell, engine: FakeEngine, words: tuple[str, ...], state: str, loss: str
) -> None:
    """If this fails, one word destroys the better copy."""
    engine.state.update(data_state=state, role="none")
    assert shell("engine", *words) == 2  # nobody is at the terminal
    assert loss in shell.err
    assert "--yes" in shell.err
    assert [request["command"] for request in engine.requests] == ["state"]
    assert shell("engine", *words, "--yes") == 0
    assert loss in shell.err
    assert engine.requests[-1]["command"] == words[0]


def test_a_loss_that_is_not_confirmed_is_not_suffered(
    shell: Shell, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, "n" counts as yes, or nobody knows whether it did."""
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert shell("engine", "promote", "--force") == errors.RefusedError.exit_code
    assert "not confirmed; nothing was done" in shell.err
    assert [request["command"] for request in engine.requests] == ["state"]


class Terminal(io.StringIO):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        """Somebody can answer."""
        return True


def test_nobody_confirms_a_discard_that_is_refused(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, an operator agrees to lose a copy and is then told to do something else."""
    assert shell("engine", "discard", "--yes") == errors.RefusedError.exit_code
    assert "discard: this node is primary; demote it first" in shell.err
    assert "are given up" not in shell.err
    assert [request["command"] for request in engine.requests] == ["state"]


def answer_after(engine: FakeEngine, change: dict[str, Any]) -> None:
    """Let the engine's state change with the next command."""

    def script(request: dict[str, Any]) -> list[Any]:
        if request["command"] != "state":
            engine.state.update(change)
        return engine.answer(request)

    engine.script = script


@pytest.mark.parametrize(
    ("session", "said"), [(STATE["session"], "a new session"), (None, "noted; the peer is not")]
)
def test_resync_says_when_it_compares(
    shell: Shell, engine: FakeEngine, session: object, said: str
) -> None:
    """If this fails, an operator waits for the end of a comparison that does not run."""
    engine.state["session"] = session
    answer_after(engine, {"session": None, "frozen": True})
    assert shell("engine", "resync") == 0
    assert ("waiting for the peer to return" in shell.out) == (session is not None)
    assert said in shell.out


def test_a_planned_promotion_is_no_freeze(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, a swap that goes well looks like one that needs an answer."""
    engine.state["role"] = "none"
    answer_after(engine, {"role": "primary", "session": None, "frozen": True})
    assert shell("engine", "promote") == 0
    assert "(now primary, waiting for the peer to return as secondary)" in shell.out


def test_the_next_command_is_complete(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the line that is copied to the other node is refused or makes another file."""
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", shell.base)
    assert shell("metadata", "create", "--size", "8MiB", "--sparse") == 0
    wanted = "Next, on beta: nbdmirror metadata create -m demo --join --size 8MiB --sparse"
    assert shell.out.splitlines()[-1] == wanted


def rows_of(text: str) -> dict[str, str]:
    """The rows of a printed table."""
    cells = [[each.strip() for each in line.split("│")] for line in text.splitlines()]
    return {row[1]: row[2] for row in cells if len(row) == 4}


def test_one_thing_has_one_word(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, a flag that the state shows is not found in the metadata, or the reverse."""
    assert shell("metadata", "create", "--size", "8MiB", "--join", node="beta") == 0
    assert shell("metadata", "show", node="beta") == 0
    rows = rows_of(shell.out)
    assert (rows["generation"], rows["fell back"]) == ("-", "no")
    engine.state.update(generation="00" * 16, fell_back=False)
    assert shell("engine", "state") == 0
    rows = rows_of(shell.out)
    assert (rows["generation"], rows["fell back"]) == ("-", "no")
    assert shell("config", "show") == 0
    assert rows_of(shell.out)["engine.lock_memory"] == "true"
    config = load(shell.base / "demo.toml", "alpha")
    born = admin.first_superblock(config, 1 << 30, join=False, zeroed=True)
    facts = admin.superblock_facts(replace(born, flags=Flags.WAS_PRIMARY))
    assert facts["flags"] == STATE["flags"]


def test_events_are_lines(shell: Shell, engine: FakeEngine) -> None:
    """If this fails, the question that an engine asks does not reach the one who can answer."""
    event = {"number": 5, "at_ms": 1500, "event": "question", "question": "frozen"}
    engine.script = lambda request: [{"id": request["id"], "event": event}, None]
    assert shell("engine", "events") == 0
    assert shell.out.startswith("5  1.500 s  question: question=frozen\n")
    assert "engine alone" in shell.out
    assert shell("engine", "events", "--json") == 0
    assert json.loads(shell.out) == event


def test_the_only_mirror_needs_no_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, every command needs a name, or one of two mirrors is chosen by chance."""
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", base)
    assert options.find_config(None, None) == base / "demo.toml"
    assert options.find_config(None, "demo") == base / "demo.toml"
    assert options.find_config(base / "x", None) == base / "x"
    (base / "second.toml").touch()
    with pytest.raises(errors.ConfigError, match="demo, second"):
        options.find_config(None, None)
    with pytest.raises(click.UsageError):
        options.find_config(None, "../demo")


def test_a_mirror_that_is_not_there_leads_to_those_that_are(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a typing error is told as an error of the file system, and on a new server
    nobody says how to begin.
    """
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", base)
    with pytest.raises(errors.ConfigError, match=r"no mirror nope .*; here are: demo"):
        options.find_config(None, "nope")
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", base / "none")
    for name in ("nope", None):
        with pytest.raises(errors.ConfigError, match="nbdmirror create NAME"):
            options.find_config(None, name)
