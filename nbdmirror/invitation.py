"""The two ends of an invitation: a listener for one join, and the server that joins.

Owns the sockets of the exchange, its bounds, and the count of its attempts; `token_exchange` has
what is said. Must never: keep the secret of a token anywhere but in memory, hand the configuration
out twice, or let those who do not have the token keep out the one who has.
"""

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from nbdmirror.config_fields import Address
from nbdmirror.core.messages import printable, text_bytes
from nbdmirror.errors import (
    AuthenticationError,
    NbdMirrorError,
    PeerProtocolError,
    PeerRefusedError,
    RefusedError,
    SessionLostError,
)
from nbdmirror.link import abort
from nbdmirror.token_exchange import (
    CONFIGURATION_CHARS_MAX,
    HEADER_BYTES,
    NONCE_BYTES,
    SECRET_BYTES,
    TOKEN_CHARS_MAX,
    Joining,
    Kind,
    Offer,
    Outcome,
    Receive,
    Send,
    Token,
    body_bytes,
    inviting,
    joining,
    parse_token,
)

__all__ = [
    "CONFIGURATION_CHARS_MAX",
    "TOKEN_CHARS_MAX",
    "Invitation",
    "Joined",
    "Offer",
    "Token",
    "join",
    "join_over",
    "parse_token",
]

ATTEMPTS_MAX: Final = 5
CONNECTIONS_MAX: Final = 32
EXCHANGE_TIMEOUT_S: Final = 10.0
# Reserving the space of a large device takes minutes where the file system has to write zeros.
OUTCOME_TIMEOUT_S: Final = 3600.0
PROBE_S: Final = (10, 5, 3)  # idle, between probes, how many: a silent end is found in 25 s
PAUSE_S: Final = 0.05

_SPENT: Final = "make a new one with `nbdmirror invite` on the other server"


# --- the second server ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """What the inviter offered, the name that was taken, and whether the inviter knows of it."""

    offer: Offer
    node: str
    told: bool


def join(token: Token, make: Callable[[Offer], str]) -> Joined:
    """Dial the inviter and make what it offers; `make` returns the name of this node.

    What `make` raises goes on to the caller; the inviter hears the reason.

    Raises:
        SessionLostError: nobody listens there, or the connection ended or was silent for 10 s.
        AuthenticationError: the token is wrong or void, or somebody sits in between.
        PeerProtocolError: another program is there.
    """
    address = token.address
    try:
        connection = socket.create_connection((address.host, address.port), EXCHANGE_TIMEOUT_S)
    except OSError as error:
        raise SessionLostError(
            f"nobody listens at {address} ({error.strerror or 'no answer'}): the token is used or "
            f"its time is over ({_SPENT}), or a firewall is between the servers"
        ) from error
    with connection:
        return join_over(connection, token.secret, make)


def join_over(connection: socket.socket, secret: bytes, make: Callable[[Offer], str]) -> Joined:
    """`join` over a connected socket; the caller closes it."""
    steps = joining(secret, os.urandom(NONCE_BYTES))
    wire = _Wire(connection)
    offer = wire.until_offer(steps)
    try:
        node = make(offer)
    except BaseException as error:
        reason = str(error) if isinstance(error, NbdMirrorError) else type(error).__name__
        wire.tell(steps, Outcome(reason=text_bytes(reason or "no reason").decode()))
        raise
    return Joined(offer, node, wire.tell(steps, Outcome(node=node)))


class _Wire:
    """Drives the joining side over a blocking socket, 10 s in all for each half."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline_s = 0.0

    def until_offer(self, steps: Joining) -> Offer:
        """Prove the token both ways and get the offer."""
        self._deadline_s = time.monotonic() + EXCHANGE_TIMEOUT_S
        answer: bytes | None = None
        kind = Kind.CHALLENGE
        try:
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Offer):
                    return step
                if isinstance(step, Send):
                    self._send(step.frame)
                else:
                    kind = step.kind
                    answer = self._receive(kind)
        except OSError as error:
            raise _lost(kind, error) from error

    def tell(self, steps: Joining, outcome: Outcome) -> bool:
        """Whether the inviter has the outcome: it closes when it has read it."""
        self._deadline_s = time.monotonic() + EXCHANGE_TIMEOUT_S
        try:
            step = steps.send(outcome)
            assert isinstance(step, Send)
            self._send(step.frame)
            self._bound()
            return self._connection.recv(1) == b""
        except OSError:
            return False

    def _bound(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        self._connection.settimeout(left_s)

    def _send(self, frame: bytes) -> None:
        self._bound()
        self._connection.sendall(frame)

    def _receive(self, kind: Kind) -> bytes:
        return self._exactly(body_bytes(self._exactly(HEADER_BYTES), kind))

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            self._bound()
            part = self._connection.recv(count - len(parts))
            if not part:
                raise ConnectionError("the other end closed the connection")
            parts += part
        return bytes(parts)


def _lost(kind: Kind, error: OSError) -> NbdMirrorError:
    """Why the joining side has no offer. After its proof an end without a word is a no."""
    if kind is Kind.WELCOME and isinstance(error, ConnectionError):
        return AuthenticationError(
            "the inviter ended the connection when it had seen the proof: the token is not its "
            f"present one, is used, or another join is under way; {_SPENT}"
        )
    why = error.strerror or str(error) or "no answer in time"
    return SessionLostError(f"the inviter was lost before {kind.name}: {why}; {_SPENT}")


# --- the first server ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Visitor:
    """One connection: where it comes from, and how far it is."""

    connection: socket.socket
    host: str
    greeted: bool = False
    proven: bool = False
    handed: bool = False


class Invitation:
    """One token, one listener, at most one hand-over.

    The listener is there when this returns. `tell` gets a sentence for each attempt that failed.

    Raises:
        RefusedError: the address cannot be listened at.
    """

    def __init__(self, offer: Offer, at: tuple[str, int], tell: Callable[[str], None]) -> None:
        self._offer = offer
        self._tell = tell
        self._listener = _listen(*at)
        self.token = Token(
            Address(at[0], self._listener.getsockname()[1]), os.urandom(SECRET_BYTES)
        )
        self._visitors: dict[asyncio.Task[None], _Visitor] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._failures = 0
        self._late = False
        self._end: asyncio.Future[tuple[str, str]] | None = None

    def close(self) -> None:
        """Stop listening: the token is void."""
        self._listener.close()

    async def wait(self, timeout_s: float) -> tuple[str, str]:
        """Until one has joined: the name of its node, and the address it came from.

        A join that is under way when the time is over is let through to its end.

        Raises:
            SessionLostError: nobody in time, or whoever got the mirror did not say what became of
            it. RefusedError: five attempts with a wrong token, or that could not be made.
        """
        loop = asyncio.get_running_loop()
        self._end = loop.create_future()
        self._hear()
        try:
            try:
                return await asyncio.wait_for(asyncio.shield(self._end), timeout_s)
            except TimeoutError:
                self._late = True
                if not self._end.done() and not self._underway():
                    self._nobody()
                return await self._end
        finally:
            if self._pause is not None:
                self._pause.cancel()
            loop.remove_reader(self._listener)
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    def _underway(self) -> bool:
        return any(each.proven for each in self._visitors.values())

    def _finish(self, result: tuple[str, str] | NbdMirrorError) -> None:
        assert self._end is not None
        if self._end.done():
            return
        if isinstance(result, NbdMirrorError):
            self._end.set_exception(result)
        else:
            self._end.set_result(result)

    def _nobody(self) -> None:
        self._finish(
            SessionLostError(
                "nobody joined in time and the token is void: make a new one with `nbdmirror "
                "invite`"
            )
        )

    def _hear(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Take one connection; who is here already has a turn before the next one.

        Without an await: a task that is cancelled with a connection in its hand would lose it.
        """
        loop = asyncio.get_running_loop()
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors, or the connection is gone already.
            loop.remove_reader(self._listener)
            self._pause = loop.call_later(PAUSE_S, self._hear)
            return
        self._make_room()
        visitor = _Visitor(connection, str(address[0]))
        task = loop.create_task(self._visited(visitor))
        self._visitors[task] = visitor
        self._tasks.add(task)
        task.add_done_callback(partial(self._left, visitor))

    def _left(self, visitor: _Visitor, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._visitors.pop(task, None)
        abort(visitor.connection)
        if self._late and not self._underway():
            self._nobody()

    def _make_room(self) -> None:
        """A new connection has a place: the oldest unproven one of the busiest host gives it up.

        So a flood from one host takes places from itself alone, the silent and the noisy first; who
        has the token says a valid HELLO at once and proves it within a round trip.
        """
        unproven = {task: each for task, each in self._visitors.items() if not each.proven}
        if len(unproven) < CONNECTIONS_MAX:
            return
        ((busiest, _),) = Counter(each.host for each in unproven.values()).most_common(1)
        tasks = [task for task, each in unproven.items() if each.host == busiest]
        task = next((each for each in tasks if not unproven[each].greeted), tasks[0])
        del self._visitors[task]
        task.cancel()  # its end closes the connection

    async def _visited(self, visitor: _Visitor) -> None:
        try:
            outcome = await self._talk(visitor)
        except (OSError, PeerProtocolError) as error:
            self._came_to_nothing(visitor, error)
            return
        # The joining side sees the connection close in order: its word has arrived.
        visitor.connection.close()
        if outcome.node:
            self._finish((printable(outcome.node), visitor.host))
        else:
            self._failed(visitor, f"could not be made: {printable(outcome.reason)}")

    def _came_to_nothing(self, visitor: _Visitor, error: Exception) -> None:
        if visitor.handed:
            self._finish(
                SessionLostError(
                    f"{visitor.host} got the configuration and the key, and was lost before it "
                    "said what became of them: look there; if nothing was made, make a new token "
                    "with `nbdmirror invite`"
                )
            )
        elif visitor.proven or isinstance(error, AuthenticationError):
            why = str(error) if isinstance(error, PeerProtocolError) else "the connection was lost"
            self._failed(visitor, f"failed: {why}")
        # Else a stranger who said nothing of use: no attempt, and nothing that it could fill.

    def _failed(self, visitor: _Visitor, what: str) -> None:
        self._failures += 1
        if self._failures < ATTEMPTS_MAX:
            self._tell(
                f"a join from {visitor.host} {what} (attempt {self._failures} of {ATTEMPTS_MAX})"
            )
            return
        self._finish(
            RefusedError(
                f"{ATTEMPTS_MAX} joins failed and the token is void; the last one, from "
                f"{visitor.host}, {what}. If these were not yours, somebody else reaches "
                f"{self.token.address}; make a new token with `nbdmirror invite`"
            )
        )

    async def _talk(self, visitor: _Visitor) -> Outcome:
        loop = asyncio.get_running_loop()
        steps = inviting(self.token.secret, os.urandom(NONCE_BYTES), self._offer)
        connection = visitor.connection
        connection.setblocking(False)
        _probe(connection)
        answer: bytes | None = None
        async with asyncio.timeout(EXCHANGE_TIMEOUT_S) as bound:
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Outcome):
                    return step
                if isinstance(step, Receive):
                    if step.kind is Kind.OUTCOME:
                        bound.reschedule(loop.time() + OUTCOME_TIMEOUT_S)
                    answer = await _receive(connection, step.kind)
                elif isinstance(step, Send):
                    visitor.greeted = True
                    visitor.handed = visitor.handed or step.kind is Kind.OFFER
                    await loop.sock_sendall(connection, step.frame)
                else:
                    self._prove(visitor)

    def _prove(self, visitor: _Visitor) -> None:
        if self._underway() or self._end is None or self._end.done():
            raise PeerRefusedError("another join is under way, or done")
        visitor.proven = True


async def _receive(connection: socket.socket, kind: Kind) -> bytes:
    header = await _exactly(connection, HEADER_BYTES)
    return await _exactly(connection, body_bytes(header, kind))


async def _exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    parts = bytearray()
    while len(parts) < count:
        part = await loop.sock_recv(connection, count - len(parts))
        if not part:
            raise ConnectionError("the other end closed the connection")
        parts += part
    return bytes(parts)


def _probe(connection: socket.socket) -> None:
    """A server that is gone without a word is noticed while its outcome is waited for."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    for option, value in zip(options, PROBE_S, strict=True):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((host, port))
        listener.listen(CONNECTIONS_MAX)
    except OSError as error:
        listener.close()
        where = f"port {port}" if port else "a free port"
        raise RefusedError(
            f"cannot listen at {host}, {where}: {error.strerror}; name an address of this server "
            "that the other one reaches with `--listen`"
        ) from error
    return listener
