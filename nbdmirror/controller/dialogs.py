"""The words of leaving that two controllers carry for their engines (rule 16).

    leaver                                             stayer
      ask (generation)          ------------------>    engine: would this node stay?
                                <------------------    answer (yes, session)
      durably outdated
      word (generation, session) ----------------->    engine: flush, "peer outdated", durably
                                <------------------    done

and before it, where the stayer is the one that wants it: please (leave). Every part is a field of
the heartbeat, repeated until it changes, so nothing is lost and nothing has to be sent again; an id
ties an answer to its question, and each id is acted on once.

Owns these fields and their order. Must never store anything itself: the engine does, or the shared
metadata code under the dead engine's lock.
"""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from nbdmirror.core.cluster.body import Answer, Ask, Body, Word, short
from nbdmirror.errors import NbdMirrorError

ANSWER_S: Final = 1.0
STORED_S: Final = 3.0
LOOK_S: Final = 0.2
ACTED_MAX: Final = 16
TASKS_MAX: Final = 16


@dataclass(slots=True)
class Parts:
    """The fields of the own heartbeat that belong to dialogs."""

    ask: Ask | None = None
    answer: Answer | None = None
    word: Word | None = None
    please: str = ""
    refused: str = ""
    done: str = ""

    def fields(self) -> dict[str, Any]:
        """As a heartbeat has them."""
        return {name: getattr(self, name) for name in self.__slots__}


class Dialogs:
    """One node's side of every dialog. `say` sends a heartbeat now; `command` asks the engine."""

    def __init__(
        self,
        say: Callable[[], None],
        command: Callable[..., Awaitable[dict[str, Any]]],
        on_please: Callable[[], Awaitable[bool]],
        tell: Callable[[str], None],
    ) -> None:
        self.parts = Parts()
        self._say = say
        self._command = command
        self._on_please = on_please
        self._tell = tell
        self._peer = Body()
        self._heard = asyncio.Event()
        self._acted: deque[tuple[str, str]] = deque(maxlen=ACTED_MAX)
        self._leaving = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what the peer says -----------------------------------------------------------------------

    def take(self, body: Body) -> None:
        """The peer's newest heartbeat: answer what is new in it, wake who waits."""
        self._peer = body
        self._heard.set()
        if body.ask is not None and self._is_new("ask", body.ask.id):
            self._begin(self._answer(body.ask))
        if body.word is not None and self._is_new("word", body.word.id):
            self._begin(self._store(body.word))
        if body.please and self._is_new("please", body.please):
            self._begin(self._leave_for(body.please))

    def _is_new(self, kind: str, number: str) -> bool:
        if (kind, number) in self._acted or len(self._tasks) >= TASKS_MAX:
            return False
        self._acted.append((kind, number))
        return True

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, ask: Ask) -> None:
        try:
            said = await self._command("stay", generation=ask.generation)
            answer = Answer(
                id=ask.id,
                stay=bool(said.get("stay")),
                session=str(said.get("session", "")),
                reason=short(str(said.get("reason", ""))),
            )
        except NbdMirrorError as error:
            answer = Answer(id=ask.id, stay=False, reason=short(str(error)))
        self._tell(f"the peer asks whether this node stays: {answer.reason}")
        self.parts.answer = answer
        self._say()

    async def _store(self, word: Word) -> None:
        try:
            await self._command("peer-left", generation=word.generation, session=word.session)
        except NbdMirrorError as error:
            self._tell(f"the peer says that it is behind, which was not stored: {error}")
            self.parts.refused = word.id
        else:
            self._tell("the peer is durably behind; this node goes on without it")
            self.parts.done = word.id
        self._say()

    async def _leave_for(self, number: str) -> None:
        if not await self._on_please():
            self.parts.refused = number
            self._say()

    # --- what this node says --------------------------------------------------------------------

    async def leave(self, generation: str, mark: Callable[[str], Awaitable[None]]) -> str:
        """Ask, be marked as behind, say so; "" when the peer has stored it, else why not.

        `mark` gets the number of the session that the answer was bound to, and stores. One at a
        time: a heartbeat has room for one question.
        """
        async with self._leaving:
            return await self._leave(generation, mark)

    async def _leave(self, generation: str, mark: Callable[[str], Awaitable[None]]) -> str:
        number = secrets.token_hex(8)
        self.parts.ask = Ask(id=number, generation=generation)
        self._say()
        try:
            answer = await self._wait(lambda: self._answer_to(number), ANSWER_S)
        finally:
            self.parts.ask = None
        if answer is None:
            return "the peer did not answer"
        if not answer.stay:
            return f"the peer does not stay: {answer.reason}"
        try:
            await mark(answer.session)
        except NbdMirrorError as error:
            return str(error)
        self.parts.word = Word(id=number, generation=generation, session=answer.session)
        self._say()
        ended = await self._wait(lambda: self._end_of(number), STORED_S)
        if ended is not None:
            self.parts.word = None
        return "" if ended == "done" else "the peer has not stored it"

    def _answer_to(self, number: str) -> Answer | None:
        answer = self._peer.answer
        return answer if answer is not None and answer.id == number else None

    def _end_of(self, number: str) -> str | None:
        if self._peer.done == number:
            return "done"
        return "refused" if self._peer.refused == number else None

    async def please(self, left: Callable[[], bool]) -> bool:
        """Ask the peer to leave, so that this node can go on; True when `left` says that it did."""
        number = secrets.token_hex(8)
        self.parts.please = number
        self._say()
        try:
            ended = await self._wait(
                lambda: "left" if left() else self._end_of(number), ANSWER_S + STORED_S
            )
        finally:
            self.parts.please = ""
        return bool(ended == "left")

    async def _wait(self, ready: Callable[[], Any], bound_s: float) -> Any:
        """What `ready` gives, looked at after each heartbeat and without any; None: too late."""
        loop = asyncio.get_running_loop()
        until = loop.time() + bound_s
        while ready() is None and loop.time() < until:
            self._heard.clear()
            with contextlib.suppress(TimeoutError):
                left_s = until - loop.time()
                await asyncio.wait_for(self._heard.wait(), min(left_s, LOOK_S))
        return ready()

    def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
