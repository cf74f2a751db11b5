"""`nbdmirror doctor`: what it finds, what it proposes, how it ends, and that it always ends."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nbdmirror import errors
from nbdmirror.config import load
from nbdmirror_cli import doctor, doctor_mirror, options
from nbdmirror_cli.doctor import FAIL, MACHINE, OK, WARN, Check, Finding, run_all
from nbdmirror_cli.main import run
from nbdmirror_cli.options import Source
from tests.cli.conftest import FakeEngine
from tests.cli.fake_controller import FakeController
from tests.cli.test_commands import Shell
from tests.support.accounts import MakeAccount, make_account

__all__ = ["make_account"]

BOUND_S = 60.0
STATES = {OK, WARN, FAIL}


@pytest.fixture
def shell(base: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A command line."""
    return Shell(base, capsys)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A machine without any programs; the function puts one there: its name and what it prints."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))

    def put(name: str, prints: str) -> None:
        (directory / name).write_text(
            f"#!/bin/sh\nwhile read -r l; do echo \"$l\"; done <<'END'\n{prints}\nEND\n"
        )
        (directory / name).chmod(0o755)

    return put


@pytest.fixture
def configured(base: Path) -> Callable[..., Finding]:
    """Runs a check of the mirror with more lines in its configuration."""

    def checked(check: Callable[..., Finding], more: str = "") -> Finding:
        path = base / "demo.toml"
        (base / "more.toml").write_text(path.read_text(encoding="utf-8") + more)
        return check(load(base / "more.toml", "alpha", with_key=False))

    return checked


# --- the command ----------------------------------------------------------------------------------


def test_doctor_needs_no_mirror(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: who is about to make the first mirror is told to make one first."""
    empty = base / "empty"
    empty.mkdir()
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", empty)
    code = run(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["checks"]) == len(MACHINE) + 1
    for each in facts["checks"]:
        assert set(each) == {"name", "state", "what", "remedy"}
        assert each["state"] in STATES
        assert each["what"]
        assert each["remedy"] or each["state"] == OK, each
    states = [each["state"] for each in facts["checks"]]
    assert (facts["failed"], facts["warned"]) == (states.count(FAIL), states.count(WARN))
    assert code == (1 if facts["failed"] else 0)
    assert run(["doctor"]) == code
    text = capsys.readouterr().out
    assert f"{len(states)} checks: " in text
    assert "\x1b" not in text


def test_what_is_missing_fails_with_a_remedy(
    shell: Shell, programs: Callable[[str, str], None]
) -> None:
    """Breaks in the field: a machine without nbdkit is called well, or is left without a hint."""
    assert shell("doctor", "--json") == doctor.FAILED == 1
    found = {each["name"]: each for each in json.loads(shell.out)["checks"]}
    assert found["nbdkit"]["state"] == FAIL
    assert "apt-get install nbdkit" in found["nbdkit"]["remedy"]
    assert found["nbdkit's Python"]["state"] == FAIL
    for name in ("nbdfuse", "loop devices", "file systems", "iproute2"):
        assert found[name]["state"] == WARN, name
        assert "apt-get install" in found[name]["remedy"]
    assert shell("doctor") == 1
    assert "apt-get install nbdkit" in " ".join(shell.out.split())


def test_doctor_looks_at_the_mirror_that_is_named(shell: Shell) -> None:
    """Breaks in the field: the key that everybody can read is found by somebody else."""
    shell("doctor", "--json")
    states = {each["name"]: each["state"] for each in json.loads(shell.out)["checks"]}
    wanted = {"configuration", "data", "run directory", "own addresses", "peer beta", "key"}
    assert not wanted - set(states)
    assert (states["configuration"], states["key"], states["data"]) == (OK, OK, WARN)
    (shell.base / "key").chmod(0o644)
    assert shell("doctor", "--json") == 1
    (key,) = [each for each in json.loads(shell.out)["checks"] if each["name"] == "key"]
    assert key["state"] == FAIL
    assert "its mode is 0644" in key["what"]


def test_a_wrong_configuration_is_a_finding(shell: Shell) -> None:
    """Breaks in the field: a mistake in the file hides what the machine lacks."""
    path = shell.base / "demo.toml"
    path.write_text(path.read_text(encoding="utf-8") + "colour = 1\n")
    assert shell("doctor", "--json") == 1
    checks = json.loads(shell.out)["checks"]
    assert len(checks) == len(MACHINE) + 1
    assert (checks[-1]["name"], checks[-1]["state"]) == ("configuration", FAIL)
    assert "colour: unknown key" in checks[-1]["what"]
    for missing in (["-c", str(shell.base / "missing.toml")], ["-m", "nope"]):
        assert run(["doctor", *missing]) == errors.ConfigError.exit_code


@pytest.mark.slow
def test_no_check_holds_up_the_others() -> None:
    """Breaks in the field: a file system that hangs, or a file that is odd, hides everything else
    that is wrong with a machine.
    """
    never = threading.Event()

    def hung_disk() -> Finding:
        never.wait(BOUND_S)
        return Finding("late", OK, "")

    def odd(_: int) -> Finding:
        raise PermissionError(13, "no \x1b[2J")

    checks: list[Check] = [hung_disk, partial(odd, 1), lambda: Finding("well", OK, "x")]
    try:
        hung, broken, well = run_all(checks, 2.0)
    finally:
        never.set()
    assert (hung.name, hung.state) == ("hung disk", WARN)
    assert "no answer" in hung.what
    assert (broken.name, broken.state) == ("odd", WARN)
    assert "PermissionError" in broken.what
    assert well == Finding("well", OK, "x")


def test_findings_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks in the field: what a program prints as its version clears the screen."""
    doctor.print_findings([Finding("a", WARN, "\x1b[2J [red]x[/red]", "y")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]x[/red]" in out


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "state"),
    [("nbdkit 1.32.5", WARN), ("nbdkit 1.34.0", OK), ("nbdkit 2.0.1 (x)", OK), ("odd", WARN)],
)
def test_an_old_nbdkit_is_a_warning(
    programs: Callable[[str, str], None], version: str, state: str
) -> None:
    """Breaks in the field: nobody knows why requests are served one by one."""
    programs("nbdkit", version)
    found = doctor.nbdkit()
    assert found.state == state
    assert ("one thread" in found.what) == (state == WARN)


def test_the_embedded_python_has_to_be_ours(programs: Callable[[str, str], None]) -> None:
    """Breaks in the field: the engine ends at its first import, and nothing said so before."""
    own = ".".join(map(str, sys.version_info[:3]))
    programs("nbdkit", f"name=python\npython_version={own}+\nx=1")
    assert doctor.nbdkit_python().state == OK
    programs("nbdkit", "name=python\npython_version=2.7.18")
    found = doctor.nbdkit_python()
    assert found.state == FAIL
    assert "embeds Python 2.7" in found.what
    programs("nbdkit", "name=python")
    assert "no Python plugin" in doctor.nbdkit_python().what


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: an installation that is half done is called complete."""
    assert doctor.packages().state == OK
    monkeypatch.setattr(doctor, "PACKAGES", ("json", "nbdmirror_none"))
    found = doctor.packages()
    assert found.state == FAIL
    assert "nbdmirror_none" in found.what
    monkeypatch.setitem(sys.modules, "crcmod._crcfunext", None)
    assert doctor.crcmod_extension().state == WARN


def test_a_port_that_is_taken_has_a_next_one() -> None:
    """Breaks in the field: the second mirror of a server cannot answer its load balancer."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = doctor.probe_port("127.0.0.1", port)
        assert found.state == WARN
        proposed = int(found.remedy.rpartition(" ")[2])
        assert proposed > port
        with socket.create_server(("127.0.0.1", proposed)):
            pass
    assert doctor.probe_port("127.0.0.1", port).state == OK
    assert doctor.probe_port("192.0.2.77", port).state == FAIL  # no address of this machine


@pytest.mark.parametrize(("source", "state"), [("tsc", OK), ("hpet", WARN), (None, WARN)])
def test_a_poor_clock_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, state: str
) -> None:
    """Breaks in the field: heartbeats are late on a machine whose clock is slow or jumps."""
    path = tmp_path / "clock"
    if source is not None:
        path.write_text(f"{source}\n")
    monkeypatch.setattr(doctor, "CLOCK", path)
    assert doctor.clock_source().state == state


@pytest.mark.parametrize(
    ("release", "state"),
    [("6.8.0-31-generic", OK), ("6.12", OK), ("7.0.1", OK), ("6.1.0-35-amd64", WARN), ("x", WARN)],
)
def test_an_old_kernel_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, release: str, state: str
) -> None:
    """Breaks in the field: nobody knows why a node may not be promoted after a crash."""
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert doctor.mount_ids().state == state


def test_a_missing_device_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: nbdfuse fails at the first failover, for want of a module."""
    assert doctor.openable("/dev/null") == ""
    assert doctor.openable("/dev/none") == "/dev/none: No such file or directory"
    monkeypatch.setattr(doctor, "openable", lambda path: f"{path}: no")
    assert (doctor.fuse().state, doctor.loop_devices().state) == (WARN, WARN)


@pytest.mark.usefixtures("require_root")
def test_what_only_root_may_is_a_warning_for_others() -> None:
    """Breaks in the field: an operator's own account is told that a controller would do well."""
    program = """
import json, os, resource
import icmplib
from nbdmirror_cli import doctor
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
checks = (doctor.user, doctor.icmp, doctor.memory_lock, doctor.oom_score)
print(json.dumps([each().state for each in checks]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        timeout=BOUND_S,
    )  # fmt: skip
    assert json.loads(done.stdout) == [WARN] * 4
    assert doctor.user().state == OK
    assert doctor.icmp().state == OK


# --- a mirror -------------------------------------------------------------------------------------


def test_own_addresses_are_on_this_machine(configured: Callable[..., Finding]) -> None:
    """Breaks in the field: a node that took the other one's name waits for itself."""
    found = configured(doctor_mirror.own_addresses)
    assert (found.state, found.what) == (OK, "127.0.0.1")


def test_an_address_that_is_not_here_fails(base: Path) -> None:
    """Breaks in the field: an engine tries for ever to listen at an address it does not have."""
    path = base / "demo.toml"
    text = path.read_text(encoding="utf-8").replace("127.0.0.1:17789", "192.0.2.77:7789")
    path.write_text(text)
    found = doctor_mirror.own_addresses(load(path, "alpha", with_key=False))
    assert found.state == FAIL
    assert "192.0.2.77" in found.what
    assert "is this node alpha?" in found.remedy


def test_the_peer_is_asked(configured: Callable[..., Finding], base: Path) -> None:
    """Breaks in the field: a firewall is found at the first failover."""
    path = base / "demo.toml"
    with socket.socket() as peer:
        peer.bind(("127.0.0.2", 0))
        port = peer.getsockname()[1]
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("127.0.0.2:17789", f"127.0.0.2:{port}"))
        silent = configured(doctor_mirror.peer)
        assert (silent.name, silent.state) == ("peer beta", WARN)
        assert f"nothing listens at port {port}" in silent.what
        peer.listen()
        assert configured(doctor_mirror.peer).state == OK


def test_who_listens_does_not_look_for_a_listener(
    base: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: the node with the higher id is told for ever to start the other one."""
    path = base / "demo.toml"
    turned = path.read_text(encoding="utf-8").replace("id = 1", "id = 3")
    path.write_text(turned)
    config = load(path, "alpha", with_key=False)
    found = doctor_mirror.peer(config)
    assert (found.name, found.state, found.what) == ("peer beta", OK, "is connected")
    engine.state["session"] = None
    monkeypatch.setattr(doctor_mirror, "no_echo", lambda _hosts: "")
    found = doctor_mirror.peer(config)
    assert found.state == OK
    assert "it dials this node" in found.what
    monkeypatch.setattr(doctor_mirror, "no_echo", lambda _hosts: "no echo")
    assert doctor_mirror.peer(config).state == WARN


def test_what_a_dead_controller_left_is_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: a mount and an address stay for days, and the other node serves."""
    path = base / "demo.toml"
    more = '[[virtual_address]]\naddress = "192.0.2.77/24"\n'
    config, source = load(path, "alpha", with_key=False), Source(path, "alpha")
    assert doctor_mirror.leftovers(config, source) == Finding("left over", OK, "nothing")
    path.write_text(path.read_text(encoding="utf-8") + more)
    (base / "service.json").touch()
    config = load(path, "alpha", with_key=False)
    found = doctor_mirror.leftovers(config, source)
    assert found.state == WARN
    assert "service.json" in found.what
    assert "address" not in found.what
    here = {"eth0": [SimpleNamespace(family=socket.AF_INET, address="192.0.2.77")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: here)
    found = doctor_mirror.leftovers(config, source)
    assert "address 192.0.2.77/24 is on this host" in found.what
    command = f"`nbdmirrord -c {path} --node alpha --clean`"
    assert found.remedy == f"left by a dead controller: {command}"
    controller = FakeController(base / "controller.sock")
    try:
        assert doctor_mirror.leftovers(config, source).state == OK
    finally:
        controller.close()


def test_half_a_copy_fails(configured: Callable[..., Finding], base: Path) -> None:
    """Breaks in the field: a node whose metadata is gone is called new."""
    assert configured(doctor_mirror.data_files).state == WARN
    (base / "alpha").mkdir()
    (base / "alpha" / "data").touch()
    assert configured(doctor_mirror.data_files).state == FAIL
    (base / "alpha" / "meta").touch()
    assert configured(doctor_mirror.data_files).state == OK


def test_the_run_directory_is_ours_alone(configured: Callable[..., Finding], base: Path) -> None:
    """Breaks in the field: others can put their own socket where ours should be."""
    assert configured(doctor_mirror.run_directory).state == OK
    base.chmod(0o777)
    found = configured(doctor_mirror.run_directory)
    assert (found.state, found.remedy) == (WARN, f"chmod 0700 {base}")


def test_a_running_controller_has_its_port(configured: Callable[..., Finding], base: Path) -> None:
    """Breaks in the field: a mirror that runs is told to give its own port away."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        probe = f'\n[probe]\naddress = "127.0.0.1:{taken.getsockname()[1]}"\n'
        assert configured(doctor_mirror.controller_port, probe).state == WARN
        controller = FakeController(base / "controller.sock")
        try:
            assert configured(doctor_mirror.controller_port, probe).state == OK
        finally:
            controller.close()


@pytest.mark.parametrize(
    ("address", "interface", "state"),
    [("192.0.2.77/24", "lo", OK), ("192.0.2.77/24", "none0", FAIL), ("192.0.2.77/30", None, FAIL)],
)
def test_a_virtual_address_needs_an_interface(
    address: str, interface: str | None, state: str
) -> None:
    """Breaks in the field: the address goes nowhere at the first failover."""
    found = doctor_mirror.virtual_address(address, interface)
    assert found.state == state
    assert found.remedy or state == OK


def test_what_a_mount_needs_is_looked_for(
    configured: Callable[..., Finding], base: Path, programs: Callable[[str, str], None]
) -> None:
    """Breaks in the field: the first takeover ends because a program is missing."""
    point = base / "point"
    more = f'\n[mount]\npoint = "{point}"\ntype = "tmpfs"\n'
    missing = configured(doctor_mirror.mount_point, more)
    assert (missing.state, missing.remedy) == (OK, "")
    assert "made when needed" in missing.what
    point.mkdir()
    assert configured(doctor_mirror.mount_point, more).what == f"{point}, tmpfs"
    odd = more.replace("tmpfs", "nofs")
    assert configured(doctor_mirror.mount_point, odd).state == FAIL
    found = configured(doctor_mirror.attach, more)
    assert found.state == FAIL
    assert "apt-get install libnbd-bin" in found.remedy


def test_what_an_application_needs_is_looked_for(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: the mirror takes over, and the application does not start."""
    assert doctor_mirror.program(Path("/bin/sh")).state == OK
    assert "does not exist" in doctor_mirror.program(Path("/none")).what
    assert "cannot be executed" in doctor_mirror.program(base / "key").what
    monkeypatch.setattr(doctor_mirror, "SYSTEMD", base)
    assert doctor_mirror.units().state == OK
    monkeypatch.setattr(doctor_mirror, "SYSTEMD", base / "none")
    assert doctor_mirror.units().state == FAIL


@pytest.mark.usefixtures("require_root")
def test_the_routers_of_the_arbiter_are_asked(configured: Callable[..., Finding]) -> None:
    """Breaks in the field: the arbiter says no to both nodes, because its address is wrong."""
    assert configured(doctor_mirror.routers, '\n[ping]\naddresses = ["127.0.0.1"]\n').state == OK
    found = configured(doctor_mirror.routers, '\n[ping]\naddresses = ["255.255.255.255"]\n')
    assert found.state == WARN


def test_each_part_of_a_configuration_is_looked_at(base: Path) -> None:
    """Breaks in the field: a check is there, and nobody runs it."""
    path = base / "demo.toml"
    more = """
[mount]
point = "/srv/demo"
[application]
start = ["/none/start"]
stop = ["/none/stop"]
units = ["a.service"]
[ping]
addresses = ["127.0.0.1"]
[[virtual_address]]
address = "192.0.2.77/24"
interface = "lo"
"""
    path.write_text(path.read_text(encoding="utf-8") + more)
    found = run_all(doctor_mirror.checks(Source(path, "alpha")))
    names = [each.name for each in found]
    assert names[0] == "configuration"
    wanted = {"address 192.0.2.77/24", "mount", "attach", "application", "units", "ping", "key"}
    wanted.add("left over")
    assert not wanted - set(names)
    assert names.count("application") == 2


def test_an_engine_that_runs_as_root_is_a_warning(
    configured: Callable[..., Finding], make_account: MakeAccount
) -> None:
    """Breaks in the field: nobody learns that the engine has root's rights, or how to change it; or
    that the user in the file is not on this host.
    """
    found = configured(doctor_mirror.user_of_engine)
    assert found.state == WARN
    assert "the engine runs as root" in found.what
    assert "useradd --system --user-group" in found.remedy
    assert 'engine.user = "nbdmirror-demo"' in found.remedy
    found = configured(doctor_mirror.user_of_engine, '[engine]\nuser = "not-here"\n')
    assert found.state == FAIL
    assert "there is no such user on this host" in found.what
    name = make_account().name
    found = configured(doctor_mirror.user_of_engine, f'[engine]\nuser = "{name}"\n')
    assert found.state == OK


def test_an_engine_that_was_not_restarted_is_a_warning(
    configured: Callable[..., Finding], make_account: MakeAccount, engine: FakeEngine
) -> None:
    """Breaks in the field: the file has a user, and the engine that runs is root's still."""
    engine.state["pid"] = os.getpid()
    name = make_account().name
    found = configured(doctor_mirror.user_of_engine, f'[engine]\nuser = "{name}"\n')
    assert found.state == WARN
    assert "the engine runs as user 0" in found.what
    assert "restart the engine" in found.remedy
