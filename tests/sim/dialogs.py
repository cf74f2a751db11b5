"""The words of leaving, as the simulated heartbeats carry them (rule 16).

Owns the order that production has in nbdmirror/controller/dialogs.py and words.py, with the fields
of production's heartbeat: ask, answer, word, please, done, refused. Each is said until it changes;
an id ties an answer to its question, and each id is acted on once. Must never store anything.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdmirror.core.cluster.body import Answer, Ask, Body, Word, short
from nbdmirror.core.ports import Path
from nbdmirror.errors import NbdMirrorError
from tests.sim.world import sleep

if TYPE_CHECKING:
    from tests.sim.conducted import Controller

ANSWER_MS = 1_000
STORED_MS = 3_000
CHANNEL_MS = 1_500
LOOK_MS = 20
ACTED_MAX = 16


@dataclass(slots=True)
class Fields:
    """The fields of the own heartbeat that belong to dialogs."""

    ask: Ask | None = None
    answer: Answer | None = None
    word: Word | None = None
    please: str = ""
    refused: str = ""
    done: str = ""

    def all(self) -> dict[str, Any]:
        """As a heartbeat has them."""
        return {name: getattr(self, name) for name in self.__slots__}


class Dialogs:
    """One controller's side of every dialog."""

    def __init__(self, controller: "Controller") -> None:
        self.said = Fields()
        self._c = controller
        self._peer = Body()
        self._acted: deque[tuple[str, str]] = deque(maxlen=ACTED_MAX)
        self._leaving = False

    # --- what the peer says -----------------------------------------------------------------------

    def take(self, body: Body) -> None:
        """The peer's newest heartbeat: act on what is new in it."""
        self._peer = body
        if body.ask is not None and self._is_new("ask", body.ask.id):
            self._c.spawn("answer", self._answer(body.ask))
        if body.word is not None and self._is_new("word", body.word.id):
            self._c.spawn("store word", self._store(body.word))
        if body.please and self._is_new("please", body.please):
            self._c.spawn("please", self._leave_for(body.please))

    def _is_new(self, kind: str, number: str) -> bool:
        if (kind, number) in self._acted:
            return False
        self._acted.append((kind, number))
        return True

    def _answer(self, ask: Ask) -> Path:
        try:
            said = yield from self._c.word("stay", generation=ask.generation)
        except NbdMirrorError as error:
            answer = Answer(id=ask.id, stay=False, reason=short(str(error)))
        else:
            if said["stay"]:
                self._c.pair.on_stay(1 - self._c.index)
            answer = Answer(
                id=ask.id,
                stay=said["stay"],
                session=str(said["session"]),
                reason=short(str(said["reason"])),
            )
        self._c.note(f"is asked whether it stays: {answer.reason}")
        self.said.answer = answer
        self._c.say_now()

    def _store(self, word: Word) -> Path:
        try:
            yield from self._c.word("peer-left", generation=word.generation, session=word.session)
        except NbdMirrorError as error:
            self._c.note(f"does not store the word: {error}")
            self.said.refused = word.id
        else:
            self._c.pair.counts["told"] += 1
            self.said.done = word.id
        self._c.say_now()

    def _leave_for(self, number: str) -> Path:
        if not (yield from self.on_please()):
            self.said.refused = number
            self._c.say_now()

    # --- what this node says ----------------------------------------------------------------------

    def leave(self, generation: str, mark: Callable[[str], Path]) -> Path:
        """Ask, be marked as behind, say so; returns "" once the peer has stored it, or why not."""
        while self._leaving:
            yield (sleep, LOOK_MS)
        self._leaving = True
        try:
            return (yield from self._leave(generation, mark))
        finally:
            self._leaving = False

    def _leave(self, generation: str, mark: Callable[[str], Path]) -> Path:
        number = self._c.random_hex(8)
        self.said.ask = Ask(id=number, generation=generation)
        self._c.say_now()
        answer = yield from self._wait(lambda: self._answer_to(number), ANSWER_MS)
        self.said.ask = None
        if answer is None:
            return "the peer did not answer"
        if not answer.stay:
            return f"the peer does not stay: {answer.reason}"
        try:
            yield from mark(answer.session)
        except NbdMirrorError as error:
            return str(error)
        self._c.pair.counts["spoken"] += 1
        self.said.word = Word(id=number, generation=generation, session=answer.session)
        self._c.say_now()
        ended = yield from self._wait(lambda: self._end_of(number), STORED_MS)
        if ended is not None:
            self.said.word = None
        return "" if ended == "done" else "the peer has not stored it"

    def _answer_to(self, number: str) -> Answer | None:
        answer = self._peer.answer
        return answer if answer is not None and answer.id == number else None

    def _end_of(self, number: str) -> str | None:
        if self._peer.done == number:
            return "done"
        return "refused" if self._peer.refused == number else None

    def ask_peer(self) -> Path:
        """Ask the peer to leave, so that this node can go on."""
        c, before, number = self._c, self.said.done, self._c.random_hex(8)

        def over() -> str | None:
            serves = c.peer_body is not None and c.peer_body.primary
            if self.said.done != before or serves or not c.observer.peer_heard():
                return "left"
            return self._end_of(number)

        self.said.please = number
        c.say_now()
        yield from self._wait(over, ANSWER_MS + STORED_MS)
        self.said.please = ""

    def _wait(self, ready: Callable[[], Any], bound_ms: int) -> Path:
        until_ms = self._c.world.now_ms + bound_ms
        while ready() is None and self._c.world.now_ms < until_ms:
            yield (sleep, LOOK_MS)
        return ready()

    # --- who leaves -------------------------------------------------------------------------------

    def speak(self) -> Path:
        """For the dead engine of this node."""
        problem = yield from self._leave_for_the_dead()
        self._c.note(f"speaks for its dead engine: {problem or 'it left'}")

    def on_please(self) -> Path:
        """The peer serves, or wants to, and asks this node to leave; returns whether it did."""
        try:
            if self._c.host.life is not None:
                problem = yield from self._leave_for_the_living()
            else:
                problem = yield from self._leave_for_the_dead()
        except NbdMirrorError as error:
            problem = str(error)
        self._c.note(f"is asked to leave: {problem or 'it did'}")
        return not problem

    def _leave_for_the_living(self) -> Path:
        until_ms = self._c.world.now_ms + CHANNEL_MS
        while (self._c.engine_state or {}).get("session") and self._c.world.now_ms < until_ms:
            yield (sleep, LOOK_MS)
        generation = str((self._c.engine_state or {}).get("generation", ""))

        def mark(session: str) -> Path:
            yield from self._c.word("leave", generation=generation, session=session)

        return (yield from self.leave(generation, mark))

    def _leave_for_the_dead(self) -> Path:
        dead = yield from self._c.take_lock()
        if dead is None:
            return "it runs again"
        try:
            reason = dead.refusal()
            if reason:
                return f"no word for the dead engine: {reason}"
            return (yield from self.leave(dead.generation, dead.mark))
        finally:
            dead.close()
