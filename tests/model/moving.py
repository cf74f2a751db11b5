"""A running mirror moves from one store of its record to another one (rule 21), walked through
completely.

Owns the machine: two nodes that share one generation, two stores with one record each, one link,
and an operator who types the move on either node, again and again. Generations and data are left
out: protocol.py has those. What matters here is which record a node asks, and what is on its way.

A store is (version, owner, state). A node is (which store it asks, whether it has the right alone,
and the request that it sent: which store, under which version). Requests may arrive at any time, or
never; one that arrives under another version does nothing.

The move, step by step, each of which can be the last one before anything else happens:

    away    the record in the old store says "moved", so nobody can claim from it any more
    in      the record in the new store is made, with no owner
    adopt   a node stores durably that it asks the new store from now on
"""

from collections.abc import Iterator
from enum import Enum, IntEnum
from typing import NamedTuple

from tests.model.explore import Report, explore

NOBODY = -1
OLD, NEW = 0, 1


class Rule(Enum):
    """The rules that can be switched off."""

    AWAY_FIRST = "the new record is made only when nobody can claim from the old one any more"
    MOVED_IS_NO = "nobody claims from a record that says that the mirror was moved"
    IN_SYNC = "the old record is set only while both are in sync"
    ADOPT_MOVED = "a node asks the new store only once the old one says that the mirror was moved"


class Content(IntEnum):
    """What lies in a store."""

    NOTHING = 0
    RECORD = 1
    MOVED = 2


class Store(NamedTuple):
    """One store."""

    version: int = 0
    owner: int = NOBODY
    content: Content = Content.NOTHING


class Node(NamedTuple):
    """One node; `request` is (store, version) that is on its way, or () ."""

    asks: int = OLD
    alone: bool = False
    request: tuple[int, ...] = ()


class State(NamedTuple):
    """Everything there is."""

    stores: tuple[Store, Store] = (Store(1, NOBODY, Content.RECORD), Store())
    nodes: tuple[Node, Node] = (Node(), Node())
    session: bool = True
    cuts: int = 2


ALL = frozenset(Rule)


def put(pair: tuple[Store, Store], i: int, value: Store) -> tuple[Store, Store]:
    """The pair with one part replaced."""
    return (value, pair[1]) if i == 0 else (pair[0], value)


def seat(s: State, i: int, node: Node) -> State:
    """The state with one node replaced."""
    return s._replace(nodes=(node, s.nodes[1]) if i == 0 else (s.nodes[0], node))


def write(s: State, at: int, owner: int, content: Content) -> State:
    """One store written: another version."""
    changed = Store(s.stores[at].version + 1, owner, content)
    return s._replace(stores=put(s.stores, at, changed))


def steps(rules: frozenset[Rule], s: State) -> Iterator[tuple[str, State | str]]:
    """Every step: its label, and the state after it or the promise that it breaks."""
    if all(node.alone for node in s.nodes):
        yield "and now", "two nodes acknowledge"
        return
    if s.session and s.cuts:
        yield "cut", s._replace(session=False, cuts=s.cuts - 1)
    same = s.nodes[0].asks == s.nodes[1].asks
    if not s.session and same and not any(node.request for node in s.nodes):
        yield from meet(s)
    yield from moves(rules, s)
    for i in (0, 1):
        yield from claims(rules, s, i)


def meet(s: State) -> Iterator[tuple[str, State | str]]:
    """A session, and the joint step: nobody has the right, and the record says so, if it is one."""
    at = s.nodes[0].asks
    if s.stores[at].content is Content.NOTHING:
        return
    s = write(s, at, NOBODY, s.stores[at].content)
    one, other = (node._replace(alone=False) for node in s.nodes)
    yield "meet", s._replace(nodes=(one, other), session=True)


def moves(rules: frozenset[Rule], s: State) -> Iterator[tuple[str, State | str]]:
    """What the operator's command does, on either node."""
    old, new = s.stores
    unclaimed = s.session or Rule.IN_SYNC not in rules
    if old.content is Content.RECORD and unclaimed and any(n.asks == OLD for n in s.nodes):
        yield "away", write(s, OLD, NOBODY, Content.MOVED)
    away = old.content is Content.MOVED
    if new.content is Content.NOTHING and (away or Rule.AWAY_FIRST not in rules):
        yield "in", write(s, NEW, NOBODY, Content.RECORD)
    for i, node in enumerate(s.nodes):
        may = away or Rule.ADOPT_MOVED not in rules
        idle = node.asks == OLD and not node.request and not node.alone
        if idle and may and new.content is Content.RECORD:
            yield f"adopt {i}", seat(s, i, node._replace(asks=NEW))


def claims(rules: frozenset[Rule], s: State, i: int) -> Iterator[tuple[str, State | str]]:
    """A node that lost its peer goes for the right, and learns whether it has it."""
    node = s.nodes[i]
    if node.request:
        at, version = node.request
        store, free = s.stores[at], seat(s, i, node._replace(request=()))
        yield f"lost {i}", free
        if store.version == version:
            yield f"done {i}", write(free, at, i, store.content)
        else:
            yield f"late {i}", free
    if s.session or node.alone:
        return
    store = s.stores[node.asks]
    refused = store.content is Content.MOVED and Rule.MOVED_IS_NO in rules
    if store.content is Content.NOTHING or refused:
        return
    if store.owner == i:
        yield f"won {i}", seat(s, i, node._replace(alone=True))
    elif store.owner == NOBODY and not node.request:
        yield f"claim {i}", seat(s, i, node._replace(request=(node.asks, store.version)))


def is_moved(s: State) -> bool:
    """Where the operator wants to come to."""
    return s.session and all(node.asks == NEW and not node.alone for node in s.nodes)


def walk(rules: frozenset[Rule] = ALL, *, stop_at_first: bool = True) -> Report[State]:
    """All orders of all steps."""
    return explore(State(), lambda s: steps(rules, s), is_moved, stop_at_first=stop_at_first)
