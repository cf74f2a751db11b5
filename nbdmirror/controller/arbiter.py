"""The arbiters that have no memory: `none` and `ping`.

Owns the question "may this node go on without its peer?", and one memory: whether the network was
gone since the peer was last heard. When a switch comes back, it does so for both nodes at once, and
the router's echo may be here before the peer's next heartbeat: both would go on, each for itself.
So a yes after a no counts only when the peer stays silent for a whole silence with the network
there. Arbiters with a memory of their own come with a port of their own. Must never be asked while
the peer can be heard.
"""

from nbdmirror.config import Config
from nbdmirror.controller.ping import ping_any
from nbdmirror.core.cluster.view import Verdict
from nbdmirror.core.superblock import ArbiterKind


class Arbiter:
    """One node's questions. `heard()` whenever the peer is heard, or nothing is asked any more."""

    def __init__(self) -> None:
        self._was_gone = False
        self._back_ms: float | None = None

    def heard(self) -> None:
        """What was seen of the network before says nothing any more."""
        self._was_gone, self._back_ms = False, None

    async def ask(self, config: Config, now_ms: float) -> tuple[Verdict, str]:
        """Yes or no, and a sentence why. Bounded by `ping.timeout_ms`; raises nothing."""
        if config.arbiter is ArbiterKind.NONE:
            return Verdict.YES, 'arbiter = "none" lets every node go on'
        hosts = config.ping.addresses
        no_echo = await ping_any(hosts, config.ping.timeout_ms)
        if no_echo:
            self._was_gone, self._back_ms = True, None
            return Verdict.NO, no_echo
        silence_ms = config.controller.silence_ms
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
