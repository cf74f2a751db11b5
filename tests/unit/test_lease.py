"""The two sides of a read lease, and that one is over before the other begins."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.lease import Lease
from nbdmirror.core.wire import FrameType
from nbdmirror.limits import READ_LEASE_DRIFT_SHARE, READ_LEASE_MS_MAX, READ_LEASE_MS_MIN

LENGTH_MS = 1000
LENGTHS = st.integers(READ_LEASE_MS_MIN, READ_LEASE_MS_MAX)


class Asked:
    """A session that remembers what was queued."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def queue(self, kind: FrameType, *fields: Any) -> None:
        """Only echo requests."""
        assert kind is FrameType.ECHO_REQUEST
        self.numbers.append(fields[1])


class Woken:
    """A waiter."""

    def __init__(self) -> None:
        self.result = None
        self.count = 0

    def wait(self, timeout_s: float | None = None) -> bool:
        """Not driven here."""
        raise AssertionError(timeout_s)

    def wake(self, result: Any = None) -> None:
        """Counts."""
        self.count += 1


def asker(lease: Lease) -> Callable[[int], int]:
    """Asks at a time; returns the number."""
    session: Any = Asked()

    def ask(now_ms: int) -> int:
        lease.ask(session, now_ms, 0)
        return int(session.numbers[-1])

    return ask


def test_a_lease_counts_from_the_question() -> None:
    """Breaks in the field: an answer that was long on its way lets a deposed primary read on."""
    lease = Lease(LENGTH_MS, 0, confirms=False)
    ask = asker(lease)
    first, second = ask(100), ask(400)
    assert lease.until_ms == 0
    lease.answered(first)
    assert lease.until_ms == 1100
    lease.answered(first)
    assert lease.until_ms == 1100
    lease.answered(second)
    assert lease.until_ms == 1400


def test_an_answer_that_was_skipped_counts_for_nothing() -> None:
    """Breaks in the field: numbers that nobody asked under renew a lease."""
    lease = Lease(LENGTH_MS, 0, confirms=False)
    ask = asker(lease)
    first, second = ask(100), ask(400)
    lease.answered(second + 1)
    lease.answered(first)
    lease.answered(0)
    assert lease.until_ms == 0
    third = ask(500)
    lease.forget()
    lease.answered(third)
    assert lease.until_ms == 0
    assert lease.answered_number == 0


def test_a_held_read_is_woken_once() -> None:
    """Breaks in the field: a read that waits is not looked at again, or keeps a thread busy."""
    lease = Lease(LENGTH_MS, 0, confirms=False)
    number = asker(lease)(100)
    waiter = Woken()
    assert next(lease.wait(waiter)) == (waiter.wait, None)
    lease.answered(number)
    lease.wake()
    assert waiter.count == 1


def test_confirmed_reads_have_no_lease() -> None:
    """Breaks in the field: with `confirm` a clock that stood still lets a deposed primary read."""
    lease = Lease(LENGTH_MS, 0, confirms=True)
    ask = asker(lease)
    mark = lease.number
    assert lease.lacks_question(mark)
    lease.answered(ask(100))
    assert lease.until_ms == 0
    assert lease.answered_number > mark
    assert not lease.lacks_question(mark)
    assert lease.lacks_question(lease.number)
    first, _ = ask(200), ask(300)
    # However many begin now: they wait for an answer, and share the echo that follows it.
    assert not lease.lacks_question(lease.number)
    lease.answered(first)
    assert lease.lacks_question(lease.number)


@given(LENGTHS, st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_lease_is_over_when_the_peer_serves(
    length_ms: int, sent_us: int, way_us: int, skew_ms: int
) -> None:
    """Breaks in the field: for a millisecond both nodes answer reads.

    Real time in microseconds; both clocks are rounded down, the peer's is set differently and
    runs faster by the drift that is allowed for.
    """

    def peer_ms(real_us: int) -> int:
        return skew_ms + (real_us + real_us // READ_LEASE_DRIFT_SHARE) // 1000

    primary, peer = Lease(length_ms, 0, confirms=False), Lease(length_ms, 0, confirms=False)
    number = asker(primary)(sent_us // 1000)
    peer.lend(peer_ms(sent_us + way_us))
    primary.answered(number)
    # The last moment at which the primary's clock is still below.
    last_us = primary.until_ms * 1000 - 1
    assert peer.left_ms(peer_ms(last_us)) > 0


def test_what_was_lent_comes_back_by_word() -> None:
    """Breaks in the field: a planned swap stops the application for a second without a reason."""
    lease = Lease(LENGTH_MS, 5000, confirms=False)
    # An engine that starts cannot know what the one before it answered.
    assert lease.left_ms(5000) > LENGTH_MS
    lease.returned()
    assert lease.left_ms(5000) == 0
    lease.lend(6000)
    assert lease.left_ms(6500) > LENGTH_MS - 500
    assert lease.left_ms(8000) == 0
