"""The engine's control socket: JSON lines over a Unix socket, for one controller and any reader.

Owns the commands' names and their arguments, the check of who asks, and the rule that a command
names the engine instance and the role epoch it was decided under. What a command does is the
core's; nothing here decides. One controller commands at a time, the newest; readers of state and
events any number.

Request:  {"id": 1, "command": "promote", "instance": "<hex>", "epoch": 3, "args": {"force":
false}} Reply:    {"id": 1, "ok": {...}}  or  {"id": 1, "error": {"kind": "...", "reason": "...",
"remedy": ""}}
"""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeGuard

from nbdmirror.core import claims, giveup, joint, ports, roles
from nbdmirror.core.describe import describe
from nbdmirror.core.leave import Word
from nbdmirror.core.messages import Relay
from nbdmirror.core.node import Node, Role
from nbdmirror.core.record import COUNTER_MAX
from nbdmirror.core.superblock import ARBITER_IDENTITY_BYTES, ArbiterKind
from nbdmirror.driver import Driver, Pool
from nbdmirror.errors import NbdMirrorError, RefusedError, StaleCommandError
from nbdmirror.events import EventLog
from nbdmirror.files import path_error, remove_socket, require_socket_path
from nbdmirror.jsonlines import described, may_command, parse
from nbdmirror.limits import COMMAND_TIMEOUT_MS, KEEP_BYTES_MAX, RELAY_BYTES_MAX

LINE_BYTES_MAX: Final = 1024 * 1024
CONNECTIONS_MAX: Final = 64
CROWDED_MAX: Final = 64
CROWDED_S: Final = 5.0
EVENT_POLL_S: Final = 0.05
EXIT_AFTER_REPLY_S: Final = 0.05
SOCKET_MODE: Final = 0o600
Arguments: TypeAlias = dict[str, Any]
Guard: TypeAlias = Callable[[ports.Path], ports.Path]
Handler: TypeAlias = Callable[[Arguments, Guard], dict[str, Any]]


class Commanded(Protocol):
    """What a control server needs of the engine it serves."""

    instance: bytes
    node: Node
    driver: Driver
    pool: Pool
    events: EventLog
    handles: int

    def hurry(self) -> None:
        """Try to reach the peer now. From any thread."""
        ...

    def begin_stand_in(self) -> None:
        """See engine.py; nothing if it stands in already, or the arbiter has no memory."""
        ...

    def demote(self, guard: Guard) -> None:
        """Stop serving, if `guard` still allows it; blocks until the clients are gone."""
        ...

    def stop(self, guard: Guard) -> None:
        """Leave in order, if `guard` still allows it; blocks."""
        ...

    def background_error(self, name: str, error: BaseException) -> None:
        """Tell of an error that no caller can do anything about."""
        ...

    def exit(self) -> None:
        """End the process."""
        ...


class ControlServer:
    """Serves one engine's commands on the loop's thread; the commands run on worker threads."""

    def __init__(self, engine: Commanded) -> None:
        self._engine = engine
        self._commander = 0
        self._connections = 0
        self._numbers = 0
        self._server: asyncio.Server
        self._commands: dict[str, Handler] = {
            "promote": self._promote,
            "demote": self._demote,
            "alone": self._alone,
            "claim": self._claim,
            "claimed": self._claimed,
            "confirm-joint": self._confirm_joint,
            "recorded": self._recorded,
            "seen": self._seen,
            "named": self._named,
            "move-arbiter": self._move_arbiter,
            "reconnected": self._reconnected,
            "resync": self._resync,
            "drain": self._drain,
            "discard": self._discard,
            "give-up": self._give_up,
            "kept-discard": self._kept_discard,
            "kept-limit": self._kept_limit,
            "accept-peer": self._accept_peer,
            "stay": self._stay,
            "leave": self._leave,
            "peer-left": self._peer_left,
            "stop": self._stop,
        }

    async def start(self, path: Path, bound: socket.socket | None = None) -> None:
        """Listen. The metadata lock is held, so a socket that is there is a dead engine's.

        `bound`: the socket that was made there by whoever may. The kernel tells who connects that
        it is this process's from now on, because it is this one that listens.

        Raises:
            RefusedError: what is there is no socket. ConfigError, OutOfSpaceError: it cannot be
            made.
        """
        if bound is not None:
            self._server = await asyncio.start_unix_server(
                self._serve, sock=bound, limit=LINE_BYTES_MAX
            )
            return
        require_socket_path(path)
        try:
            remove_socket(path)
            before = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(
                    self._serve, path=str(path), limit=LINE_BYTES_MAX
                )
            finally:
                os.umask(before)
            path.chmod(SOCKET_MODE)  # noqa: ASYNC240 - once, before anybody is served
        except OSError as error:
            remedy = "the engine needs a directory where it may make its control socket"
            raise path_error(error, str(path), remedy) from error
        assert self._server.is_serving()

    # --- connections ----------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._numbers += 1
        number = self._numbers
        self._connections += 1
        try:
            if self._connections > CONNECTIONS_MAX + CROWDED_MAX or not may_command(writer):
                return
            # Whoever comes when it is crowded may command, and does not stay.
            idle_s = CROWDED_S if self._crowded() else None
            while line := await asyncio.wait_for(reader.readline(), idle_s):
                if not await self._answer(number, line, writer):
                    return
        except (ConnectionError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections -= 1
            if number == self._commander:
                self._attend(attended=False)
            writer.close()

    def _crowded(self) -> bool:
        return self._connections > CONNECTIONS_MAX

    async def _answer(self, number: int, line: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False ends the connection. No error is left without an answer."""
        request_id: Any = None
        command = ""
        late = False
        try:
            request = parse(line)
            request_id = request.get("id")
            command = request["command"]
            if command == "events":
                try:
                    await self._events(request, writer)
                except ConnectionError:
                    return False
                return True
            reply = {"id": request_id, "ok": await self._run(number, request)}
        except NbdMirrorError as error:
            late = isinstance(error, StaleCommandError)
            kind = type(error).__name__
            reply = {"id": request_id, "error": described(kind, str(error), error.exit_code)}
        except Exception as error:  # noqa: BLE001 - the asker waits, whatever it was
            self._engine.background_error(f"command {command}", error)
            reason = f"{command}: an error inside the engine: {type(error).__name__}: {error}"
            body = described("NbdMirrorError", reason, NbdMirrorError.exit_code)
            reply = {"id": request_id, "error": body}
        finally:
            if command == "stop" and self._engine.node.stopping and not late:
                # Also after an error on the way, or without anybody to answer: a node that is
                # stopping serves nobody any more. Not while another stop is at it still.
                asyncio.get_running_loop().call_later(EXIT_AFTER_REPLY_S, self._engine.exit)
        writer.write(json.dumps(reply).encode() + b"\n")
        await writer.drain()
        return True

    async def _run(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        command = request["command"]
        args = request.get("args") or {}
        if command == "state":
            return self._state(args)
        if command == "attach":
            self._commander = number
            self._attend(attended=True)
            return self._state(args)
        if command == "relay":
            return self._relay(number, args)
        handler = self._commands.get(command)
        if handler is None:
            known = ", ".join(["state", "events", "attach", "relay", *self._commands])
            raise RefusedError(f"unknown command {command!r}; known: {known}")
        self._require_current(number, request)
        guard = partial(roles.decided_under, self._engine.node, request["epoch"])
        loop = asyncio.get_running_loop()
        future: asyncio.Future[dict[str, Any]] = loop.create_future()

        def job() -> None:
            try:
                result = handler(args, guard)
            except BaseException as error:  # noqa: BLE001 - carried to the waiting command
                loop.call_soon_threadsafe(settle, future, None, error)
            else:
                loop.call_soon_threadsafe(settle, future, result, None)

        self._engine.pool.submit(f"command {command}", job)
        try:
            return await asyncio.wait_for(asyncio.shield(future), COMMAND_TIMEOUT_MS / 1000)
        except TimeoutError:
            raise RefusedError(
                f"{command}: not done within {COMMAND_TIMEOUT_MS} ms; it goes on, see `state`"
            ) from None

    def _require_current(self, number: int, request: dict[str, Any]) -> None:
        """A command is for this engine in this epoch.

        Raises:
            StaleCommandError: it was decided under another one, or by a controller that was
            replaced.
        """
        instance, epoch = request.get("instance"), request.get("epoch")
        if instance != self._engine.instance.hex() or epoch != self._engine.node.epoch:
            raise StaleCommandError(
                f"decided under engine {instance} epoch {epoch}; this is "
                f"{self._engine.instance.hex()} epoch {self._engine.node.epoch}: look again"
            )
        if request.get("controller") and number != self._commander:
            raise StaleCommandError("another controller commands this engine now")

    async def _events(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Send every event after `since`, and go on until the reader leaves (unless follow is
        false).
        """
        args = request.get("args") or {}
        number = args.get("since", 0)
        if not isinstance(number, int):
            raise RefusedError("events: since has to be the number of an event")
        if self._crowded():
            raise RefusedError(f"events: more than {CONNECTIONS_MAX} connections; end some of them")
        follow = bool(args.get("follow", True))
        while True:
            for event in self._engine.events.since(number):
                number = event["number"]
                writer.write(json.dumps({"id": request.get("id"), "event": event}).encode() + b"\n")
            await writer.drain()
            if not follow:
                writer.write(json.dumps({"id": request.get("id"), "ok": {}}).encode() + b"\n")
                await writer.drain()
                return
            if writer.is_closing():
                return
            await asyncio.sleep(EVENT_POLL_S)

    # --- commands ---------------------------------------------------------------------------------

    def _state(self, _args: dict[str, Any]) -> dict[str, Any]:
        engine = self._engine
        with engine.driver.lock:
            state = describe(engine.node)
            epoch = engine.node.epoch
        return {
            "instance": engine.instance.hex(),
            "epoch": epoch,
            "pid": os.getpid(),
            "clients": engine.handles,
            **state,
        }

    def _attend(self, *, attended: bool) -> None:
        """A controller came, or the last one is gone; the peer's engine is told."""
        with self._engine.driver.lock:
            node = self._engine.node
            node.commanded = node.polled = node.attended = attended
            node.was_attended = node.was_attended or attended
            self._tell_peer(b"")

    def _relay(self, number: int, args: Arguments) -> dict[str, Any]:
        """Carry some bytes to the peer's controller, bring what it sent last, and the state.

        Raises:
            StaleCommandError: from a controller that was replaced. RefusedError: too much.
        """
        if number != self._commander:
            raise StaleCommandError("another controller commands this engine now")
        try:
            payload = bytes.fromhex(args.get("payload", ""))
        except (TypeError, ValueError):
            raise RefusedError("relay: payload has to be hexadecimal digits") from None
        if len(payload) > RELAY_BYTES_MAX:
            raise RefusedError(f"relay: {len(payload)} bytes, at most {RELAY_BYTES_MAX}")
        with self._engine.driver.lock:
            self._engine.node.polled = True
            self._tell_peer(payload)
            relayed = self._engine.node.relayed.hex()
        return {**self._state(args), "relayed": relayed}

    def _tell_peer(self, payload: bytes) -> None:
        """Under the lock, on the loop's thread."""
        node = self._engine.node
        session = node.session
        if session is not None and session.live:
            session.tell(Relay(attended=node.attended, payload=payload))
            session.link.kick()

    def _drive(self, path: Any) -> Any:
        return self._engine.driver.drive(path)

    def _promote(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.promote(self._engine.node, force=bool(args.get("force", False)))))
        self._engine.hurry()
        return self._state(args)

    def _demote(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._engine.demote(guard)
        return self._state(args)

    def _alone(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.alone(self._engine.node)))
        return self._state(args)

    def _claim(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        record = generation_of(args) if "generation" in args else bytes(16)
        self._note_counter(args)
        prepared = self._drive(guard(roles.claim(self._engine.node, record)))
        return {
            "generation": prepared["generation"].hex(),
            "record_holds": [generation.hex() for generation in prepared["record_holds"]],
        }

    def _claimed(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        won = bool(args.get("won", False))
        self._note_counter(args)
        self._drive(guard(roles.claimed(self._engine.node, generation_of(args), won=won)))
        return self._state(args)

    def _confirm_joint(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(joint.confirm(self._engine.node, generation_of(args))))
        return self._state(args)

    def _recorded(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        generation = generation_of(args)
        self._note_counter(args)
        self._drive(guard(at_once(roles.recorded, self._engine.node, generation)))
        return self._state(args)

    def _seen(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        """What a look at the arbiter found: whether it answers, and the record's counter."""
        reachable = args.get("reachable")
        if not isinstance(reachable, bool):
            raise RefusedError("seen: reachable has to be true or false")
        self._note_counter(args)
        self._drive(guard(roles.seen(self._engine.node, reachable=reachable)))
        return self._state(args)

    def _named(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(claims.named(self._engine.node, generation_of(args))))
        return self._state(args)

    def _move_arbiter(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        try:
            kind = ArbiterKind.of_word(str(args.get("arbiter")))
            identity = bytes.fromhex(str(args.get("identity")))
        except (KeyError, ValueError):
            raise RefusedError("move-arbiter: arbiter is its word, identity is in hex") from None
        counter: object = args.get("counter")
        if len(identity) != ARBITER_IDENTITY_BYTES or not is_counter(counter):
            raise RefusedError("move-arbiter: identity has 64 hexadecimal digits, counter a number")
        path = roles.move_arbiter(
            self._engine.node, kind, identity, counter, meet=bool(args.get("meet", False))
        )
        self._drive(guard(path))
        self._engine.begin_stand_in()
        self._engine.hurry()
        return self._state(args)

    def _note_counter(self, args: Arguments) -> None:
        counter = args.get("counter")
        if counter is None:
            return
        if not is_counter(counter):
            raise RefusedError(f"counter has to be a number from 0 to {COUNTER_MAX}")
        with self._engine.driver.lock:
            self._engine.node.note_counter(counter)

    def _reconnected(self, args: Arguments, _guard: Guard) -> dict[str, Any]:
        # Changes nothing, so there is nothing that could be out of date.
        engine = self._engine
        if engine.node.role is not Role.PRIMARY:
            raise RefusedError("reconnected: this node is not primary; nothing is frozen here")
        engine.hurry()
        state = self._state(args)
        if state["frozen"]:
            raise RefusedError(
                f"reconnected: the peer is not back yet ({state['refusal'] or 'no connection'}); "
                "this node tries again by itself and goes on when it is"
            )
        return state

    def _resync(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.resync_full(self._engine.node)))
        return self._state(args)

    def _drain(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.drain(self._engine.node)))
        return self._state(args)

    def _discard(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.discard(self._engine.node)))
        return self._state(args)

    def _give_up(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        keep = bool(args.get("keep", True))
        kept = self._drive(guard(giveup.give_up(self._engine.node, keep=keep)))
        self._engine.hurry()
        return {**self._state(args), "is_kept": kept}

    def _kept_discard(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(giveup.discard_kept(self._engine.node)))
        self._engine.hurry()
        return self._state(args)

    def _kept_limit(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        limit = args.get("bytes")
        if not isinstance(limit, int) or not 0 <= limit <= KEEP_BYTES_MAX:
            raise RefusedError(f"kept-limit: bytes is a number from 0 to {KEEP_BYTES_MAX}")
        self._drive(guard(giveup.give_space(self._engine.node, limit)))
        self._engine.hurry()
        return self._state(args)

    def _accept_peer(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.accept_peer(self._engine.node)))
        self._engine.hurry()
        return self._state(args)

    def _stay(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        answer = self._drive(
            guard(at_once(roles.stay_word, self._engine.node, generation_of(args)))
        )
        return dict(answer)

    def _leave(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.leave_for_peer(self._engine.node, word_of(args))))
        return self._state(args)

    def _peer_left(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._drive(guard(roles.peer_has_left(self._engine.node, word_of(args))))
        return self._state(args)

    def _stop(self, args: Arguments, guard: Guard) -> dict[str, Any]:
        self._engine.stop(guard)
        return self._state(args)


def is_counter(value: object) -> TypeGuard[int]:
    """Whether it could be a counter of an arbiter's record."""
    return type(value) is int and 0 <= value <= COUNTER_MAX


def at_once(function: Callable[..., Any], *arguments: Any) -> ports.Path:
    """A plain function of the core, as a path of one step."""
    yield from ()
    return function(*arguments)


def generation_of(args: dict[str, Any]) -> bytes:
    """The generation in a command's arguments.

    Raises:
        RefusedError: it is not 32 hexadecimal digits.
    """
    try:
        generation = bytes.fromhex(args["generation"])
    except (KeyError, TypeError, ValueError):
        generation = b""
    if len(generation) != 16:
        raise RefusedError("generation has to be 32 hexadecimal digits")
    return generation


def word_of(args: dict[str, Any]) -> Word:
    """The word of leaving in a command's arguments.

    Raises:
        RefusedError: no generation, or no session's number.
    """
    try:
        session = int(args["session"], 16)
    except (KeyError, TypeError, ValueError):
        raise RefusedError("session has to be a hexadecimal number") from None
    return Word(generation_of(args), session)


def settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    """Hand a worker's result to the loop."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
