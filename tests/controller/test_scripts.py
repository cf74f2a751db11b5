"""Scripts of the operator: bounded, marked, their output kept, their daemons left alone."""

import asyncio
import os
import stat
from pathlib import Path

import pytest
import uvloop

from nbdmirror.controller.bounded import start
from nbdmirror.controller.processes import process, processes
from nbdmirror.controller.scripts import (
    LOG_BYTES_MAX,
    ROOM_BYTES_MIN,
    RUN_VARIABLE,
    TAIL_BYTES,
    Outcome,
    end_marked,
    end_unfinished,
    run,
)
from tests.controller.doing import alive, end, pid_in, script, tmpfs

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
# A daemon as they are: two forks, a session of its own, the script's output kept.
DAEMON = """
setsid sh -c 'echo $$ >{pid}.new; mv {pid}.new {pid}; {does}' &
until [ -e {pid} ]; do :; done
"""


async def run_it(path: Path, *arguments: str, timeout_s: float = 60) -> Outcome:
    """Run a script with the log beside it."""
    return await run(
        [str(path), *arguments],
        timeout_s=timeout_s,
        environment={**ENVIRONMENT, "PLACE": str(path.parent)},
        log=path.with_name("log"),
        name="test",
    )


def daemon(pid: Path, does: str) -> str:
    """The lines that start one."""
    return DAEMON.format(pid=pid, does=does)


def test_code_and_output_are_kept(tmp_path: Path) -> None:
    """Breaks in the field: a start fails at night, and nobody can read why."""
    does = script(tmp_path / "does", "echo to out; printf 'to \\033 err\\n' >&2; exit 3")
    outcome = uvloop.run(run_it(does))
    assert (outcome.code, outcome.timed_out, outcome.ok) == (3, False, False)
    assert outcome.tail == "to out\nto  err"
    assert str(outcome).startswith("exit code 3 after ")
    log = tmp_path / "log"
    assert "to out\nto \x1b err\n" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_arguments_stay_out_of_the_log(tmp_path: Path) -> None:
    """Breaks in the field: the password that an argument holds is read from the log file."""
    outcome = uvloop.run(run_it(script(tmp_path / "does", ":"), "hushed"))
    assert outcome.ok
    assert "hushed" not in (tmp_path / "log").read_text()


def test_tail_is_bounded(tmp_path: Path) -> None:
    """Breaks in the field: a chatty script fills status, events and the peer's memory."""
    does = script(tmp_path / "does", "yes | head -c 100000; echo last")
    outcome = uvloop.run(run_it(does))
    assert outcome.tail.endswith("\nlast")
    assert TAIL_BYTES - 10 < len(outcome.tail) <= TAIL_BYTES


def test_tail_is_of_this_run(tmp_path: Path) -> None:
    """Breaks in the field: the reason that is shown is the one of last month."""
    does = script(tmp_path / "does", 'echo "$1"')

    async def main() -> tuple[Outcome, Outcome]:
        return await run_it(does, "first"), await run_it(does, "second")

    assert [each.tail for each in uvloop.run(main())] == ["first", "second"]


@pytest.mark.parametrize(
    ("body", "said"),
    [("kill -9 $$", "ended by SIGKILL after"), (None, "not started: "), ("", "not started: ")],
)
def test_other_endings_are_named(tmp_path: Path, body: str | None, said: str) -> None:
    """Breaks in the field: a script that is missing, or killed, is taken for one that ran."""
    does = tmp_path / "does"
    if body is not None:
        script(does, body)
    if body == "":
        does.chmod(0o600)
    outcome = uvloop.run(run_it(does))
    assert not outcome.ok
    assert str(outcome).startswith(said)


def test_only_the_given_environment(tmp_path: Path) -> None:
    """Breaks in the field: a secret in the controller's environment reaches every script, or a
    script that reads its standard input waits for ever.
    """
    does = script(tmp_path / "does", "cat; exec env")
    outcome = uvloop.run(run_it(does))
    seen = {line.partition("=")[0] for line in outcome.tail.splitlines()}
    assert seen - {"PWD", "_", "SHLVL", "OLDPWD"} == {"PATH", "PLACE", RUN_VARIABLE}
    assert "PWD=/" in outcome.tail.splitlines()


def test_a_session_of_its_own(tmp_path: Path) -> None:
    """Breaks in the field: a Ctrl-C at the controller's terminal ends the application."""
    outcome = uvloop.run(run_it(script(tmp_path / "does", 'echo $$; cut -d" " -f6 /proc/$$/stat')))
    pid, session = outcome.tail.splitlines()
    assert pid == session


def test_a_daemon_is_left_alone(tmp_path: Path) -> None:
    """Breaks in the field: the application that a start script leaves behind is waited for, killed,
    or dies of SIGPIPE at its first word after the start.
    """
    os.mkfifo(tmp_path / "ask")
    os.mkfifo(tmp_path / "answer")
    says = f"read line <{tmp_path}/ask; echo later $line; echo said >{tmp_path}/answer; "
    says += "exec sleep 1000"
    does = script(tmp_path / "does", daemon(tmp_path / "pid", says) + "echo up")
    outcome = uvloop.run(run_it(does))
    pid = pid_in(tmp_path / "pid")
    try:
        assert outcome.ok
        assert outcome.tail == "up"
        (tmp_path / "ask").write_text("words\n")
        assert (tmp_path / "answer").read_text() == "said\n"
        assert "later words\n" in (tmp_path / "log").read_text()
        assert alive(pid)
    finally:
        end(pid)


STUBBORN = "trap '' TERM; while :; do sleep 1000; done"


def test_no_descriptor_is_handed_on(tmp_path: Path) -> None:
    """Breaks in the field: a daemon keeps a listening socket of the controller, and the next
    controller cannot have its address; or the log pipe of the service manager, which waits for it.
    """
    does = script(tmp_path / "does", "exec ls -l /proc/self/fd")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        outcome = uvloop.run(run_it(does))
    finally:
        os.close(read)
        os.close(write)
    leads = {line.partition("-> ")[2] for line in outcome.tail.splitlines() if "->" in line}
    own = {each for each in leads if each.startswith("/proc/")}  # the directory that ls reads
    assert leads - own == {"/dev/null", str(tmp_path / "log")}
    assert outcome.tail.count("->") == 4


@pytest.mark.slow
def test_timeout_ends_all_that_descends(tmp_path: Path) -> None:
    """Breaks in the field: a script that hangs is given up, its processes go on and hold the mount
    that the other node needs.
    """
    orphan, other = tmp_path / "orphan", tmp_path / "other"
    lines = daemon(orphan, "exec sleep 1000") + daemon(other, STUBBORN.replace("''", '""'))
    does = script(tmp_path / "does", f"({lines})\necho hangs\n{STUBBORN}")
    outcome = uvloop.run(run_it(does, timeout_s=3))
    assert outcome.timed_out
    assert outcome.code is None
    assert outcome.tail == "hangs"
    assert not alive(pid_in(orphan))
    assert not alive(pid_in(other))
    assert [each for each in processes() if belongs(each.pid, tmp_path)] == []


def belongs(pid: int, place: Path) -> bool:
    """Whether a process has the arguments or the environment of a script of this test."""
    try:
        files = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    except OSError:
        return False
    return any(bytes(place) in each for each in files) and pid != os.getpid()


def test_cancelling_ends_it(tmp_path: Path) -> None:
    """Breaks in the field: the controller stops in the middle of a start, and the start goes on
    beside the other node's.
    """
    os.mkfifo(tmp_path / "up")
    does = script(tmp_path / "does", f"echo $$ >{tmp_path}/pid; echo >{tmp_path}/up; sleep 1000")

    async def main() -> None:
        task = asyncio.create_task(run_it(does))
        await asyncio.to_thread((tmp_path / "up").read_text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    uvloop.run(main())
    assert not alive(pid_in(tmp_path / "pid"))


def test_marked_runs_are_found_later(tmp_path: Path) -> None:
    """Breaks in the field: a new controller cannot end what a start script of the old one left, or
    ends that of another mirror.
    """
    pids = {name: tmp_path / name for name in ("mine", "theirs")}

    async def start(name: str) -> None:
        does = script(tmp_path / f"start-{name}", daemon(pids[name], "exec sleep 1000"))
        log = tmp_path / f"log-{name}"
        await run([str(does)], timeout_s=60, environment=ENVIRONMENT, log=log, name="start")

    async def main() -> None:
        await start("mine")
        await start("theirs")
        ending = await end_marked(tmp_path / "log-mine", grace_s=30)
        assert [each.pid for each in ending.asked] != []
        assert ending.killed == ()

    try:
        uvloop.run(main())
        assert not alive(pid_in(pids["mine"]))
        assert alive(pid_in(pids["theirs"]))
    finally:
        for path in pids.values():
            end(pid_in(path))


def test_only_runs_that_go_on_are_unfinished(tmp_path: Path) -> None:
    """Breaks in the field: the start script of a controller that was killed goes on and starts the
    application after the stop; or what a start that has ended left behind is ended with it.
    """
    os.mkfifo(tmp_path / "up")
    up = script(tmp_path / "up.sh", daemon(tmp_path / "daemon", "exec sleep 1000"))
    hangs = "sleep 1000 & echo $! >$D/child; echo $$ >$D/own; echo >$D/up; wait"
    does = script(tmp_path / "does", hangs)

    async def main() -> None:
        await run_it(up)
        # Not by run(): the controller that began it is no longer there.
        mark = own_marks(pid_in(tmp_path / "daemon"))[0].decode()
        log = os.open(tmp_path / "log", os.O_RDWR)
        start([str(does), "words"], {**ENVIRONMENT, RUN_VARIABLE: f"{mark[:17]}other"}, log, log)
        os.close(log)
        await asyncio.to_thread((tmp_path / "up").read_text)
        other = await end_unfinished(tmp_path / "log", [str(does), "other"], grace_s=30)
        assert other.asked == ()
        ending = await end_unfinished(tmp_path / "log", [str(does), "words"], grace_s=30)
        assert pid_in(tmp_path / "own") in [each.pid for each in ending.asked]

    try:
        uvloop.run(main())
        assert not alive(pid_in(tmp_path / "own"))
        assert not alive(pid_in(tmp_path / "child"))
        assert alive(pid_in(tmp_path / "daemon"))
    finally:
        for name in ("own", "child", "daemon"):
            end(pid_in(tmp_path / name))


def own_marks(pid: int) -> list[bytes]:
    """The values of the variable that marks a run, in a process."""
    name = f"{RUN_VARIABLE}=".encode()
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return [line.removeprefix(name) for line in lines if line.startswith(name)]


def test_log_is_rotated(tmp_path: Path) -> None:
    """Breaks in the field: the log file of a script fills the disk over the years."""
    log = tmp_path / "log"
    log.write_bytes(b"x" * (LOG_BYTES_MAX + 1))
    assert uvloop.run(run_it(script(tmp_path / "does", "echo new"))).tail == "new"
    assert log.stat().st_size < 1000
    assert (tmp_path / "log.1").stat().st_size == LOG_BYTES_MAX + 1


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "missing place"])
def test_a_broken_log_file_is_no_obstacle(tmp_path: Path, kind: str) -> None:
    """Breaks in the field: the application does not start, or its start hangs, because of what
    somebody put in the place of the log file.
    """
    does, log = script(tmp_path / "does", "echo said"), tmp_path / "log"
    if kind == "directory":
        log.mkdir()
    elif kind == "fifo":
        os.mkfifo(log)
    elif kind == "link":
        log.symlink_to("/dev/full")
    else:
        log = tmp_path / "missing" / "log"
    outcome = uvloop.run(
        run([str(does)], timeout_s=60, environment=ENVIRONMENT, log=log, name="test")
    )
    assert outcome.ok
    assert f"(not kept: the log file {log} cannot be written: " in outcome.tail


@pytest.mark.usefixtures("require_root")
def test_a_full_disk_is_no_obstacle(tmp_path: Path) -> None:
    """Breaks in the field: the disk of the log files is full, the first echo of the stop script
    fails, and the node cannot give its role up.
    """
    with tmpfs(tmp_path / "fs") as place:
        (place / "filler").write_bytes(b"x" * ((4 << 20) - ROOM_BYTES_MIN // 2))
        does = script(tmp_path / "does", "set -e; yes | head -c 2000000; echo said")
        log = place / "log"
        outcome = uvloop.run(
            run([str(does)], timeout_s=60, environment=ENVIRONMENT, log=log, name="test")
        )
        assert outcome.ok
        assert "no room there" in outcome.tail


def test_a_process_is_told_by_its_start(tmp_path: Path) -> None:
    """Breaks in the field: a pid that was given to somebody else is signalled."""
    me = process(os.getpid())
    assert me is not None
    assert me == process(os.getpid())
    parent = process(os.getppid())
    assert me.parent == os.getppid()
    assert parent is None or (parent.pid, parent.started) != (me.pid, me.started)
