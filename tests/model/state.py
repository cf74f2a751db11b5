"""One state of the machine: two nodes, the link, the record, and what was promised so far.

Owns the shapes, their canonical names, and the bridge to production's `decide` and `promotable`.
Must not know any rule or step.
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

from nbdmirror.core.decide import Decision, NodeView, decide
from nbdmirror.core.promotable import promotable
from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, PendingKind

NOBODY = -1


class Role(IntEnum):
    """What an engine does; it starts in no role."""

    NONE = 0
    PRIMARY = 1
    SECONDARY = 2


class Stage(IntEnum):
    """How far a session has come; COPIED to SETTLED are the parts (a) to (d) of the joint step."""

    COPYING = 0
    COPIED = 1
    GIVEN_UP = 2
    RECORDED = 3
    TAKEN = 4
    SETTLED = 5


class Node(NamedTuple):
    """One node. `up`, `role` and `met` are volatile; `request` (a claim) and `joint` (part (b) of
    the joint step) travel in the network and outlive both. `met`: its last session was in sync,
    and nothing was decided over it since."""

    up: bool = True
    role: Role = Role.NONE
    gen: int = 1
    pending: int = 0
    kind: PendingKind = PendingKind.NONE
    base: tuple[int, ...] = ()
    data: DataState = DataState.UPTODATE
    alone: bool = False
    peer_outdated: bool = False
    was_primary: bool = False
    lost_cache: bool = False
    dirty: bool = False
    cache: int = 0
    disk: int = 0
    met: bool = False
    request: tuple[int, int] = (0, 0)  # (the record it expects, what it wants to put there)
    joint: tuple[int, int] = (0, 0)


class State(NamedTuple):
    """Everything there is. `source` is NOBODY without a session; `word` is who was told to stay."""

    nodes: tuple[Node, Node]
    link: bool = True
    record: int = 1
    owner: int = NOBODY
    source: int = 0
    stage: Stage = Stage.SETTLED
    joint: int = 0
    solo: tuple[int, int] = (0, 0)
    cut: tuple[int, int] = (0, 0)
    written: int = 0
    cuts: int = 0
    crashes: int = 0
    leaves: int = 0
    word: int = NOBODY
    split: bool = False


def start(writes: int, cuts: int, crashes: int, leaves: int) -> State:
    """A pair in sync; `written` counts down the writes that are still to come."""
    first = Node(role=Role.PRIMARY, was_primary=True)
    return State(
        (first, Node(role=Role.SECONDARY)),
        written=writes, cuts=cuts, crashes=crashes, leaves=leaves,
    )  # fmt: skip


def connected(s: State) -> bool:
    """Whether the two engines can talk."""
    return s.link and s.nodes[0].up and s.nodes[1].up


def held(node: Node) -> set[int]:
    """Generations that count as this node's own."""
    return {node.gen, node.pending} - {0}


def both(pair: tuple[int, int], i: int, value: int) -> tuple[int, int]:
    """The pair with its i-th part replaced."""
    return (value, pair[1]) if i == 0 else (pair[0], value)


def protected(s: State) -> int:
    """Writes acknowledged by both that some node must still have."""
    return s.joint & ~(s.cut[0] & s.cut[1])


@cache
def view(i: int, node: Node, *, memory: bool) -> NodeView:
    """The node as production sees it. Called with what does not matter to the table left out."""
    flags = Flags(0)
    for flag, is_set in (
        (Flags.ALONE, node.alone),
        (Flags.PEER_OUTDATED, node.peer_outdated),
        (Flags.WAS_PRIMARY, node.was_primary),
    ):
        flags |= flag if is_set else Flags(0)
    return NodeView(
        mirror_id=bytes(16), node_id=i + 1, device_bytes=1, extent_bytes=1, region_bytes=1,
        generation=bytes([node.gen] * 16),
        base=tuple(bytes([g] * 16) for g in node.base),
        pending=bytes([node.pending] * 16),
        pending_kind=node.kind,
        history=(),
        data_state=node.data,
        flags=flags,
        primary_now=node.role is Role.PRIMARY,
        cache_survived=not node.lost_cache,
        fell_back=False, own_txn=0, peer_txn=0,
        dirty=node.dirty,
        arbiter=ArbiterKind.ETCD if memory else ArbiterKind.NONE,
        arbiter_identity=bytes(32), arbiter_counter=0,
    )  # fmt: skip


@cache
def compared(mine: NodeView, theirs: NodeView) -> Decision:
    """Production's decision, asked once for each pair of views."""
    return decide(mine, theirs)


@cache
def blocked(mine: NodeView, *, linked: bool, memory: bool) -> bool:
    """Whether production refuses to promote this node without force."""
    return promotable(mine, linked, memory) is not None


NO_SESSION: dict[str, Any] = {"source": NOBODY, "stage": Stage.COPYING, "word": NOBODY}
LEADS: dict[str, Any] = {"role": Role.PRIMARY, "was_primary": True}


def parted(s: State) -> State:
    """The session ends; whoever is up remembers whether it was in sync."""
    if s.source != NOBODY:
        settled = s.stage is Stage.SETTLED
        nodes = [node._replace(met=settled and node.up) for node in s.nodes]
        s = s._replace(nodes=(nodes[0], nodes[1]))
    return s._replace(**NO_SESSION)


def with_node(s: State, i: int, node: Node) -> State:
    """The state with one node replaced."""
    return s._replace(nodes=(node, s.nodes[1]) if i == 0 else (s.nodes[0], node))


def change(s: State, i: int, **fields: Any) -> State:
    """The state with some fields of one node replaced."""
    return with_node(s, i, s.nodes[i]._replace(**fields))


def begun(s: State, node: Node) -> Node:
    """The generation of a right begins with the first write under it.

    Without a memory nobody knows whether the target took a pending joint generation: it stays
    pending until now, and both are in the base from here on.
    """
    if not node.alone or node.kind is PendingKind.NONE:
        return node
    base, gen = (*node.base, node.gen), node.pending
    if node.kind is PendingKind.JOINT:
        base, gen = (*base, gen), fresh(s)
    return node._replace(base=base, gen=gen, pending=0, kind=PendingKind.NONE)


def joined(node: Node, gen: int) -> Node:
    """A node after it took the joint generation."""
    return node._replace(
        gen=gen, pending=0, kind=PendingKind.NONE, base=(), data=DataState.UPTODATE,
        alone=False, peer_outdated=False, lost_cache=False,
    )  # fmt: skip


def cool_down(s: State) -> State:
    """Regions stay hot on both nodes until both have flushed."""
    hot = any(node.cache != node.disk for node in s.nodes)
    return change(change(s, 0, dirty=hot), 1, dirty=hot)


def mentioned(s: State) -> Iterator[int]:
    """Generations in an order that does not depend on their names, as far as it goes."""
    yield s.record
    for node in s.nodes:
        yield from (node.gen, node.pending, *node.request, *node.joint)
    for node in s.nodes:
        yield from sorted(node.base)


def fresh(s: State) -> int:
    """A generation that nobody has heard of."""
    return max(mentioned(s)) + 1


def fenced(s: State) -> State:
    """The record was written as it is: whatever expects what it held until now comes too late."""
    for i in (0, 1):
        for slot in ("request", "joint"):
            if getattr(s.nodes[i], slot)[0] == s.record:
                s = change(s, i, **{slot: (0, 0)})
    return s


def canonical(s: State) -> State:
    """Rename generations densely, and forget those that can never be met again.

    What expects another record than there is now is one of these: no record comes back as it was.
    """
    for i in (0, 1):
        for slot in ("request", "joint"):
            if getattr(s.nodes[i], slot)[0] not in (0, s.record):
                s = change(s, i, **{slot: (0, 0)})
    a, b = s.nodes
    lasting = {s.record, *a.request, *b.request, *a.joint, *b.joint, *held(a), *held(b)}
    bases = [set(mine.base) & (lasting | set(other.base)) - {0} for mine, other in ((a, b), (b, a))]
    names: dict[int, int] = {0: 0}
    trimmed = s._replace(nodes=(a._replace(base=tuple(bases[0])), b._replace(base=tuple(bases[1]))))
    for gen in mentioned(trimmed):
        names.setdefault(gen, len(names))
    renamed = [
        node._replace(
            gen=names[node.gen], pending=names[node.pending],
            base=tuple(sorted(names[g] for g in base)),
            request=(names[node.request[0]], names[node.request[1]]),
            joint=(names[node.joint[0]], names[node.joint[1]]),
        )
        for node, base in zip(s.nodes, bases, strict=True)
    ]  # fmt: skip
    return s._replace(nodes=(renamed[0], renamed[1]), record=names[s.record])
