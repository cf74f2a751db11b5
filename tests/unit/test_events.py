"""The log of events under whoever wants to wash it out."""

import io
import sys
import threading
from time import monotonic
from typing import Any

import pytest

from nbdmirror.events import BURST_MAX, EVENTS_KEPT_MAX, MERGE_S, EventLog, Repeats, line


def kinds(log: EventLog) -> list[str]:
    """The kinds of all events that are kept."""
    return [event["event"] for event in log.since(0)]


def test_a_flood_does_not_wash_out_the_history() -> None:
    """Breaks in the field: a stranger at the peer port makes the engine forget why it failed."""
    log = EventLog()
    log.emit("local-failure", reason="the disk")
    for number in range(2 * EVENTS_KEPT_MAX):
        log.emit("no-peer", reason=f"handshake message of type {number}")
    assert kinds(log)[0] == "local-failure"
    assert len(kinds(log)) < 2 * BURST_MAX


def test_a_split_brain_is_told_once_and_not_at_every_contact() -> None:
    """Breaks in the field: two nodes that wait for an operator fill the log until he comes."""
    log = EventLog()
    for number in range(100):
        # The side that goes on writes more and more.
        log.emit("split-brain", waits=False, own_bytes=number, reason="this node goes on alone")
        log.emit("refused", reason="Split brain.")
        log.emit("session-lost", session=f"{number:016x}", reason="peer: Split brain.")
    assert kinds(log) == ["split-brain", "refused", "session-lost"]


def test_what_the_node_does_itself_is_never_merged() -> None:
    """Breaks in the field: a controller that follows the events misses a change of role."""
    log = EventLog()
    for _ in range(200):
        log.emit("decided", verdict="FULL", row="x", reason="x")
        log.emit("role", role="none", epoch=1)
        log.emit("session-lost", session="00", reason="the peer closed the connection")
    assert len(kinds(log)) == 600


def test_repeats_are_counted_and_told_after_a_while() -> None:
    """Breaks in the field: nobody can see whether what was told once goes on."""
    repeats = Repeats()
    facts: dict[str, Any] = {"reason": "refused"}
    assert repeats.admit("no-peer", facts, 0.0) == facts
    assert repeats.admit("no-peer", facts, 1.0) is None
    assert repeats.admit("no-peer", facts, MERGE_S - 1) is None
    assert repeats.admit("no-peer", facts, MERGE_S + 1) == {"reason": "refused", "repeats": 2}
    many = [repeats.admit("no-peer", {"reason": str(n)}, MERGE_S + 2) for n in range(100)]
    assert 0 < sum(each is not None for each in many) <= BURST_MAX
    later = repeats.admit("no-peer", {"reason": "later"}, MERGE_S + 100)
    assert later is not None
    assert later["not_told"] == sum(each is None for each in many)


def test_a_line_of_the_journal_is_one_line() -> None:
    """Breaks in the field: a text from elsewhere writes lines, or steers a terminal."""
    event = {"number": 1, "at_ms": 2, "event": "refused", "reason": "a\nb\x1b[2J", "repeats": 3}
    assert line(event) == "nbdmirror: refused: reason a?b?[2J, repeats 3\n"


def test_a_slow_journal_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: whoever reads the journal hangs, and the engine hangs with it."""
    may_write = threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            may_write.wait(60)
            return super().write(text)

    slow = Slow()
    monkeypatch.setattr(sys, "stderr", slow)
    log = EventLog()
    threading.Thread(target=log.write_for_ever, daemon=True).start()
    for number in range(50):
        log.emit("role", role="none", epoch=number)
    began = monotonic()
    log.wait_written(0.01)
    assert monotonic() - began < 30, "the wait is bounded"
    may_write.set()
    log.wait_written(60)
    assert slow.getvalue().count("nbdmirror: role: ") == 50
