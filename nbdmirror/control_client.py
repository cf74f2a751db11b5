"""A client of a control socket, an engine's or a controller's: JSON lines over a Unix socket.

Owns: one connection, its time limit, and the mapping of the server's errors to ours. Must never:
repeat a command by itself (it may have been carried out), trust a length or a field of the answer,
or know who is asking.

A request is `{"id": n, "command": ..., "instance": hex|null, "epoch": n|null, "args": {...}}`. The
answer is `{"id": n, "ok": {...}}` or `{"id": n, "error": {"kind", "reason", "remedy"}}`. `instance`
and `epoch` name the engine and the role that the command was decided under: the engine refuses what
is older; a controller needs neither. `events` is answered with lines `{"id": n, "event": {...}}`,
as they happen.
"""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from nbdmirror import errors
from nbdmirror.errors import NbdMirrorError, RefusedError, StoreError, UnreachableError
from nbdmirror.limits import CONTROL_ANSWER_TIMEOUT_MS, MIB

LINE_BYTES_MAX: Final = 1 * MIB
RECEIVE_BYTES: Final = 64 * 1024
TEXT_CHARS_MAX: Final = 4096
# By name, as the engine sends it. A StoreError wants an errno, which no answer carries.
KINDS: Final[dict[str, type[NbdMirrorError]]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, NbdMirrorError)
    and not issubclass(kind, StoreError)
}


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is expected at a socket, for messages: its name, and the command that starts it."""

    name: str
    start: str


ENGINE: Final = Listener("engine", "nbdmirror engine run")


class ControlClient:
    """One connection to an engine or a controller; a context manager.

    Not for use by several threads at once. `timeout_s` bounds every call as a whole, from the first
    byte sent to the last one received. `listener` is who should answer at `path`.
    """

    def __init__(
        self,
        path: Path,
        timeout_s: float = CONTROL_ANSWER_TIMEOUT_MS / 1000,
        listener: Listener = ENGINE,
    ) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.listener = listener
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next call opens a new one."""
        connection, self._socket = self._socket, None
        self._received.clear()
        if connection is not None:
            connection.close()

    def call(
        self,
        command: str,
        *,
        instance: str | None = None,
        epoch: int | None = None,
        **args: object,
    ) -> dict[str, Any]:
        """Send one command and return what is answered under "ok".

        Raises:
            UnreachableError: nobody there, no answer in time, or an answer that is none. Whether
                the command was carried out is then unknown: ask for the state.
            RefusedError: it is refused; the text says why and what would help.
            StaleCommandError: decided under another engine instance or role epoch.
            NbdMirrorError: another kind that the answer names.
        """
        deadline = time.monotonic() + self.timeout_s
        try:
            self._send(command, instance, epoch, args, deadline)
            answer = self._answer(deadline)
            if "ok" not in answer and "error" not in answer:
                raise self._nonsense("neither ok nor error")
        except (OSError, UnreachableError) as error:
            self.close()  # a late answer must not be taken for that of the next call
            raise self._unreachable(error, command) from error
        if "error" in answer:
            raise refusal(command, answer["error"])
        result = answer["ok"]
        return result if isinstance(result, dict) else {}

    def events(
        self, *, since: int = 0, timeout_s: float | None = None, follow: bool = True
    ) -> Iterator[dict[str, Any]]:
        """The events that are remembered after number `since`, then those that happen.

        Ends when the other side ends the connection, and without `follow` after what is remembered.
        `timeout_s` bounds the wait for each event; None waits as long as the other side lives. The
        connection is of no use for calls meanwhile.

        Raises:
            UnreachableError, RefusedError: as call().
        """
        try:
            deadline = time.monotonic() + self.timeout_s
            args = {"since": since} if follow else {"since": since, "follow": False}
            self._send("events", None, None, args, deadline)
            while True:
                wait = None if timeout_s is None else time.monotonic() + timeout_s
                line = self._answer(wait, may_end=True)
                if "error" in line:
                    raise refusal("events", line["error"])
                event = line.get("event")
                if not isinstance(event, dict):
                    return
                yield event
        except (OSError, UnreachableError) as error:
            raise self._unreachable(error, "events") from error
        finally:
            self.close()

    def _send(
        self,
        command: str,
        instance: str | None,
        epoch: int | None,
        args: dict[str, Any],
        deadline: float,
    ) -> None:
        self._id += 1
        request = {
            "id": self._id,
            "command": command,
            "instance": instance,
            "epoch": epoch,
            "args": args,
        }
        line = json.dumps(request, separators=(",", ":")).encode() + b"\n"
        if len(line) > LINE_BYTES_MAX:
            raise RefusedError(f"{command}: the request is longer than {LINE_BYTES_MAX} bytes")
        self._connected(deadline).sendall(line)

    def _answer(self, deadline: float | None, *, may_end: bool = False) -> dict[str, Any]:
        """The next line, which must answer the request that was sent last."""
        line = self._line(deadline, may_end=may_end)
        if line and line.get("id") != self._id:
            raise self._nonsense(f"it answers request {line.get('id')!r}, not {self._id}")
        return line

    def _connected(self, deadline: float) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                connection.settimeout(self._left(deadline))
                connection.connect(str(self.path))
            except OSError:
                connection.close()
                raise
            self._socket = connection
        self._socket.settimeout(self._left(deadline))
        return self._socket

    @staticmethod
    def _left(deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left

    def _line(self, deadline: float | None, *, may_end: bool = False) -> dict[str, Any]:
        """The next line as an object; {} at the end of the connection if it may end."""
        assert self._socket is not None, "the request was sent"
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > LINE_BYTES_MAX:
                raise self._nonsense(f"a line of more than {LINE_BYTES_MAX} bytes")
            self._socket.settimeout(None if deadline is None else self._left(deadline))
            piece = self._socket.recv(RECEIVE_BYTES)
            if not piece:
                if may_end and not self._received:
                    return {}
                raise ConnectionResetError(
                    "it closed the connection without an answer (only root and the "
                    f"{self.listener.name}'s own user may ask, and only some at a time)"
                )
            self._received += piece
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            decoded = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._nonsense("a line that is not JSON") from error
        if not isinstance(decoded, dict) or not decoded:
            raise self._nonsense("a line that is not a JSON object")
        return decoded

    def _nonsense(self, what: str) -> UnreachableError:
        who = self.listener.name
        return UnreachableError(f"{what}: this is not the control socket of the {who}")

    def _unreachable(self, error: Exception, command: str) -> UnreachableError:
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            who = self.listener
            why = f"no {who.name} is running here (start it with `{who.start}`)"
        elif isinstance(error, TimeoutError):
            why = f"no answer within {self.timeout_s:g} s; what became of {command} is unknown"
        elif isinstance(error, PermissionError):
            why = f"this user may not command the {self.listener.name}; ask as root"
        else:
            why = str(error)
        return UnreachableError(f"{self.path}: {why}")


def refusal(command: str, error: object) -> NbdMirrorError:
    """The exception for the `error` member of an answer: of its kind, if text is all it takes."""
    facts = error if isinstance(error, dict) else {}
    reason = _text(facts.get("reason")) or "no reason was given"
    remedy = _text(facts.get("remedy"))
    kind = KINDS.get(_text(facts.get("kind")), RefusedError)
    prefix = "" if reason.startswith(f"{command}:") else f"{command}: "
    return kind(f"{prefix}{reason}; {remedy}" if remedy else f"{prefix}{reason}")


def _text(value: object) -> str:
    """Text for a terminal: bounded, and without what could steer it."""
    if not isinstance(value, str):
        return ""
    clean = "".join(each if each.isprintable() or each == "\n" else "?" for each in value)
    return clean[:TEXT_CHARS_MAX]
