"""The three lines of the promise, and which of them are in force.

Owns the words. README, status and documents repeat them.
"""

from collections.abc import Mapping
from typing import Any, Final

PROMISE_A: Final = "(a) a write acknowledged now survives the loss of either node, power included"
PROMISE_B: Final = "(b) an acknowledged FLUSH or FUA survives the loss of power on both nodes"
PROMISE_C: Final = (
    "(c) two nodes never both acknowledge, and a stale or half-synced node never takes over "
    "by itself"
)
ONE_COPY: Final = "one copy: until the peer is in sync again, the loss of this node loses writes"
NO_MEMORY: Final = frozenset({"none", "ping"})


def phase_of(state: Mapping[str, Any]) -> str:
    """Where the session with the peer stands; "" without one."""
    session = state.get("session")
    return str(session.get("phase", "")) if isinstance(session, Mapping) else ""


def mode_of(state: Mapping[str, Any]) -> str:
    """One word for what an engine does: mirrored, alone, resync, frozen, failed or waiting."""
    if state.get("failed"):
        return "failed"
    if state.get("frozen"):
        return "frozen"
    phase = phase_of(state)
    if phase == "synced":
        return "mirrored"
    if phase in {"resync", "joint"}:
        return "resync"
    return "alone" if state.get("role") == "primary" else "waiting"


def no_promise_c(arbiter: str) -> str:
    """What the arbiter does not promise; the promise itself if it does."""
    if arbiter in NO_MEMORY:
        return (
            f'arbiter "{arbiter}" does not give (c): when the nodes cannot see each other, both '
            "may go on, and the writes of one side are then given up; until it notices, a primary "
            "that was replaced answers reads with what was there before"
        )
    return PROMISE_C


def promises(state: Mapping[str, Any], arbiter: str, trouble: str = "") -> list[str]:
    """Which of the three promises are in force now, in the words of the documentation.

    `trouble`: why an arbiter with a memory cannot be asked now.
    """
    last = no_promise_c(arbiter)
    if trouble and arbiter not in NO_MEMORY:
        last += f"; the price, now: without its arbiter no node goes on alone ({trouble})"
    mode = mode_of(state)
    if mode == "mirrored":
        return [PROMISE_A, PROMISE_B, last]
    if mode == "frozen":
        return ["nothing is acknowledged while frozen", last]
    if state.get("role") == "primary":
        return [ONE_COPY, last]
    return ["none by this node: it is not in sync with the other one", last]
