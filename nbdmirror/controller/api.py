"""The controller's own socket: JSON lines over a Unix socket, for the command line.

Owns the names of the commands, their arguments, who may give them, and what is refused at once
with its remedy. The form is that of the engine's socket. An order is accepted here and carried out
by the conductor; `status` shows how far it is. Must never wait for a role to change.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from nbdmirror.controller.conductor import Conductor
from nbdmirror.controller.moving import move
from nbdmirror.controller.reload import plan_of
from nbdmirror.controller.status import status_of
from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.view import OrderKind, Service, View
from nbdmirror.errors import NbdMirrorError, RefusedError, StaleCommandError
from nbdmirror.files import path_error, remove_socket, require_socket_path
from nbdmirror.jsonlines import described, may_command, parse
from nbdmirror.limits import MIB

LINE_BYTES_MAX: Final = MIB
CONNECTIONS_MAX: Final = 64
IDLE_S: Final = 600.0
LOOK_AGAIN_S: Final = 5.0
EVENT_POLL_S: Final = 0.1
SWITCHES: Final = ("checkers", "failover", "boot")
OPERATOR: Final = "an operator asked for it"

Arguments = dict[str, Any]
Handler = Callable[[Arguments], Awaitable[str]]


class Api:
    """Serves one conductor. Every handler returns one sentence: what was done."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._connections = 0
        self._server: asyncio.Server | None = None
        self._path = conductor.config.controller_socket
        self._commands: dict[str, Handler] = {
            "start": self._start,
            "stop": self._stop,
            "prim": self._prim,
            "second": self._second,
            "swap": self._swap,
            "restart": self._restart,
            "resync": self._resync,
            "switch": self._switch,
            "arbiter-move": self._arbiter_move,
            "mount": self._mount,
            "unmount": self._unmount,
        }

    async def start(self, path: Path) -> None:
        """Listen. The mirror's lock is held, so a socket that is there is a dead controller's.

        Raises:
            RefusedError: what is there is no socket. ConfigError, OutOfSpaceError: it cannot be
            made.
        """
        require_socket_path(path)
        before = os.umask(0o177)
        try:
            remove_socket(path)
            self._server = await asyncio.start_unix_server(
                self._serve, path=str(path), limit=LINE_BYTES_MAX
            )
        except OSError as error:
            remedy = "the controller needs a directory where it may make its socket"
            raise path_error(error, str(path), remedy) from error
        finally:
            os.umask(before)

    async def close(self) -> None:
        """Take no more connections. To be called before the mirror's lock is given back.

        A socket that this one did not make stays: it is that of the controller that has the lock.
        """
        if self._server is not None:
            self._server.close()
            remove(self._path)

    # --- connections --------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > CONNECTIONS_MAX or not may_command(writer):
                return
            while line := await asyncio.wait_for(reader.readline(), IDLE_S):
                await self._answer(line, writer)
        except (ConnectionError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        request_id: Any = None
        try:
            request = parse(line)
            request_id = request.get("id")
            if request["command"] == "events":
                await self._events(request, writer)
                return
            reply = {"id": request_id, "ok": await self._run(request)}
        except NbdMirrorError as error:
            body = described(type(error).__name__, str(error), error.exit_code)
            reply = {"id": request_id, "error": body}
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the asker waits, whatever it was
            self._conductor.events.emit("background-error", reason=f"{error!r}")
            reason = f"an error inside the controller: {type(error).__name__}: {error}"
            body = described("NbdMirrorError", reason, NbdMirrorError.exit_code)
            reply = {"id": request_id, "error": body}
        writer.write(json.dumps(reply).encode() + b"\n")
        await writer.drain()

    async def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        command, args = request["command"], request.get("args") or {}
        if command == "status":
            return status_of(self._conductor)
        if command == "reload":
            return plan_of(self._conductor, dry_run=bool(args.get("dry_run", True)))
        handler = self._commands.get(command)
        if handler is None:
            known = ", ".join(["status", "events", "reload", *self._commands])
            raise RefusedError(f"unknown command {command!r}; known: {known}")
        done = await handler(args)
        self._conductor.events.emit("order", command=command, reason=done)
        self._conductor.wake()
        return {**status_of(self._conductor), "done": done}

    async def _events(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        args = request.get("args") or {}
        number = args.get("since", 0)
        if not isinstance(number, int):
            raise RefusedError("events: since has to be the number of an event")
        follow = bool(args.get("follow", True))
        while not writer.is_closing():
            for event in self._conductor.events.since(number):
                number = event["number"]
                writer.write(json.dumps({"id": request.get("id"), "event": event}).encode() + b"\n")
            await writer.drain()
            if not follow:
                writer.write(json.dumps({"id": request.get("id"), "ok": {}}).encode() + b"\n")
                await writer.drain()
                return
            await asyncio.sleep(EVENT_POLL_S)

    # --- commands -----------------------------------------------------------------------------

    async def _start(self, _args: Arguments) -> str:
        c = self._conductor
        if c.peer_heard() and c.config_differs() and not c.supervisor.alive:
            found = "; ".join(c.comparison.differences) or "which keys is being found out"
            raise RefusedError(
                f"start: the configuration of this node is not that of {c.config.peer.name}: "
                f"{found}. Make the two files equal, then restart this controller"
            )
        c.supervisor.forgive()
        c.orders.start()
        return said("this node shall run", await c.keeper.kept())

    async def _stop(self, args: Arguments) -> str:
        c = self._conductor
        if args.get("shutdown"):
            c.orders.clear()
            c.orders.shutdown = "the service is being stopped; it starts again with it"
            return "until the service starts again"
        both = bool(args.get("both")) and self._stops_both()
        c.orders.stop("stopped by an operator", both=both)
        problem = await c.keeper.kept()
        return said("both nodes stop" if both else "this node stops", problem)

    def _stops_both(self) -> bool:
        """The primary's application first, then the secondary, then the primary: equal copies.

        Raises:
            RefusedError: the other node is the primary.
        """
        v = self._conductor.look_at_everything()
        if not policy.is_primary(v) and v.peer.heard and v.peer.wanted:
            raise RefusedError(f"stop --both: type it on the primary, {v.settings.peer_name}")
        return policy.is_primary(v)

    async def _prim(self, args: Arguments) -> str:
        c, force = self._conductor, bool(args.get("force", False))
        v = c.look_at_everything()
        if v.engine is not None and v.engine.primary:
            raise RefusedError("prim: this node is primary already")
        if policy.peer_serves(v):
            raise RefusedError(
                f"prim: {v.settings.peer_name} serves; `nbdmirror swap` exchanges the roles, and "
                "`nbdmirror stop` there ends its service"
            )
        refusal = v.engine.promote_refusal if v.engine is not None else ""
        if refusal and not force:
            raise RefusedError(f"prim: {refusal}")
        c.orders.give(OrderKind.PRIM, OPERATOR, force=force)
        c.orders.start()
        return said("this node becomes primary", await c.keeper.kept())

    async def _second(self, args: Arguments) -> str:
        c = self._conductor
        v = c.look_at_everything()
        primary = v.engine is not None and v.engine.primary
        if v.engine is not None and v.engine.split and not primary and not args.get("force"):
            raise RefusedError(
                f"second: this node waits after a split brain: {v.settings.peer_name} goes on; "
                "`nbdmirror second --force` gives this copy up and fills it from there; what it "
                "holds is kept (`nbdmirror kept`)"
            )
        if args.get("force"):
            kept = await self._give_up_copy(keep=bool(args.get("keep", True)))
            c.orders.start()
            held = "what it holds is kept (`nbdmirror kept show`)" if kept else "nothing is kept"
            done = f"this copy is given up and filled from the other node; {held}"
        elif primary:
            self._require_swap("second")
            c.orders.start()
            c.orders.swap(v.settings.peer_id, OPERATOR)
            done = f"{v.settings.peer_name} takes over"
        else:
            c.orders.start()
            done = "this node runs, and serves only if it has to"
        return said(done, await c.keeper.kept())

    async def _give_up_copy(self, *, keep: bool) -> bool:
        """Give this copy up; once more where a session with the other node began meanwhile.

        Any other change of role may mean that the other copy is gone: that is for the operator.
        Returns whether what it holds is kept.

        Raises:
            NbdMirrorError: it serves, the other node has nothing to fill it with, or the engine
            refuses.
        """
        c = self._conductor
        self._require_no_use()
        try:
            return await c.give_up(keep=keep)
        except StaleCommandError:
            c.looked.clear()
            c.wake()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(c.looked.wait(), LOOK_AGAIN_S)
            if not (c.engine_state or {}).get("session"):
                raise
            self._require_no_use()
            return await c.give_up(keep=keep)

    def _require_no_use(self) -> None:
        """Whether this copy may be given up.

        Raises:
            RefusedError: it serves, or nobody else has what it holds.
        """
        v = self._conductor.look_at_everything()
        if v.engine is not None and v.engine.primary:
            raise RefusedError("second --force: this node serves; `nbdmirror stop`, or `swap`")
        if v.engine is not None:
            self._require_a_source(v)

    def _require_a_source(self, v: View) -> None:
        """Whether the other node has what this one is to be filled with.

        Raises:
            RefusedError: nobody can say that it has.
        """
        state = self._conductor.peer_body.data_state if self._conductor.peer_body else ""
        if not v.peer.heard or state not in ("uptodate", "outdated"):
            known = f"its copy is {state or 'not known'}" if v.peer.heard else "it is not heard"
            raise RefusedError(
                f"second --force: {v.settings.peer_name} cannot be the source: {known}; this would "
                "give up the only copy"
            )

    async def _swap(self, _args: Arguments) -> str:
        c = self._conductor
        v = c.look_at_everything()
        if v.engine is not None and v.engine.primary:
            self._require_swap("swap")
            c.orders.swap(v.settings.peer_id, OPERATOR)
            return f"{v.settings.peer_name} takes over"
        synced = v.engine is not None and v.engine.synced and v.engine.peer_primary
        if not synced or not policy.promotable(v):
            raise RefusedError(f"swap: this node cannot serve now: {why_not(v)}")
        c.orders.swap(v.settings.node_id, OPERATOR)
        return f"{v.settings.peer_name} is asked to hand over"

    def _require_swap(self, what: str) -> None:
        v = self._conductor.look_at_everything()
        if not self._conductor.orders.can_swap(v):
            role = f"{v.peer.role} {v.peer.readiness}" if v.peer.heard else "not heard"
            raise RefusedError(
                f"{what}: {v.settings.peer_name} cannot take over: it is {role}; "
                "wait until it is SECOND ready"
            )

    async def _restart(self, _args: Arguments) -> str:
        c = self._conductor
        v = c.look_at_everything()
        if v.engine is None or not v.engine.primary:
            raise RefusedError("restart: the application does not run here; see `nbdmirror status`")
        c.orders.give(OrderKind.RESTART, OPERATOR)
        return "the application is stopped and started"

    async def _resync(self, _args: Arguments) -> str:
        await self._conductor.command("resync")
        return "everything is compared with the other node"

    async def _switch(self, args: Arguments) -> str:
        name, on = args.get("name"), args.get("on")
        if name not in SWITCHES or not isinstance(on, bool):
            raise RefusedError(f"switch: name is one of {', '.join(SWITCHES)}, on is true or false")
        c = self._conductor
        c.switches.change(**{name: on})
        c.events.emit("switch", name=name, on=on)
        return said(f"{name} {'on' if on else 'off'}", await c.keeper.kept())

    async def _arbiter_move(self, args: Arguments) -> str:
        return await move(self._conductor, old_is_gone=bool(args.get("old_is_gone", False)))

    async def _mount(self, _args: Arguments) -> str:
        c = self._conductor
        self._require_maintenance("mount")
        await c.service.mount()
        return "the file system is mounted; the application is not started"

    async def _unmount(self, _args: Arguments) -> str:
        self._require_maintenance("unmount")
        problems = await self._conductor.service.unmount()
        if problems:
            raise RefusedError(f"unmount: {'; '.join(problems)}")
        return "the file system is unmounted and the device given up"

    def _require_maintenance(self, what: str) -> None:
        v = self._conductor.look_at_everything()
        if v.engine is None or not v.engine.primary:
            raise RefusedError(f"{what}: this node is not primary")
        if v.service not in (Service.DOWN, Service.FAILED):
            raise RefusedError(
                f"{what}: the application is {v.service.value}; its device is the controller's"
            )


def said(done: str, problem: str) -> str:
    """What was done, with what could not be stored."""
    return f"{done} ({problem})" if problem else done


def why_not(v: Any) -> str:
    """Why this node cannot serve."""
    if v.engine is None:
        return "its engine is not running"
    if v.held_back or v.engine.promote_refusal:
        return str(v.held_back or v.engine.promote_refusal)
    return "it is not in sync with a primary; see `nbdmirror status`"


def remove(path: Path) -> None:
    """The socket of a controller that ends."""
    with contextlib.suppress(OSError, RefusedError):
        remove_socket(path)
