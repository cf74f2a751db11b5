"""The decision table: mirror images over a whole domain, then each row, veto and refusal by name.

The sequences of `CASES` are the field's: what two nodes look like after a crash, a cut, a restore.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.core.decide import (
    FORCE_COMMAND,
    NO_GENERATION,
    TABLE,
    VETOES,
    Decision,
    DecisionKind,
    NodeView,
    decide,
)
from nbdmirror.core.promotable import promotable
from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, PendingKind

G, G1, G2, J = (bytes([n]) * 16 for n in (1, 2, 3, 4))
POOL = (G, G1, G2, J)
COPIES = {DecisionKind.COPY_BY_MAP, DecisionKind.COPY_FULL}
MOVES = COPIES | {DecisionKind.JOINT, DecisionKind.IN_SYNC}
A = NodeView(
    mirror_id=b"m" * 16,
    node_id=1,
    device_bytes=1 << 30,
    extent_bytes=4096,
    region_bytes=1 << 22,
    generation=G,
    base=(),
    pending=NO_GENERATION,
    pending_kind=PendingKind.NONE,
    history=(),
    data_state=DataState.UPTODATE,
    flags=Flags(0),
    primary_now=False,
    cache_survived=True,
    fell_back=False,
    own_txn=9,
    peer_txn=9,
    dirty=False,
    arbiter=ArbiterKind.ETCD,
    arbiter_identity=b"e" * 32,
    arbiter_counter=3,
)
B = replace(A, node_id=2)


def alone(view: NodeView, generation: bytes, *base: bytes) -> NodeView:
    """A node that went on alone from `base` and wrote."""
    flags = view.flags | Flags.ALONE | Flags.WAS_PRIMARY
    return replace(view, generation=generation, base=base, flags=flags, dirty=True)


def quiet(view: NodeView, generation: bytes, *base: bytes) -> NodeView:
    """A node that began a line of its own (by the answer to a flush) and wrote nothing."""
    return replace(alone(view, generation, *base), dirty=False)


def is_mirror_image(one: Decision, other: Decision) -> bool:
    """Same kind, row and reason; opposite source; at most one side has to stop."""
    opposite = None if one.source_is_mine is None else not one.source_is_mine
    return (
        (one.kind, one.row, one.reason) == (other.kind, other.row, other.reason)
        and other.source_is_mine is opposite
        and not (one.stop_first and other.stop_first)
        and (one.kind is not DecisionKind.SPLIT_BRAIN or one.stop_first != other.stop_first)
    )


def is_safe(mine: NodeView, theirs: NodeView, decision: Decision) -> bool:
    """No verdict overwrites a serving node, or copies from a copy that must not be believed."""
    if decision.kind not in MOVES:
        return decision.source_is_mine is None or decision.kind is DecisionKind.REFUSE
    if decision.source_is_mine is None or decision.stop_first:
        return False
    source, target = (mine, theirs) if decision.source_is_mine else (theirs, mine)
    held = {source.generation, source.pending} & {target.generation, target.pending}
    equal = bool(held - {NO_GENERATION})
    quiet = decision.kind in COPIES or not (source.dirty or target.dirty) or "new" in decision.row
    return (
        source.data_state in (DataState.UPTODATE, DataState.OUTDATED)
        and not target.primary_now
        and Flags.FAILED not in source.flags
        and (equal or not source.fell_back)
        and (equal or source.data_state is DataState.UPTODATE)
        and source.own_txn >= target.peer_txn
        and quiet
    )


def lineage_views(node_id: int, seed: int) -> list[tuple[NodeView, ...]]:
    """All 1,100 of generation, pending, base and state; each with 16 draws of everything else."""
    draw = random.Random(seed)
    bases = [c for n in (0, 1, 2) for c in itertools.combinations(POOL, n)]
    either = (NO_GENERATION, *POOL)
    views = []
    for generation, pending, base, state in itertools.product(either, either, bases, DataState):
        variants = []
        for number in range(16):
            kinds = (PendingKind.CLAIM, PendingKind.JOINT)
            variants.append(
                replace(
                    A,
                    node_id=node_id,
                    generation=generation,
                    pending=pending,
                    pending_kind=draw.choice(kinds) if pending != NO_GENERATION else kinds[0],
                    base=base,
                    data_state=state,
                    flags=Flags(draw.getrandbits(9) & draw.getrandbits(9)),
                    primary_now=bool(number & 1),
                    cache_survived=bool(number & 2),
                    dirty=bool(number & 4),
                    fell_back=draw.random() < 0.1,
                    history=tuple(draw.sample((*POOL, NO_GENERATION), draw.randrange(3))),
                    own_txn=draw.choice((9, 9, 9, 8)),
                )
            )
        views.append(tuple(variants))
    return views


def domain() -> Iterator[tuple[NodeView, NodeView]]:
    """Every pair of lineages and states: 1,100 x 1,100, the rest drawn."""
    draw = random.Random(3)
    left, right = lineage_views(1, 1), lineage_views(2, 2)
    for mine, theirs in itertools.product(left, right):
        bits = draw.getrandbits(8)
        yield mine[bits & 15], theirs[bits >> 4]


@pytest.mark.timeout(240)
def test_decisions_are_mirror_images_and_safe_over_the_whole_domain() -> None:
    """If it fails, two nodes at contact disagree who is right, or overwrite the better copy."""
    count = 0
    rows = set()
    for mine, theirs in domain():
        here, there = decide(mine, theirs), decide(theirs, mine)
        assert is_mirror_image(here, there), (mine, theirs)
        assert is_safe(mine, theirs, here), (mine, theirs, here)
        rows.add(here.row)
        count += 1
    assert count >= 1_000_000
    fit_and_new = {"do not fit", "both new"}  # the domain has one geometry; the latter is rare
    wanted = {row.name for row in TABLE} | {veto.name for veto in VETOES}
    assert rows >= wanted - fit_and_new


generations = st.sampled_from((NO_GENERATION, *POOL))


def views(node_id: int) -> st.SearchStrategy[NodeView]:
    """Any view at all, also such as no engine would produce."""
    return st.builds(
        NodeView,
        mirror_id=st.sampled_from((b"m" * 16, b"m" * 16, b"n" * 16)),
        node_id=st.sampled_from((node_id, node_id, 1)),
        device_bytes=st.sampled_from((1 << 30, 1 << 30, 1 << 31)),
        extent_bytes=st.just(4096),
        region_bytes=st.sampled_from((1 << 22, 1 << 22, 1 << 23)),
        generation=generations,
        base=st.lists(generations, max_size=3).map(tuple),
        pending=generations,
        pending_kind=st.sampled_from(PendingKind),
        history=st.lists(generations, max_size=3).map(tuple),
        data_state=st.sampled_from(DataState),
        flags=st.integers(0, 511).map(Flags),
        primary_now=st.booleans(),
        cache_survived=st.booleans(),
        fell_back=st.booleans(),
        own_txn=st.integers(7, 9),
        peer_txn=st.integers(7, 9),
        dirty=st.booleans(),
        arbiter=st.sampled_from(ArbiterKind),
        arbiter_identity=st.sampled_from((b"e" * 32, b"f" * 32)),
        arbiter_counter=st.integers(2, 3),
    )


@given(views(1), views(2))
@settings(max_examples=1500, deadline=None)
def test_any_two_views_have_one_mirrored_answer(mine: NodeView, theirs: NodeView) -> None:
    """If it fails, some odd metadata makes the handshake crash or the two nodes disagree."""
    here, there = decide(mine, theirs), decide(theirs, mine)
    if mine.node_id == theirs.node_id:
        assert here.kind is there.kind is DecisionKind.REFUSE
        return
    assert is_mirror_image(here, there)
    assert is_safe(mine, theirs, here)


@given(views(1), views(2), st.permutations(POOL))
@settings(max_examples=500, deadline=None)
def test_the_answer_depends_on_which_generations_are_the_same_only(
    mine: NodeView, theirs: NodeView, names: list[bytes]
) -> None:
    """If it fails, a random identifier's value (its order, its bits) decides which data lives."""
    new = dict(zip(POOL, names, strict=True)) | {NO_GENERATION: NO_GENERATION}

    def renamed(view: NodeView) -> NodeView:
        return replace(
            view,
            generation=new[view.generation],
            pending=new[view.pending],
            base=tuple(new[g] for g in view.base),
            history=tuple(new[g] for g in view.history),
        )

    assert decide(renamed(mine), renamed(theirs)) == decide(mine, theirs)


PRIMARY = replace(A, primary_now=True, flags=Flags.WAS_PRIMARY)
CRASHED = replace(A, flags=Flags.WAS_PRIMARY, dirty=True)
POWERLESS = replace(A, cache_survived=False, dirty=True)
BLANK = replace(B, data_state=DataState.BLANK, generation=NO_GENERATION)
NEW_A = replace(alone(A, G), flags=Flags.ZEROED | Flags.ALONE, dirty=False, own_txn=0, peer_txn=0)
NEW_B = replace(BLANK, flags=Flags.ZEROED, own_txn=0, peer_txn=0)
JOINING = replace(
    A, generation=G1, base=(G,), pending=J, pending_kind=PendingKind.JOINT, dirty=True
)
CLAIMING = replace(A, pending=G1, pending_kind=PendingKind.CLAIM)
OUTDATED = replace(A, data_state=DataState.OUTDATED)
HALF = replace(B, data_state=DataState.INCONSISTENT, dirty=True)
FULL, BY_MAP = DecisionKind.COPY_FULL, DecisionKind.COPY_BY_MAP
SPLIT, ASK, REFUSE = DecisionKind.SPLIT_BRAIN, DecisionKind.ASK, DecisionKind.REFUSE
IN_SYNC, JOINT, UNRELATED = DecisionKind.IN_SYNC, DecisionKind.JOINT, DecisionKind.UNRELATED

# name: (mine, theirs, kind, row, source: 1 mine, 2 theirs, 0 nobody)
CASES = {
    # the numbers are those of the two-node crash sequences
    "1 secondary back, nothing written": (PRIMARY, B, IN_SYNC, "equal generations", 1),
    "1 acknowledged, not flushed": (
        replace(PRIMARY, dirty=True), B, BY_MAP, "equal generations", 1,
    ),
    "2 secondary back, primary wrote": (alone(PRIMARY, G1, G), B, BY_MAP, "in the base", 1),
    "3 primary crashed, power": (POWERLESS, B, BY_MAP, "equal generations", 2),
    "3 primary crashed, promoted again": (
        replace(CRASHED, primary_now=True), B, BY_MAP, "equal generations", 1,
    ),
    "4 secondary took over": (CRASHED, alone(B, G2, G), BY_MAP, "in the base", 2),
    "5 both lost power": (
        replace(POWERLESS, flags=Flags.WAS_PRIMARY), replace(B, cache_survived=False),
        BY_MAP, "equal generations", 1,
    ),
    "7 outlived and forced": (alone(A, G1, G), alone(B, G2, G), SPLIT, "common base", 0),
    "8 promoted without a write": (
        alone(A, G1, G), replace(B, pending=G2, pending_kind=PendingKind.CLAIM, flags=Flags.ALONE),
        BY_MAP, "in the base", 1,
    ),
    "10 resync interrupted": (alone(A, G1, G), HALF, BY_MAP, "one side incomplete", 1),
    "10 resync at equal generations": (A, HALF, BY_MAP, "one side incomplete", 1),
    "12 finished, the word was lost": (
        JOINING, replace(B, generation=J), BY_MAP, "equal generations", 1,
    ),
    "12 and the target went on": (JOINING, alone(B, G2, J), BY_MAP, "in the base", 2),
    "12 and both went on": (
        alone(A, G2, G, G1, J), alone(B, b"x" * 16, J),
        SPLIT, "common base", 0,
    ),
    "15 both stopped clean": (
        replace(A, flags=Flags.CLEAN | Flags.WAS_PRIMARY), replace(B, flags=Flags.CLEAN),
        IN_SYNC, "equal generations", 1,
    ),
    "16 left, the peer wrote": (OUTDATED, alone(B, G2, G), BY_MAP, "in the base", 2),
    "17 new disk": (alone(A, G), BLANK, FULL, "one side incomplete", 1),
    "18 restored image, older generation": (
        A, replace(B, generation=J, history=(G1, G)), FULL, "in the history", 2,
    ),
    "18 restored image, same generation": (replace(A, own_txn=8), B, FULL, "rolled back", 2),
    "18 restored image, their base": (
        replace(A, own_txn=8), alone(B, G2, G), FULL, "rolled back", 2,
    ),
    # generations and pending ones
    "claim stored, nothing written": (CLAIMING, B, JOINT, "equal generations", 1),
    "claim of mine is in their base": (
        replace(CLAIMING, generation=J), alone(B, G2, G1), BY_MAP, "in the base", 2,
    ),
    "nothing written on one side": (
        quiet(A, G1, G), alone(B, G2, G), BY_MAP, "one side wrote nothing", 2,
    ),
    "nothing written on either side": (
        quiet(A, G1, G), quiet(B, G2, G), BY_MAP, "one side wrote nothing", 1,
    ),
    "nothing written, each in the other's base": (
        quiet(A, G1, G2), alone(B, G2, G1), BY_MAP, "one side wrote nothing", 2,
    ),
    "nothing written, but it serves": (
        replace(quiet(A, G1, G), primary_now=True), alone(B, G2, G),
        REFUSE, "target is primary", 2,
    ),
    "nothing written, but its map is an old one": (
        replace(quiet(A, G1, G), own_txn=1), alone(B, G2, G), SPLIT, "common base", 0,
    ),
    "nothing written, but the other map is an old one": (
        quiet(A, G1, G), replace(alone(B, G2, G), own_txn=1), SPLIT, "common base", 0,
    ),
    "nothing written, by older metadata": (
        replace(quiet(A, G1, G), fell_back=True), alone(B, G2, G), SPLIT, "common base", 0,
    ),
    "nothing written, the writer's disk failed": (
        quiet(A, G1, G), replace(alone(B, G2, G), flags=Flags.FAILED), SPLIT, "common base", 0,
    ),
    "nothing written, the writer is behind": (
        quiet(A, G1, G), replace(alone(B, G2, G), data_state=DataState.OUTDATED),
        SPLIT, "common base", 0,
    ),
    "each in the other's base": (
        alone(A, G1, G2), alone(B, G2, G1), SPLIT, "each in the other's base", 0,
    ),
    "fork further back": (
        replace(alone(A, G1, J), history=(J, G)), replace(alone(B, G2), history=(G,)),
        SPLIT, "common ancestor", 0,
    ),
    "histories contradict": (
        replace(A, history=(G2,)), replace(B, generation=G2, history=(G,)),
        SPLIT, "common ancestor", 0,
    ),
    "strangers": (A, replace(B, generation=G2), UNRELATED, "nothing in common", 0),
    "unused slots are no ancestor": (
        replace(A, history=(NO_GENERATION,), base=(NO_GENERATION,)),
        replace(B, generation=G2, history=(NO_GENERATION,), base=(NO_GENERATION,)),
        UNRELATED, "nothing in common", 0,
    ),
    "no generation is not a generation": (
        replace(A, generation=NO_GENERATION), replace(B, generation=NO_GENERATION),
        UNRELATED, "nothing in common", 0,
    ),
    # not in sync though equal
    "alone": (replace(PRIMARY, flags=Flags.ALONE), B, JOINT, "equal generations", 1),
    "peer outdated": (
        replace(PRIMARY, flags=Flags.PEER_OUTDATED), replace(B, data_state=DataState.OUTDATED),
        JOINT, "equal generations", 1,
    ),
    "both outdated": (
        OUTDATED, replace(B, data_state=DataState.OUTDATED), JOINT, "equal generations", 1,
    ),
    "cache lost, nothing dirty": (
        replace(A, cache_survived=False), B, JOINT, "equal generations", 2,
    ),
    "fell back, equal confirms": (replace(A, fell_back=True), B, JOINT, "equal generations", 1),
    "target holds a right": (
        PRIMARY, replace(B, flags=Flags.ALONE), BY_MAP, "equal generations", 1,
    ),
    "target was told to stay": (
        PRIMARY, replace(B, flags=Flags.PEER_OUTDATED), BY_MAP, "equal generations", 1,
    ),
    "target may have won": (
        PRIMARY, replace(B, pending=G1, pending_kind=PendingKind.CLAIM),
        BY_MAP, "equal generations", 1,
    ),
    "arbiter counters differ": (
        replace(PRIMARY, arbiter_counter=4), B, JOINT, "equal generations", 1,
    ),
    "arbiters differ": (
        replace(PRIMARY, arbiter=ArbiterKind.NONE), B, JOINT, "equal generations", 1,
    ),
    # who leads at equal generations, each criterion against all that follow it
    "primary before cache": (
        replace(PRIMARY, cache_survived=False), B, JOINT, "equal generations", 1,
    ),
    "cache before outdated": (
        OUTDATED, replace(B, cache_survived=False), JOINT, "equal generations", 1,
    ),
    "outdated before last primary": (
        replace(OUTDATED, flags=Flags.WAS_PRIMARY), B, JOINT, "equal generations", 2,
    ),
    "last primary before node id": (
        A, replace(B, flags=Flags.WAS_PRIMARY), IN_SYNC, "equal generations", 2,
    ),
    "not failed before primary": (
        replace(A, flags=Flags.FAILED), replace(B, primary_now=True), FULL, "equal generations", 2,
    ),
    "node id": (A, B, IN_SYNC, "equal generations", 1),
    # states
    "both new": (NEW_A, NEW_B, JOINT, "both new", 1),
    # A session wrote before its first joint step was complete, and ended.
    "new, written here": (
        replace(NEW_A, dirty=True), NEW_B, FULL, "one side incomplete", 1,
    ),
    "new, written there": (
        NEW_A, replace(NEW_B, dirty=True), FULL, "one side incomplete", 1,
    ),
    # ... and the other node of then was another machine.
    "new, written and flushed here": (
        replace(NEW_A, own_txn=1), NEW_B, FULL, "one side incomplete", 1,
    ),
    "new, written and flushed there": (
        NEW_A, replace(NEW_B, own_txn=1), FULL, "one side incomplete", 1,
    ),
    "one adopted": (
        NEW_A, replace(NEW_B, flags=Flags(0)), FULL, "one side incomplete", 1,
    ),
    "both blank": (replace(BLANK, node_id=1), BLANK, ASK, "no usable copy", 0),
    "both half": (replace(HALF, node_id=1), HALF, ASK, "no usable copy", 0),
    "half, unknown": (
        alone(A, G1, G), replace(HALF, generation=J), FULL, "one side incomplete", 1,
    ),
    "half and rolled back": (
        alone(A, G1, G), replace(HALF, own_txn=1), FULL, "one side incomplete", 1,
    ),
    "split brain discarded": (
        alone(A, G1, G), replace(HALF, generation=G2, base=(G,)), BY_MAP, "one side incomplete", 1,
    ),
    "both rolled back": (
        replace(A, own_txn=1), replace(B, own_txn=1), ASK, "both rolled back", 0,
    ),
    # vetoes
    "source failed": (
        replace(alone(A, G1, G), flags=Flags.FAILED), B, ASK, "source failed", 0,
    ),
    "both failed": (
        replace(A, flags=Flags.FAILED), replace(B, flags=Flags.FAILED), ASK, "source failed", 0,
    ),
    "source fell back": (
        replace(alone(A, G1, G), fell_back=True), B, ASK, "source fell back", 0,
    ),
    "source rolled back": (
        replace(alone(A, G1, G), own_txn=1), B, ASK, "source rolled back", 0,
    ),
    "source outdated": (
        replace(alone(A, G1, G), data_state=DataState.OUTDATED), B, ASK, "source outdated", 0,
    ),
    "outdated for blank": (OUTDATED, BLANK, ASK, "source outdated", 0),
    "outdated for half, equal": (OUTDATED, HALF, BY_MAP, "one side incomplete", 1),
    "outdated for rolled back": (
        OUTDATED, replace(B, own_txn=1), ASK, "source outdated", 0,
    ),
    # a target that serves
    "two primaries, one behind": (
        PRIMARY, replace(alone(B, G2, G), primary_now=True), REFUSE, "target is primary", 2,
    ),
    "two primaries, equal": (
        PRIMARY, replace(B, primary_now=True), REFUSE, "target is primary", 1,
    ),
    "frozen primary, peer took over and fell": (
        PRIMARY, alone(B, G2, G), REFUSE, "target is primary", 2,
    ),
    # fit
    "other mirror": (A, replace(B, mirror_id=b"n" * 16), REFUSE, "do not fit", 0),
    "other size": (A, replace(B, device_bytes=1 << 29), REFUSE, "do not fit", 0),
    "other extent": (A, replace(B, extent_bytes=8192), REFUSE, "do not fit", 0),
    "other region": (A, replace(B, region_bytes=1 << 23), REFUSE, "do not fit", 0),
    "my own id": (A, A, REFUSE, "do not fit", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_sequence_has_its_row(name: str) -> None:
    """If it fails, this sequence of the field ends with the wrong copy, or with nobody serving."""
    mine, theirs, kind, row, source = CASES[name]
    decision = decide(mine, theirs)
    expected = {0: None, 1: True, 2: False}[source]
    assert (decision.kind, decision.row, decision.source_is_mine) == (kind, row, expected)


def test_every_row_and_veto_has_a_case() -> None:
    """If it fails, a row was added that no sequence of the field is known for."""
    wanted = {row.name for row in TABLE} | {veto.name for veto in VETOES}
    assert wanted <= {case[3] for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_reason_is_a_sentence_with_both_nodes_and_a_remedy(name: str) -> None:
    """If it fails, the operator at three in the morning reads a template or no way out."""
    decision = decide(*CASES[name][:2])
    assert decision.reason.endswith(".")
    assert not set("{}\n") & set(decision.reason)
    assert name == "my own id" or {"1", "2"} <= set(decision.reason)
    if decision.kind is ASK:
        assert FORCE_COMMAND in decision.reason


TOOK_OVER = Flags.WAS_PRIMARY | Flags.ALONE | Flags.TOOK_OVER


@pytest.mark.parametrize(
    ("mine", "theirs", "waits"),
    [
        (replace(alone(A, G1, G), primary_now=True), alone(B, G2, G), 2),
        (alone(A, G1, G), replace(alone(B, G2, G), primary_now=True), 1),
        (replace(alone(A, G1, G), flags=Flags.WAS_PRIMARY), alone(B, G2, G), 1),
        (replace(alone(A, G1, G), flags=Flags.ALONE), alone(B, G2, G), 1),
        (replace(alone(A, G1, G), flags=TOOK_OVER), alone(B, G2, G), 1),
        (alone(A, G1, G), alone(B, G2, G), 2),
    ],
    ids=[
        *("only A serves", "only B serves", "only B alone", "only B was primary"),
        *("A took over from B", "lower id"),
    ],
)
def test_split_brain_keeps_exactly_one_side_going(
    mine: NodeView, theirs: NodeView, waits: int
) -> None:
    """If it fails, a split brain stops both applications, or leaves both running."""
    decision = decide(mine, theirs)
    assert decision.kind is SPLIT
    assert decision.stop_first is (waits == 1)
    assert decide(theirs, mine).stop_first is (waits == 2)


def test_only_the_target_is_told_to_stop_first() -> None:
    """If it fails, the node with the newer data stops its application for the older one."""
    mine, theirs = PRIMARY, replace(alone(B, G2, G), primary_now=True)
    assert decide(mine, theirs).stop_first
    assert not decide(theirs, mine).stop_first
    assert "stop the application on node 1" in decide(theirs, mine).reason


LOST = replace(A, cache_survived=False)

# name: (view, arbiter has memory, rule or 0)
PROMOTIONS = {
    "up to date": (A, True, 0),
    "up to date, no memory": (A, False, 0),
    "half-synced": (HALF, True, 14),
    "outdated": (OUTDATED, False, 14),
    "blank": (BLANK, True, 14),
    "failed disk": (replace(A, flags=Flags.FAILED | Flags.ALONE), True, 5),
    "fell back": (replace(A, fell_back=True), True, 7),
    "waits after a split brain": (replace(A, flags=Flags.SPLIT), False, 19),
    "goes on after a split brain": (replace(A, flags=Flags.SPLIT | Flags.ALONE), False, 0),
    "lost its cache": (LOST, True, 12),
    "lost its cache, no memory": (LOST, False, 12),
    "lost its cache while alone": (replace(LOST, flags=Flags.ALONE), False, 0),
    "lost its cache, peer outdated": (replace(LOST, flags=Flags.PEER_OUTDATED), True, 0),
    "lost its cache, claim pending": (replace(CLAIMING, cache_survived=False), True, 0),
    "lost its cache, claim without record": (replace(CLAIMING, cache_survived=False), False, 12),
    "lost its cache, joining": (replace(JOINING, cache_survived=False), True, 12),
}


@pytest.mark.parametrize("name", PROMOTIONS)
@pytest.mark.parametrize("connected", [False, True])
def test_promotion_needs_a_copy_that_may_lead(name: str, *, connected: bool) -> None:
    """If it fails, a stale copy takes over by itself, or the only good one stays down."""
    view, memory, rule = PROMOTIONS[name]
    refusal = promotable(view, connected, memory)
    assert (refusal.rule if refusal is not None else 0) == rule
    if refusal is not None:
        assert f"rule {rule}" in refusal.reason
        assert f"`{FORCE_COMMAND}`" in refusal.reason
        assert ("resync" in refusal.reason.split(";")[1]) is connected
