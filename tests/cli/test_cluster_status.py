"""Status, explanation and watch: exit codes, words, shapes, and what cannot break them."""

import copy
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nbdmirror import errors
from nbdmirror.control_client import ControlClient, Listener
from nbdmirror_cli import options
from nbdmirror_cli.cluster import ROLE_CODES
from nbdmirror_cli.main import run
from nbdmirror_cli.status_view import (
    Screen,
    duration_text,
    event_line,
    explanation,
    explanation_view,
    status_view,
    summary,
)
from tests.cli.fake_controller import STATUS, FakeController
from tests.cli.test_commands import Shell, rows_of

COMMAND = Path(sys.executable).parent / "nbdmirror"
BOUND_S = 60.0


@pytest.fixture
def shell(base: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A command line."""
    return Shell(base, capsys)


@pytest.fixture
def controller(base: Path) -> Iterator[FakeController]:
    """A stand-in for alpha's controller."""
    fake = FakeController(base / "controller.sock")
    yield fake
    fake.close()


# --- status ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "code"), [*ROLE_CODES.items()])
def test_quiet_is_the_role_and_its_code(
    shell: Shell, controller: FakeController, role: str, code: int
) -> None:
    """Breaks in the field: a script that asks for the role acts on another one."""
    assert ROLE_CODES == {"STOP": 0, "WAIT": 1, "ALONE": 2, "PRIM": 3, "SECOND": 4}
    controller.change(role=role, exit_code=99)
    assert shell("status", "--quiet") == code
    assert (shell.out, shell.err) == (f"{role}\n", "")
    assert controller.requests == [("status", {})]


def test_quiet_of_a_role_that_is_not_known(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: a newer controller's role is taken for STOP, or steers the terminal."""
    controller.change(role="REST\x1b[2J", exit_code=7)
    assert shell("status", "-q") == 7
    assert shell.out == "REST?[2J\n"
    controller.change(exit_code="no code")
    assert shell("status", "-q") == errors.NbdMirrorError.exit_code


def test_quiet_without_a_controller_or_a_mirror(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: monitoring cannot tell a dead controller from a name it has wrong."""
    assert shell("status", "--quiet") == 5
    assert (shell.out, shell.err) == ("", "")
    assert run(["status", "-q", "-c", str(shell.base / "missing.toml")]) == 6
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", shell.base)
    assert run(["status", "-q", "-m", "other"]) == 6
    assert run(["status", "-q", "-m", "demo", "--node", "alpha"]) == 5
    (shell.base / "second.toml").touch()
    assert run(["status", "-q"]) == 6  # which of the two?
    assert capsys.readouterr() == ("", "")
    assert run(["status", "-q", "-m", "second"]) == errors.ConfigError.exit_code
    assert "mirror: is not set" in capsys.readouterr().err
    assert run(["status", "-q", "--json", "-m", "demo"]) == 2


def test_status_without_a_controller_says_how_to_start_one(shell: Shell) -> None:
    """Breaks in the field: the commonest mistake of all sends its reader to the engine."""
    assert shell("status") == errors.UnreachableError.exit_code
    assert f"no controller is running here (start it with `nbdmirrord -c {shell.base}" in shell.err
    assert "engine" not in shell.err
    assert shell("status", "--json") == errors.UnreachableError.exit_code
    assert json.loads(shell.out)["error"]["kind"] == "UnreachableError"


def test_the_client_names_who_should_be_there(tmp_path: Path, controller: FakeController) -> None:
    """Breaks in the field: whoever asks the controller is told that it is the engine's fault."""
    listener = Listener("controller", "nbdmirrord -m demo")
    with pytest.raises(errors.UnreachableError, match="start it with `nbdmirrord -m demo`"):
        ControlClient(tmp_path / "none.sock", BOUND_S, listener).call("status")
    controller.extra["start"] = {"x": 1}
    with ControlClient(controller.path, BOUND_S, listener) as client:
        assert client.call("start")["x"] == 1
        client.path = tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(errors.UnreachableError, match="no controller is running"):
        ControlClient(tmp_path / "file", BOUND_S, listener).call("status")


def test_status_shows_everything(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: an operator at night does not see what the controller knows."""
    controller.change(remedy="do this", order="swap", new_fact=["x", "y"])
    assert shell("status") == 0
    rows = rows_of(shell.out)
    assert "mirror demo, alpha (node 1)" in shell.out
    wanted = {
        "role": "PRIM ready  serves the application, for 2 h 5 min",
        "reason": "this node serves, and the peer has every write",
        "to do": "do this",
        "order": "swap",
        "engine": "mirrored",
        "data": "uptodate, of 1.0 GiB (1073741824)",
        "peer": "beta: SECOND ready, data uptodate, alpha serves; this node has every write",
        "link 1": "up, 10.1.0.1:7789 - 10.1.0.2:7789, silent for 40 ms, round trip 0.4 ms",
        "link channel": "DOWN, 10.1.0.1:7789 - 10.1.0.2:7789, no route to host",
        "service": "up",
        "application": "running",
        "device": "/dev/loop0, by nbdfuse and a loop device",
        "mount": "mounted at /srv/demo",
        "address": "10.0.0.100/24 on eth0: held",
        "checker web": "DOWN for 12 s, http, when primary, then restart: status 500",
        "switches": "checkers on, failover OFF, boot on",
        "actions": "1 of 3 within 24 h, last: restart, by web",
        "arbiter": "none, not asked",
        "takeover": "automatic",
        "controller": "0.1.0, process 4712, up for 1 d 1 h",
        "new fact": "x, y",
    }
    assert {key: rows.get(key) for key in wanted} == wanted
    assert all(line in shell.out for line in STATUS["promise"])
    assert "\x1b" not in shell.out  # no terminal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": None, "engine_reason": "died 4 times"}, ["does not run: died 4 times"]),
        ({"peer": {"heard": False, "silent_ms": 9000}}, ["beta: not heard, silent for 9000 ms"]),
        (
            {"peer": {"config_differs": True, "config_differences": ["mount.type: here ext4"]}},
            ["configuration of beta is another one", "differs mount.type: here ext4"],
        ),
        (
            {"service": {"state": "failed", "reason": "exit code 3"}},
            ["failed: exit code 3", "/log"],
        ),
        ({"service": {"mounted": False}}, ["not mounted; its place is /srv/demo"]),
        ({"actions": {"max": 0}}, ["1 within 24 h"]),
        ({"engine": {"dirty_bytes": 4096}}, ["the peer may lack 4.0 KiB"]),
        (
            {"engine": {"frozen": True, "question": "frozen", "frozen_reason": "link lost"}},
            ["link lost", "writes wait for the peer"],
        ),
        (
            {"engine": {"refusal": "peer: Split brain: both"}},
            ["Split brain", "whose copy is given up"],
        ),
        (
            {
                "role": "ALONE",
                "engine": {
                    "session": {"number": "1", "phase": "resync"},
                    "resync": {
                        "total_bytes": 1000 << 20,
                        "examined_bytes": 420 << 20,
                        "copied_bytes": 50 << 20,
                        "bytes_per_s": 10 << 20,
                    },
                },
            },
            ["42.0 % of 1000.0 MiB", "50.0 MiB (52428800) copied", "10.0 MiB/s", "about 58 s left"],
        ),
    ],
)
def test_status_says_what_is_wrong(
    shell: Shell, controller: FakeController, change: dict[str, Any], words: list[str]
) -> None:
    """Breaks in the field: what needs somebody looks like what is well."""
    controller.change(**change)
    assert shell("status") == 0
    text = " ".join(shell.out.replace("│", " ").split())
    assert not [each for each in words if each not in text], shell.out


def test_status_is_json(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: a program that reads the status gets another one than was answered."""
    assert shell("status", "--json") == 0
    assert json.loads(shell.out) == STATUS
    assert shell("explain", "--json") == 0
    assert json.loads(shell.out) == explanation(STATUS)


def mutations(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The status with each member, at any depth, missing, or of any other type, or hostile."""
    others: list[Any] = [None, -1e300, "\x1b[2J\r\n\u202e", [1, {"a": []}], {"b": {}}]

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        steps = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in steps:
            yield (*path, key)
            if isinstance(member, dict | list):
                yield from places(member, (*path, key))

    for *way, last in list(places(facts, ())):
        for other in (Ellipsis, *others):
            changed = copy.deepcopy(facts)
            place: Any = changed
            for step in way:
                place = place[step]
            if other is Ellipsis:
                del place[last]
            else:
                place[last] = other
            yield changed


@pytest.mark.slow
def test_nothing_in_a_status_breaks_the_view(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks in the field: a controller of another version, or a hostile peer, gives a traceback
    instead of a status, or clears the screen and writes its own.
    """
    resyncs = copy.deepcopy(STATUS)
    resyncs["engine"]["resync"] = {"total_bytes": 100, "examined_bytes": 10, "bytes_per_s": 3}
    resyncs["engine"]["split"] = {"found_s": 5, "parted_s": None, "own_bytes": 1, "peer_bytes": 2}
    resyncs["engine"]["kept"] = {"complete": False, "used_bytes": 1, "problem": "it"}
    screen, count = Screen(), 0
    for facts in ({}, *mutations(resyncs)):
        for view in (status_view(facts), explanation_view(facts), summary(facts)):
            screen.print(view, markup=False)
        json.dumps(explanation(facts))
        count += 1
    assert count > 300
    out = capsys.readouterr().out
    assert not [char for char in ("\x1b", "\r", "\u202e") if char in out]
    assert "?[2J" in out


def test_a_line_break_of_the_peer_draws_no_row(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: text of the peer shows a promise that is not in force."""
    controller.change(peer={"reason": "well\n│ promise │ everything"}, reason="a\nb")
    assert shell("status") == 0
    assert "alone\n" not in shell.out
    assert rows_of(shell.out)["reason"] == "a b"
    assert not [line for line in shell.out.splitlines() if line.startswith("│ promise │ every")]
    assert "\n" not in summary(controller.status)


def test_what_guards_the_channel_is_shown(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: `tls = "on"` is in the file, and nobody sees whether it is in force."""
    session = {"number": "01", "phase": "synced", "integrity": "crc", "tls": ""}
    controller.change(engine={"session": session})
    assert shell("status") == 0
    assert rows_of(shell.out)["channel"] == "crc"
    controller.change(engine={"session": {**session, "tls": "TLSv1.3 TLS_AES_256_GCM_SHA384"}})
    assert shell("status") == 0
    assert rows_of(shell.out)["channel"] == "crc, TLSv1.3 TLS_AES_256_GCM_SHA384"


def test_events_of_any_shape_are_one_line() -> None:
    """Breaks in the field: one strange event ends the only view of what goes on."""
    event = {"number": 5, "at_ms": 1500, "event": "role", "role": "PRIM", "reason": "well"}
    assert event_line(event) == "5  1.500 s  role: role PRIM: well"
    assert event_line({}) == "?  ?  ?"
    assert event_line({"event": "note", "reason": "a\n\x1b[2J"}) == "?  ?  note: a ?[2J"


def test_durations_are_short() -> None:
    """Breaks in the field: nobody reads "for 266400.3 s"."""
    texts = {0: "0 s", 119: "119 s", 120: "2 min", 7512.3: "2 h 5 min", 266_400: "3 d 2 h"}
    assert {key: duration_text(key) for key in texts} == texts
    assert [duration_text(each) for each in (None, "x", True, -1, float("nan"))] == [""] * 5


# --- why ------------------------------------------------------------------------------------------


def test_explain_says_why_and_what_to_type(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: an operator learns that a node waits, but not what for."""
    controller.change(
        role="WAIT",
        readiness="not-ready",
        reason="beta serves; waiting for its engine (rule 14)",
        row="peer serves",
        remedy="mend the cable",
        engine={"refusal": "authentication failed", "promote_refusal": "its copy is outdated"},
        arbiter={"reason": "no echo (rule 9)"},
        explain=["the engine is not connected"],
    )
    assert shell("explain") == 0
    rows = rows_of(shell.out)
    wanted = {
        "because": "beta serves; waiting for its engine (rule 14)",
        "decided by": 'row "peer serves" of the table of decisions: nothing more to be done now',
        "why": "the engine is not connected",
        "refused": "authentication failed",
        "not promoted": "its copy is outdated",
        "arbiter": "no echo (rule 9)",
        "to do": "mend the cable",
        "rules": "14: see docs/safety.md",
    }
    assert {key: rows.get(key) for key in wanted} == wanted
    assert shell("explain", "--json") == 0
    facts = json.loads(shell.out)
    assert (facts["row"], facts["rules"], facts["refusal"]) == (
        "peer serves",
        [14],
        "authentication failed",
    )


def test_explain_says_nothing_twice(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: the one sentence that helps is lost among its own repetitions, or the
    words of a peer that is long dead are taken for news.
    """
    reason = "beta is silent: waiting"
    controller.change(
        reason=reason,
        explain=[f"Row 'x' of the policy decided: {reason}", "The application: no disk", "more"],
        service={"reason": "no disk"},
        peer={"heard": False, "reason": "I serve"},
    )
    assert shell("explain") == 0
    rows = [line.split("│") for line in shell.out.splitlines() if "│" in line]
    assert [row[2].strip() for row in rows if row[1].strip() == "why"] == ["more"]
    assert shell.out.count(reason) == shell.out.count("no disk") == 1
    assert "I serve" not in shell.out


def test_round_trips_are_short(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: a table with 0.8134765625 ms, or how often the engine was looked at
    taken for the time that a network needs.
    """
    ends = {"local": "a", "remote": "b", "up": True, "silent_ms": 1, "reason": ""}
    times = {"1": 0.8134765625, "2": 123.4, "channel": 201.5}
    controller.change(links=[{**ends, "name": name, "rtt_ms": ms} for name, ms in times.items()])
    assert shell("status") == 0
    rows = rows_of(shell.out)
    assert rows["link 1"] == "up, a - b, silent for 1 ms, round trip 0.81 ms"
    assert rows["link 2"].endswith("round trip 120 ms")
    assert "round trip" not in rows["link channel"]


# --- processes ------------------------------------------------------------------------------------


class Watch:
    """`nbdmirror status --watch` as a process, on a pipe or on a terminal."""

    def __init__(self, base: Path, *words: str, terminal: bool) -> None:
        self._read, write = pty.openpty() if terminal else os.pipe()
        options = ("-c", str(base / "demo.toml"), "--node", "alpha")
        line = [str(COMMAND), "status", "--watch", *words, *options]
        self.process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE,
            env={**os.environ, "COLUMNS": "120", "LINES": "60", "TERM": "xterm"},
        )  # fmt: skip
        os.close(write)
        self.text = ""

    def until(self, there: Callable[[str], bool]) -> None:
        """Read what is printed until it is there."""
        until_s = time.monotonic() + BOUND_S
        while not there(self.text):
            left_s = until_s - time.monotonic()
            assert left_s > 0, self.text
            # `there` may look at something else than the text, so it is asked again soon.
            if select.select([self._read], [], [], min(left_s, 0.1))[0]:
                piece = os.read(self._read, 65_536)
                assert piece, self.text
                self.text += piece.decode()

    def hang_up(self) -> None:
        """Read no more."""
        if self._read >= 0:
            os.close(self._read)
            self._read = -1

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it said on standard error."""
        _, said = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, said.decode()

    def close(self) -> None:
        """End it, whatever it does."""
        self.hang_up()
        self.process.kill()
        self.process.communicate(timeout=BOUND_S)


@pytest.fixture
def watch(base: Path) -> Iterator[Callable[..., Watch]]:
    """Starts watches, and ends them."""
    with ExitStack() as stack:

        def started(*words: str, terminal: bool) -> Watch:
            made = Watch(base, *words, terminal=terminal)
            stack.callback(made.close)
            return made

        yield started


@pytest.mark.slow
def test_a_watch_prints_changes_and_ends_with_its_reader(
    controller: FakeController, watch: Callable[..., Watch]
) -> None:
    """Breaks in the field: a watch in a pipe fills a log with what does not change, misses what
    does, or stays behind for ever when its reader has gone.
    """
    running = watch(terminal=False)
    running.until(lambda text: "PRIM ready, data uptodate" in text)
    controller.change(since_s=9999, peer={"silent_ms": 7})
    running.until(lambda _: len(controller.requests) > 2)
    controller.change(role="ALONE", reason="the peer is lost")
    running.until(lambda text: "ALONE ready, data uptodate" in text and text.endswith("lost\n"))
    assert len(running.text.splitlines()) == 2
    running.hang_up()
    assert running.ended() == (0, "")


@pytest.mark.slow
def test_a_watch_sees_the_controller_go_and_come(
    base: Path, controller: FakeController, watch: Callable[..., Watch]
) -> None:
    """Breaks in the field: the view of a restart ends with the restart."""
    running = watch("--json", terminal=False)
    running.until(lambda text: '"role": "PRIM"' in text)
    controller.close()
    running.until(lambda text: "no controller is running here" in text)
    again = FakeController(base / "controller.sock")
    try:
        again.change(role="WAIT")
        running.until(lambda text: '"role": "WAIT"' in text and text.endswith("\n"))
    finally:
        again.close()
    lines = [json.loads(line) for line in running.text.splitlines()]
    assert {"UnreachableError"} == {each["error"]["kind"] for each in lines if "error" in each}
    running.process.send_signal(signal.SIGINT)
    code, said = running.ended()
    assert (code, "Traceback" in said) == (130, False)


@pytest.mark.slow
def test_a_watch_on_a_terminal_ends_with_ctrl_c(
    controller: FakeController, watch: Callable[..., Watch]
) -> None:
    """Breaks in the field: a resync cannot be watched, or leaves a terminal without a cursor."""
    session = {"number": "01", "phase": "resync"}
    progress = {"total_bytes": 1000, "examined_bytes": 420, "copied_bytes": 1}
    controller.change(role="ALONE", engine={"session": session, "resync": progress})
    running = watch(terminal=True)
    running.until(lambda text: "42.0 %" in text and "\u2501" in text)
    controller.change(engine={"resync": {**progress, "examined_bytes": 810}})
    running.until(lambda text: "81.0 %" in text)
    running.process.send_signal(signal.SIGINT)
    running.until(lambda text: text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"))
    code, said = running.ended()
    assert (code, said.strip()) == (130, "nbdmirror: interrupted")
