"""The events of one engine: a bounded log in memory that readers follow from any point.

Owns numbering and the bound. An event is a fact with a kind; it never holds a secret. Emitting
never blocks and never fails: it is called under the engine's lock.
"""

import threading
import time
from collections import deque
from typing import Any, Final

EVENTS_KEPT_MAX: Final = 4096


class EventLog:
    """The last EVENTS_KEPT_MAX events, numbered from 1."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT_MAX)
        self._lock = threading.Lock()
        self._number = 0
        self._began_s = time.monotonic()

    def emit(self, kind: str, **facts: object) -> None:
        """Append one event."""
        with self._lock:
            self._number += 1
            at_ms = int((time.monotonic() - self._began_s) * 1000)
            self._events.append({"number": self._number, "at_ms": at_ms, "event": kind, **facts})

    def since(self, number: int) -> list[dict[str, Any]]:
        """All kept events after `number`, oldest first."""
        with self._lock:
            return [event for event in self._events if event["number"] > number]
