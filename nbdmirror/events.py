"""The events of one engine: a bounded log in memory that readers follow from any point, and the
lines of it that go to standard error.

Owns numbering, the bound, and what becomes of repeats. An event is a fact with a kind; it never
holds a secret. Emitting never blocks and never fails: it is called under the engine's lock.

Some kinds can be caused from outside, as often as somebody likes: by a peer that is refused at
every contact, or by strangers at the peer port. Those say once a minute that they happen still, and
how often they did (`repeats`), and new ones of them come at a bounded rate, so that they can
neither wash out the history nor fill a journal.
"""

import contextlib
import sys
import threading
import time
from collections import OrderedDict, deque
from typing import Any, Final

EVENTS_KEPT_MAX: Final = 4096
# Kinds that are merged with their like.
NOISY: Final = frozenset({"no-peer", "refused", "split-brain", "protocol-error"})
# The end of a session without any of these before it is noise, too: the two met and parted.
BEGINS_LIFE: Final = frozenset({"decided", "resumed", "in-sync"})
MERGE_S: Final = 60.0
MERGED_MAX: Final = 64
BURST_MAX: Final = 32
REFILL_S: Final = 2.0
# Kinds that an operator reads in the journal; those of errors are there with their traceback.
TOLD: Final = frozenset(
    {
        "started", "memory", "metadata", "tls", "witness", "role", "question", "held", "in-sync",
        "resumed", "session-lost", "refused", "no-peer", "protocol-error", "split-brain", "decided",
        "local-failure", "failure-not-recorded", "leave", "leave-without-flush",
        "demote-without-flush", "clients-stay", "resync-started", "resync-finished", "tidy-failed",
        "kept-begun", "kept-closed", "kept-damaged", "kept-missing", "kept-discarded", "given-up",
        "resync-waits", "hand-over", "decision", "note", "peer", "checker", "order", "switch",
        "engine-ended",
    }
)  # fmt: skip
LINE_CHARS_MAX: Final = 1024

Event = dict[str, Any]


class Repeats:
    """Which events are repeats of an earlier one, and which are too many."""

    def __init__(self) -> None:
        # (kind, text) -> when it was told last, and how often it came since.
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        # Of each kind: strangers cannot silence what only the peer can cause.
        self._tokens: dict[str, tuple[float, float]] = {}
        self._dropped_count = 0
        self._lived = False

    def admit(self, kind: str, facts: Event, now_s: float) -> Event | None:
        """The facts to tell, or None if this one is only counted."""
        if kind == "in-sync":
            self._seen.clear()  # what comes after it is news
        text = str(facts.get("reason", facts))
        fruitless = kind == "session-lost" and not self._lived
        if kind in BEGINS_LIFE or kind == "session-lost":
            self._lived = kind in BEGINS_LIFE
        if kind not in NOISY and not fruitless:
            return facts
        key = (kind, text)
        told_s, count = self._seen.get(key, (None, 0))
        if told_s is not None and now_s - told_s < MERGE_S:
            self._seen[key] = (told_s, count + 1)
            self._seen.move_to_end(key)
            return None
        tokens, filled_s = self._tokens.get(kind, (float(BURST_MAX), 0.0))
        tokens = min(tokens + (now_s - filled_s) / REFILL_S, float(BURST_MAX))
        if tokens < 1:
            self._tokens[kind] = (tokens, now_s)
            self._dropped_count += 1
            return None
        self._tokens[kind] = (tokens - 1, now_s)
        self._seen[key] = (now_s, 0)
        self._seen.move_to_end(key)
        if len(self._seen) > MERGED_MAX:
            self._seen.popitem(last=False)
        more: Event = {"repeats": count} if count else {}
        if self._dropped_count:
            more["not_told"] = self._dropped_count
            self._dropped_count = 0
        return {**facts, **more}


class EventLog:
    """The last EVENTS_KEPT_MAX events, numbered from 1."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT_MAX)
        self._changed = threading.Condition(threading.Lock())
        self._number = 0
        self._began_s = time.monotonic()
        self._repeats = Repeats()
        self._written = 0

    def emit(self, kind: str, **facts: object) -> None:
        """Append one event, unless it only repeats."""
        with self._changed:
            now_s = time.monotonic() - self._began_s
            told = self._repeats.admit(kind, facts, now_s)
            if told is None:
                return
            self._number += 1
            at_ms = int(now_s * 1000)
            self._events.append({"number": self._number, "at_ms": at_ms, "event": kind, **told})
            self._changed.notify_all()

    def since(self, number: int) -> list[Event]:
        """All kept events after `number`, oldest first."""
        with self._changed:
            return [event for event in self._events if event["number"] > number]

    def write_for_ever(self) -> None:
        """Write a line to standard error for each event of TOLD. For a thread of its own: whoever
        reads the journal may be slow.
        """
        while True:
            with self._changed:
                while self._number == self._written:
                    self._changed.wait()
            events = self.since(self._written)
            for event in events:
                if event["event"] in TOLD:
                    with contextlib.suppress(OSError, ValueError):
                        sys.stderr.write(line(event))
            with self._changed:
                self._written = events[-1]["number"]
                self._changed.notify_all()

    def wait_written(self, bound_s: float) -> None:
        """Give what was told so far the time to be written."""
        with self._changed:
            number = self._number
            self._changed.wait_for(lambda: self._written >= number, bound_s)


def line(event: Event) -> str:
    """An event as one line of a journal."""
    facts = ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("number", "at_ms", "event")
    )
    text = "".join(char if char.isprintable() else "?" for char in facts)
    return f"nbdmirror: {event['event']}: {text[:LINE_CHARS_MAX]}\n"
