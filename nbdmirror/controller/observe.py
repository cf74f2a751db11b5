"""What is true of this node and its peer at this moment, put together from all parts.

Owns the one place where a `View` is made, and what of an earlier look it depends on: since when a
set of facts is as it is, and which session was decided over. Must never act, or wait.
"""

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdmirror.controller.heart import boottime_ms
from nbdmirror.core.cluster import body as bodies
from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.view import Engine, Service, Settings, View, engine_of

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

CLEAN_AGAIN_S: Final = 10.0
# A primary sees the loss of its channel when its secondary does, 2 s after the last word, and asks
# at once: until half a second after that a secondary leaves the arbiter to it.
FIRST_MS: Final = 1000
FACTS_ID_BYTES: Final = 8


class Observer:
    """The eyes of one controller."""

    def __init__(self, conductor: "Conductor") -> None:
        self._c = conductor
        self._facts: tuple[object, ...] = ()
        self._facts_id = ""
        self._superseded = ("", "")

    def settings(self) -> Settings:
        """What the configuration and the switches say."""
        c = self._c
        me, peer = c.config.me, c.config.peer
        ids = {me.name: me.id, peer.name: peer.id}
        return Settings(
            node_id=me.id,
            peer_id=peer.id,
            peer_name=peer.name,
            preferred_id=ids.get(c.config.preferred, 0),
            preferred_last=c.config.preferred == "last",
            takeover=c.config.takeover == "automatic",
            memory=c.config.arbiter.has_memory,
            failover=c.switches.now.failover,
        )

    def view(self) -> View:
        """The view of this moment."""
        c = self._c
        engine = self._engine_view()
        before = self._before_down()
        v = View(
            settings=self.settings(),
            wanted=c.switches.now.wanted and not c.orders.shutdown,
            stop_reason=c.orders.stop_reason(),
            stop_both=c.switches.now.stop_both,
            engine=engine,
            engine_given_up=c.supervisor.given_up() if engine is None else "",
            died_serving=c.died_serving,
            spoken=c.spoken,
            peer=bodies.peer_of(c.peer_body, heard=c.peer_heard()),
            service=c.service.state,
            service_reason=c.service.reason,
            leftovers=not c.cleaned or self._clean_again(),
            before_down=before,
            verdict=c.questions.verdict,
            verdict_reason=c.questions.reason,
            asked_peer=c.questions.asked_peer,
            held_back=self._held_back(before),
            order=c.orders.order,
            order_from=c.orders.reason,
            forced=c.orders.force,
            hesitates=c.heart.silent_ms() <= c.config.controller.silence_ms + FIRST_MS,
            record=c.scribe.standing(),
            record_reason=c.scribe.record_reason,
            swap_to=c.orders.swap_to,
            served=c.switches.now.served,
            listening=not c.heart.ever_heard() and not c.silence_is_over(),
        )
        return replace(v, facts_id=self._id_of(policy.own_facts(v)))

    def _id_of(self, facts: tuple[object, ...]) -> str:
        """A fresh id for each change of these facts: what is as it was before has another one."""
        if facts != self._facts:
            self._facts, self._facts_id = facts, secrets.token_hex(FACTS_ID_BYTES)
        return self._facts_id

    def _engine_view(self) -> Engine | None:
        """The engine; without the memory of having been in sync, once the peer went on alone.

        A heartbeat that says so may be all that this node ever hears of it, and it is enough.
        """
        c = self._c
        if c.engine_state is None:
            return None
        engine = engine_of(c.engine_state)
        moment = (engine.instance, str(c.engine_state.get("last_session", "")))
        body = c.peer_body
        if not engine.phase and engine.met and body is not None and body.alone:
            self._superseded = moment
        return replace(engine, met=False) if moment == self._superseded else engine

    def _clean_again(self) -> bool:
        """Whether what could not be removed is tried once more."""
        c = self._c
        due = boottime_ms() / 1000 - c.cleaned_s > CLEAN_AGAIN_S
        return bool(c.service.leftovers) and due

    def _held_back(self, before: str) -> str:
        """Why this node may not become primary."""
        c = self._c
        if c.service.leftovers:
            left = "; ".join(c.service.leftovers)
            return f"something of an earlier term is still here (rule 22): {left}"
        running = c.service.state is not Service.DOWN
        return c.orders.held_back() or ("" if running else before)

    def _before_down(self) -> str:
        """Which checker keeps the application from being started."""
        c = self._c
        if not c.switches.now.checkers:
            return ""
        for facts in c.checkers.facts():
            if facts.when == "before" and facts.action != "tell" and facts.state != "up":
                why = facts.reason or "not checked yet"
                return f"checker {facts.name}: {why}"
        return ""
