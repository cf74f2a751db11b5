"""The launcher beside an engine that answers as one in the midst of a change does."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdmirror.config import Config
from nbdmirror.errors import RefusedError
from nbdmirror.journal import Journal
from nbdmirror.launcher import STOP_TRIES_COUNT, Watcher, take_lock

BOUND_S = 20.0
STATE = {"instance": "00" * 16, "epoch": 1, "question": "frozen", "frozen_reason": "no peer"}


class Answers:
    """A control socket that gives one list of answers to a command, one after the other."""

    def __init__(self, path: Path, errors: dict[str, list[str]]) -> None:
        self.asked: list[str] = []
        self._errors = errors
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._listener:
            connection, _ = self._listener.accept()
        with connection, connection.makefile("rwb") as stream:
            for line in stream:
                request = json.loads(line)
                self.asked.append(request["command"])
                stream.write(json.dumps({"id": request["id"], **self._answer(request)}).encode())
                stream.write(b"\n")
                stream.flush()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        errors = self._errors.get(request["command"], [])
        if errors:
            return {"error": {"kind": errors.pop(0), "reason": "so it is", "remedy": ""}}
        return {"ok": STATE}


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its input does."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@contextmanager
def beside(
    engine: subprocess.Popen[bytes], errors: dict[str, list[str]], on_freeze: str = "ask"
) -> Iterator[tuple[Watcher, Answers]]:
    """The launcher's part beside that process, and what answers for it."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "s"
        answers = Answers(path, errors)
        config = SimpleNamespace(control_socket=path, engine=SimpleNamespace(on_freeze=on_freeze))
        journal = Journal()
        journal.start()
        watcher = Watcher(cast("Config", config), engine.pid, journal)
        try:
            yield watcher, answers
        finally:
            watcher._client.close()
            journal.close()


def test_a_stop_that_meets_a_change_of_role_is_asked_again(
    engine: subprocess.Popen[bytes],
) -> None:
    """Breaks in the field: SIGTERM meets a change of role, and the engine is ended like a crash
    instead of handing over.
    """
    with beside(engine, {"stop": ["StaleCommandError"] * 2}) as (watcher, answers):
        watcher._stop()
        assert answers.asked == ["state", "stop"] * 3
        assert engine.poll() is None


def test_a_stop_that_is_never_taken_ends_the_engine(engine: subprocess.Popen[bytes]) -> None:
    """Breaks in the field: the launcher asks for ever, and the machine does not shut down."""
    errors = {"stop": ["StaleCommandError"] * 2 * STOP_TRIES_COUNT}
    with beside(engine, errors) as (watcher, answers):
        watcher._stop()
        assert answers.asked.count("stop") == STOP_TRIES_COUNT
        assert engine.wait(BOUND_S) < 0


def test_an_answer_that_fails_leaves_the_launcher_alive(engine: subprocess.Popen[bytes]) -> None:
    """Breaks in the field: a disk that fails in the midst of a freeze ends the launcher, and nbdkit
    with it: two failures out of one.
    """
    errors = {"alone": ["StoreError", "NotPrimaryError"]}
    with beside(engine, errors, "alone") as (watcher, answers):
        for _ in range(2):
            watcher._answer()
        assert answers.asked == ["state", "alone"] * 2
        assert engine.poll() is None


def test_who_comes_second_is_told_of_the_controller(tmp_path: Path) -> None:
    """Breaks in the field: whoever starts a second nbdmirrord is sent to stop the engine."""
    first = take_lock(tmp_path / "lock")
    with pytest.raises(RefusedError, match=r"a controller .* runs on this node already"):
        take_lock(tmp_path / "lock")
    os.close(first)
    os.close(take_lock(tmp_path / "lock"))
