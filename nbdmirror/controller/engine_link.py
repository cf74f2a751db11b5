"""The controller's connection to its engine's control socket.

Owns two connections: one that commands and polls (the newest controller is the one that commands),
one that follows the events. Must never repeat a command by itself, wait without a bound, or believe
a length that the engine sends: everything it does not understand ends the connection.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from nbdmirror.control_client import refusal
from nbdmirror.errors import StaleCommandError, UnreachableError
from nbdmirror.limits import COMMAND_TIMEOUT_MS, ENGINE_PING_TIMEOUT_MS, MIB

LINE_BYTES_MAX: Final = MIB
COMMAND_S: Final = COMMAND_TIMEOUT_MS / 1000 + 5
PING_S: Final = ENGINE_PING_TIMEOUT_MS / 1000
WORD_TRIES: Final = 5

State = dict[str, Any]


class Lines:
    """One connection: a request, its answer, one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._number = 0
        self._turn = asyncio.Lock()

    async def call(self, command: str, bound_s: float, **fields: Any) -> State:
        """The `ok` of the answer.

        Raises:
            UnreachableError: no engine, no answer in time, or nonsense; what became of the command
                is unknown. NbdMirrorError: the engine refuses.
        """
        async with self._turn:
            try:
                answer = await asyncio.wait_for(self._ask(command, fields), bound_s)
            except TimeoutError:
                self.close()
                raise UnreachableError(f"the engine did not answer within {bound_s:g} s") from None
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                self.close()
                raise UnreachableError(f"the engine cannot be reached: {error}") from error
            except asyncio.CancelledError:
                self.close()  # a late answer must not be taken for that of the next call
                raise
        if "error" in answer:
            raise refusal(command, answer["error"])
        result = answer.get("ok")
        return result if isinstance(result, dict) else {}

    async def _ask(self, command: str, fields: dict[str, Any]) -> State:
        reader, writer = await self.connected()
        self._number += 1
        request = {"id": self._number, "command": command, **fields}
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        return await next_line(reader)

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The two ends of the connection, made when there is none."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_unix_connection(
                str(self._path), limit=LINE_BYTES_MAX
            )
        return self._reader, self._writer

    @property
    def is_open(self) -> bool:
        """Whether the next call takes the connection of the last one."""
        return self._writer is not None

    def close(self) -> None:
        """End the connection; the next call makes a new one."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()


async def next_line(reader: asyncio.StreamReader) -> State:
    """The next object. Raises OSError, ValueError."""
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise ConnectionResetError("it closed the connection")
    decoded = json.loads(line)
    if not isinstance(decoded, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - like any other line that is none
    return decoded


class EngineLink:
    """Commands, polls and events of one engine. `on_event` is called for each event."""

    def __init__(self, path: Path, on_event: Callable[[State], None]) -> None:
        self._path = path
        self._on_event = on_event
        self._poll = Lines(path)
        self._command = Lines(path)
        self._follower: asyncio.Task[None] | None = None

    async def attach(self) -> State:
        """Become the engine's controller; returns its state."""
        state = await self._poll.call("attach", PING_S)
        if self._follower is not None:
            self._follower.cancel()
        self._follower = asyncio.create_task(self._follow(), name="engine-events")
        return state

    async def poll(self, payload: bytes) -> tuple[State, bytes]:
        """Its state; carries `payload` to the peer's controller and brings what that sent last.

        Attaches first, where this connection has not.
        """
        if not self._poll.is_open:
            await self.attach()
        state = await self._poll.call("relay", PING_S, args={"payload": payload.hex()})
        return state, bytes.fromhex(str(state.pop("relayed", "")))

    async def command(self, name: str, state: Mapping[str, Any], **args: object) -> State:
        """A command for the engine as `state` has it. The engine refuses it when it is no more."""
        return await self._command.call(
            name, COMMAND_S, instance=state.get("instance"), epoch=state.get("epoch"), args=args
        )

    async def word(self, name: str, **args: object) -> State:
        """A word of leaving, for the engine as it is now.

        It is bound to a generation and a session by itself, so the epoch says nothing about it: the
        last look may be older than the end of that session, which has changed the role.

        Raises:
            NbdMirrorError: there is no engine, or it refuses.
        """
        for _ in range(WORD_TRIES):
            state = await self._command.call("state", PING_S)
            with contextlib.suppress(StaleCommandError):
                return await self.command(name, state, **args)
        raise StaleCommandError(f"{name}: the engine changes its role again and again")

    async def _follow(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            reader, writer = await asyncio.open_unix_connection(
                str(self._path), limit=LINE_BYTES_MAX
            )
            try:
                writer.write(b'{"id": 1, "command": "events", "args": {"follow": true}}\n')
                while True:
                    event = (await next_line(reader)).get("event")
                    if isinstance(event, dict):
                        self._on_event(event)
            finally:
                writer.close()

    def let_go(self) -> None:
        """Another controller commands it: the next poll attaches anew."""
        self._poll.close()

    def close(self) -> None:
        """End all connections; the engine goes on."""
        if self._follower is not None:
            self._follower.cancel()
            self._follower = None
        self._poll.close()
        self._command.close()
