"""A mirror on disk for the commands, and a stand-in for the engine that answers by a script."""

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fixtures import make_pair, pair

__all__ = ["FakeEngine", "base", "engine", "make_pair", "pair"]

CONFIG = """
mirror = "demo"
key_file = "{base}/key"
arbiter = "none"
[node.alpha]
id = 1
address = "127.0.0.1:17789"
data_dir = "{base}/alpha"
run_dir = "{base}"
[node.beta]
id = 2
address = "127.0.0.2:17789"
data_dir = "{base}/beta"
run_dir = "{base}/run-beta"
"""

# What the engine's `describe()` says of a healthy primary.
STATE: dict[str, Any] = {
    "instance": "ab" * 16,
    "epoch": 3,
    "pid": 4711,
    "clients": 1,
    "mirror": "demo",
    "node_id": 1,
    "role": "primary",
    "data_state": "uptodate",
    "generation": "cd" * 16,
    "base": [],
    "flags": ["was_primary"],
    "right_alone": False,
    "frozen": False,
    "frozen_reason": "",
    "question": "",
    "failed": "",
    "refusal": "",
    "dirty_extents": 0,
    "dirty_bytes": 0,
    "device_bytes": 1 << 30,
    "arbiter": "none",
    "session": {"number": "00ff", "phase": "synced", "peer_primary": False},
    "resync": {},
}

Script = Callable[[dict[str, Any]], list[Any]]


class FakeEngine:
    """Listens where the engine would; answers each request with what the script returns.

    The script gets the request and returns the lines to send: objects, or bytes as they are. None
    in the list ends the connection. The requests are kept in `requests`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[dict[str, Any]] = []
        self.state = dict(STATE)
        self.script: Script = self.answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def answer(self, request: dict[str, Any]) -> list[Any]:
        """The state for everything."""
        return [{"id": request["id"], "ok": self.state}]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # A client that goes away in the middle is what some tests want.
            with (
                contextlib.suppress(ConnectionError),
                connection,
                connection.makefile("rb") as lines,
            ):
                for line in lines:
                    if not self._respond(connection, json.loads(line)):
                        break

    def _respond(self, connection: socket.socket, request: dict[str, Any]) -> bool:
        self.requests.append(request)
        for item in self.script(request):
            if item is None:
                return False
            line = item if isinstance(item, bytes) else json.dumps(item).encode() + b"\n"
            connection.sendall(line)
        return True

    def close(self) -> None:
        """Stop listening; the thread ends."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory with a short name (sockets), the configuration and its key."""
    directory = Path(tempfile.mkdtemp(prefix="nbdm-"))
    (directory / "demo.toml").write_text(CONFIG.replace("{base}", str(directory)))
    (directory / "key").write_bytes(b"k" * 32)
    (directory / "key").chmod(0o600)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def engine(base: Path) -> Iterator[FakeEngine]:
    """A stand-in for alpha's engine."""
    fake = FakeEngine(base / "engine.sock")
    yield fake
    fake.close()
