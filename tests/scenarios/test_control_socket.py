"""The control socket: who may command, and which commands are too late."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from nbdmirror.control_client import ControlClient
from nbdmirror.errors import RefusedError, StaleCommandError
from tests.support.pair import Engine, Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def raw(engine: Engine) -> socket.socket:
    """A plain connection."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(engine.config.control_socket))
    return connection


def ask(connection: socket.socket, line: bytes) -> dict[str, Any]:
    """Send bytes and read one line."""
    connection.sendall(line)
    said = b""
    while not said.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece:
            return {}
        said += piece
    answer = json.loads(said)
    assert isinstance(answer, dict)
    return answer


def test_commands_of_another_time_are_refused(pair: Pair) -> None:
    """Breaks in the field: a controller that slept demotes the node that was promoted meanwhile."""
    alpha = pair.alpha
    with alpha.client() as client:
        old = client.call("state")
        with pytest.raises(StaleCommandError):
            client.call("demote", instance="00" * 16, epoch=old["epoch"])
        with pytest.raises(StaleCommandError):
            client.call("demote", instance=old["instance"], epoch=old["epoch"] + 1)
        with pytest.raises(StaleCommandError):
            client.call("demote")
        assert client.call("state")["role"] == "primary"
    alpha.command("demote")
    alpha.command("promote")
    with alpha.client() as client, pytest.raises(StaleCommandError):
        client.call("demote", instance=old["instance"], epoch=old["epoch"])


def test_the_newest_controller_commands(pair: Pair) -> None:
    """Breaks in the field: two controllers drive one engine against each other."""
    alpha = pair.alpha
    with raw(alpha) as old, raw(alpha) as new:
        state = ask(old, b'{"id": 1, "command": "attach"}\n')["ok"]
        ask(new, b'{"id": 1, "command": "attach"}\n')
        command = {
            "id": 2, "command": "drain", "controller": True,
            "instance": state["instance"], "epoch": state["epoch"],
        }  # fmt: skip
        line = json.dumps(command).encode() + b"\n"
        assert ask(old, line)["error"]["kind"] == "StaleCommandError"
        assert "ok" in ask(new, line)
        assert "ok" in ask(old, b'{"id": 3, "command": "state"}\n'), "readers any number"


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"garbage\n", b"[1, 2]\n", b'{"id": 1}\n', b'{"command": 5}\n',
        b'{"a": ' * 5000 + b"\n",
        b'{"command": "promote", "args": [1]}\n', b'{"command": "no such"}\n', b"\xff\xfe\x00\n",
        b'{"id": 1, "command": "events", "args": {"since": "x"}}\n', b"x" * (2 << 20) + b"\n",
    ],
)  # fmt: skip
def test_garbage_is_answered_or_cut_off(pair: Pair, line: bytes) -> None:
    """Breaks in the field: one bad line ends the engine, or the channel of everybody."""
    alpha = pair.alpha
    with raw(alpha) as connection:
        try:
            answer = ask(connection, line)
        except (ConnectionError, BrokenPipeError):
            answer = {}
        assert "ok" not in answer
    assert alpha.state()["role"] == "primary"
    pair.synced()


def test_unknown_commands_are_named(pair: Pair) -> None:
    """Breaks in the field: a typing error looks like a command that worked."""
    with pytest.raises(RefusedError, match="unknown command"):
        pair.alpha.command("promoted")


def test_only_root_and_its_own_user_may_ask(pair: Pair, require_root: None) -> None:
    """Breaks in the field: any user of the server demotes the primary."""
    path = pair.alpha.config.control_socket
    path.parent.chmod(0o711)
    path.chmod(0o666)
    script = (
        # By a relative path: the directories above may be closed to that user.
        "import os,socket,sys; os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(65534);"
        "os.setuid(65534); s=socket.socket(socket.AF_UNIX); s.settimeout(5);"
        's.connect(sys.argv[2]); s.sendall(b\'{"command": "state"}\\n\');'
        "print(len(s.recv(100)))"
    )
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-c", script, str(path.parent), path.name],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.stdout.strip() == "0" or "ConnectionReset" in said or "BrokenPipe" in said, said


@pytest.mark.parametrize("since", ["[]", "1e400", '"x"', "null", "{}"])
def test_a_bad_since_is_answered(pair: Pair, since: str) -> None:
    """Breaks in the field: a reader of events with a slip hears nothing and waits."""
    request = '{"id": 4, "command": "events", "args": {"since": ' + since + "}}\n"
    with raw(pair.alpha) as connection:
        answer = ask(connection, request.encode())
    assert "since" in answer["error"]["reason"]
    assert answer["id"] == 4


def test_idle_connections_do_not_keep_commands_out(pair: Pair) -> None:
    """Breaks in the field: a monitoring that leaks connections, and the node cannot be stopped."""
    alpha = pair.alpha
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(raw(alpha)) for _ in range(80)][-1]
        with alpha.client() as client, pytest.raises(RefusedError, match="more than 64"):
            next(client.events())
        idle.settimeout(60)
        assert ask(idle, b"") == {}, "those beyond the bound do not stay"
        assert alpha.command("demote")["role"] != "primary"
        alpha.stop()


def test_many_readers_do_not_keep_commands_out(pair: Pair) -> None:
    """Breaks in the field: a monitoring that leaks connections blocks the controller for ever."""
    alpha = pair.alpha
    readers = [raw(alpha) for _ in range(80)]
    for reader in readers:
        reader.close()
    with ControlClient(alpha.config.control_socket, 10) as client:
        assert client.call("state")["role"] == "primary"
