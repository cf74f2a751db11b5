"""The words of leaving between two controllers whose heartbeats are late, lost, doubled, mixed.

Owns two ends in one loop, each with an abstract engine that keeps the rules of core/leave.py, and
the heartbeats between them. Must never wait for time to pass: where a silence has to be long
enough, its bound is made short.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import pytest

from nbdmirror.controller import dialogs
from nbdmirror.controller.dialogs import Dialogs
from nbdmirror.core.cluster.body import Body
from nbdmirror.errors import RefusedError, UnreachableError

LONG_S: Final = 60.0
SHORT_S: Final = 0.05
GENERATION: Final = "ab" * 16
SESSION: Final = f"{7:016x}"
SEEDS: Final = range(20)


@pytest.fixture(autouse=True)
def long_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to arrive has all the time of a slow machine."""
    bounds(monkeypatch, LONG_S, LONG_S)


def bounds(monkeypatch: pytest.MonkeyPatch, answer_s: float, stored_s: float) -> None:
    """How long an answer, and the end of a word, are waited for."""
    monkeypatch.setattr(dialogs, "ANSWER_S", answer_s)
    monkeypatch.setattr(dialogs, "STORED_S", stored_s)


@dataclass
class Engine:
    """One engine of a pair that was in sync until its channel was lost."""

    alive: bool = True
    data: str = "uptodate"
    last_session: str = SESSION
    peer_outdated: bool = False
    keeps_promises: bool = True
    stays_after: str = ""
    calls: list[str] = field(default_factory=list)

    async def command(self, name: str, *, generation: str, session: str = "") -> dict[str, Any]:
        """As the control socket: an answer, or an error of ours."""
        await asyncio.sleep(0)
        if not self.alive:
            raise UnreachableError("the engine of this node is not running")
        self.calls.append(name)
        if name == "stay":
            return self.stay(generation)
        if (self.data, self.last_session, generation) != ("uptodate", session, GENERATION):
            raise RefusedError(f"{name}: the word is about an earlier moment; look again")
        if name == "leave":
            if self.keeps_promises and self.stays_after == session:
                raise RefusedError("leave: this node has answered that it stays itself")
            self.data = "outdated"
        else:
            assert name == "peer-left"
            self.peer_outdated = True
        self.last_session = ""
        return {}

    def stay(self, generation: str) -> dict[str, Any]:
        """Whether it would stay."""
        reason = "" if self.data == "uptodate" else f"this node is {self.data}"
        if not self.last_session or generation != GENERATION:
            reason = reason or "not in sync with you until now"
        if not reason:
            self.stays_after = self.last_session
        return {"stay": not reason, "reason": reason or "I stay", "session": self.last_session}


class End:
    """One controller, as far as words go."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.told: list[str] = []
        self.said = [Body(v=1)]
        self.pleased: list[bool] = []
        self.dialogs = Dialogs(self.say, engine.command, self.on_please, self.told.append)

    def say(self) -> None:
        """A heartbeat."""
        parts = self.dialogs.parts
        self.said.append(
            Body(v=1, ask=parts.ask, answer=parts.answer, word=parts.word, please=parts.please,
                 refused=parts.refused, done=parts.done)
        )  # fmt: skip

    async def on_please(self) -> bool:
        """The other one asks this one to leave."""
        left = not await self.leave()
        self.pleased.append(left)
        return left

    async def leave(self) -> str:
        """As controller and engine, or as the controller for its dead engine."""
        return await self.dialogs.leave(GENERATION, self.mark)

    async def mark(self, session: str) -> None:
        """Durably behind."""
        if self.engine.alive:
            await self.engine.command("leave", generation=GENERATION, session=session)
        elif self.engine.data == "uptodate":
            self.engine.data = "outdated"
        else:
            raise RefusedError("no word for the dead engine: it is outdated")


class Wire:
    """The heartbeats both ways. `cut`: the ends to which nothing comes; `wild`: old ones, too."""

    def __init__(self, seed: int, ends: tuple[End, End], *, wild: bool = False) -> None:
        self.chance = random.Random(seed)
        self.ends = ends
        self.cut: set[int] = set()
        self.wild = wild
        self.newest = [0, 0]

    def beat(self) -> None:
        """A heartbeat each way, or none, or an earlier one; the last one said comes again."""
        for place in (0, 1):
            sender = self.ends[1 - place]
            if self.chance.random() < 0.3:
                sender.say()
            number = len(sender.said) - 1 - self.chance.choice((0, 0, 0, 1, 2, 5))
            if place in self.cut or self.chance.random() < 0.3 or number < 0:
                continue
            if self.wild or number >= self.newest[place]:
                self.newest[place] = max(number, self.newest[place])
                self.ends[place].dialogs.take(sender.said[number])

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.beat()
            for _ in range(self.chance.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.sleep(0)


class Pair:
    """Two ends and what is between them."""

    def __init__(self, seed: int, *, wild: bool = False, **engine: Any) -> None:
        self.a, self.b = End(Engine(**engine)), End(Engine(**engine))
        self.wire = Wire(seed, (self.a, self.b), wild=wild)

    def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The work of a test, with heartbeats beside it."""

        async def all_of_it() -> None:
            # They belong to the loop that runs.
            for end in (self.a, self.b):
                end.dialogs = Dialogs(end.say, end.engine.command, end.on_please, end.told.append)
            beats = asyncio.create_task(self.wire.run())
            try:
                await work()
            finally:
                beats.cancel()
                self.a.dialogs.close()
                self.b.dialogs.close()

        asyncio.run(all_of_it())


async def until(true: Callable[[], bool]) -> None:
    """Let the others run until it is so."""
    async with asyncio.timeout(LONG_S):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wild", [False, True])
def test_who_leaves_has_left_when_the_other_one_has_stored_it(seed: int, wild: bool) -> None:
    """Breaks in the field: the service stands still after the death of an engine, or a node is
    believed to be behind that is not.
    """
    pair = Pair(seed, wild=wild)

    async def work() -> None:
        assert await pair.a.leave() == ""

    pair.run(work)
    assert (pair.a.engine.data, pair.b.engine.data) == ("outdated", "uptodate")
    assert pair.b.engine.peer_outdated
    assert pair.a.engine.calls == ["leave"]
    assert pair.b.engine.calls == ["stay", "peer-left"], "each word is acted on once"
    assert pair.a.dialogs.parts.ask is None
    assert pair.a.dialogs.parts.word is None


@pytest.mark.parametrize("seed", SEEDS)
def test_who_is_asked_to_leave_leaves(seed: int) -> None:
    """Breaks in the field: a primary whose channel is lost freezes until the arbiter is asked,
    although its peer would step back.
    """
    pair = Pair(seed)

    async def work() -> None:
        parts = pair.a.dialogs.parts
        assert await pair.a.dialogs.please(lambda: bool(parts.done))
        assert parts.please == ""
        await until(lambda: bool(pair.b.pleased))

    pair.run(work)
    assert pair.b.pleased == [True]
    assert (pair.a.engine.data, pair.b.engine.data) == ("uptodate", "outdated")
    assert pair.a.engine.peer_outdated


@pytest.mark.parametrize("seed", SEEDS)
def test_who_may_not_leave_says_so_at_once(seed: int) -> None:
    """Breaks in the field: the primary waits for seconds, frozen, for somebody who has said no."""
    pair = Pair(seed)
    pair.a.engine.last_session = ""  # it went on alone before

    async def work() -> None:
        parts = pair.a.dialogs.parts
        assert not await pair.a.dialogs.please(lambda: bool(parts.done))

    pair.run(work)
    assert (pair.a.engine.data, pair.b.engine.data) == ("uptodate", "uptodate")
    assert "leave" not in pair.b.engine.calls


def test_without_a_yes_nothing_is_marked() -> None:
    """Breaks in the field: the last copy is declared to be behind."""
    pair = Pair(1)
    pair.b.engine.data = "inconsistent"

    async def work() -> None:
        assert await pair.a.leave() == "the peer does not stay: this node is inconsistent"

    pair.run(work)
    assert (pair.a.engine.data, pair.a.engine.calls) == ("uptodate", [])
    assert pair.a.dialogs.parts.word is None


@pytest.mark.parametrize("deaf", [0, 1])
def test_without_an_answer_nothing_is_marked(monkeypatch: pytest.MonkeyPatch, deaf: int) -> None:
    """Breaks in the field: a node that is cut off declares itself behind, its peer does not know
    it, and nobody serves.
    """
    bounds(monkeypatch, SHORT_S, SHORT_S)
    pair = Pair(1)
    pair.wire.cut.add(deaf)

    async def work() -> None:
        assert await pair.a.leave() == "the peer did not answer"
        assert pair.a.dialogs.parts.ask is None
        # The answer of before is to another question.
        pair.wire.cut.clear()
        pair.b.engine.alive = False
        bounds(monkeypatch, LONG_S, LONG_S)
        assert "is not running" in await pair.a.leave()

    pair.run(work)
    assert (pair.a.engine.data, pair.a.engine.calls) == ("uptodate", [])


def test_what_could_not_be_marked_is_not_said() -> None:
    """Breaks in the field: the peer goes on because of a mark that is on no disk."""
    pair = Pair(1)

    async def mark(_session: str) -> None:
        await asyncio.sleep(0)
        raise RefusedError("leave: this node is primary; demote it first")

    async def work() -> None:
        assert "demote it first" in await pair.a.dialogs.leave(GENERATION, mark)

    pair.run(work)
    assert all(body.word is None for body in pair.a.said)
    assert not pair.b.engine.peer_outdated


def test_a_word_is_said_until_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: a node is behind, its peer has missed that by a second and never learns
    it, and nobody serves.
    """
    pair = Pair(1)
    bounds(monkeypatch, LONG_S, SHORT_S)

    async def work() -> None:
        async def mark(session: str) -> None:
            pair.wire.cut.add(1)
            await pair.a.mark(session)

        assert await pair.a.dialogs.leave(GENERATION, mark) == "the peer has not stored it"
        assert pair.a.engine.data == "outdated"
        assert not pair.b.engine.peer_outdated
        pair.wire.cut.clear()
        await until(lambda: pair.b.engine.peer_outdated)

    pair.run(work)


def test_a_word_about_another_moment_is_refused_at_once() -> None:
    """Breaks in the field: the channel came back in between, and the peer is forgotten all the
    same.
    """
    pair = Pair(1)

    async def mark(session: str) -> None:
        await pair.a.mark(session)
        pair.b.engine.last_session = f"{8:016x}"

    async def work() -> None:
        assert await pair.a.dialogs.leave(GENERATION, mark) == "the peer has not stored it"

    pair.run(work)
    assert not pair.b.engine.peer_outdated


def both_asked(seed: int, *, keeps_promises: bool, dead: tuple[bool, bool]) -> Pair:
    """Both ask the other one to leave at the same moment, and for themselves if they are dead."""
    pair = Pair(seed, keeps_promises=keeps_promises)
    for end, is_dead in zip((pair.a, pair.b), dead, strict=True):
        end.engine.alive = not is_dead

    async def one(end: End) -> None:
        parts = end.dialogs.parts
        await end.dialogs.please(lambda: bool(parts.done))

    async def work() -> None:
        own = [end.leave() for end in (pair.a, pair.b) if not end.engine.alive]
        await asyncio.gather(one(pair.a), one(pair.b), *own)

    pair.run(work)
    return pair


@pytest.mark.parametrize("dead", [(False, False), (True, False), (False, True), (True, True)])
def test_two_that_leave_at_once_are_never_both_behind(
    monkeypatch: pytest.MonkeyPatch, dead: tuple[bool, bool]
) -> None:
    """Breaks in the field: both nodes are outdated, and nobody serves until an operator comes."""
    bounds(monkeypatch, 2.0, 2.0)
    for seed in range(6):
        pair = both_asked(seed, keeps_promises=True, dead=dead)
        states = {pair.a.engine.data, pair.b.engine.data}
        assert "uptodate" in states, seed
        for end, other in pairwise((pair.a, pair.b, pair.a)):
            assert not other.engine.peer_outdated or end.engine.data == "outdated"
        if all(dead):
            assert states == {"uptodate"}, "the dead do not answer"


def test_it_is_the_promise_to_stay_that_keeps_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: the test above passes because the two never meet like that.

    Without the promise of the engine (rule 16: not leaving itself) both do end behind.
    """
    bounds(monkeypatch, 0.5, SHORT_S)
    ends = [both_asked(seed, keeps_promises=False, dead=(False, False)) for seed in range(4)]
    assert any(e.a.engine.data == e.b.engine.data == "outdated" for e in ends)


def test_one_question_at_a_time() -> None:
    """Breaks in the field: a second request to leave takes the question of the first one away, and
    neither is answered.
    """
    pair = Pair(3)

    async def work() -> None:
        ends = await asyncio.gather(pair.a.leave(), pair.a.leave())
        assert ends[0] == ""
        assert ends[1].startswith("the peer does not stay")

    pair.run(work)
    assert pair.b.engine.calls == ["stay", "peer-left", "stay"]


def test_a_flood_of_words_is_bounded() -> None:
    """Breaks in the field: a peer whose program is broken fills the memory of this controller."""
    pair = Pair(1)
    pair.wire.cut = {0, 1}

    async def work() -> None:
        for number in range(1000):
            pair.b.dialogs.take(Body(v=1, please=f"{number:x}"))
        assert len(asyncio.all_tasks()) < 2 * dialogs.TASKS_MAX
        pair.b.dialogs.close()
        await until(lambda: len(asyncio.all_tasks()) <= 2)

    pair.run(work)
