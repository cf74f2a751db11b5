"""`create`, `invite` and `join` as an operator types them: two servers on one machine."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import click
import pytest

from nbdmirror.config import load
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    OutOfSpaceError,
    RefusedError,
    SessionLostError,
)
from nbdmirror_cli import options
from nbdmirror_cli.create import interruptible
from nbdmirror_cli.main import nbdmirror, run
from tests.support.accounts import MakeAccount, make_account, way_for_users

__all__ = ["make_account"]

COMMAND = str(Path(sys.executable).parent / "nbdmirror")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "create-and-join.md"
BOUND_S = 60
TOKEN = re.compile(r"(?:[A-Z2-7]{5}-){7}[A-Z2-7]{5}")
ON_FULL_TMPFS = ("unshare", "--mount", "sh", "-c")
MOUNT = 'mkdir "$0" && mount -t tmpfs -o size=4M none "$0" && exec "$@"'
# Nobody else's port: proposals begin at the first one that is free.
BASIC = ("--node-name", "alpha", "--address", "127.0.0.1", "--peer-name", "beta")
MORE = ("--peer-address", "127.0.0.2", "--size", "8MiB", "--arbiter", "none", "--yes")


class Servers:
    """The directories of two servers, and commands on them."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def create(self, *more: str, name: str = "demo") -> list[str]:
        """The words that make the mirror on the first server."""
        place = ("--config-dir", self.path("a"), "--run-dir", self.path("run"))
        data = () if "--data-dir" in more else ("--data-dir", self.path("alpha"))
        return ["create", name, *BASIC, *MORE, *place, *data, *more]

    def join(self, *more: str) -> list[str]:
        """The words that join on the second one; the token comes on standard input."""
        data = () if "--data-dir" in more else ("--data-dir", self.path("beta"))
        return ["join", "-", "--config-dir", self.path("b"), "--run-dir", self.path("rb"),
                *data, *more]  # fmt: skip

    def path(self, name: str) -> str:
        return str(self.base / name)

    def names(self) -> list[str]:
        """Every file and directory of both."""
        return sorted(str(each.relative_to(self.base)) for each in self.base.rglob("*"))


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Two servers with nothing on them."""
    base = Path(tempfile.mkdtemp(prefix="nbdm-"))
    yield Servers(base)
    shutil.rmtree(base)


class Waiting:
    """A process that makes a token and waits for a join, with --json; ends with the `with`."""

    def __init__(self, words: list[str]) -> None:
        self._process = subprocess.Popen(
            [COMMAND, *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=BOUND_S)

    def line(self) -> dict[str, Any]:
        """The next object that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.communicate(timeout=BOUND_S)
        read: dict[str, Any] = json.loads(line)
        return read

    def ended(self) -> int:
        """Its exit code."""
        return self._process.wait(BOUND_S)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)


def command(
    *words: str, given: str = "", before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        [*before, COMMAND, *words],
        input=given, capture_output=True, text=True, check=False, timeout=BOUND_S,
    )  # fmt: skip


def shown(directory: str, node: str) -> dict[str, Any]:
    """The metadata of a node; its configuration is checked on the way."""
    source = ("-c", f"{directory}/demo.toml", "--node", node)
    check = command("config", "check", *source)
    assert check.returncode == 0, check.stdout + check.stderr
    done = command("metadata", "show", *source, "--json")
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


@pytest.mark.slow
def test_a_mirror_on_two_servers_with_one_token(servers: Servers) -> None:
    """Breaks in the field: the way that the first page shows does not lead to a mirror."""
    with Waiting(servers.create("--sparse", "--mount-point", "/srv/demo")) as first:
        made, token = first.line(), first.line()
        assert [each.split()[:2] for each in made["next"]][-1] == ["nbdmirror", "start"]
        assert (made["event"], made["node"], made["size_bytes"]) == ("made", "alpha", 8 << 20)
        assert (token["event"], token["peer"]) == ("token", "beta")
        assert TOKEN.fullmatch(token["token"])
        done = command(*servers.join("--json"), given=f"{token['token'].lower()}\n")
        assert done.returncode == 0, done.stdout + done.stderr
        joined = json.loads(done.stdout)
        assert (joined["node"], joined["inviter"], joined["told"]) == ("beta", "alpha", True)
        assert first.line() == {"event": "joined", "node": "beta", "address": "127.0.0.1"}
        assert first.ended() == 0
        late = command(*servers.join(), given=token["token"])
    assert late.returncode == SessionLostError.exit_code
    assert "used or its time is over" in late.stderr
    alpha, beta = shown(servers.path("a"), "alpha"), shown(servers.path("b"), "beta")
    assert alpha["mirror_id"] == beta["mirror_id"]
    assert (alpha["data_state"], beta["data_state"]) == ("uptodate", "blank")
    assert (alpha["node_id"], beta["node_id"]) == (1, 2)
    assert alpha["device_bytes"] == beta["device_bytes"] == 8 << 20
    assert "sparse" in alpha["flags"]
    assert "sparse" in beta["flags"]
    for name in ("a", "b"):
        modes = {p.name: p.stat().st_mode & 0o777 for p in (servers.base / name).iterdir()}
        assert modes == {"demo.toml": 0o644, "demo.key": 0o600}
    keys = {(servers.base / name / "demo.key").read_bytes() for name in ("a", "b")}
    assert [len(each) for each in keys] == [32]
    # The secret of the token is in no file.
    plain = token["token"].encode()
    files = [each for each in servers.base.rglob("*") if each.is_file() and each.name != "data"]
    assert len(files) == 6
    assert not [each for each in files if plain in each.read_bytes()]


@pytest.mark.slow
def test_each_server_has_its_own_user_for_the_engine(
    servers: Servers, make_account: MakeAccount
) -> None:
    """Breaks in the field: who wants an engine without rights has to type chown on both servers, or
    to have the same users on both.
    """
    way_for_users(servers.base)
    one, other = make_account(), make_account()
    with Waiting(servers.create("--sparse", "--engine-user", one.name)) as first:
        first.line()
        token = first.line()["token"]
        done = command(*servers.join("--engine-user", "not-here"), given=token)
        assert done.returncode == ConfigError.exit_code
        assert "there is no such user on this host" in done.stderr
        assert not [each for each in servers.names() if each.startswith("b/")]
        done = command(*servers.join("--engine-user", other.name), given=token)
        assert done.returncode == 0, done.stderr
        assert first.line()["event"] == "attempt"
        assert first.line()["event"] == "joined"
        assert first.ended() == 0
    for name, node, user in (("a", "alpha", one), ("b", "beta", other)):
        config = load(servers.base / name / "demo.toml", node)
        assert config.engine.user == user.name
        for path in (config.data_file, config.metadata_file):
            assert path.stat().st_uid == user.uid
        assert config.me.data_dir.stat().st_uid == 0


@pytest.mark.slow
def test_a_token_on_the_terminal_and_a_wrong_one(servers: Servers) -> None:
    """Breaks in the field: what is printed for eyes cannot be typed, or a wrong token does harm."""
    assert run(servers.create("--no-invite")) == 0
    source = ["invite", "-c", f"{servers.path('a')}/demo.toml", "--node", "alpha"]
    process = subprocess.Popen(
        [COMMAND, *source, "--listen", "127.0.0.3"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        while "Waiting" not in said:
            line = process.stdout.readline()
            assert line
            said += line
        (right,) = TOKEN.findall(said)
        assert "nbdmirror join -" in said
        typed = right[:-1] + ("A" if right[-1] != "A" else "B")
        typing = command(*servers.join(), given=typed)
        assert typing.returncode == ConfigError.exit_code
        assert "typing error" in typing.stderr
        assert command(*servers.join(), given="").returncode == ConfigError.exit_code
        done = command("join", right, *servers.join()[2:])
        assert done.returncode == 0, done.stderr
        assert "This server is beta of mirror demo, 8MiB; alpha has the data." in done.stdout
        assert process.wait(BOUND_S) == 0
        assert "beta has joined, from 127.0.0.1" in process.stdout.read()
    finally:
        process.kill()
        process.wait(BOUND_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
def test_a_second_server_without_room_tells_the_first_one(
    servers: Servers, require_root: None
) -> None:
    """Breaks in the field: half a mirror is left on the second server, or the first one believes
    in it, or the operator needs another token for the second try.
    """
    full = servers.path("full")
    with Waiting(servers.create()) as first:
        assert first.line()["event"] == "made"
        token = first.line()["token"]
        done = command(
            *servers.join("--data-dir", f"{full}/data"),
            given=token,
            before=(*ON_FULL_TMPFS, MOUNT, full),
        )
        assert done.returncode == OutOfSpaceError.exit_code, done.stderr
        assert "ENOSPC" in done.stderr
        assert not (servers.base / "b").exists()
        told = first.line()
        assert told["event"] == "attempt"
        assert "ENOSPC" in told["reason"]
        assert "attempt 1 of 5" in told["reason"]
        again = command(*servers.join(), given=token)
        assert again.returncode == 0, again.stderr
        assert first.line()["event"] == "joined"
        assert first.ended() == 0


@pytest.mark.slow
def test_a_first_server_without_room_is_left_as_it_was(
    servers: Servers, require_root: None
) -> None:
    """Breaks in the field: the second try is refused because of what the first one left."""
    full = servers.path("full")
    done = command(
        *servers.create("--data-dir", f"{full}/data"), before=(*ON_FULL_TMPFS, MOUNT, full)
    )
    assert done.returncode == OutOfSpaceError.exit_code, done.stderr
    assert "--sparse" in done.stderr
    assert servers.names() == ["full"]  # the place of the mount, which went with its namespace
    assert "token" not in done.stdout


@pytest.mark.slow
def test_an_invitation_ends_with_its_time_and_by_a_signal(servers: Servers) -> None:
    """Breaks in the field: a forgotten terminal leaves the mirror open to whoever saw the token."""
    with Waiting(servers.create("--timeout", "1")) as first:
        assert [first.line()["event"] for _ in range(2)] == ["made", "token"]
        error = first.line()["error"]
        assert first.ended() == error["exit_code"] == SessionLostError.exit_code
    source = ["invite", "-c", f"{servers.path('a')}/demo.toml", "--node", "alpha"]
    with Waiting(source) as second:
        token = second.line()["token"]
        second.terminate()
        assert second.ended() == 130
    done = command(*servers.join(), given=token)
    assert done.returncode == SessionLostError.exit_code
    assert not (servers.base / "b").exists()


def test_without_an_arbiter_the_choice_is_explained(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: a mirror is made whose behaviour in a partition nobody chose."""
    words = servers.create()
    at = words.index("--arbiter")
    for chosen in ([], ["--arbiter", "coin"]):
        assert run([*words[:at], *words[at + 2 :], *chosen]) == 2
        said = capsys.readouterr().err
        assert '"none"        both may go on alone' in said
        assert '"ping"        the node that still sees the router' in said
        assert '"azure-blob"  as etcd' in said
    assert run([*words, "--arbiter", "ping"]) == 2
    assert "--ping-address" in capsys.readouterr().err
    assert run([*words, "--arbiter", "etcd"]) == 2
    assert "--store endpoints=https://10.1.0.9:2379" in capsys.readouterr().err
    assert run([*words, "--store", "bucket=records"]) == 2
    assert "this arbiter has no store" in capsys.readouterr().err
    assert servers.names() == []


def test_what_is_missing_is_told_at_once(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: a script that makes mirrors learns of one missing option at a time."""
    assert run(["create", "demo", "--arbiter", "none", "--yes"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "missing: --address, --peer-name, --peer-address, --size" in said
    for words in (
        ["--heartbeat", "10.9.0.1"],
        ["--start", "/bin/x 'y"],
        ["--adopt", "--size", "x"],
    ):
        assert run(servers.create(*words)) == 2
    assert servers.names() == []


def test_what_exists_is_not_overwritten(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: `create`, typed a second time, ends a mirror that runs."""
    assert run(servers.create("--no-invite")) == 0
    before = {p: p.read_bytes() for p in servers.base.rglob("*") if p.is_file()}
    assert run(servers.create("--no-invite")) == RefusedError.exit_code
    assert "demo.toml exists and is not overwritten" in capsys.readouterr().err
    (servers.base / "a" / "demo.toml").rename(servers.base / "kept.toml")
    assert run(servers.create("--no-invite")) == RefusedError.exit_code
    assert "demo.key exists and is not overwritten" in capsys.readouterr().err
    # Another name, the same data: the metadata stands in the way, and nothing else is left.
    assert run(servers.create("--no-invite", name="other")) == RefusedError.exit_code
    assert "meta exists and is not overwritten" in capsys.readouterr().err
    (servers.base / "kept.toml").rename(servers.base / "a" / "demo.toml")
    assert {p: p.read_bytes() for p in servers.base.rglob("*") if p.is_file()} == before


def test_a_second_mirror_gets_ports_of_its_own(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: the probe of one mirror answers for the other one."""
    assert run(servers.create("--no-invite", "--probe-port", "19310")) == 0
    other = ("--no-invite", "--data-dir", servers.path("other"))
    words = servers.create(*other, "--probe-port", "19310", name="other")
    assert run(words) == RefusedError.exit_code
    said = capsys.readouterr().err
    assert "port 19310 of the probe is that of" in said
    (proposal,) = re.findall(r"next free one is (\d+) \(`--probe-port`\)", said)
    assert int(proposal) > 19310
    assert run(servers.create(*other, "--probe-port", proposal, name="other")) == 0
    text = (servers.base / "a" / "other.toml").read_text(encoding="utf-8")
    assert f'address = "0.0.0.0:{proposal}"' in text
    # Neither named a port of the peer channel, and they do not have the same one.
    first = (servers.base / "a" / "demo.toml").read_text(encoding="utf-8")
    ports = [re.findall(r'address = "127.0.0.[12]:(\d+)"', each) for each in (first, text)]
    assert ports[0][0] == ports[0][1]
    assert ports[1][0] == ports[1][1]
    assert ports[0][0] != ports[1][0]
    taken = ("--address", f"127.0.0.1:{ports[0][0]}", "--data-dir", servers.path("third"))
    assert run(servers.create(*taken, name="third")) == RefusedError.exit_code
    assert f"127.0.0.1:{ports[0][0]} is that of" in capsys.readouterr().err


def test_a_taken_default_is_proposed_away(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: with --yes the second mirror of a server cannot be made."""
    assert run(servers.create("--no-invite", "--probe-port", "19320")) == 0
    text = (servers.base / "a" / "demo.toml").read_text(encoding="utf-8")
    (servers.base / "a" / "demo.toml").write_text(text.replace("19320", "9010"), encoding="utf-8")
    assert run(servers.create("--no-invite", "--data-dir", servers.path("o"), name="other")) == 0
    assert "Port 9010 of the probe is that of" in capsys.readouterr().out
    made = (servers.base / "a" / "other.toml").read_text(encoding="utf-8")
    (port,) = re.findall(r'address = "0.0.0.0:(\d+)"', made)
    assert 9010 < int(port) < 9999


def test_everything_can_be_asked_for(
    servers: Servers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: whoever types `create NAME` and answers gets something else."""
    answers = [
        *("alpha", "127.0.0.1:17789", "beta", "127.0.0.2"),
        *("ten", "16MiB", "/srv/demo", "/bin/start 'a b'", "", "10.0.0.100/24", "19330", "y"),
    ]
    place = ("--config-dir", servers.path("a"), "--data-dir", servers.path("alpha"))
    words = ["create", "demo", "--arbiter", "none", *place, "--no-invite"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(answers) + "\n"))
    assert run(words) == 0
    said = capsys.readouterr().out
    assert "Mirror demo, 16MiB: this node is alpha (127.0.0.1:17789), the other one beta" in said
    text = (servers.base / "a" / "demo.toml").read_text(encoding="utf-8")
    for line in (
        'address = "127.0.0.2:17789"',
        'point = "/srv/demo"',
        'start = ["/bin/start", "a b"]',
        'address = "10.0.0.100/24"',
        'address = "0.0.0.0:19330"',
    ):
        assert line in text
    assert "stop =" not in text
    assert (servers.base / "alpha" / "data").stat().st_size == 16 << 20
    # A no at the end makes nothing, and neither does the end of the answers.
    words[1] = "second"
    for given in ("\n".join(answers).replace("17789", "17790")[:-1] + "n\n", "alpha\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        assert run([*words, "--probe-port", "19331"]) == 130
    assert not (servers.base / "a" / "second.toml").exists()


def test_an_existing_image_is_adopted(servers: Servers) -> None:
    """Breaks in the field: the data that the mirror is made for is gone, or its size is asked."""
    (servers.base / "alpha").mkdir()
    (servers.base / "alpha" / "data").write_bytes(b"precious".ljust(2 << 20, b"."))
    words = servers.create("--adopt", "--no-invite")
    at = words.index("--size")
    assert run([*words[:at], *words[at + 2 :]]) == 0
    assert (servers.base / "alpha" / "data").read_bytes().startswith(b"precious.")
    assert (servers.base / "alpha" / "meta").exists()


def test_a_wrong_token_is_found_without_a_network(
    servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: half a token waits for a time-out, or is printed into a log."""
    token = "AAAAA-BBBBB-CCCCC"
    assert run(["join", token, "--config-dir", servers.path("b")]) == ConfigError.exit_code
    assert token not in "".join(capsys.readouterr())
    assert AuthenticationError.exit_code != ConfigError.exit_code
    assert servers.names() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_undoes_as_ctrl_c_does(number: signal.Signals) -> None:
    """Breaks in the field: a closed terminal leaves half a mirror, which blocks the next try."""
    before = signal.getsignal(number)
    undone = []

    def hung_up() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), number)
                signal.sigtimedwait([], 0)  # the handler runs between two instructions
            finally:
                undone.append(True)

    with pytest.raises(KeyboardInterrupt):
        hung_up()
    assert undone == [True]
    assert signal.getsignal(number) is before


def typed() -> list[str]:
    """What the page tells to type on each server."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^(?:alpha|beta)# (nbdmirror .*)$", text, re.MULTILINE)


def parsed(line: str) -> click.Context:
    """The command line, not run. Raises UsageError."""
    words = shlex.split(line)[1:]
    found: click.Command = nbdmirror
    while isinstance(found, click.Group):
        found = found.commands[words.pop(0)]
    return found.make_context(found.name, words)


@pytest.mark.parametrize("line", typed())
def test_the_page_shows_commands_that_exist(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: an operator types what the page says and gets a usage error."""
    (tmp_path / "demo.toml").touch()
    monkeypatch.setattr(options, "CONFIG_DIRECTORY", tmp_path)
    assert parsed(line).params
    with pytest.raises(click.UsageError):
        parsed(f"{line} --colour")


def test_the_page_shows_every_step() -> None:
    """Breaks in the field: a finder that finds nothing lets every wrong command through."""
    assert {line.split()[1] for line in typed()} == {"create", "join", "invite", "config"}
