"""The count of silence: pauses of this process are none, and a dead peer is lost all the same."""

import pytest

from nbdmirror.core.cluster.heartbeat import Silence

SILENCE_MS = 1_500
HEARTBEAT_MS = 200


def silence() -> Silence:
    """As a silence of 1500 ms has it."""
    made = Silence(SILENCE_MS // 2, SILENCE_MS // 15)
    assert not made.tick(0)
    return made


def test_silence_is_counted_from_the_start_and_from_what_is_heard() -> None:
    """Breaks in the field: a dead peer is lost too late, or a living one at once."""
    counted = silence()
    for now_ms in range(0, 1001, HEARTBEAT_MS):
        assert not counted.tick(now_ms)
    assert counted.silent_ms(1100) == 1100
    counted.heard(1050)
    assert counted.silent_ms(1100) == 50
    assert Silence(750, 100).silent_ms(5000) == 0


def test_a_pause_is_not_counted_and_the_sockets_come_first() -> None:
    """Breaks in the field: a node that was paused for a minute takes over a living peer."""
    counted = silence()
    counted.tick(200)
    # Also asked before the next round: a process may be paused between any two instructions.
    assert counted.silent_ms(60_200) == 300
    assert counted.tick(60_200)
    assert counted.silent_ms(60_200) == 300
    assert not counted.tick(60_400)
    assert counted.silent_ms(60_400) == 500


def test_what_was_heard_in_a_pause_hides_no_later_silence() -> None:
    """Breaks in the field: after each pause a dead peer has that much longer to live."""
    counted = silence()
    counted.heard(60_000)
    assert counted.tick(60_001)
    for now_ms in range(60_200, 61_601, HEARTBEAT_MS):
        counted.tick(now_ms)
    assert counted.silent_ms(61_600) >= 1500


def run_with_pauses(pause_ms: int, awake_ms: int, *, peer: bool) -> tuple[int, int]:
    """A minute with a pause each `awake_ms`: the longest silence, and how long until it is 1500.

    After each pause the sockets are read first, where `tick` asks for it; else after the timer,
    as libuv does it.
    """
    counted = silence()
    longest_ms, now_ms = 0, 0
    while now_ms < 60_000:
        before_ms, now_ms = now_ms, now_ms + pause_ms
        drain_first = counted.tick(now_ms)
        heard = peer and now_ms - before_ms >= HEARTBEAT_MS
        if heard and drain_first:
            counted.heard(now_ms)
        longest_ms = max(longest_ms, counted.silent_ms(now_ms))
        if heard:
            counted.heard(now_ms)
        for _ in range(0, awake_ms, HEARTBEAT_MS):
            now_ms += HEARTBEAT_MS
            counted.tick(now_ms)
            if peer:
                counted.heard(now_ms)
            longest_ms = max(longest_ms, counted.silent_ms(now_ms))
        if longest_ms >= SILENCE_MS:
            break
    return longest_ms, now_ms


@pytest.mark.parametrize("awake_ms", [0, 200, 1000])
@pytest.mark.parametrize("pause_ms", [400, 700, 760, 1200, 5000])
def test_pauses_are_no_silence_of_a_living_peer(pause_ms: int, awake_ms: int) -> None:
    """Breaks in the field: a host that is short of time loses its peer again and again."""
    longest_ms, _ = run_with_pauses(pause_ms, awake_ms, peer=True)
    assert longest_ms < SILENCE_MS


@pytest.mark.parametrize("awake_ms", [0, 200, 1000])
@pytest.mark.parametrize("pause_ms", [400, 700, 760, 1200, 3000])
def test_a_dead_peer_is_lost_between_pauses(pause_ms: int, awake_ms: int) -> None:
    """Breaks in the field: while this host is short of time, nobody ever takes over."""
    _, lost_at_ms = run_with_pauses(pause_ms, awake_ms, peer=False)
    assert lost_at_ms <= 16 * (pause_ms + awake_ms)
