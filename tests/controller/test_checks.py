"""Each kind of check against the real thing: sockets, servers, processes, mounts, interfaces."""

import asyncio
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
import uvloop
from aiohttp import web

from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checks import OUTPUT_BYTES_MAX, PATH, USER_AGENT, check
from tests.support.frozen import disk, frozen
from tests.support.network import Network, hold

BOUND_S = 60.0
SOON_MS = 30_000  # where an answer is expected, on a machine that is many times slower
RunLoop = Callable[[Coroutine[Any, Any, Any]], Any]

# Checks in a process of their own: on another host, or with another command line.
ALONE = """
import json, sys, uvloop
from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checks import check

async def main():
    for given in json.loads(sys.argv[1]):
        print(await check(CheckerSection.model_validate(given)))

uvloop.run(main())
"""

# Without a listener, on a host whose connections all begin at the port that is asked for.
MEETS_ITSELF = """
import socket
one = socket.create_connection(("127.0.0.1", 45000))
one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
print(one.getsockname() == one.getpeername())
"""

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


def section(kind: str, **keys: Any) -> CheckerSection:
    """One `[[checker]]`; no two of a run have the same name."""
    given = {"name": f"t{uuid4().hex[:12]}", "kind": kind, "timeout_ms": SOON_MS, **keys}
    return CheckerSection.model_validate(given)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run_loop(request: pytest.FixtureRequest) -> RunLoop:
    """Both loops."""
    made: RunLoop = request.param
    return made


def looked(kind: str, **keys: Any) -> str:
    """What one check says."""
    return uvloop.run(check(section(kind, **keys)))


def alone(before: tuple[str, ...], *sections: dict[str, Any], more: str = "") -> list[str]:
    """What these checks say in a process of its own, with these words before and behind."""
    given = [{"name": "alone", "timeout_ms": SOON_MS, **each} for each in sections]
    command = (*before, sys.executable, "-c", ALONE, json.dumps(given), more)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


async def soon(awaited: Awaitable[Any]) -> Any:
    """Wait with a bound."""
    async with asyncio.timeout(BOUND_S):
        return await awaited


async def answered(one: CheckerSection) -> str:
    """One check, with a bound of the test's own."""
    async with asyncio.timeout(BOUND_S):
        return await check(one)


def ended(pid: int) -> bool:
    """Whether a process that is no child of ours has ended, or does so soon."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], BOUND_S)[0])
    finally:
        os.close(descriptor)


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


# --- tcp ----------------------------------------------------------------------------------------


def test_a_connection_is_taken_and_closed(run_loop: RunLoop) -> None:
    """Breaks in the field: a listening application counts as dead, or its connections run out."""

    async def main() -> None:
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.put_nowait(await reader.read())
            writer.close()

        for host in ("127.0.0.1", "::1"):
            server = await asyncio.start_server(serve, host, 0)
            shown = f"[{host}]" if ":" in host else host
            address = f"{shown}:{server.sockets[0].getsockname()[1]}"
            assert await soon(check(section("tcp", address=address))) == ""
            assert await soon(heard.get()) == b""
            server.close()

    run_loop(main())


def test_a_refused_connection_is_a_failure(run_loop: RunLoop) -> None:
    """Breaks in the field: an application that listens no more counts as well."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        said = run_loop(check(section("tcp", address=address)))
    assert said == f"{address} takes no connection: Connection refused"


def test_a_connection_without_answer_has_its_bound(run_loop: RunLoop) -> None:
    """Breaks in the field: an overloaded application holds its checker for minutes."""
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())  # the queue is full: the system drops who else asks
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        said = run_loop(check(section("tcp", address=address, timeout_ms=300)))
    assert said == "no answer within 300 ms"


@pytest.mark.net
@pytest.mark.slow
def test_a_connection_that_meets_itself_is_none() -> None:
    """Breaks in the field: a dead application on a high port is up now and then, by chance."""
    holder = hold()
    try:
        host = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        for command in (
            ("ip", "link", "set", "lo", "up"),
            ("sysctl", "-q", "-w", "net.ipv4.ip_local_port_range=45000 45000"),
        ):
            subprocess.run([*host, *command], check=True)
        raw = subprocess.run(
            [*host, sys.executable, "-c", MEETS_ITSELF], capture_output=True, check=True
        )
        assert raw.stdout == b"True\n"
        # The second one finds the port free again, as the application would.
        said = alone(host, *[{"kind": "tcp", "address": "127.0.0.1:45000"}] * 2)
    finally:
        holder.communicate()
    assert said == ["127.0.0.1:45000 takes no connection: nobody listens"] * 2


# --- http ---------------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler, **keys: Any) -> AsyncIterator[int]:
    """A web server whose every page is `handler`; its port."""
    application = web.Application()
    application.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, **keys)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def test_the_status_decides(run_loop: RunLoop) -> None:
    """Breaks in the field: an error page counts as well; a redirect to a login page, too."""
    asked: list[tuple[str, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append((request.path_qs, request.headers.get("User-Agent")))
        status = int(request.path.strip("/"))
        return web.Response(status=status, headers={"Location": "/200"} if status == 302 else {})

    async def main() -> list[str]:
        async with served(handler) as port:
            url = f"http://127.0.0.1:{port}"
            return [
                await check(section("http", url=f"{url}/200?a=b%20c")),
                await check(section("http", url=f"{url}/503")),
                await check(section("http", url=f"{url}/302")),
                await check(section("http", url=f"{url}/404", status=404)),
            ]

    said = ["", "answers 503, 200 expected", "answers 302, 200 expected", ""]
    assert run_loop(main()) == said
    assert asked == [(path, USER_AGENT) for path in ("/200?a=b%20c", "/503", "/302", "/404")]


def test_the_body_is_not_waited_for(run_loop: RunLoop) -> None:
    """Breaks in the field: a page that never ends fills the memory of the controller."""

    async def main() -> None:
        gone = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(bytes(1 << 16))
            finally:
                gone.set()

        async with served(handler) as port:
            assert await soon(check(section("http", url=f"http://127.0.0.1:{port}/"))) == ""
            await soon(gone.wait())

    run_loop(main())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer of HTTP"),
        (b"", "no answer: Server disconnected"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "no answer of HTTP"),
    ],
    ids=["foreign", "closed", "long"],
)
def test_what_is_no_http_is_a_failure(run_loop: RunLoop, answer: bytes, said: str) -> None:
    """Breaks in the field: another service on the port counts as well, or a password is shown."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def main() -> str:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await answered(section("http", url=f"http://me:secret@127.0.0.1:{port}/?secret"))

    reason = run_loop(main())
    assert reason.startswith(said)
    assert "secret" not in reason
    assert len(reason) < 2000
    assert reason.isprintable()


def test_a_page_without_answer_has_its_bound(run_loop: RunLoop) -> None:
    """Breaks in the field: a hung web server holds its checker for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        said = run_loop(check(section("http", url=url, timeout_ms=300)))
        assert said == "no answer within 300 ms"
    assert run_loop(check(section("http", url=url))) == "takes no connection: Connection refused"
    assert looked("http", url="http://127.0.0.1:99999/") == "url is not the address of a page"


def test_a_certificate_is_verified(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: whoever sits on the way answers for the application."""
    import ssl  # noqa: PLC0415 - for this test alone

    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/CN=127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def handler(_: web.Request) -> web.Response:
        return web.Response()

    async def main() -> str:
        async with served(handler, ssl_context=context) as port:
            return await answered(section("http", url=f"https://127.0.0.1:{port}/"))

    assert "certificate" in run_loop(main())


# --- ping, interface, address -------------------------------------------------------------------


@pytest.mark.net
@pytest.mark.slow
def test_hosts_interfaces_and_addresses_of_this_node() -> None:
    """Breaks in the field: a pulled cable or a lost address is not seen, or seen where none is."""
    cable, lo = ({"kind": "interface", "interface": each} for each in ("cable", "lo"))
    here, other, sixth = (
        {"kind": "address", "held": each} for each in ("192.0.2.1/24", "192.0.2.2/24", "fd00::5/64")
    )
    with Network() as network:
        alpha = network.enter("alpha")
        network.run("alpha", "ip", "address", "add", "fd00::5/64", "dev", "cable", "nodad")
        ping = {"kind": "ping", "hosts": ["192.0.2.99", "192.0.2.2"]}
        assert alone(alpha, cable, lo, here, sixth, ping) == [""] * 5
        missing = [{"kind": "interface", "interface": each} for each in ("cable0", "ü" * 15)]
        assert alone(alpha, *missing, other) == [
            "there is no interface cable0",
            f"there is no interface {'ü' * 15}",
            "192.0.2.2 is on no interface of this node",
        ]
        network.run("beta", "ip", "link", "set", "cable", "down")
        silent = {"kind": "ping", "hosts": ["192.0.2.2"], "timeout_ms": 300}
        assert alone(alpha, cable, here, silent) == [
            "cable has no carrier",
            "",
            "no echo: 192.0.2.2 did not answer within 300 ms",
        ]
        network.run("alpha", "ip", "link", "set", "cable", "down")
        network.run("alpha", "ip", "address", "del", "192.0.2.1/24", "dev", "cable")
        assert alone(alpha, cable, here) == [
            "cable is switched off",
            "192.0.2.1 is on no interface of this node",
        ]


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


def threads_of(one: CheckerSection) -> int:
    """How many threads check for it now."""
    return sum(each.name == f"check {one.name}" for each in threading.enumerate())


@pytest.mark.usefixtures("require_root")
@pytest.mark.slow
def test_a_frozen_file_system_holds_one_thread_alone(tmp_path: Path, run_loop: RunLoop) -> None:
    """Breaks in the field: a hung disk stops the heartbeats, or takes a thread more every 2 s."""

    async def main(one: CheckerSection) -> None:
        other = section("interface", interface="lo")
        for expected in ("no answer within 300 ms", "the last check has not returned for", "the"):
            reason, beside = await asyncio.gather(check(one), check(other))
            assert reason.startswith(expected)
            assert beside == ""
            assert threads_of(one) == 1

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
