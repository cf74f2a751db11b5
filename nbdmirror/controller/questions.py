"""What was asked in this freeze or silence already, and what was answered.

Owns when an answer is too old and when a question is put again. Must never act on an answer.
"""

from typing import Final

from nbdmirror.config import Config
from nbdmirror.controller.arbiter import Arbiter
from nbdmirror.controller.heart import boottime_ms
from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.view import Verdict, View

VERDICT_MS: Final = 1_000
ASK_AGAIN_MS: Final = 5_000


class Questions:
    """To the peer, whether it leaves; to the arbiter, whether this node may go on without it."""

    def __init__(self) -> None:
        self.asked_peer = False
        self.verdict = Verdict.UNASKED
        self.reason = ""
        self._arbiter = Arbiter()
        self._asked_ms = 0.0
        self._verdict_ms = 0.0

    def peer_is_asked(self, now_ms: float) -> None:
        """Once for each freeze."""
        self.asked_peer, self._asked_ms = True, now_ms

    async def ask_arbiter(self, config: Config) -> None:
        """Ask; bounded by the arbiter's own time."""
        self.answered(*await self._arbiter.ask(config, boottime_ms()))

    def answered(self, verdict: Verdict, reason: str) -> None:
        """By an arbiter with a memory."""
        self.verdict, self.reason = verdict, reason
        self._verdict_ms = boottime_ms()

    def settle(self, v: View, now_ms: float) -> None:
        """Forget what is over: the silence, the freeze, or the worth of an old answer."""
        engine = v.engine
        if engine is not None and (engine.phase or not (engine.frozen or policy.silent(v))):
            # Not in a loop while the peer has no engine: its answer would be the same.
            no_engine = v.peer.heard and not v.peer.engine
            again = now_ms - self._asked_ms > ASK_AGAIN_MS
            self.asked_peer = self.asked_peer and no_engine and not again
            self._arbiter.heard()
            if not v.settings.memory:
                # A record's answer is as good as it is old: it is no word about the peer.
                self.verdict = Verdict.UNASKED
        if now_ms - self._verdict_ms > VERDICT_MS:
            self.verdict = Verdict.UNASKED
