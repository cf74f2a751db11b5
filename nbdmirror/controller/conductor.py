"""Observe, decide, act: the loop of one controller.

Owns what is remembered between two looks (the order that is being carried out, what was asked
already, the words for a dead engine), the steps that a decision can name, and nothing else: the
policy decides, the parts act. One step at a time; heartbeats, checkers, probe and the application's
own work go on beside it. Must never act on a state that it did not just see.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import replace
from time import monotonic
from typing import Any, Final, TypeVar

from nbdmirror.config import Config
from nbdmirror.controller import arbiter
from nbdmirror.controller.checkers import Checkers
from nbdmirror.controller.dialogs import Dialogs
from nbdmirror.controller.engine_link import EngineLink
from nbdmirror.controller.heart import Heart, boottime_ms
from nbdmirror.controller.keeper import Keeper
from nbdmirror.controller.moving import arbiter_of
from nbdmirror.controller.reload import Comparison, config_id, shared_facts
from nbdmirror.controller.scribe import Scribe
from nbdmirror.controller.service import Service
from nbdmirror.controller.supervisor import KILL_S, Supervisor, listener_of
from nbdmirror.controller.switches import Switches
from nbdmirror.controller.words import Words
from nbdmirror.core.cluster import body as bodies
from nbdmirror.core.cluster import observing, policy, standing
from nbdmirror.core.cluster.asking import Questions
from nbdmirror.core.cluster.body import Body
from nbdmirror.core.cluster.checking import CheckerFacts
from nbdmirror.core.cluster.observing import Observer
from nbdmirror.core.cluster.ordering import Orders
from nbdmirror.core.cluster.policy import Decision, Step
from nbdmirror.core.cluster.saying import said_of
from nbdmirror.core.cluster.view import Service as ServiceState
from nbdmirror.core.cluster.view import Settings, Verdict, View
from nbdmirror.errors import (
    ArbiterError,
    NbdMirrorError,
    PeerProtocolError,
    RefusedError,
    StaleCommandError,
    UnreachableError,
)
from nbdmirror.events import EventLog

T = TypeVar("T")
LOOK_S: Final = 0.2
AGAIN_S: Final = 1.0
FRESH_MS: Final = 1_000
POLLS_LOST_MAX: Final = 2


class Conductor:
    """One mirror on one node."""

    def __init__(self, config: Config, events: EventLog, mirror_id: bytes) -> None:
        self.config = config
        self.events = events
        self._config_id = config_id(config)
        self.comparison = Comparison(shared_facts(config), config.key)
        self.switches = Switches(config.switches_file)
        self.keeper = Keeper(self.switches, self.tell)
        self.orders = Orders(
            config.me.id,
            limits=config.controller,
            switches=self.switches,
            tell=self.tell,
            clock_ms=monotonic_ms,
        )
        self.service = Service(config, self.tell, self.wake)
        self.checkers = Checkers(config.checkers, self._checker_changed)
        self.supervisor = Supervisor(config, self._engine_ended, self.tell)
        self.link = EngineLink(config.control_socket, self._engine_event)
        self.heart = Heart(
            config.key,
            mirror_id,
            config.me,
            config.peer,
            heartbeat_ms=config.controller.heartbeat_ms,
            silence_ms=config.controller.silence_ms,
            on_body=self._heard,
        )
        self.words = Words(self)
        self.dialogs = Dialogs(self._say_now, self.link.word, self.words.on_please, self.tell)
        self.peer_body: Body | None = None
        self.decision = Decision("start", Step.NOTHING, "the controller is starting")
        self.decided_ms = boottime_ms()
        self.engine_state: dict[str, Any] | None = None
        self.engine_reason = ""
        self.trouble = ""
        self.observer = Observer(self, clock_ms=boottime_ms, random_hex=secrets.token_hex)
        self.view = View(self.settings)
        self.looked_ms = 0.0
        self._polls_lost = 0
        self.died_serving = self.gave_way = False
        self.spoken = True
        self.questions = Questions(boottime_ms)
        self.scribe = Scribe(self, mirror_id)
        self._promoting = False
        self.cleaned = False
        self.cleaned_s = 0.0
        self._said = Body()
        self.hands = asyncio.Lock()
        self._woken = asyncio.Event()
        self.looked = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._ending = False

    # --- small things ----------------------------------------------------------------------------

    def tell(self, sentence: str) -> None:
        """For the operator: events, and standard error."""
        self.events.emit("note", reason=sentence)

    def wake(self) -> None:
        """Look again now."""
        self._woken.set()

    def serving(self) -> bool:
        """What the health probe asks: from what was seen within the last second, or not at all."""
        return boottime_ms() - self.looked_ms <= FRESH_MS and standing.serves(self.view)

    # --- observe ---------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What the configuration and the switches say."""
        config, me, peer = self.config, self.config.me, self.config.peer
        ids = {me.name: me.id, peer.name: peer.id}
        return Settings(
            node_id=me.id,
            peer_id=peer.id,
            peer_name=peer.name,
            preferred_id=ids.get(config.preferred, 0),
            preferred_last=config.preferred == "last",
            takeover=config.takeover == "automatic",
            memory=config.arbiter.has_memory,
            failover=self.switches.now.failover,
        )

    @property
    def silence_ms(self) -> int:
        """How long a peer that is there is never silent."""
        return self.config.controller.silence_ms

    def _engine_ended(self, how: str) -> None:
        observing.engine_ended(self, self.view)
        self.link.close()
        self.engine_state = None
        self._polls_lost = 0
        self.engine_reason = how
        self.events.emit("engine-ended", reason=how)
        self.wake()

    def _engine_event(self, event: dict[str, Any]) -> None:
        facts = {k: v for k, v in event.items() if k not in ("number", "at_ms", "event")}
        self.events.emit("engine", what=event.get("event", "?"), **facts)
        self.wake()

    def _checker_changed(self, facts: CheckerFacts) -> None:
        self.events.emit("checker", name=facts.name, state=facts.state, reason=facts.reason)
        self.wake()

    def _heard(self, data: bytes) -> None:
        try:
            body = bodies.decode(data)
        except PeerProtocolError as error:
            self.events.emit("no-peer", reason=str(error))
            return
        before, self.peer_body = self.peer_body, body
        self.dialogs.take(body)
        self.comparison.take(body)
        if before is None or (before.role, before.readiness) != (body.role, body.readiness):
            self.events.emit("peer", role=body.role, readiness=body.readiness, reason=body.reason)
        self.wake()

    async def _look(self) -> None:
        """See the engine as it is now; one that hangs is killed."""
        if not self.supervisor.alive:
            self.engine_state = None
            self.looked_ms = boottime_ms()
            return
        try:
            state, relayed = await self.link.poll(self.heart.extra_packet())
        except UnreachableError as error:
            self._polls_lost += 1
            self.trouble = str(error)
            if self._polls_lost >= POLLS_LOST_MAX and self.supervisor.alive:
                self.events.emit("engine-ended", reason=f"{error}; it is killed")
                self.supervisor.kill()
                await self.supervisor.gone(KILL_S)
            return
        except NbdMirrorError as error:
            self.trouble = str(error)
            self.link.let_go()
            return
        self._polls_lost = 0
        self.engine_state = state
        self.looked_ms = boottime_ms()
        if relayed:
            self.heart.take_extra(relayed)

    def peer_heard(self) -> bool:
        """Whether a fresh heartbeat came within the silence."""
        return self.observer.peer_heard()

    def look_at_everything(self) -> View:
        """The view of this moment."""
        return self.observer.view()

    # --- the loop --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take what is this mirror's: lock, engine, application of an earlier controller.

        Raises:
            NbdMirrorError: another controller has it, or an address cannot be had.
        """
        self.supervisor.open()
        self.keeper.begin()
        if self.switches.note:
            self.tell(self.switches.note)
        await self.heart.start()
        with contextlib.suppress(UnreachableError):
            # Also one that hangs is adopted: else nobody would end it.
            if pid := listener_of(self.config.control_socket):
                self.supervisor.adopt(pid)
            state = await self.link.attach()
            self.engine_state = state
            self.tell(f"adopted the engine, process {pid}")
            if state.get("role") == "primary":
                # Rule 22: what is not of this very term is taken down before anything is started.
                self.cleaned = await self.service.adopt(term_of(state))
        self.scribe.begin()

    async def run(self) -> None:
        """Until `end`."""
        while not self._ending:
            await self._look()
            self.looked.set()
            self.view = self.look_at_everything()
            observing.settle(self, self.view)
            self.view = self.look_at_everything()
            self._note(policy.decide(self.view))
            self.say()
            self._watch_checkers()
            if self.decision.step is not Step.NOTHING and await self._act():
                continue
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), LOOK_S)

    def _watch_checkers(self) -> None:
        v = self.view
        engine = v.engine
        self.checkers.pause(not self.switches.now.checkers)
        up = v.service is ServiceState.UP
        second = engine is not None and not engine.primary and bool(engine.phase)
        self.checkers.active(
            before=v.wanted and v.service is ServiceState.DOWN,
            primary=up or self.orders.waits_for_checker(),
            secondary=second,
        )

    def _note(self, decision: Decision) -> None:
        if (decision.row, decision.reason) != (self.decision.row, self.decision.reason):
            self.events.emit("decision", step=decision.step.value, reason=decision.reason)
        if decision.row != self.decision.row:
            self.decided_ms = boottime_ms()
        self.decision = decision

    # --- heartbeats ------------------------------------------------------------------------------

    def say(self) -> None:
        """Put the present into the heartbeats; what is new goes out at once."""
        differs = self.config_differs()
        more = {
            "reason": bodies.short(self.decision.reason),
            "config": self._config_id,
            "arbiter": self._arbiter_said(),
            "piece": self.comparison.piece() if differs else None,
            **self.dialogs.parts.fields(),
        }
        body = said_of(self.view, names=not self._promoting).model_copy(update=more)
        if body != self._said:
            self._said = body
            self.heart.say(bodies.encode(body), now=True)

    def _arbiter_said(self) -> str:
        state = self.engine_state
        if state is None or "arbiter_identity" not in state:
            return ""
        return arbiter_of(str(state["arbiter"]), str(state["arbiter_identity"]))

    def _say_now(self) -> None:
        self.view = self.look_at_everything()
        self.say()

    # --- act -------------------------------------------------------------------------------------

    async def _act(self) -> bool:
        """Carry out the step; True to look again at once."""
        steps: dict[Step, Callable[[], Any]] = {
            Step.CLEAN: self._clean,
            Step.SPEAK: self._speak,
            Step.START_ENGINE: self._start_engine,
            Step.STOP_ENGINE: self._stop_engine,
            Step.ENTER: self._enter,
            Step.LEAVE: self._leave,
            Step.PROMOTE: self._promote,
            Step.DEMOTE: self._demote,
            Step.ALONE: self._alone,
            Step.ASK_PEER: self._ask_peer,
            Step.ASK_ARBITER: self._ask_arbiter,
            Step.SETTLE: self._settle_claim,
        }
        try:
            await steps[self.decision.step]()
        except NbdMirrorError as error:
            self.trouble = str(error)
            self.events.emit("refused", step=self.decision.step.value, reason=str(error))
            self.orders.failed(str(error))
            with contextlib.suppress(TimeoutError):
                self._woken.clear()
                await asyncio.wait_for(self._woken.wait(), AGAIN_S)
            return True
        self.trouble = ""
        return True

    async def command(self, name: str, **args: object) -> dict[str, Any]:
        """A command for the engine as it was seen last.

        Raises:
            NbdMirrorError: there is none, or it refuses.
        """
        if self.engine_state is None:
            raise UnreachableError("the engine of this node is not running")
        return await self._meanwhile(self.link.command(name, self.engine_state, **args))

    async def _meanwhile(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result; an engine that hangs meanwhile is found as at any other time."""
        work = asyncio.create_task(coroutine)
        try:
            while not (await asyncio.wait({work}, timeout=LOOK_S))[0]:
                await self._look()
        finally:
            work.cancel()
        return work.result()

    async def _clean(self) -> None:
        self.cleaned = True
        self.cleaned_s = boottime_ms() / 1000
        self.service.leave(served=False)

    async def _start_engine(self) -> None:
        async with self.hands:
            try:
                await self.supervisor.start()
            except NbdMirrorError:
                # Whatever wakes this loop: the bound on starts is not used up in a moment.
                await asyncio.sleep(AGAIN_S)
                raise

    async def _stop_engine(self) -> None:
        self.switches.change(served=False)
        try:
            await self.command("stop")
        except StaleCommandError:
            return  # its role has changed meanwhile: look again
        except NbdMirrorError as error:
            self.tell(f"the engine did not leave in order: {error}")
            self.supervisor.kill()
        if not await self.supervisor.gone(KILL_S):
            self.supervisor.kill()
            await self.supervisor.gone(KILL_S)
        self.died_serving = False
        self.supervisor.note_success()

    async def _enter(self) -> None:
        assert self.engine_state is not None
        self.service.enter(term_of(self.engine_state), may_force=lambda: not self.peer_heard())

    async def _leave(self) -> None:
        engine = self.view.engine
        self.service.leave(served=engine is not None and engine.primary and not engine.frozen)

    async def _promote(self) -> None:
        self._promoting, forced = True, self.orders.force
        try:
            await self.command("promote", force=forced)
        finally:
            self._promoting = False
        if forced:
            await self._look()  # the record is written as what this node is by now
            await self._meanwhile(self.scribe.force())
        self.orders.promoted()
        self.switches.change(served=True)

    async def _demote(self) -> None:
        await self.command("demote")
        self.gave_way = policy.gives_way(self.view)
        if self.orders.order is not None:
            self.switches.change(served=False)

    async def _alone(self) -> None:
        await self.command("alone")

    async def _ask_arbiter(self) -> None:
        if self.config.arbiter.has_memory:
            self.questions.answered(*await self._meanwhile(self.scribe.claim()))
        else:
            self.questions.answered(*await arbiter.ask(self.config, self.questions.patience))
        kind, q = self.config.arbiter.word, self.questions
        self.tell(f"arbiter {kind}: {q.verdict.value}: {q.reason}")

    async def _settle_claim(self) -> None:
        verdict, reason = await self._meanwhile(self.scribe.settle())
        if verdict is Verdict.UNKNOWN:
            raise ArbiterError(reason)

    async def _ask_peer(self) -> None:
        self.questions.peer_is_asked()
        await self.words.ask_peer()

    async def _speak(self) -> None:
        self.spoken = True
        await self.words.speak()

    # --- for the api ----------------------------------------------------------------------------

    async def give_up(self, *, keep: bool) -> bool:
        """Give up this copy; returns whether what it holds is kept.

        Raises:
            RefusedError: there is no engine, or it refuses. StaleCommandError: look again.
        """
        if self.engine_state is None:
            raise RefusedError("second --force: the engine is not running; `nbdmirror start` first")
        if self.engine_state.get("claim_unsettled"):
            await self._settle_before_giving_up()
        self.scribe.forget_force()
        return bool((await self.command("give-up", keep=keep)).get("is_kept"))

    async def _settle_before_giving_up(self) -> None:
        """A claim that is dropped could still be done: by a node without a copy (rule 11)."""
        verdict, reason = await self.scribe.settle()
        if verdict is Verdict.UNKNOWN:
            raise RefusedError(
                "second --force: this node has asked the arbiter for the right, and whether it got "
                f"it is not known ({reason}): the record could name a node without a copy; type it "
                "again when the arbiter answers; if it never will, `nbdmirror engine give-up`"
            )
        await self._look()

    def config_differs(self) -> bool:
        """Whether the peer reads another configuration."""
        body = self.peer_body
        return body is not None and bool(body.config) and body.config != self._config_id

    def reconfigure(self, config: Config, identity: str) -> None:
        """Use another configuration from now on, as far as it can take effect online."""
        old, self.config, self._config_id = self.config, config, identity
        self.comparison = Comparison(shared_facts(config), config.key)
        self.orders.reconfigure(config.controller)
        self.service.application.reconfigure(config.application)
        if old.checkers != config.checkers:
            stale, self.checkers = self.checkers, Checkers(config.checkers, self._checker_changed)
            self._closing = asyncio.create_task(stale.close())
        self.wake()

    async def rearm(self, config: Config) -> None:
        """Ask the arbiter of another configuration from now on; nothing else of it is used."""
        mirror_id, stale = self.scribe.mirror_id, self.scribe
        names = ("arbiter", "ping", "etcd", "s3", "azure_blob")
        self.config = replace(self.config, **{name: getattr(config, name) for name in names})
        self._config_id = config_id(config)
        self.comparison = Comparison(shared_facts(self.config), config.key)
        self.scribe = Scribe(self, mirror_id)
        self.scribe.begin()
        await stale.close()

    # --- end -------------------------------------------------------------------------------------

    def end(self) -> None:
        """Let `run` return; engine and application go on."""
        self._ending = True
        self.wake()

    async def close(self) -> None:
        """Let go of everything."""
        await self.keeper.kept()
        self.dialogs.close()
        await self.scribe.close()
        await self.checkers.close()
        await self.service.close()
        await self.heart.close()
        self.link.close()
        self.supervisor.close()


def term_of(state: dict[str, Any]) -> str:
    """What names one term of one engine as primary (rule 22)."""
    return f"{state.get('instance')}/{state.get('epoch')}"


def monotonic_ms() -> float:
    """Milliseconds while the system runs, suspension left out."""
    return monotonic() * 1000
