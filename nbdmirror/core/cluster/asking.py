"""What was asked in this freeze or silence already, and what was answered.

Owns when an answer is too old, when a question is put again, and whether a network that has just
come back is believed. Must never act on an answer, or ask anybody: the shell does.
"""

from collections.abc import Callable, Sequence
from typing import Final

from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.view import Verdict, View

VERDICT_MS: Final = 1_000
ASK_AGAIN_MS: Final = 5_000


class Patience:
    """What `ping` remembers: whether the network was gone since the peer was last heard.

    When a switch comes back, it does so for both nodes at once, and the router's echo may be here
    before the peer's next heartbeat: both would go on, each for itself. So a yes after a no counts
    only when the peer stays silent for a whole silence with the network there.
    """

    def __init__(self) -> None:
        self._was_gone = False
        self._back_ms: float | None = None

    def heard(self) -> None:
        """The peer is heard, or nothing is asked any more: what was seen before says nothing."""
        self._was_gone, self._back_ms = False, None

    def verdict(
        self, no_echo: str, hosts: Sequence[str], silence_ms: int, now_ms: float
    ) -> tuple[Verdict, str]:
        """Yes or no, and a sentence why. `no_echo`: why none of the hosts answered, "" if one did.

        `now_ms`: when they were asked.
        """
        if no_echo:
            self._was_gone, self._back_ms = True, None
            return Verdict.NO, no_echo
        if self._was_gone and not self._is_back_for(silence_ms, now_ms):
            return Verdict.NO, (
                f"the network is there again, but not yet for {silence_ms} ms: the other node may "
                "still be heard"
            )
        return Verdict.YES, f"the network is there: one of {', '.join(hosts)} answers"

    def _is_back_for(self, silence_ms: int, now_ms: float) -> bool:
        if self._back_ms is None:
            self._back_ms = now_ms
        return now_ms - self._back_ms >= silence_ms


class Questions:
    """To the peer, whether it leaves; to the arbiter, whether this node may go on without it."""

    def __init__(self, clock_ms: Callable[[], float]) -> None:
        self.asked_peer = False
        self.verdict = Verdict.UNASKED
        self.reason = ""
        self.patience = Patience()
        self._clock_ms = clock_ms
        self._asked_ms = 0.0
        self._verdict_ms = 0.0

    def peer_is_asked(self) -> None:
        """Once for each freeze."""
        self.asked_peer, self._asked_ms = True, self._clock_ms()

    def answered(self, verdict: Verdict, reason: str) -> None:
        """By the arbiter."""
        self.verdict, self.reason = verdict, reason
        self._verdict_ms = self._clock_ms()

    def settle(self, v: View) -> None:
        """Forget what is over: the silence, the freeze, or the worth of an old answer."""
        engine, now_ms = v.engine, self._clock_ms()
        if engine is not None and (engine.phase or not (engine.frozen or policy.silent(v))):
            # Not in a loop while the peer has no engine: its answer would be the same.
            no_engine = v.peer.heard and not v.peer.engine
            again = now_ms - self._asked_ms > ASK_AGAIN_MS
            self.asked_peer = self.asked_peer and no_engine and not again
            self.patience.heard()
            if not v.settings.memory:
                # A record's answer is as good as it is old: it is no word about the peer.
                self.verdict = Verdict.UNASKED
        if now_ms - self._verdict_ms > VERDICT_MS:
            self.verdict = Verdict.UNASKED
