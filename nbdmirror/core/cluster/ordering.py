"""What is being carried out because somebody or something asked for it.

Owns the one order at a time, where it came from, when it is over, and the bound on what checkers
may cause by themselves. Must never talk to the engine: an order becomes steps by way of the policy.
Switches, checkers and the clock are the shell's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.checking import CheckerFacts, demanded
from nbdmirror.core.cluster.view import OrderKind, Service, Verdict, View
from nbdmirror.errors import RefusedError

SWAP_S: Final = 30.0
PRIM_S: Final = 30.0
FAILBACK_S: Final = 5.0
TOO_LONG: Final = "it took too long"
NO_ANSWER: Final = {
    Verdict.NO: "the arbiter does not let this node (`--force` does it all the same)",
    Verdict.UNKNOWN: "the arbiter gave no answer",
}
START_FAILED: Final = "the application"
ACTIONS: Final = {
    "restart": OrderKind.RESTART,
    "stopstart": OrderKind.STOPSTART,
    "swap": OrderKind.SWAP,
    "wait": OrderKind.WAIT,
}


class Remembered(Protocol):
    """What an operator switched, and what outlives this process."""

    @property
    def wanted(self) -> bool:
        """Whether this node is to run."""
        ...

    @property
    def stop_reason(self) -> str:
        """Why it is not."""
        ...

    @property
    def stop_both(self) -> bool:
        """Whether the other node is to stop first."""
        ...

    @property
    def failover(self) -> bool:
        """Whether this node takes over by itself."""
        ...

    @property
    def checkers(self) -> bool:
        """Whether checkers may do anything."""
        ...

    @property
    def served(self) -> bool:
        """Whether it took the role and has not given it up in order."""
        ...


class Switches(Protocol):
    """The file of these."""

    @property
    def now(self) -> Remembered:
        """What is in force."""
        ...

    def change(self, **fields: Any) -> None:
        """From now on."""
        ...

    def actions_within(self, hours: int) -> list[str]:
        """What was done by itself within so many hours."""
        ...

    def count_action(self, what: str) -> None:
        """One more."""
        ...


class Checkers(Protocol):
    """What looks after application and host."""

    def facts(self) -> Sequence[CheckerFacts]:
        """All of them as they are now."""
        ...

    def reset(self, name: str) -> None:
        """After an action: what was found before it says nothing about now."""
        ...


class Limits(Protocol):
    """How often this node may act by itself: so many actions within so many hours, 0 for any."""

    @property
    def actions_max(self) -> int:
        """How many."""
        ...

    @property
    def actions_window_h(self) -> int:
        """Within how long."""
        ...


class Orders:
    """The order that is being carried out, and what holds this node back."""

    def __init__(
        self,
        node_id: int,
        *,
        limits: Limits,
        switches: Switches,
        tell: Callable[[str], None],
        clock_ms: Callable[[], float],
    ) -> None:
        self._node_id = node_id
        self._limits = limits
        self._switches = switches
        self._tell = tell
        self._clock_ms = clock_ms
        self.order: OrderKind | None = None
        self.reason = ""
        self.force = False
        self.shutdown = ""
        self.swap_to = 0
        self.error = ""
        self._swap_until_s = 0.0
        self._prim_until_s = 0.0
        self._waits_for = ""
        self._waits_reason = ""
        self._failback_since_s = 0.0

    def reconfigure(self, limits: Limits) -> None:
        """Use other limits from now on."""
        self._limits = limits

    def _now_s(self) -> float:
        return self._clock_ms() / 1000

    # --- given -----------------------------------------------------------------------------------

    def give(self, kind: OrderKind, reason: str, *, force: bool = False) -> None:
        """Begin to carry out; one at a time.

        Raises:
            RefusedError: another order is under way.
        """
        if self.order is not None and self.order is not kind:
            raise RefusedError(f"{kind}: {self.order} is under way; wait for it, or stop the node")
        self.order, self.reason, self.force, self.error = kind, reason, force, ""
        self._prim_until_s = self._now_s() + PRIM_S

    def swap(self, to: int, reason: str) -> None:
        """Exchange the roles: this node steps back, or lets the peer know that it wants the role.

        Raises:
            RefusedError: another order is under way.
        """
        if to != self._node_id:
            self.give(OrderKind.SWAP, reason)
        self.swap_to = to
        self._swap_until_s = self._now_s() + SWAP_S

    def start(self) -> None:
        """The node shall run; nothing holds it back any more."""
        self.shutdown = self._waits_for = self._waits_reason = ""
        self._switches.change(wanted=True, stop_reason="", stop_both=False, actions=())

    def stop(self, reason: str, *, both: bool = False) -> None:
        """The node shall stop, and stay so. `both`: after the other one."""
        self.clear()
        self._tell(reason)
        self._switches.change(wanted=False, stop_reason=reason, stop_both=both)

    def clear(self) -> None:
        """Nothing is under way any more."""
        self.order, self.reason, self.force, self.swap_to = None, "", False, 0

    def failed(self, reason: str) -> None:
        """The engine refused a step: an order to serve is over, with that answer."""
        if self.order is OrderKind.PRIM:
            self.clear()
            self.error = reason

    def promoted(self) -> None:
        """This node serves now."""
        if self.order is OrderKind.PRIM or self.swap_to == self._node_id:
            self.clear()
        self._waits_for = self._waits_reason = ""

    # --- facts for the view ----------------------------------------------------------------------

    def stop_reason(self) -> str:
        """Why the node is stopped, or stops."""
        return self.shutdown or self._switches.now.stop_reason

    def held_back(self) -> str:
        """Why this node may not become primary, "" if it may."""
        return self._waits_reason

    def waits_for_checker(self) -> bool:
        """Whether a checker has to come up before anything else."""
        return bool(self._waits_for)

    # --- over ------------------------------------------------------------------------------------

    def settle(self, v: View) -> None:
        """See what is over."""
        engine = v.engine
        primary = engine is not None and engine.primary
        if self.order is OrderKind.RESTART and (not primary or v.service is Service.DOWN):
            self.order = None
        if self.order in policy.HANDS_OVER and engine is not None and not primary:
            self.order = None
        if self.order is OrderKind.PRIM:
            self._settle_prim(v, primary=primary)
        if v.service is Service.LEAVING:
            # However long the application takes to stop.
            self._swap_until_s = max(self._swap_until_s, self._now_s() + SWAP_S)
        if self.swap_to and (
            self._now_s() > self._swap_until_s or self._swapped(v, primary=primary)
        ):
            self.swap_to = 0
            if self.order is OrderKind.SWAP:
                self.order = None
        if self._switches.now.stop_both and not primary:
            self._switches.change(stop_both=False)
        told = v.peer.heard and v.peer.stop_both and v.peer.service == Service.DOWN
        if v.wanted and told and not primary:
            self.stop(f"stopped together with {v.settings.peer_name}")
        self._asked_by_peer(v, primary=primary)
        self._failback(v, primary=primary)

    def _settle_prim(self, v: View, *, primary: bool) -> None:
        """An order to serve is for now. It never lies in wait until the peer serves no more."""
        if primary:
            self.clear()
        elif policy.peer_serves(v) or self._is_refused(v) or self._now_s() > self._prim_until_s:
            serves = policy.peer_serves(v)
            why = f"{v.settings.peer_name} serves" if serves else NO_ANSWER.get(v.verdict, TOO_LONG)
            self.clear()
            self.error = f"prim was given up: {why}; look again"

    def _is_refused(self, v: View) -> bool:
        return v.settings.memory and v.verdict is Verdict.NO and not self.force

    def _swapped(self, v: View, *, primary: bool) -> bool:
        mine = self.swap_to == v.settings.node_id
        return primary if mine else not primary and policy.peer_serves(v)

    def _asked_by_peer(self, v: View, *, primary: bool) -> None:
        """The operator typed `swap` on the other node."""
        wanted = v.peer.heard and v.peer.swap_to == v.settings.peer_id
        if primary and wanted and self.order is None and self.swap_to == 0 and self.can_swap(v):
            self.swap(v.settings.peer_id, f"the roles are exchanged, asked for on "
                                          f"{v.settings.peer_name}")  # fmt: skip

    def _failback(self, v: View, *, primary: bool) -> None:
        """The preferred node is back, and has been ready for a moment."""
        ready = primary and v.service is Service.UP and self.order is None and policy.swap_back(v)
        if not ready:
            self._failback_since_s = self._now_s()
        elif self._now_s() - self._failback_since_s > FAILBACK_S:
            self.swap(v.settings.peer_id, f"{v.settings.peer_name} is the preferred primary")

    @staticmethod
    def can_swap(v: View) -> bool:
        """Whether the peer could serve at once."""
        engine = v.engine
        ready = v.peer.role == "SECOND" and v.peer.readiness == "ready"
        able = v.peer.promotable and not v.peer.held_back and v.peer.wanted
        return engine is not None and engine.synced and v.peer.heard and ready and able

    # --- what checkers cause ---------------------------------------------------------------------

    def from_checkers(self, v: View, checkers: Checkers) -> None:
        """Turn what is down into an order, within the bound."""
        facts = checkers.facts()
        if self._waits_for:
            known = {each.name: each for each in facts}
            waited = known.get(self._waits_for)
            if waited is None or waited.state == "up" or not self._switches.now.checkers:
                self._tell(f"checker {self._waits_for} is up again")
                self._waits_for = self._waits_reason = ""
        if self.order is not None or not v.wanted or not self._switches.now.checkers:
            return
        if v.service is Service.FAILED and v.engine is not None and v.engine.primary:
            self._act(v, START_FAILED, "stopstart", v.service_reason)
            return
        down = demanded([each for each in facts if self._matters(v, each)])
        if down is None:
            return
        self._act(v, f"checker {down.name}", down.action, down.reason)
        checkers.reset(down.name)
        if down.action == "wait":
            self._waits_for = down.name

    def _matters(self, v: View, facts: CheckerFacts) -> bool:
        """Whether something follows here and now from this checker's being down.

        What exchanges roles or restarts an application is of a primary alone; a secondary would
        count actions that change nothing, until the bound stops it.
        """
        if facts.when == "before" or facts.action == "tell" or facts.name == self._waits_for:
            return False
        if facts.action == "stop":
            return True
        if facts.when == "primary" and v.service is not Service.UP:
            return False
        return facts.action == "wait" or policy.is_primary(v)

    def _act(self, v: View, who: str, action: str, why: str) -> None:
        reason = f"{who}: {why}"
        limits = self._limits
        done = self._switches.actions_within(limits.actions_window_h)
        if limits.actions_max and len(done) >= limits.actions_max:
            self.stop(
                f"{reason}; this would be action {len(done) + 1} within "
                f"{limits.actions_window_h} hours, and at most {limits.actions_max} are taken "
                "without an operator: look at it, then `nbdmirror start`"
            )
            return
        self._switches.count_action(f"{action}: {reason}")
        self._tell(f"{action}, because of {reason}")
        if action == "stop":
            self.stop(f"stopped because of {reason}")
            return
        primary = v.engine is not None and v.engine.primary
        if action == "wait":
            self._waits_reason = f"waiting, because of {reason}"
        if not primary:
            return
        if action == "swap" and not self.can_swap(v):
            self._tell(f"{v.settings.peer_name} cannot take over now; restarting here instead")
            action = "restart"
        self.give(ACTIONS[action], reason)
        if action in ("swap", "stopstart") and self.can_swap(v):
            self.swap_to = v.settings.peer_id
            self._swap_until_s = self._now_s() + SWAP_S
