"""Checks of this node's processes, units, file systems and programs, against the real ones."""

import asyncio
import fcntl
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
import uvloop

from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checks import OUTPUT_BYTES_MAX, PATH, check
from tests.support.checks import SOON_MS, RunLoop, alone, ended, looked, section, soon
from tests.support.frozen import disk, frozen

# `systemctl is-active` of systemd 252, for units that are known by their names.
SYSTEMCTL = """#!/bin/sh
[ "$1 $2" = "is-active --" ] || exit 1
case "$3" in
  good.service) echo active ;;
  dead.service) echo failed; exit 3 ;;
  slow.service) exec sleep 1000 ;;
  *) echo inactive; exit 4 ;;
esac
"""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run_loop(request: pytest.FixtureRequest) -> RunLoop:
    """Both loops."""
    made: RunLoop = request.param
    return made


# --- process ------------------------------------------------------------------------------------


@contextmanager
def started(*command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has become its program."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_processes_are_counted_by_command_line() -> None:
    """Breaks in the field: a dead application counts as running, or a running one as dead."""
    token = uuid4().hex
    command = ("cat", "-", f"/nowhere/{token}")
    assert "0 processes match" in looked("process", pattern=token)
    with started(*command), started(*command):
        pattern = rf"cat - /nowhere/{token[:-1]}.$"
        assert looked("process", pattern=pattern, count_min=2, count_max=2) == ""
        assert "2 processes match" in looked("process", pattern=pattern, count_min=3)
        assert "at most 1 expected" in looked("process", pattern=pattern, count_max=1)
    assert "at least 1 expected" in looked("process", pattern=token)


def test_a_process_that_ended_unreaped_is_none(tmp_path: Path) -> None:
    """Breaks in the field: the dead child of a careless parent keeps the checker up for ever."""
    program = tmp_path / f"t{uuid4().hex[:12]}"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o700)
    with started(str(program)) as process:
        assert looked("process", pattern=program.name) == ""
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert "0 processes match" in looked("process", pattern=program.name)


def test_the_controller_does_not_find_itself() -> None:
    """Breaks in the field: the pattern on the controller's own command line is always found."""
    token = uuid4().hex
    shell = ("/bin/sh", "-c", '"$@"; exit $?', token)
    said = alone(shell, {"kind": "process", "pattern": token}, more=token)
    assert said == [f'0 processes match "{token}", at least 1 expected']


# --- unit ---------------------------------------------------------------------------------------


def test_a_unit_is_active_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_loop: RunLoop
) -> None:
    """Breaks in the field: a failed unit is not seen, or an active one is restarted."""
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL)
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = {
        name: run_loop(check(section("unit", unit=f"{name}.service")))
        for name in ("good", "dead", "-")
    }
    assert said == {
        "good": "",
        "dead": "dead.service is not active: failed",
        "-": "-.service is not active: inactive",
    }
    slow = section("unit", unit="slow.service", timeout_ms=300)
    assert run_loop(check(slow)) == "no answer within 300 ms"


def test_without_systemd_a_unit_is_not_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: a node without systemd calls every unit well."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert looked("unit", unit="any.service").startswith("systemd does not run here")


# --- filesystem ---------------------------------------------------------------------------------


@contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    """Something mounted at a new directory."""
    path.mkdir()
    subprocess.run(["mount", *arguments, str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.usefixtures("require_root")
def test_a_file_system_is_mounted_and_takes_writes(tmp_path: Path) -> None:
    """Breaks in the field: the application writes into an empty directory, or onto a dead disk."""
    plain = tmp_path / "plain"
    plain.mkdir()
    assert looked("filesystem", path=str(plain)) == f"nothing is mounted at {plain}"
    with mounted(tmp_path / "a b\\", "-t", "tmpfs", "-o", "size=1m", "none") as mount:
        assert looked("filesystem", path=str(mount)) == ""
        assert list(mount.iterdir()) == []
        with mounted(tmp_path / "bound", "--bind", str(plain)) as bound:
            assert looked("filesystem", path=str(bound)) == ""
        link = tmp_path / "link"
        link.symlink_to(mount)
        assert looked("filesystem", path=str(link)) == ""
        assert looked("filesystem", path=str(mount), free_min="512KiB") == ""
        assert "bytes free, 2MiB expected" in looked("filesystem", path=str(mount), free_min="2MiB")
        full = mount / "full"
        with suppress(OSError), full.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        assert "No space left on device" in looked("filesystem", path=str(mount))
        full.unlink()
        assert list(mount.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        assert "Read-only file system" in looked("filesystem", path=str(mount))
    assert looked("filesystem", path=str(tmp_path / "no")).startswith("nothing is mounted")


@pytest.mark.usefixtures("require_root")
def test_a_file_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """Breaks in the field: whoever may write there lets the controller overwrite a file of root."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with mounted(tmp_path / "m", "-t", "tmpfs", "none") as mount:
        one = section("filesystem", path=str(mount))
        (mount / f".nbdmirror-{os.getpid()}-{one.name}").symlink_to(victim)
        assert asyncio.run(check(one)) == ""
    assert victim.read_text() == "precious"


@pytest.mark.usefixtures("require_root")
@pytest.mark.slow
def test_a_frozen_file_system_holds_one_process_alone(tmp_path: Path, run_loop: RunLoop) -> None:
    """Breaks in the field: a hung disk stops the heartbeats, takes a process more every 2 s, or
    keeps the controller from ending: then nobody can start the next one.
    """

    async def main(one: CheckerSection) -> None:
        other = section("interface", interface="lo")
        for expected in ("no answer within 300 ms", "the last run, process ", "the last run, proc"):
            reason, beside = await asyncio.gather(check(one), check(other))
            assert reason.startswith(expected)
            assert beside == ""
            assert not any(each.name == f"check {one.name}" for each in threading.enumerate())

    with disk(tmp_path / "disk") as mount:
        one = section("filesystem", path=str(mount), timeout_ms=300)
        with frozen(mount):
            run_loop(main(one))
        assert run_loop(check(one.model_copy(update={"timeout_ms": SOON_MS}))) == ""
        assert list(mount.glob(".nbd*")) == []


# --- command ------------------------------------------------------------------------------------


def shell(text: str, **keys: Any) -> CheckerSection:
    """A checker whose command is a few lines of shell."""
    return section("command", command=["/bin/sh", "-c", text], **keys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 0", ""),
        ("echo fine; exit 0", ""),
        ("exit 3", "exit code 3"),
        ("echo one; printf 'tw\\033[1mo\\n' >&2; exit 1", "exit code 1: one tw [1mo"),
        ("printf '\\377\\n'; exit 1", "exit code 1: \ufffd"),
        ("kill -KILL $$", "signal 9 ended it"),
    ],
)
def test_the_exit_code_decides(run_loop: RunLoop, text: str, said: str) -> None:
    """Breaks in the field: a check that fails counts as well, or nobody learns what it said."""
    assert run_loop(check(shell(text))) == said


def test_a_missing_program_is_a_failure(run_loop: RunLoop) -> None:
    """Breaks in the field: a checker whose script was not copied to this node is up."""
    said = run_loop(check(section("command", command=["/nowhere/at=all", "x"])))
    assert said.startswith("exit code 127")
    assert "/nowhere/at=all" in said


def test_much_output_neither_blocks_nor_fills(run_loop: RunLoop) -> None:
    """Breaks in the field: a talkative check hangs on its full pipe, or floods the log."""
    said = run_loop(check(shell("yes | head -c 1000000; echo; echo; echo the end; exit 3")))
    assert said.startswith("exit code 3: ")
    assert said.endswith("y y y the end")
    assert len(said) < OUTPUT_BYTES_MAX


def test_the_environment_is_small(
    run_loop: RunLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: a check works when started by hand, and fails under the controller."""
    monkeypatch.setenv("NBDMIRROR_MIRROR", "demo")
    monkeypatch.setenv("SECRET", "x")
    told = tmp_path / "told"
    assert run_loop(check(shell(f"env > {told}; pwd >> {told}"))) == ""
    lines = set(told.read_text().splitlines()) - {"PWD=/", "OLDPWD=/", "SHLVL=0", "SHLVL=1"}
    lines = {each for each in lines if not each.startswith("_=")}
    assert lines == {f"PATH={PATH}", "LANG=C.UTF-8", "NBDMIRROR_MIRROR=demo", "/"}


def test_what_a_command_leaves_behind_ends(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: every check leaves a process, until the node has none to give."""
    told = tmp_path / "pid"
    assert run_loop(check(shell(f"sleep 1000 & echo $! > {told}"))) == ""
    assert ended(int(told.read_text()))


def test_after_its_time_a_command_ends_with_all_it_started(
    run_loop: RunLoop, tmp_path: Path
) -> None:
    """Breaks in the field: hung checks pile up behind each other."""
    told = tmp_path / "pids"
    text = f"trap '' TERM; sleep 1000 & echo $! $$ > {told}; wait"
    assert run_loop(check(shell(text, timeout_ms=2000))) == "no answer within 2000 ms"
    assert all(ended(int(each)) for each in told.read_text().split())


def test_a_cancelled_command_ends(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: a node that left its role still runs checks of the application."""
    told = tmp_path / "pids"
    os.mkfifo(told)

    async def main() -> str:
        task = asyncio.create_task(check(shell(f"echo $$ > {told}; exec sleep 1000")))
        pid = await asyncio.to_thread(told.read_text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
        return pid

    assert ended(int(run_loop(main())))


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Whoever opens or executes the file waits, as on a file system that hangs."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks for the file back
    try:
        with path.open("r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
    finally:
        signal.signal(signal.SIGIO, before)


@pytest.mark.usefixtures("require_root")
@pytest.mark.slow
def test_a_program_that_cannot_be_read_does_not_hold_the_loop(
    run_loop: RunLoop, tmp_path: Path
) -> None:
    """Breaks in the field: a check that lies on the frozen mirror stops what would unfreeze it."""
    lease_s = int(Path("/proc/sys/fs/lease-break-time").read_text())
    with mounted(tmp_path / "m", "-t", "tmpfs", "none") as mount:
        program = mount / "program"
        program.write_text("#!/bin/sh\nexit 0\n")
        program.chmod(0o700)
        one = section("command", command=[str(program)], timeout_ms=300)
        start_s = monotonic()
        with leased(program):
            assert run_loop(check(one)) == "no answer within 300 ms"
            assert monotonic() - start_s < lease_s / 2
        assert run_loop(check(one.model_copy(update={"timeout_ms": SOON_MS}))) == ""


@pytest.mark.usefixtures("require_root")
@pytest.mark.slow
def test_one_that_cannot_be_killed_is_not_started_again(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: on a dead disk every check leaves one more process that nothing ends."""
    started = tmp_path / "started"
    with disk(tmp_path / "disk") as mount:
        one = shell(f"echo $$ >> {started}; echo x > {mount}/x", timeout_ms=2000)

        async def main() -> list[str]:
            return [await check(one) for _ in range(3)]

        with frozen(mount):
            said = run_loop(main())
        (pid,) = started.read_text().split()
        assert ended(int(pid))
    hangs = f"the last run, process {pid}, hangs and cannot be killed"
    assert said == ["no answer within 2000 ms", hangs, hangs]


# --- whatever happens ---------------------------------------------------------------------------


@pytest.mark.usefixtures("require_root")
def test_a_check_that_fails_itself_is_a_failure(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: a checker dies of what it met, and from then on watches nothing."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    said = run_loop(check(section("filesystem", path=str(loop))))
    assert re.search("(?i)loop", said)
