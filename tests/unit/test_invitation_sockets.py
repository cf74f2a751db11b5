"""The listener of an invitation and its guests, over real sockets on loopback."""

import asyncio
import contextlib
import os
import resource
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nbdmirror.config_fields import Address
from nbdmirror.errors import (
    AuthenticationError,
    NbdMirrorError,
    PeerProtocolError,
    RefusedError,
    SessionLostError,
)
from nbdmirror.invitation import ATTEMPTS_MAX, CONNECTIONS_MAX, Invitation, join, join_over
from nbdmirror.token_exchange import (
    HEADER_BYTES,
    Kind,
    Offer,
    Outcome,
    Proven,
    Receive,
    Send,
    Token,
    body_bytes,
    inviting,
    joining,
)
from tests.unit.test_invitation import OFFER, OTHER_SECRET, SECRET, meet

BOUND_S = 60.0


def made_as_beta(offer: Offer) -> str:
    """A second server that makes what it is offered."""
    assert offer == OFFER
    return "beta"


def serve(connection: socket.socket, budget: int) -> None:
    """An inviter that sends so many bytes and then goes away."""
    steps = inviting(SECRET, os.urandom(32), OFFER)
    answer: bytes | None = None
    with connection, contextlib.suppress(OSError), connection.makefile("rb") as reader:
        while not isinstance(step := steps.send(answer), Outcome):
            answer = None
            if isinstance(step, Receive):
                header = reader.read(HEADER_BYTES)
                answer = reader.read(body_bytes(header, step.kind))
            elif isinstance(step, Send):
                connection.sendall(step.frame[:budget])
                budget -= len(step.frame)
                if budget < 0:
                    return


@pytest.mark.slow
def test_an_inviter_that_goes_at_any_byte_is_an_error_and_no_mirror() -> None:
    """Breaks in the field: a cut line leaves half a mirror, or a traceback at the second server."""
    total = sum(map(len, meet().to_joiner))
    for budget in range(total):
        mine, theirs = socket.socketpair()
        other = threading.Thread(target=serve, args=(theirs, budget))
        other.start()
        made: list[Offer] = []

        def take(offer: Offer, made: list[Offer] = made) -> str:
            made.append(offer)
            return "beta"

        with mine, pytest.raises((SessionLostError, AuthenticationError)):
            join_over(mine, SECRET, take)
        other.join(BOUND_S)
        assert not made
    mine, theirs = socket.socketpair()
    other = threading.Thread(target=serve, args=(theirs, total))
    other.start()
    with mine:
        assert join_over(mine, SECRET, made_as_beta).node == "beta"
    other.join(BOUND_S)


class Host:
    """One invitation on loopback, and what it said."""

    def __init__(self, offer: Offer = OFFER) -> None:
        self.told: list[str] = []
        self.invitation = Invitation(offer, ("127.0.0.1", 0), self.told.append)
        self.token = self.invitation.token

    def run(
        self, *guests: Coroutine[Any, Any, Any], timeout_s: float = BOUND_S
    ) -> tuple[str, str] | NbdMirrorError:
        """Wait for a join while the guests come, one after the other; what it came to."""

        async def all_of_it() -> tuple[str, str] | NbdMirrorError:
            waiting = asyncio.ensure_future(self.invitation.wait(timeout_s))
            for guest in guests:
                await guest
            try:
                return await waiting
            except NbdMirrorError as error:
                return error

        return asyncio.run(asyncio.wait_for(all_of_it(), 2 * BOUND_S))

    async def joined(self, make: Callable[[Offer], str] = made_as_beta, **changes: Any) -> Any:
        """A second server; what join() returned or raised."""
        token = Token(self.token.address, changes.get("secret", self.token.secret))
        try:
            return await asyncio.to_thread(join, token, make)
        except NbdMirrorError as error:
            return error

    def gone(self) -> bool:
        """Whether nobody listens any more."""
        with socket.socket() as probe:
            return probe.connect_ex((self.token.address.host, self.token.address.port)) != 0


def test_one_join_and_the_listener_is_gone() -> None:
    """Breaks in the field: a token that was used once opens the mirror to the next one."""
    host = Host()
    results: list[Any] = []

    async def guest() -> None:
        results.append(await host.joined())
        results.append(await host.joined())

    assert host.run(guest()) == ("beta", "127.0.0.1")
    first, second = results
    assert (first.node, first.offer, first.told) == ("beta", OFFER, True)
    assert isinstance(second, NbdMirrorError)
    assert host.gone()
    assert not host.told


def test_five_wrong_tokens_end_it() -> None:
    """Breaks in the field: somebody who guesses has the whole time for it, unseen."""
    host = Host()
    results: list[Any] = []

    async def guests() -> None:
        results.extend([await host.joined(secret=OTHER_SECRET) for _ in range(ATTEMPTS_MAX)])

    end = host.run(guests())
    assert isinstance(end, RefusedError)
    assert "5 joins failed" in str(end)
    assert len(host.told) == ATTEMPTS_MAX - 1
    assert "127.0.0.1 failed: the other end does not have this token" in host.told[0]
    assert all(isinstance(each, AuthenticationError) for each in results)
    assert "token is not its present one" in str(results[0])
    assert host.gone()


def test_four_wrong_tokens_do_not() -> None:
    """Breaks in the field: a typing error at the first server costs the second one its join."""
    host = Host()
    guests = [host.joined(secret=OTHER_SECRET) for _ in range(ATTEMPTS_MAX - 1)]
    assert host.run(*guests, host.joined()) == ("beta", "127.0.0.1")


def test_nobody_comes() -> None:
    """Breaks in the field: a forgotten invitation stays open for ever."""
    host = Host()
    end = host.run(timeout_s=0.05)
    assert isinstance(end, SessionLostError)
    assert "nobody joined" in str(end)
    assert host.gone()


def test_a_join_that_cannot_be_made_tells_why_and_may_come_again() -> None:
    """Breaks in the field: the first server believes in a mirror that the second one has not, or a
    full disk there costs a new token.
    """
    host = Host()
    results: list[Any] = []

    def full(_: Offer) -> str:
        raise RefusedError("there is no room \x1b[31m here")

    async def guest() -> None:
        results.append(await host.joined(full))

    assert host.run(guest(), host.joined()) == ("beta", "127.0.0.1")
    assert "no room" in str(results[0])
    assert host.told == [
        "a join from 127.0.0.1 could not be made: there is no room ?[31m here (attempt 1 of 5)"
    ]


def nothing() -> None:
    """What happens meanwhile, by default."""


def talked(
    connection: socket.socket,
    secret: bytes,
    budget: int,
    greeted: Callable[[], None] = nothing,
) -> None:
    """A joiner that sends so many bytes, hears what comes, and then goes away.

    `greeted` is called when the inviter has answered the first message.
    """
    steps = joining(secret, os.urandom(32))
    answer: Any = None
    with connection, contextlib.suppress(OSError, PeerProtocolError, StopIteration):
        reader = connection.makefile("rb")
        for _ in range(99):
            step = steps.send(answer)
            answer = None
            if isinstance(step, Offer):
                answer = Outcome(node="beta")
            elif isinstance(step, Receive):
                answer = reader.read(body_bytes(reader.read(HEADER_BYTES), step.kind))
                if step.kind is Kind.CHALLENGE:
                    greeted()
            else:
                assert not isinstance(step, Proven)
                connection.sendall(step.frame[: max(budget, 0)])
                budget -= len(step.frame)
                if budget < 0:
                    return


async def guest_of(host: Host, budget: int) -> None:
    """Such a joiner comes and goes."""
    address = (host.token.address.host, host.token.address.port)
    connection = await asyncio.to_thread(socket.create_connection, address, BOUND_S)
    await asyncio.to_thread(talked, connection, host.token.secret, budget)


@pytest.mark.slow
def test_a_joiner_that_goes_at_any_byte_leaves_the_token_or_spends_it() -> None:
    """Breaks in the field: a cut line before the hand-over costs the token, or one after it lets
    the key be taken a second time without a word.
    """
    frames = [len(frame) for frame in meet().to_inviter]
    handed = sum(frames[:3])
    for budget in range(sum(frames)):
        host = Host()
        if budget < handed:
            assert host.run(guest_of(host, budget), host.joined()) == ("beta", "127.0.0.1")
            # With its proof it was an attempt; without one a stranger.
            assert len(host.told) == (budget >= sum(frames[:2])), budget
        else:
            end = host.run(guest_of(host, budget))
            assert isinstance(end, SessionLostError)
            assert "127.0.0.1 got the configuration" in str(end)
            assert host.gone()


def test_a_join_under_way_is_let_through_and_alone() -> None:
    """Breaks in the field: a large second disk takes longer than the token is good for, and the
    join is cut off at its end; or two servers get the mirror at once.
    """
    host = Host()
    inside, go = threading.Event(), threading.Event()
    results: list[Any] = []

    def slow(_: Offer) -> str:
        inside.set()
        assert go.wait(BOUND_S)
        return "beta"

    async def guests() -> None:
        first = asyncio.ensure_future(host.joined(slow))
        assert await asyncio.to_thread(inside.wait, BOUND_S)
        results.append(await host.joined())
        host.invitation._late = True  # as when the time is over
        go.set()
        results.append(await first)

    assert host.run(guests()) == ("beta", "127.0.0.1")
    assert isinstance(results[0], AuthenticationError)
    assert "another join is under way" in str(results[0])
    assert results[1].node == "beta"


@pytest.mark.slow
def test_the_time_ends_while_a_join_is_under_way() -> None:
    """Breaks in the field: as above, by the clock itself."""
    host = Host()
    inside, over = threading.Event(), threading.Event()

    def slow(_: Offer) -> str:
        inside.set()
        assert over.wait(BOUND_S)
        return "beta"

    async def all_of_it() -> tuple[str, str]:
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(1.5, late.set)
        waiting = asyncio.ensure_future(host.invitation.wait(1.0))
        first = asyncio.ensure_future(host.joined(slow))
        assert await asyncio.to_thread(inside.wait, BOUND_S)
        await late.wait()
        over.set()
        await first
        return await waiting

    assert asyncio.run(asyncio.wait_for(all_of_it(), BOUND_S)) == ("beta", "127.0.0.1")


def test_a_late_join_that_fails_is_the_end() -> None:
    """Breaks in the field: an invitation whose time is over waits for ever."""
    host = Host()

    def fails(_: Offer) -> str:
        host.invitation._late = True
        raise RefusedError("no room")

    end = host.run(host.joined(fails))
    assert isinstance(end, SessionLostError)
    assert "nobody joined" in str(end)


def garbage(host: Host, number: int) -> socket.socket:
    """A connection of somebody else: silent, noise, a giant length, or the beginning of a hello."""
    words = (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\x28NBDMINV\x01" + b"x" * 32,
        os.urandom(64),
    )
    address = (host.token.address.host, host.token.address.port)
    connection = socket.create_connection(address, BOUND_S)
    with contextlib.suppress(OSError):
        connection.sendall(words[number % len(words)])
    return connection


@pytest.mark.slow
def test_a_flood_of_strangers_does_not_keep_the_right_one_out() -> None:
    """Breaks in the field: a port scanner on the network, and no mirror can be made there."""
    host = Host()
    held: list[socket.socket] = []
    stop, full = threading.Event(), threading.Event()

    def flood() -> None:
        number = 0
        while not stop.is_set():
            with contextlib.suppress(OSError):
                held.append(garbage(host, number))
            number += 1
            if len(held) > 2 * CONNECTIONS_MAX:
                full.set()
                held.pop(0).close()

    async def guests() -> None:
        flooding = asyncio.ensure_future(asyncio.to_thread(flood))
        assert await asyncio.to_thread(full.wait, BOUND_S)
        try:
            # From one and the same host a place may be lost; an operator tries again.
            for _ in range(20):
                if not isinstance(await host.joined(), NbdMirrorError):
                    break
        finally:
            stop.set()
            await flooding

    try:
        assert host.run(guests()) == ("beta", "127.0.0.1")
    finally:
        for each in held:
            each.close()
    assert not host.told
    assert len(host.invitation._visitors) <= CONNECTIONS_MAX + 1


@pytest.mark.slow
def test_another_host_keeps_its_place_in_a_flood() -> None:
    """Breaks in the field: one host that holds connections open pushes the second server out."""
    host = Host()
    held: list[socket.socket] = []
    address = (host.token.address.host, host.token.address.port)

    async def guests() -> None:
        quiet = socket.create_connection(address, BOUND_S, source_address=("127.0.0.9", 0))
        held.append(quiet)
        strangers = range(3 * CONNECTIONS_MAX)
        held.extend([await asyncio.to_thread(garbage, host, 0) for _ in strangers])
        # Who comes last was accepted after all of them, and a wrong token is an attempt.
        assert isinstance(await host.joined(secret=OTHER_SECRET), AuthenticationError)
        assert len(host.told) == 1
        assert len(host.invitation._visitors) <= CONNECTIONS_MAX
        # The oldest of all is still heard: it is the only one of its host.
        await asyncio.to_thread(talked, quiet, host.token.secret, 1 << 20)

    try:
        assert host.run(guests()) == ("beta", "127.0.0.9")
    finally:
        for each in held:
            each.close()


@pytest.mark.slow
def test_who_said_a_valid_word_keeps_its_place_before_the_silent() -> None:
    """Breaks in the field: connections from the second server itself push its join out."""
    host = Host()
    held: list[socket.socket] = []

    def strangers() -> None:
        held.extend(garbage(host, 0) for _ in range(3 * CONNECTIONS_MAX))

    async def guests() -> None:
        address = (host.token.address.host, host.token.address.port)
        right = await asyncio.to_thread(socket.create_connection, address, BOUND_S)
        await asyncio.to_thread(talked, right, host.token.secret, 1 << 20, come)

    def come() -> None:
        strangers()
        # Who comes last was accepted after all of them.
        with pytest.raises(AuthenticationError):
            join(Token(host.token.address, OTHER_SECRET), made_as_beta)

    try:
        assert host.run(guests(), timeout_s=BOUND_S / 2) == ("beta", "127.0.0.1")
    finally:
        for each in held:
            each.close()


def test_an_address_that_is_not_here_is_refused_with_the_way_out() -> None:
    """Breaks in the field: a traceback instead of a word about `--listen`."""
    with pytest.raises(RefusedError, match="--listen"):
        Invitation(OFFER, ("192.0.2.77", 0), print)


def test_nobody_there_is_said_in_a_sentence() -> None:
    """Breaks in the field: a firewall looks like a defect of the program."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(
        SessionLostError, match=r"nobody listens at 127.0.0.1:\d+ .*nbdmirror invite"
    ):
        join(Token(Address("127.0.0.1", port), SECRET), made_as_beta)


def test_a_lack_of_descriptors_is_waited_out() -> None:
    """Breaks in the field: a server that is short of descriptors for a moment spins, or never hears
    the one that joins.
    """

    class Watched(Invitation):
        """Counts how often it begins to listen, and how often it tries to accept."""

        hearings = 0
        tries = 0

        def _accept(self) -> None:
            self.tries += 1
            super()._accept()

        def _hear(self) -> None:
            super()._hear()
            self.hearings += 1
            if self.hearings == 2:
                tries.append(self.tries)
                again.set()

    again = asyncio.Event()
    tries: list[int] = []
    host = Host()
    host.invitation.close()
    host.invitation = Watched(OFFER, ("127.0.0.1", 0), host.told.append)
    host.token = host.invitation.token
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def guest() -> None:
        address = (host.token.address.host, host.token.address.port)
        connection = socket.create_connection(address, BOUND_S)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
        try:
            await again.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        await asyncio.to_thread(talked, connection, host.token.secret, 1 << 20)

    assert host.run(guest()) == ("beta", "127.0.0.1")
    assert tries == [1]
