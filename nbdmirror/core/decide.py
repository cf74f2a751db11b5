"""Which of two copies is right: the decision table.

Owns the comparison of two nodes' metadata at contact (`decide`). Must never look at a clock, a
timer, the arbiter's record or the data: the answer is a function of the two views and nothing else,
so that both nodes come to the same answer without talking about it, and the model of the protocol
calls this very code. Who may be promoted is in promotable.py.

How to read the table (`TABLE`)
-------------------------------
Rows are tried from the top, the first that applies decides. The order carries the meaning:

1. *Fit* comes first, before anything is touched.
2. *Data state* comes before lineage. A half-synced or blank copy is a target whatever its
   generation says, and where no copy is usable nobody guesses.
3. *Rolled back* comes before every row that trusts a map. A node restored from a backup or a
   snapshot carries a map as old as its data; only the number of its last intent transaction, which
   its peer stored durably, gives it away. A crash cannot lower that number.
4. *Lineage.* A generation names one line of acknowledged writes. `generation` and `pending` are
   both "held": a crash between storing and using a pending one must not look like another line.
   `base` names every generation that the peer may hold while this node acknowledged without it, so
   "held by one, in the base of the other" means: ahead by exactly what the map says. Held by
   one and only in the *history* of the other means ahead by more than the map knows. The same base
   on both sides means that both went on alone from there: a split brain, and no data moves, unless
   the map of one side says that it wrote nothing there.

   "Common ancestor" is the last of these rows on purpose. Two nodes of which one is simply older
   share ancestors too; only when neither line contains the other is the shared one a fork.
   Unused slots (`NO_GENERATION`) are removed before anything is compared.

Equal generations do not mean equal data: the last writes may be on one side only, or in a page
cache that one side lost. The maps say where; `_equal_source` says which side to believe.

What may stop a row (`VETOES`)
------------------------------
A row names a source. A source must be worth it: not failed, not fallen back to an older metadata
slot that nobody confirms, not rolled back, not known to be behind. If it is not, the other side is
*not* taken instead (it is behind, that is what the row found): the nodes stop and ask. Last, a
target that is primary must be stopped first, with its application; `Decision.stop_first` tells it
so.

Names in the reason are node ids, so both nodes, the log and the console show the same sentence.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, PendingKind

NO_GENERATION: Final = bytes(16)
FORCE_COMMAND: Final = "nbdmirror engine promote --force"

_USABLE: Final = frozenset({DataState.UPTODATE, DataState.OUTDATED})
# Each of these says that the last joint step is not the whole story; the next one clears them.
_UNSETTLED: Final = Flags.ALONE | Flags.PEER_OUTDATED | Flags.FAILED | Flags.SPLIT


# What lets a node resume without its page cache (rule 12).
_RIGHT: Final = Flags.ALONE | Flags.PEER_OUTDATED


class DecisionKind(IntEnum):
    """What the two nodes do with each other; the values travel in the verdict, where 0 is taken."""

    REFUSE = 1
    ASK = 2
    IN_SYNC = 3
    JOINT = 4
    COPY_BY_MAP = 5
    COPY_FULL = 6
    SPLIT_BRAIN = 7
    UNRELATED = 8


@dataclass(frozen=True, slots=True)
class NodeView:
    """What one node's metadata (and its engine, for the volatile part) says at contact.

    Generations are 16 bytes, `NO_GENERATION` where there is none. `own_txn` is the last durable
    intent transaction of this node, `peer_txn` the highest of the other's that this node stored
    durably. `dirty` is true when the map is not empty, hot regions of an unclean stop included.
    `fell_back` must be cleared by the caller once an arbiter's record that names this node
    confirms its generation.
    """

    mirror_id: bytes
    node_id: int
    device_bytes: int
    extent_bytes: int
    region_bytes: int
    generation: bytes
    base: Collection[bytes]
    pending: bytes
    pending_kind: PendingKind
    history: tuple[bytes, ...]
    data_state: DataState
    flags: Flags
    primary_now: bool
    cache_survived: bool
    fell_back: bool
    own_txn: int
    peer_txn: int
    dirty: bool
    arbiter: ArbiterKind
    arbiter_identity: bytes
    arbiter_counter: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict as one of the two nodes sees it.

    `source_is_mine` is None where no data may move. `stop_first` is true on the node that must
    stop its application and leave the primary role before a session is opened: with REFUSE the
    target that is primary, with SPLIT_BRAIN the side that waits while the other goes on alone.
    """

    kind: DecisionKind
    source_is_mine: bool | None
    row: str
    reason: str
    stop_first: bool = False


def _real(generations: Iterable[bytes]) -> frozenset[bytes]:
    return frozenset(generations) - {NO_GENERATION}


class _Pair:
    """The two views with the facts that several rows ask for, each worked out once."""

    __slots__ = (
        "equal",
        "mine",
        "mine_in_base",
        "mine_in_history",
        "mine_rolled",
        "my_base",
        "my_held",
        "related",
        "their_base",
        "their_held",
        "theirs",
        "theirs_in_base",
        "theirs_in_history",
        "theirs_rolled",
    )  # fmt: skip

    def __init__(self, mine: NodeView, theirs: NodeView) -> None:
        self.mine = mine
        self.theirs = theirs
        self.my_held = _real((mine.generation, mine.pending))
        self.their_held = _real((theirs.generation, theirs.pending))
        self.my_base = _real(mine.base)
        self.their_base = _real(theirs.base)
        self.equal = not self.my_held.isdisjoint(self.their_held)
        self.mine_in_base = not self.my_held.isdisjoint(self.their_base)
        self.theirs_in_base = not self.their_held.isdisjoint(self.my_base)
        self.mine_in_history = not self.my_held.isdisjoint(theirs.history)
        self.theirs_in_history = not self.their_held.isdisjoint(mine.history)
        self.mine_rolled = mine.own_txn < theirs.peer_txn
        self.theirs_rolled = theirs.own_txn < mine.peer_txn
        self.related = (
            self.equal
            or self.mine_in_base
            or self.theirs_in_base
            or not self.my_base.isdisjoint(self.their_base)
        )

    def other(self, view: NodeView) -> NodeView:
        return self.theirs if view is self.mine else self.mine

    def rolled(self, view: NodeView) -> bool:
        return self.mine_rolled if view is self.mine else self.theirs_rolled


def _usable(view: NodeView) -> bool:
    return view.data_state in _USABLE


def _is_only(pair: _Pair, *, mine: bool, theirs: bool) -> NodeView | None:
    """The one side for which the fact holds; None when it holds for both or for neither."""
    if mine == theirs:
        return None
    return pair.mine if mine else pair.theirs


def _only(pair: _Pair, fact: Callable[[NodeView], bool]) -> NodeView | None:
    return _is_only(pair, mine=fact(pair.mine), theirs=fact(pair.theirs))


def _lower_id(pair: _Pair) -> NodeView:
    return pair.mine if pair.mine.node_id < pair.theirs.node_id else pair.theirs


def _equal_source(pair: _Pair) -> NodeView:
    """Whom to believe when both hold the same generation.

    A primary has answered clients from its copy; a surviving page cache holds acknowledged writes
    that a lost one may lack; an outdated copy is complete here, or the generations would differ,
    but it left.
    """
    return (
        _only(pair, lambda view: Flags.FAILED not in view.flags)
        or _only(pair, lambda view: view.primary_now)
        or _only(pair, lambda view: view.cache_survived)
        or _only(pair, lambda view: view.data_state is not DataState.OUTDATED)
        or _only(pair, lambda view: Flags.WAS_PRIMARY in view.flags)
        or _lower_id(pair)
    )


def _goes_on(pair: _Pair) -> NodeView:
    """Who keeps serving after a split brain: who serves now, else who did before the other one.

    The side that waits drops its ALONE flag when it records the verdict, so a later contact, after
    both were down, comes to the same answer.
    """
    return (
        _only(pair, lambda view: view.primary_now)
        or _only(pair, lambda view: Flags.ALONE in view.flags)
        or _only(pair, lambda view: Flags.TOOK_OVER not in view.flags)
        or _only(pair, lambda view: Flags.WAS_PRIMARY in view.flags)
        or _only(pair, _usable)
        or _lower_id(pair)
    )


def _settled(view: NodeView) -> bool:
    return (
        view.data_state is DataState.UPTODATE
        and view.cache_survived
        and not view.fell_back
        and view.pending == NO_GENERATION
        and view.pending_kind is PendingKind.NONE
        and not view.flags & _UNSETTLED
    )


def _has_right(view: NodeView) -> bool:
    return bool(view.flags & _RIGHT) or view.pending_kind is PendingKind.CLAIM


def _same_arbiter(pair: _Pair) -> bool:
    mine, theirs = pair.mine, pair.theirs
    return (
        mine.arbiter is theirs.arbiter
        and mine.arbiter_identity == theirs.arbiter_identity
        and mine.arbiter_counter == theirs.arbiter_counter
    )


def _equal_kind(pair: _Pair) -> DecisionKind:
    """How far apart two copies of one generation are.

    A target with a right of its own (won, or claimed and perhaps won) is copied to even if there is
    nothing to copy. What the source acknowledges in the session may be in the target's page cache
    only; a target that fell back on its right after a power cut would serve without it. Being
    inconsistent until the joint step takes the right away, and keeps the next contact from
    believing that all is settled.
    """
    if pair.mine.dirty or pair.theirs.dirty or _has_right(pair.other(_equal_source(pair))):
        return DecisionKind.COPY_BY_MAP
    if (
        pair.mine.generation == pair.theirs.generation
        and _settled(pair.mine)
        and _settled(pair.theirs)
        and _same_arbiter(pair)
    ):
        return DecisionKind.IN_SYNC
    return DecisionKind.JOINT


def _unusable_kind(pair: _Pair) -> DecisionKind:
    """By map only when a map starts where the other copy is, and neither side is an old one."""
    by_map = pair.related and not pair.mine_rolled and not pair.theirs_rolled
    return DecisionKind.COPY_BY_MAP if by_map else DecisionKind.COPY_FULL


def _misfit(pair: _Pair) -> bool:
    mine, theirs = pair.mine, pair.theirs
    return (
        mine.mirror_id != theirs.mirror_id
        or mine.node_id == theirs.node_id
        or mine.device_bytes != theirs.device_bytes
        or mine.extent_bytes != theirs.extent_bytes
        or mine.region_bytes != theirs.region_bytes
    )


def _both_zero(pair: _Pair) -> bool:
    """Nothing is in either file, and nothing ever was: no intent was logged on either side.

    What a session wrote before its first joint step was complete is not dirty any more once both
    have flushed it; and the other side of now may be another machine than the one of then.
    """
    blank = _only(pair, lambda view: view.data_state is DataState.BLANK)
    return (
        blank is not None
        and pair.other(blank).data_state is DataState.UPTODATE
        and Flags.ZEROED in pair.mine.flags
        and Flags.ZEROED in pair.theirs.flags
        and not (pair.mine.dirty or pair.theirs.dirty)
        and not (pair.mine.own_txn or pair.theirs.own_txn)
    )


def _rolled_back(pair: _Pair) -> bool:
    """One side lost transactions that the other saw, on a line that the other knows."""
    return (pair.mine_rolled and (pair.equal or pair.mine_in_base)) or (
        pair.theirs_rolled and (pair.equal or pair.theirs_in_base)
    )


def _wrote_alone(pair: _Pair) -> NodeView | None:
    """Of two lines from one place, the only one with something in it; None: both have, or a doubt.

    A generation begins with the first answer that counts alone, which may be that of a flush. A
    map is what the peer lacks, so an empty one says that nothing of this side would be lost; but
    not where it is of an older day than the data, as after a restored backup.
    """
    apart = pair.mine_in_base == pair.theirs_in_base and pair.related
    doubtful = (
        pair.mine_rolled or pair.theirs_rolled or pair.mine.fell_back or pair.theirs.fell_back
    )
    if not apart or doubtful or (pair.mine.dirty and pair.theirs.dirty):
        return None
    writer = _only(pair, lambda view: view.dirty) or _equal_source(pair)
    bad = writer.data_state is not DataState.UPTODATE or Flags.FAILED in writer.flags
    return None if bad else writer


def _fork(pair: _Pair) -> bool:
    """Lines that share something, where no row above found one containing the other."""
    if pair.mine_in_history and pair.theirs_in_history:
        return True
    if pair.mine_in_history or pair.theirs_in_history:
        return False
    mine = pair.my_held | pair.my_base | _real(pair.mine.history)
    return not mine.isdisjoint(pair.their_held | pair.their_base | _real(pair.theirs.history))


def _fixed(kind: DecisionKind) -> Callable[[_Pair], DecisionKind]:
    return lambda _pair: kind


def _nobody(_pair: _Pair) -> NodeView | None:
    return None


_Source: TypeAlias = Callable[[_Pair], NodeView | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `reason` may name {source}, {target}, {low} and {high} (node ids)."""

    name: str
    applies: Callable[[_Pair], bool]
    kind: Callable[[_Pair], DecisionKind]
    source: _Source
    reason: str


TABLE: Final[tuple[Row, ...]] = (
    Row(
        "do not fit", _misfit, _fixed(DecisionKind.REFUSE), _nobody,
        "Nodes {low} and {high} do not belong together: mirror id, device size, extent size and"
        " region size must be equal and the node ids must differ; correct the configuration of the"
        " node that is wrong, nothing was changed.",
    ),
    Row(
        "both new", _both_zero, _fixed(DecisionKind.JOINT), lambda p: _only(p, _usable),
        "Both files were made all zero and never written, so node {source} has nothing to copy"
        " to node {target} and starts the first joint generation.",
    ),
    Row(
        "no usable copy", lambda p: not _usable(p.mine) and not _usable(p.theirs),
        _fixed(DecisionKind.ASK), _nobody,
        "Neither node {low} nor node {high} has a complete copy, so neither can be the source;"
        " restore a backup on one node, or choose the lesser loss there with"
        " `" + FORCE_COMMAND + "`.",
    ),
    Row(
        "one side incomplete", lambda p: _usable(p.mine) != _usable(p.theirs),
        _unusable_kind, lambda p: _only(p, _usable),
        "The copy of node {target} is blank or incomplete, so it is made anew from node {source}.",
    ),
    Row(
        "both rolled back", lambda p: _rolled_back(p) and p.mine_rolled and p.theirs_rolled,
        _fixed(DecisionKind.ASK), _nobody,
        "Nodes {low} and {high} both lost transactions that the other one saw (an old backup or"
        " snapshot on each side?), so neither can be trusted; choose the copy to keep with"
        " `" + FORCE_COMMAND + "` on that node.",
    ),
    Row(
        "rolled back", _rolled_back, _fixed(DecisionKind.COPY_FULL),
        lambda p: _is_only(p, mine=p.theirs_rolled, theirs=p.mine_rolled),
        "Node {target} was set back to an older state (a backup or a snapshot), its map cannot be"
        " trusted, so everything is copied from node {source}.",
    ),
    Row(
        "equal generations", lambda p: p.equal, _equal_kind, _equal_source,
        "Both nodes hold the same generation, so node {source} leads and node {target} gets what"
        " the maps name, nothing if they are empty.",
    ),
    Row(
        "one side wrote nothing", lambda p: _wrote_alone(p) is not None,
        _fixed(DecisionKind.COPY_BY_MAP), _wrote_alone,
        "Nodes {low} and {high} both went on alone, but node {target} wrote nothing that node"
        " {source} lacks, so what the map of node {source} names is copied to node {target}.",
    ),
    Row(
        "each in the other's base", lambda p: p.mine_in_base and p.theirs_in_base,
        _fixed(DecisionKind.SPLIT_BRAIN), _nobody,
        "Split brain: nodes {low} and {high} each went on without the other; both copies are kept,"
        " node {stays} goes on alone and node {waits} waits until the operator decides which to"
        " keep.",
    ),
    Row(
        "in the base", lambda p: p.mine_in_base or p.theirs_in_base,
        _fixed(DecisionKind.COPY_BY_MAP),
        lambda p: _is_only(p, mine=p.theirs_in_base, theirs=p.mine_in_base),
        "Node {source} went on alone from where node {target} stands, so what its map names is"
        " copied to node {target}.",
    ),
    Row(
        "common base", lambda p: not p.my_base.isdisjoint(p.their_base),
        _fixed(DecisionKind.SPLIT_BRAIN), _nobody,
        "Split brain: nodes {low} and {high} both went on alone from the same generation; both"
        " copies are kept, node {stays} goes on alone and node {waits} waits until the operator"
        " decides which to keep.",
    ),
    Row(
        "common ancestor", _fork, _fixed(DecisionKind.SPLIT_BRAIN), _nobody,
        "Split brain: nodes {low} and {high} come from the same data but neither contains the"
        " other; both copies are kept, node {stays} goes on alone and node {waits} waits until the"
        " operator decides which to keep.",
    ),
    Row(
        "in the history", lambda p: p.mine_in_history or p.theirs_in_history,
        _fixed(DecisionKind.COPY_FULL),
        lambda p: _is_only(p, mine=p.theirs_in_history, theirs=p.mine_in_history),
        "Node {target} stands at a generation that node {source} left long ago, further back than"
        " any map reaches, so everything is copied from node {source}.",
    ),
    Row(
        "nothing in common", lambda _pair: True, _fixed(DecisionKind.UNRELATED), _nobody,
        "Nodes {low} and {high} hold data with nothing in common, so neither is overwritten; if one"
        " of them is to be replaced, stop it, move its metadata file away, and there"
        " `nbdmirror metadata create --join --adopt`.",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Veto:
    """Why a row's source may not lead after all. `applies` gets the pair and the row's source."""

    name: str
    applies: Callable[[_Pair, NodeView], bool]
    reason: str


VETOES: Final[tuple[Veto, ...]] = (
    Veto(
        "source failed", lambda _pair, source: Flags.FAILED in source.flags,
        "Node {source} is ahead of node {target}, but its disk failed a flush and its copy may lack"
        " writes; replace the disk, or declare one copy good with `" + FORCE_COMMAND + "` there.",
    ),
    Veto(
        "source fell back", lambda pair, source: source.fell_back and not pair.equal,
        "Node {source} is ahead of node {target}, but it had to fall back to older metadata that"
        " nobody confirms; if its copy is the right one, say so with"
        " `" + FORCE_COMMAND + "` there.",
    ),
    Veto(
        "source rolled back", lambda pair, source: pair.rolled(source),
        "Node {source} would be the source for node {target}, but it was set back to an older state"
        " (a backup or a snapshot); choose the copy to keep with"
        " `" + FORCE_COMMAND + "` on that node.",
    ),
    Veto(
        "source outdated",
        lambda pair, source: source.data_state is DataState.OUTDATED
        and (not pair.equal or pair.rolled(pair.other(source))),
        "Node {source} would be the source for node {target}, but it is known to lack acknowledged"
        " writes; to go on without them type `" + FORCE_COMMAND + "` on node {source}.",
    ),
)  # fmt: skip

_STOP_FIRST_ROW: Final = "target is primary"
_STOP_FIRST_REASON: Final = (
    "Node {target} is primary and will be overwritten from node {source}: stop the application on"
    " node {target} and take it out of the primary role first, nothing is copied before."
)


# After a sync failed its pages count as clean: the page cache shows what the disk does not have, so
# neither a map nor a comparison says what is missing there.
_BELIEVES_THE_TARGET: Final = frozenset({DecisionKind.JOINT, DecisionKind.COPY_BY_MAP})


def _names(pair: _Pair, source: NodeView | None) -> dict[str, int]:
    mine, theirs = pair.mine.node_id, pair.theirs.node_id
    names = {"low": min(mine, theirs), "high": max(mine, theirs)}
    if source is not None:
        names["source"] = source.node_id
        names["target"] = pair.other(source).node_id
    return names


def _split(pair: _Pair, row: Row) -> Decision:
    stays = _goes_on(pair)
    waits = pair.other(stays)
    reason = row.reason.format(**_names(pair, None), stays=stays.node_id, waits=waits.node_id)
    return Decision(DecisionKind.SPLIT_BRAIN, None, row.name, reason, stop_first=waits is pair.mine)


def _lead(pair: _Pair, row: Row, kind: DecisionKind, source: NodeView) -> Decision:
    """The row's verdict if its source may lead and its target may be written, else why not."""
    names = _names(pair, source)
    for veto in VETOES:
        if veto.applies(pair, source):
            return Decision(DecisionKind.ASK, None, veto.name, veto.reason.format(**names))
    is_mine = source is pair.mine
    target = pair.other(source)
    if Flags.FAILED in target.flags and kind in _BELIEVES_THE_TARGET:
        kind = DecisionKind.COPY_FULL
    if target.primary_now:
        reason = _STOP_FIRST_REASON.format(**names)
        return Decision(DecisionKind.REFUSE, is_mine, _STOP_FIRST_ROW, reason, not is_mine)
    return Decision(kind, is_mine, row.name, row.reason.format(**names))


def decide(mine: NodeView, theirs: NodeView) -> Decision:
    """Compare two nodes at contact. Raises nothing; any two views have exactly one answer.

    `decide(a, b)` and `decide(b, a)` are mirror images: same kind, row and reason, opposite source;
    where one node has to stop first, it is so on that node's side only.
    """
    pair = _Pair(mine, theirs)
    row = next(row for row in TABLE if row.applies(pair))
    kind = row.kind(pair)
    if kind is DecisionKind.SPLIT_BRAIN:
        return _split(pair, row)
    source = row.source(pair)
    if source is None:
        return Decision(kind, None, row.name, row.reason.format(**_names(pair, None)))
    return _lead(pair, row, kind, source)
