"""The commands of the controller: what is sent, waited for, confirmed and refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdmirror import errors
from nbdmirror_cli.main import run
from nbdmirror_cli.status_view import (
    Screen,
    plan_view,
)
from tests.cli.fake_controller import STATUS, FakeController
from tests.cli.test_commands import Shell, Terminal, rows_of

COMMAND = Path(sys.executable).parent / "nbdmirror"
BOUND_S = 60.0
REFUSAL = {
    "kind": "RefusedError",
    "reason": "the peer is primary",
    "remedy": "type `nbdmirror swap`",
    "exit_code": 13,
}
PLAN = {
    "plan": [
        {"key": "checker.web.fall", "old": 2, "new": 3, "how": "online"},
        {"key": "probe.address", "old": "a:1", "new": "a:2", "how": "restart the controller"},
        {"key": "device.extent", "old": "4KiB", "new": "8KiB", "how": "not possible: created so"},
    ]
}


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


# --- orders ---------------------------------------------------------------------------------------

STOP_ARGS = {"both": False, "shutdown": False}
ORDERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    # What the node is before, and what it becomes, step by step.
    "start": (
        {"role": "STOP", "readiness": "not-ready"},
        [
            {"role": "WAIT", "readiness": "transient", "reason": "the engine is being started"},
            {"role": "SECOND", "readiness": "transient", "reason": "being brought up to date"},
        ],
    ),
    "stop": ({}, [{"readiness": "transient"}, {"role": "STOP", "readiness": "not-ready"}]),
    "prim": (
        {"role": "SECOND"},
        [{"role": "ALONE", "readiness": "transient"}, {"role": "PRIM", "readiness": "ready"}],
    ),
    "second": ({}, [{"readiness": "transient"}, {"role": "SECOND"}]),
    "swap": ({}, [{"order": "swap"}, {"role": "SECOND", "order": None}]),
    "restart": (
        {},
        [
            {"order": "restart", "service": {"state": "leaving"}},
            {"order": "restart", "service": {"state": "entering"}},
            {"order": None, "service": {"state": "up"}},
        ],
    ),
    "resync": (
        {},
        [
            {"engine": {"session": {"number": "01", "phase": "resync"}}},
            {"engine": {"session": {"number": "01", "phase": "synced"}}},
        ],
    ),
    "mount": (
        {"service": {"mounted": False}},
        [{"readiness": "x"}, {"service": {"mounted": True}}],
    ),
    "unmount": ({}, [{"readiness": "x"}, {"service": {"mounted": False, "device": ""}}]),
}
# A restart is over at once where nothing shows that it has begun.
SEEN_AT_ONCE = {"restart": {"order": "restart"}}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_given_and_waited_for(
    shell: Shell, controller: FakeController, name: str
) -> None:
    """Breaks in the field: a script goes on while the node is still what it was, or for ever."""
    before, steps = ORDERS[name]
    controller.change(**before)
    controller.extra[name] = {"done": "it is\x1b ordered", **SEEN_AT_ONCE.get(name, {})}
    controller.then.extend(steps)
    assert shell(name) == 0
    forced = {"force": False}
    args = {"prim": forced, "second": forced, "stop": STOP_ARGS}.get(name, {})
    assert controller.orders == [(name, args)]
    assert not controller.then, "it was waited for to the last step"
    assert f"{name}: it is? ordered\n" in shell.out
    assert f"{name}: waiting; now " in shell.err


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_not_waited_for(shell: Shell, controller: FakeController, name: str) -> None:
    """Breaks in the field: a unit that must return at once hangs for two minutes."""
    controller.change(**ORDERS[name][0])
    assert shell(name, "--no-wait", "--json") == 0
    answer = json.loads(shell.out)
    assert answer == {**controller.status, "done": f"{name} is accepted"}
    assert [each for each, _ in controller.requests] == ["status", name]
    assert shell.err == ""


def test_a_swap_from_the_secondary(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: a swap that was typed on the other node is waited for in vain."""
    controller.change(role="SECOND")
    controller.then.extend([{"role": "ALONE", "readiness": "transient"}, {"readiness": "ready"}])
    assert shell("swap", "--json") == 0
    facts = json.loads(shell.out)
    assert (facts["role"], facts["readiness"], facts["done"]) == (
        "ALONE",
        "ready",
        "swap is accepted",
    )


def test_a_resync_without_a_peer_is_noted(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: who wants a comparison waits for a peer that is not there."""
    controller.change(engine={"session": None})
    assert shell("resync") == 0
    assert [each for each, _ in controller.requests] == ["status", "resync"]


def test_what_is_not_done_in_time_goes_on(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: an order that hangs hangs its script, or is taken for done."""
    controller.change(remedy="look at beta")
    assert shell("stop", "--timeout", "0") == errors.NbdMirrorError.exit_code
    assert "stop: accepted, but not done within 0 s; it goes on" in shell.err
    assert "look at beta" in shell.err
    assert [each for each, _ in controller.requests] == ["status", "stop"]  # and not once more
    assert shell("stop", "--timeout", "0", "--json") == errors.NbdMirrorError.exit_code
    assert json.loads(shell.out)["error"]["kind"] == "NbdMirrorError"


def test_a_service_that_fails_ends_the_wait(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: an application that does not start is waited for to the end."""
    controller.change(role="SECOND")
    failed = {"state": "failed", "reason": "start ended with 3"}
    controller.then.append({"role": "ALONE", "readiness": "not-ready", "service": failed})
    controller.then.append({"reason": "never asked for"})
    assert shell("prim", "--timeout", str(BOUND_S)) == errors.NbdMirrorError.exit_code
    assert "prim: accepted, and failed: now ALONE not-ready" in shell.err
    assert len(controller.then) == 1


def test_a_resync_that_waits_for_room_ends_the_wait(
    shell: Shell, controller: FakeController
) -> None:
    """Breaks in the field: the operator waits for a resync that waits for the operator."""
    controller.change(role="WAIT", readiness="x")
    more = {"engine": {"resync_waits": "no room"}, "remedy": "`nbdmirror kept limit SIZE` here"}
    controller.then.extend([more, {"reason": "never asked for"}])
    assert shell("second", "--timeout", str(BOUND_S)) == errors.NbdMirrorError.exit_code
    assert "second: accepted, and failed: now WAIT x" in shell.err
    assert "nbdmirror kept limit" in shell.err
    assert len(controller.then) == 1


@pytest.mark.parametrize(("name", "role"), [("prim", "WAIT"), ("swap", "PRIM"), ("second", "PRIM")])
def test_an_order_that_is_given_up_ends_the_wait(
    shell: Shell, controller: FakeController, name: str, role: str
) -> None:
    """Breaks in the field: an order that the engine refused is waited for to the end."""
    controller.change(role=role, readiness="x")
    controller.extra[name] = {"order": name}
    refused = "The last order was refused: its copy is blank"
    controller.then.extend([{"order": name}, {"order": None, "explain": [refused]}])
    assert shell(name, "--timeout", str(BOUND_S)) == errors.NbdMirrorError.exit_code
    assert f"{name}: accepted, and given up: now {role} x" in shell.err
    assert refused in shell.err


def test_a_role_that_is_shown_late_is_no_failure(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: a swap that went well is called given up."""
    controller.extra["swap"] = {"order": "swap"}
    controller.then.extend([{"order": None}, {"role": "SECOND"}])
    assert shell("swap", "--timeout", str(BOUND_S)) == 0


def test_nobody_confirms_a_discard_that_is_refused(
    shell: Shell, controller: FakeController
) -> None:
    """Breaks in the field: an operator agrees to lose a copy and is then told something else."""
    assert shell("second", "--force", "--yes") == errors.RefusedError.exit_code
    assert "second --force: this node serves" in shell.err
    assert "given up" not in shell.err
    assert controller.orders == []


def test_an_old_failure_does_not_end_the_wait(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: the restart that mends an application is called failed at once."""
    failed = {"state": "failed", "reason": "start ended with 3"}
    controller.change(readiness="not-ready", service=failed)
    controller.then.extend([{"since_s": 1}, {"readiness": "ready", "service": {"state": "up"}}])
    assert shell("restart", "--timeout", str(BOUND_S)) == 0


@pytest.mark.parametrize("name", [*ORDERS, "status", "explain", "apply"])
def test_a_refusal_is_reason_and_remedy(
    shell: Shell, controller: FakeController, name: str
) -> None:
    """Breaks in the field: a refusal looks like success, or does not say what would help."""
    controller.refusals = dict.fromkeys(("reload", name), REFUSAL)
    sent = "reload" if name == "apply" else "status" if name == "explain" else name
    controller.refusals[sent] = REFUSAL
    assert shell(name) == errors.RefusedError.exit_code
    assert shell.err == f"nbdmirror: {sent}: the peer is primary; type `nbdmirror swap`\n"
    assert shell(name, "--json") == errors.RefusedError.exit_code
    error = json.loads(shell.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("RefusedError", 13)
    assert "nbdmirror swap" in error["reason"]


@pytest.mark.slow
def test_a_wait_that_is_interrupted_says_that_the_order_goes_on(
    base: Path, controller: FakeController
) -> None:
    """Breaks in the field: who presses Ctrl-C believes that the node stays as it is."""
    process = subprocess.Popen(
        [COMMAND, "stop", "-c", base / "demo.toml", "--node", "alpha"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert "stop: waiting; now PRIM ready" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=BOUND_S)
    finally:
        process.kill()
        process.wait(BOUND_S)
    assert (process.returncode, out) == (130, "")
    assert "stop: not waited for any longer; it goes on\n" in said
    assert controller.orders == [("stop", STOP_ARGS)]


SPLIT = {
    "waits": True, "found_s": 60, "parted_s": 7200, "own_bytes": 3 << 20, "peer_bytes": 2 << 20,
    "keep_limit_bytes": 1 << 30,
}  # fmt: skip


# --- confirmations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "losses"),
    [
        ("prim", {"engine": {"data_state": "outdated"}}, ["known to be behind"]),
        ("prim", {"engine": {"data_state": "\x1b[2J"}}, ["?[2J", "is not known"]),
        ("prim", {"engine": None}, ["is not known"]),
        ("second", {}, ["All 1.0 GiB", "filled from beta", "nothing of it is kept"]),
        ("second", {"peer": {"heard": False}}, ["beta is not heard now", "no copy at all"]),
        ("second", {"engine": None}, ["The whole of this node's copy", "nothing of it is kept"]),
        (
            "second",
            {"engine": {"flags": ["split"], "split": SPLIT}},
            ["becomes that of beta", "up to 3.0 MiB", "up to 2.0 MiB", "kept up to 1.0 GiB"],
        ),
        (
            "second",
            {"engine": {"flags": ["split"], "split": {**SPLIT, "keep_limit_bytes": 0}}},
            ["becomes that of beta", "Nothing of it is kept"],
        ),
    ],
)
def test_force_names_the_loss_and_asks(
    shell: Shell, controller: FakeController, name: str, change: dict[str, Any], losses: list[str]
) -> None:
    """Breaks in the field: one word destroys the better copy."""
    controller.change(role="WAIT", engine={"role": "none"})
    controller.change(**change)
    assert shell(name, "--force") == 2  # nobody is at the terminal
    assert not [each for each in losses if each not in shell.err], shell.err
    assert "--yes" in shell.err
    assert "\x1b" not in shell.err
    assert controller.orders == []
    assert shell(name, "--force", "--yes", "--no-wait") == 0
    assert losses[0] in shell.err
    keep = {"keep": True} if name == "second" else {}
    assert controller.orders == [(name, {"force": True, **keep})]


def test_a_copy_is_given_up_unkept_only_if_that_is_said(
    shell: Shell, controller: FakeController
) -> None:
    """Breaks in the field: a copy is kept that there is no room for, or not kept that was wanted"""
    controller.change(role="WAIT", engine={"role": "none", "flags": ["split"], "split": SPLIT})
    assert shell("second", "--force", "--no-keep", "--yes", "--no-wait") == 0
    assert "Nothing of it is kept" in shell.err
    assert controller.orders == [("second", {"force": True, "keep": False})]


@pytest.mark.parametrize("name", ["prim", "second"])
def test_a_loss_that_is_not_confirmed_is_not_suffered(
    shell: Shell, controller: FakeController, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Breaks in the field: "n" counts as yes."""
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    controller.change(role="WAIT", engine={"role": "none"})
    assert shell(name, "--force") == errors.RefusedError.exit_code
    assert "not confirmed; nothing was done" in shell.err
    assert controller.orders == []


# --- switches, events, configuration --------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkers", "failover", "boot"])
@pytest.mark.parametrize("state", ["on", "off"])
def test_a_switch_is_thrown(
    shell: Shell, controller: FakeController, name: str, state: str
) -> None:
    """Breaks in the field: "off" switches on, or another switch than the one that was named."""
    assert shell(name, state) == 0
    assert controller.orders == [("switch", {"name": name, "on": state == "on"})]
    assert shell.out == "switch is accepted\nnow checkers on, failover OFF, boot on\n"
    assert shell(name, state, "--json") == 0
    assert json.loads(shell.out)["switches"] == STATUS["switches"]
    controller.refusals["switch"] = REFUSAL
    assert shell(name, state) == errors.RefusedError.exit_code


def test_events_are_followed_or_not(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: what happened is not told, told twice, or the command never ends."""
    controller.events = [
        {"number": number, "at_ms": 1000 * number, "event": "role", "reason": f"why {number}"}
        for number in (1, 2, 3)
    ]
    assert shell("events", "--no-follow", "--since", "1") == 0
    assert controller.requests == [("events", {"since": 1, "follow": False})]
    assert shell.out == "2  2.000 s  role: why 2\n3  3.000 s  role: why 3\n"
    assert shell("events", "--no-follow", "--json") == 0
    assert [json.loads(line) for line in shell.out.splitlines()] == controller.events
    assert shell("events", "--since", "-1") == 2
    controller.refusals["events"] = {**REFUSAL, "reason": "too many readers"}
    assert shell("events") == errors.RefusedError.exit_code


def test_apply_shows_the_plan_and_asks(
    shell: Shell, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: a change of the configuration is used before anybody has seen it."""
    controller.extra["reload"] = {**PLAN, "done": "2 changes are in force"}
    assert shell("apply", "--dry-run") == 0
    for word in ("checker.web.fall", "restart the controller", "not possible: created so", "8KiB"):
        assert word in shell.out
    assert shell("apply") == 2  # nobody is at the terminal
    assert controller.orders == [("reload", {"dry_run": True})] * 2
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert shell("apply") == errors.RefusedError.exit_code
    assert ("reload", {"dry_run": False}) not in controller.orders
    assert shell("apply", "--yes") == 0
    assert controller.orders[-2:] == [("reload", {"dry_run": True}), ("reload", {"dry_run": False})]
    assert shell.out.endswith("2 changes are in force\n")
    controller.requests.clear()
    assert shell("apply", "--yes", "--json") == 0
    assert json.loads(shell.out)["plan"] == PLAN["plan"]
    assert "probe.address: a:1 -> a:2: restart the controller" in shell.err
    assert shell("apply", "--dry-run", "--json") == 0
    assert json.loads(shell.out)["plan"] == PLAN["plan"]


def test_nothing_to_apply_asks_nothing(shell: Shell, controller: FakeController) -> None:
    """Breaks in the field: a deployment that changes nothing waits for somebody who says yes."""
    controller.extra["reload"] = {"plan": []}
    assert shell("apply") == 0
    assert controller.orders == [("reload", {"dry_run": True})]
    assert "has not changed" in shell.out


def test_a_plan_of_any_shape_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks in the field: a value that steers the terminal stands in a configuration file."""
    Screen().print(plan_view([{}, {"key": "a", "old": None, "new": "\x1b[2J", "how": 7}]))
    out = capsys.readouterr().out
    assert "?[2J" in out
    assert "\x1b" not in out


def test_config_show_has_what_the_controller_reads(shell: Shell) -> None:
    """Breaks in the field: what decides over a takeover is not to be seen before it happens."""
    path = shell.base / "demo.toml"
    more = """
takeover = "operator"
preferred = "beta"
"""
    tables = """
[mount]
point = "/srv/demo"
[application]
start = ["/bin/true", "a b"]
[[virtual_address]]
address = "10.0.0.100/24"
[[checker]]
name = "space"
kind = "filesystem"
path = "/srv"
free_min = "1GiB"
[[checker]]
name = "web"
kind = "tcp"
address = "10.0.0.100:80"
"""
    path.write_text(more + path.read_text(encoding="utf-8") + tables)
    assert shell("config", "show", "--json") == 0
    facts = json.loads(shell.out)
    assert (facts["takeover"], facts["preferred"]) == ("operator", "beta")
    assert facts["node"]["beta"]["heartbeats"] == ["127.0.0.2:17789"]
    assert facts["controller"]["heartbeat_ms"] == 200
    assert facts["ping"] == {"addresses": [], "timeout_ms": 500}
    assert facts["probe"] == {"address": "0.0.0.0:9010"}
    assert (facts["mount"]["point"], facts["mount"]["attach"]) == ("/srv/demo", "auto")
    assert facts["virtual_address"] == [{"address": "10.0.0.100/24", "interface": None}]
    assert [each["name"] for each in facts["checker"]] == ["space", "web"]
    assert facts["checker"][0]["free_min"] == "1GiB"
    assert "address" not in facts["checker"][0]
    assert shell("config", "show") == 0
    rows = rows_of(shell.out)
    assert rows["application.start"] == '["/bin/true", "a b"]'
    assert rows["checker[2].address"] == "10.0.0.100:80"


def test_completion_is_a_script_that_works(
    base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Breaks in the field: a shell that reads it at every start says a syntax error each time."""
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        assert "_NBDMIRROR_COMPLETE" in capsys.readouterr().out
    assert run(["completion", "bash", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["shell"] == "bash"
    script = tmp_path / "script"
    script.write_text(facts["script"])
    subprocess.run(["bash", "-n", script], check=True, timeout=BOUND_S)
    assert run(["completion", "tcsh"]) == 2
    asked = {
        "_NBDMIRROR_COMPLETE": "bash_complete",
        "COMP_WORDS": "nbdmirror sta",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [COMMAND], env={**os.environ, **asked}, capture_output=True, text=True, check=False,
        timeout=BOUND_S,
    )  # fmt: skip
    assert done.stdout.split() == ["plain,start", "plain,status"]


# --- a file that has mistakes by now ------------------------------------------------------------


@pytest.mark.parametrize("mistake", ['colour = "red"\n', "this is no TOML"])
def test_a_mistake_in_the_file_does_not_take_the_controller_away(
    shell: Shell, controller: FakeController, base: Path, mistake: str
) -> None:
    """Breaks in the field: a typing error in the file, and nobody can stop or swap any more a node
    that runs well with what it read before.
    """
    path = base / "demo.toml"
    text = path.read_text()
    path.write_text(f"{mistake}\n{text}" if "=" in mistake else f"{text}\n{mistake}")
    code = shell("swap", "--no-wait")
    if "=" in mistake:
        assert code == 0, shell.err
        assert "colour: unknown key" in shell.err
        assert controller.orders == [("swap", {})]
    else:  # where its directories are is in the file alone
        assert code == errors.ConfigError.exit_code
