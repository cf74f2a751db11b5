"""The control socket over an engine that fails in ways that no engine should."""

import asyncio
import errno
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdmirror.control import EXIT_AFTER_REPLY_S, Commanded, ControlServer, Guard
from nbdmirror.driver import Driver, Pool
from nbdmirror.events import EventLog

INSTANCE = bytes(range(16))
BOUND_S = 20.0


class BrokenEngine:
    """Every change of role fails as it may in the midst of one; a stop has begun by then."""

    def __init__(self) -> None:
        self.instance = INSTANCE
        self.node: Any = SimpleNamespace(epoch=3, stopping=False)
        self.driver = Driver()
        self.errors: list[str] = []
        self.pool = Pool(self.background_error)
        self.events = EventLog()
        self.handles = 0
        self.error: Exception = OSError(errno.EBADF, "Bad file descriptor")
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.ended = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def begin_stand_in(self) -> None:
        """Nothing reads here."""

    def hurry(self) -> None:
        """Nothing to reach."""

    def demote(self, _guard: Guard) -> None:
        """Fails."""
        raise self.error

    def stop(self, _guard: Guard) -> None:
        """Fails after the point of no return, when the asker may be gone."""
        self.node.stopping = True
        self.loop.call_soon_threadsafe(self.begun.set)
        asyncio.run_coroutine_threadsafe(self.let_go.wait(), self.loop).result(BOUND_S)
        raise self.error

    def background_error(self, name: str, error: BaseException) -> None:
        """Keep it."""
        self.errors.append(f"{name}: {error}")

    def exit(self) -> None:
        """Instead of the process."""
        self.ended.set()


def line(command: str, epoch: int = 3) -> bytes:
    """A command for that engine."""
    request = {"id": 7, "command": command, "instance": INSTANCE.hex(), "epoch": epoch}
    return json.dumps(request).encode() + b"\n"


@pytest.fixture
def path() -> Iterator[Path]:
    """Where the control socket is; short."""
    with tempfile.TemporaryDirectory(prefix="nm") as directory:
        yield Path(directory) / "engine.sock"


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), AssertionError("never"), KeyError("x")]
)
def test_every_error_is_an_answer(path: Path, error: Exception) -> None:
    """Breaks in the field: the controller asks for a demotion, hears nothing, and cannot know
    whether this node still serves.
    """

    async def main() -> None:
        engine = BrokenEngine()
        engine.error = error
        server = ControlServer(cast("Commanded", engine))
        await server.start(path)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(line("demote"))
        answer = json.loads(await asyncio.wait_for(reader.readline(), BOUND_S))
        assert answer["id"] == 7
        assert type(error).__name__ in answer["error"]["reason"]
        assert answer["error"]["exit_code"] == 10
        assert engine.errors, "and the log has it"
        writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("stays", [True, False])
def test_a_stop_always_ends_the_engine(path: Path, *, stays: bool) -> None:
    """Breaks in the field: an engine that is stopping, refuses everything, and never ends; the
    service manager waits until it kills it.
    """

    async def main() -> None:
        engine = BrokenEngine()
        server = ControlServer(cast("Commanded", engine))
        await server.start(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(path))
            await engine.loop.sock_sendall(client, line("stop"))
            await asyncio.wait_for(engine.begun.wait(), BOUND_S)
            if not stays:
                client.close()
            engine.let_go.set()
            await asyncio.wait_for(engine.ended.wait(), BOUND_S)
            if stays:
                assert b"Bad file descriptor" in await engine.loop.sock_recv(client, 4096)

    asyncio.run(main())


def test_a_second_stop_does_not_cut_the_first_one_off(path: Path) -> None:
    """Breaks in the field: SIGTERM beside `engine stop`, and what the first one was about to store
    is not stored.
    """

    async def main() -> None:
        engine = BrokenEngine()
        server = ControlServer(cast("Commanded", engine))
        await server.start(path)
        _, first = await asyncio.open_unix_connection(str(path))
        first.write(line("stop"))
        await asyncio.wait_for(engine.begun.wait(), BOUND_S)
        reader, second = await asyncio.open_unix_connection(str(path))
        second.write(line("stop", epoch=2))
        assert b"StaleCommandError" in await asyncio.wait_for(reader.readline(), BOUND_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.ended.wait(), 4 * EXIT_AFTER_REPLY_S)
        engine.let_go.set()
        await asyncio.wait_for(engine.ended.wait(), BOUND_S)
        first.close()
        second.close()

    asyncio.run(main())
