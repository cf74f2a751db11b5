"""Two controllers that use the production table: whatever arrives late, at most one serves.

Owns the properties; the model is tests/support/two_nodes.py. It must never check the sentences or
single rows: test_policy.py does.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

import pytest

from nbdmirror.core.cluster.policy import Step
from nbdmirror.core.cluster.view import OrderKind, Settings
from tests.support.two_nodes import (
    Brain,
    Metal,
    World,
    boot,
    brain,
    copied,
    crash,
    cut_channel,
    cut_heart,
    decided,
    deliver,
    deliver_role,
    expire,
    go,
    heal,
    hush,
    kill_controller,
    kill_engine,
    meet,
    metal,
    repeat,
    say,
    step,
    stop,
    swap,
    toggle,
)

ROUNDS_MAX: Final = 40

# --- runs ------------------------------------------------------------------------------------

Event = Callable[[World, int], World]
ALWAYS: Final[tuple[Event, ...]] = (
    *(step, step, step, step, deliver, deliver, deliver, deliver),
    *(repeat, repeat, deliver_role, deliver_role, hush),
    lambda w, _: meet(w),
    lambda w, _: copied(w),
)
TROUBLE: Final[tuple[Event, ...]] = (
    *(toggle, swap, expire, kill_engine, crash, boot, stop, go, cut_channel, heal),
    *(kill_controller, cut_heart),
)


def new_world(source: int = 0, was: tuple[bool, bool] = (False, False), **settings: Any) -> World:
    """Two nodes in sync that have just heard each other; nobody serves."""
    ids = tuple(Settings(node_id=n + 1, peer_id=2 - n, **settings) for n in (0, 1))
    w = World(
        (Metal(was_primary=was[0]), Metal(was_primary=was[1])),
        (Brain(), Brain()),
        (ids[0], ids[1]),
        phase="synced",
        source=source,
    )
    for n in (0, 1):
        w = deliver(repeat(say(w, 1 - n), n), n)
    return w


def rounds(w: World, count: int = ROUNDS_MAX) -> World:
    """Everything arrives at once, and both act in turn."""
    for _ in range(count):
        for n in (0, 1):
            w = repeat(w, n)
            while w.brain[n].mail and w.brain[n].alive:
                w = deliver(w, n)
            while w.metal[n].role_mail:
                w = deliver_role(w, n)
            w = step(hush(w, n), n)
        w = copied(meet(w))
    return w


def well(w: World) -> World:
    """No trouble any more: both hosts run, both networks are there, nothing holds anybody back."""
    w = heal(w)
    for n in (0, 1):
        w = brain(expire(go(boot(w, n), n), n), n, held=False)
    return rounds(w)


def serving(w: World) -> list[int]:
    """The ids of the nodes that serve, application included."""
    return [n + 1 for n in (0, 1) if w.metal[n].primary and w.brain[n].up]


def explored(
    start: World, free: tuple[Event, ...], costly: dict[tuple[Event, int], int]
) -> Iterator[tuple[World, tuple[str, ...]]]:
    """Every world that can be reached, with a shortest way; the costly events so often at most."""
    budget = tuple(costly.values())
    todo: deque[tuple[World, tuple[int, ...], tuple[str, ...]]] = deque([(start, budget, ())])
    seen = {(start, budget)}
    while todo:
        w, left_over, way = todo.popleft()
        yield w, way
        tries = [(event, n, left_over) for event in free for n in (0, 1)]
        for place, (event, n) in enumerate(costly):
            if left_over[place]:
                less = (*left_over[:place], left_over[place] - 1, *left_over[place + 1 :])
                tries.append((event, n, less))
        for event, n, rest in tries:
            after = event(w, n)
            if (after, rest) not in seen:
                seen.add((after, rest))
                todo.append((after, rest, (*way, f"{event.__name__}({n})")))


def written(w: World) -> World:
    """Clients write wherever they may."""
    for n in (0, 1):
        if w.metal[n].primary and w.metal[n].right:
            w = metal(w, 1 - n, lacks=True)
    return w


def two_primaries(w: World) -> bool:
    """Both were promoted into one session: nobody lost anybody, so neither has a right."""
    return all(m.primary and not m.right for m in w.metal)


# --- tests -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("places", [(0, 0), (0, 1), (1, 1)])
def test_two_connected_nodes_are_never_both_promoted(source: int, places: tuple[int, int]) -> None:
    """Breaks in the field: a checker that fails for a moment makes both nodes primary, and both
    start the application.

    Every order of looks and late heartbeats, with two changes of what holds a node back.
    """
    flips: dict[tuple[Event, int], int] = {}
    for n in places:
        flips[toggle, n] = flips.get((toggle, n), 0) + 1
    count = 0
    for w, way in explored(new_world(source), (step, deliver, deliver_role), flips):
        count += 1
        assert not two_primaries(w), way
    assert count > 500, "the model does not move"


@pytest.mark.slow
@pytest.mark.parametrize("reborn", [0, 1])
def test_a_controller_that_just_started_does_not_take_over(reborn: int) -> None:
    """Breaks in the field: the controller of one node is restarted while the channel is away, has
    not heard the other one yet, and both nodes acknowledge on their own.

    Every order of events; the heartbeats themselves are never cut.
    """
    w = rounds(new_world())
    assert serving(w) == [1]
    costly: dict[tuple[Event, int], int] = {(kill_controller, reborn): 1, (cut_channel, 0): 1}
    for after, way in explored(w, (step, deliver, repeat, hush, boot), costly):
        assert not all(m.primary and m.right for m in after.metal), way


EITHER: Final = ((False, False), (True, False), (False, True), (True, True))


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("takeover", [True, False])
def test_two_connected_nodes_elect_one(source: int, takeover: bool) -> None:
    """Breaks in the field: after a start of both nodes nobody serves, or the wrong one does."""
    for was, held, preferred in product(EITHER, EITHER, (0, 1, 2)):
        w = new_world(source, was, takeover=takeover, preferred_id=preferred)
        w = rounds(brain(brain(w, 0, held=held[0]), 1, held=held[1]), 6)
        able = [n for n in (1, 2) if not held[n - 1]]
        last = [n for n in able if was[n - 1]]
        if len(able) == 1:
            expected = able if takeover or last else []
        elif len(able) == 2 and len(last) != 1:
            expected = [preferred or 1] if takeover else []
        else:
            expected = last
        assert serving(w) == expected, (was, held, preferred)
        rest = rounds(w, 2)
        assert [m.primary for m in rest.metal] == [m.primary for m in w.metal], "it does not rest"


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("was", EITHER)
def test_a_node_that_is_not_wanted_leaves_the_other_one_serving(
    stopped: int, was: tuple[bool, bool]
) -> None:
    """Breaks in the field: one node is switched off on purpose, and the other one waits for it."""
    w = rounds(stop(new_world(was=was), stopped))
    assert serving(w) == [2 - stopped]
    assert not w.metal[stopped].alive
    back = rounds(go(w, stopped))
    assert serving(back) == [2 - stopped]
    assert back.phase == "synced"


@pytest.mark.parametrize("seed", range(20))
def test_a_swap_ends_with_exactly_the_other_one(seed: int) -> None:
    """Breaks in the field: after `swap` both serve, none does, or it is the same one again."""
    chance = random.Random(seed)
    for preferred in (0, 1, 2):
        w = rounds(new_world(seed % 2, preferred_id=preferred))
        old = serving(w)[0]
        w = swap(w, old - 1)
        assert w.brain[old - 1].order is OrderKind.SWAP
        for _ in range(60):
            w = chance.choice(ALWAYS)(w, chance.randrange(2))
            assert not two_primaries(w)
        w = rounds(w, 6)
        assert serving(w) == [3 - old]
        assert w.phase == "synced"


@pytest.mark.parametrize("seed", range(20))
def test_after_a_clean_stop_of_the_primary_the_other_one_serves(seed: int) -> None:
    """Breaks in the field: a host is taken down for maintenance, and the service with it."""
    chance = random.Random(seed)
    w = rounds(new_world(seed % 2))
    old = serving(w)[0]
    w = stop(w, old - 1)
    for _ in range(60):
        w = chance.choice(ALWAYS)(w, chance.randrange(2))
    w = rounds(w, 6)
    assert serving(w) == [3 - old]
    assert w.metal[old - 1].data == "outdated", "it knows that it is behind"


def test_without_an_arbiter_a_cut_lets_both_go_on_and_contact_stops_one() -> None:
    """Breaks in the field: what `none` is known to do becomes worse: both stay, or both stop."""
    w = rounds(cut_channel(cut_heart(rounds(new_world()))))
    assert serving(w) == [1, 2]
    w = rounds(heal(w))
    assert serving(w) == [1]
    assert all(m.split for m in w.metal), "it is an operator who chooses"


@pytest.mark.slow
@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_a_lost_channel_alone_never_lets_both_go_on(places: tuple[int, int]) -> None:
    """Breaks in the field: the replication network fails, and both nodes serve although their
    controllers talk the whole time.
    """
    w = cut_channel(rounds(new_world(places[0])))
    costly: dict[tuple[Event, int], int] = {(kill_engine, places[0]): 1, (toggle, places[1]): 1}
    served = False
    for after, way in explored(w, (step, deliver, repeat), costly):
        assert not all(m.primary and m.right for m in after.metal), way
        served = served or bool(serving(after))
    assert served, "and one of them does serve"


@pytest.mark.slow
@pytest.mark.parametrize("heart", [True, False])
@pytest.mark.parametrize("preferred", [{}, {"preferred_id": 2}, {"preferred_last": True}])
def test_after_any_trouble_exactly_one_serves(heart: bool, preferred: dict[str, Any]) -> None:
    """Breaks in the field: a sequence of faults ends with nobody serving although all is well
    again, or with both; or a copy that lacks acknowledged writes is served, although heartbeats and
    controllers never failed.

    Walks at random, each with a few kinds of trouble of its own; then all is well.
    """
    pool = TROUBLE if heart else TROUBLE[:-2]
    taken: set[Step] = set()
    for seed in range(80):
        chance = random.Random(seed)
        trouble = (*chance.sample(pool, chance.randint(1, 4)), boot)
        w = well(new_world(seed % 2, **preferred))
        way: list[str] = []
        for _ in range(10):
            events = [chance.choice(trouble), *chance.choices(ALWAYS, k=chance.choice((0, 5, 40)))]
            for event in events:
                n = chance.randrange(2)
                if w.brain[n].alive:
                    taken.add(decided(w, n)[1].step)
                after = written(event(w, n))
                way += [f"{event.__name__}({n})"] if after != w else []
                w = after
                assert not two_primaries(w), way
                assert heart or not any(m.primary and m.right and m.lacks for m in w.metal), way
                assert w.phase != "synced" or not any(m.lacks for m in w.metal), way
        w = well(w)
        assert len(serving(w)) == 1, way
        assert w.phase == "synced" or all(m.split for m in w.metal), way
    # No arbiter says no here, none has a memory, and nothing is left over.
    assert taken == set(Step) - {Step.CLEAN, Step.SETTLE}, "the walks go everywhere"
