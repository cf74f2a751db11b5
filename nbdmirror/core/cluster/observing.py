"""What is true of this node and its peer at this moment, put together from all parts.

Owns the one place where a `View` is made, what of an earlier look it depends on (since when a set
of facts is as it is, which session was decided over), and what is over once it has been seen. Must
never act, or wait.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from nbdmirror.core.cluster import body as bodies
from nbdmirror.core.cluster import policy
from nbdmirror.core.cluster.asking import Questions
from nbdmirror.core.cluster.body import Body
from nbdmirror.core.cluster.ordering import Checkers, Orders, Switches
from nbdmirror.core.cluster.view import (
    NEGOTIATING,
    Engine,
    Service,
    Settings,
    Standing,
    View,
    engine_of,
)

CLEAN_AGAIN_S: Final = 10.0
# A primary sees the loss of its channel when its secondary does, 2 s after the last word, and asks
# at once: until half a second after that a secondary leaves the arbiter to it.
FIRST_MS: Final = 1000
FACTS_ID_BYTES: Final = 8


class Heard(Protocol):
    """The heartbeats."""

    def silent_ms(self) -> int:
        """Since the last one on any network or the channel, or since the start."""
        ...

    def ever_heard(self) -> bool:
        """Whether any came since the start."""
        ...


class Application(Protocol):
    """What runs on the primary."""

    @property
    def state(self) -> Service:
        """Where it stands."""
        ...

    @property
    def reason(self) -> str:
        """Why it failed, or what it waits for."""
        ...

    @property
    def leftovers(self) -> Sequence[str]:
        """What is here and should not be."""
        ...


class EngineProcess(Protocol):
    """Who starts engines."""

    def given_up(self) -> str:
        """Why no further engine is started; "" while one may be."""
        ...


class RecordKeeper(Protocol):
    """Who reads the arbiter's record."""

    @property
    def record_reason(self) -> str:
        """What it says, in a sentence."""
        ...

    def standing(self) -> Standing:
        """Whom it names, if it was read a moment ago."""
        ...


class Parts(Protocol):
    """What a controller has. `died_serving`, `spoken`: of the engine that ended last."""

    died_serving: bool
    gave_way: bool
    spoken: bool

    @property
    def settings(self) -> Settings:
        """What the configuration and the switches say."""
        ...

    @property
    def silence_ms(self) -> int:
        """How long a peer that is there is never silent."""
        ...

    @property
    def engine_state(self) -> Mapping[str, Any] | None:
        """What the engine said of itself last; None: there is none."""
        ...

    @property
    def peer_body(self) -> Body | None:
        """The newest word of the peer's controller."""
        ...

    @property
    def cleaned(self) -> bool:
        """Whether this life has looked for leftovers."""
        ...

    @property
    def cleaned_s(self) -> float:
        """When."""
        ...

    @property
    def heart(self) -> Heard:
        """The heartbeats."""
        ...

    @property
    def switches(self) -> Switches:
        """What an operator switched."""
        ...

    @property
    def orders(self) -> Orders:
        """What is being carried out."""
        ...

    @property
    def questions(self) -> Questions:
        """What was asked."""
        ...

    @property
    def service(self) -> Application:
        """What runs on the primary."""
        ...

    @property
    def supervisor(self) -> EngineProcess:
        """Who starts engines."""
        ...

    @property
    def scribe(self) -> RecordKeeper:
        """Who reads the record."""
        ...

    @property
    def checkers(self) -> Checkers:
        """What looks after application and host."""
        ...


class Observer:
    """The eyes of one controller."""

    def __init__(
        self,
        parts: Parts,
        *,
        clock_ms: Callable[[], float],
        random_hex: Callable[[int], str],
    ) -> None:
        self._c = parts
        self._clock_ms = clock_ms
        self._random_hex = random_hex
        self._facts: tuple[object, ...] = ()
        self._facts_id = ""
        self._superseded = ("", "")

    def silence_is_over(self) -> bool:
        """Whether nothing was heard for as long as a peer that is there would not be silent."""
        return self._c.heart.silent_ms() > self._c.silence_ms

    def peer_heard(self) -> bool:
        """Whether a fresh heartbeat came within the silence."""
        return self._c.heart.ever_heard() and not self.silence_is_over()

    def view(self) -> View:
        """The view of this moment."""
        c = self._c
        engine = self._engine_view()
        before = self._before_down()
        v = View(
            settings=c.settings,
            wanted=c.switches.now.wanted and not c.orders.shutdown,
            stop_reason=c.orders.stop_reason(),
            stop_both=c.switches.now.stop_both,
            engine=engine,
            engine_given_up=c.supervisor.given_up() if engine is None else "",
            died_serving=c.died_serving,
            spoken=c.spoken,
            peer=bodies.peer_of(c.peer_body, heard=self.peer_heard()),
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
            hesitates=c.heart.silent_ms() <= c.silence_ms + FIRST_MS,
            gave_way=c.gave_way,
            record=c.scribe.standing(),
            record_reason=c.scribe.record_reason,
            swap_to=c.orders.swap_to,
            served=c.switches.now.served,
            listening=not c.heart.ever_heard() and not self.silence_is_over(),
        )
        return replace(v, facts_id=self._id_of(policy.own_facts(v)))

    def _id_of(self, facts: tuple[object, ...]) -> str:
        """A fresh id for each change of these facts: what is as it was before has another one."""
        if facts != self._facts:
            self._facts, self._facts_id = facts, self._random_hex(FACTS_ID_BYTES)
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
        due = self._clock_ms() / 1000 - c.cleaned_s > CLEAN_AGAIN_S
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


def engine_ended(c: Parts, last: View) -> None:
    """The engine's process is gone. One that served beside a peer in sync is to be spoken for."""
    engine = last.engine
    served = engine is not None and engine.primary and engine.synced
    c.died_serving = served and last.wanted
    c.spoken = not c.died_serving


def settle(c: Parts, v: View) -> None:
    """What was asked or ordered and is over by now."""
    engine = v.engine
    c.questions.settle(v)
    if engine is not None:
        c.died_serving = False
        c.gave_way = c.gave_way and v.peer.heard and engine.phase in ("", NEGOTIATING)
        # Filled from the other one: that served later, whichever of them comes to serve now.
        filled = not engine.primary and not engine.was_primary
        replaced = engine.synced and (engine.peer_primary or filled)
        if replaced and c.switches.now.served and not v.settings.preferred_last:
            c.switches.change(served=False)
    c.orders.settle(v)
    c.orders.from_checkers(v, c.checkers)
