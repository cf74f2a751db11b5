"""What a controller does next: one table, read from the top, the first row that applies decides.

Observe, decide, act: the controller looks at everything (view.py), asks this table, carries out
one step, and looks again. A step is small, may be repeated, and does one thing. So nothing has to
be remembered about how a node came to be where it is, and a controller that was killed goes on
where it was. Each row gives one sentence of reason: the same in log, status and `explain`.

The order of the rows is the order of what matters:

1. *What must not run is ended.* A node that shall stop, has no engine, or whose engine does not
   serve any more first takes down what it started for its role. Nothing is promoted on top of
   leftovers (rule 22).
2. *The engine is kept alive.* A dead one that served is first spoken for (rule 16), so that the
   peer goes on at once; then it is started again, in no role.
3. *A primary* that is to be overwritten, or was replaced, steps back. One that froze asks its peer
   to leave while the controllers still talk; else the arbiter decides (rule 11). Then come orders,
   and what a serving primary has to run.
4. *A node that is not primary* becomes it only for one of four reasons: an operator said so; it
   holds the right; the two are connected and both name it; or its peer is silent, everywhere and
   for long enough, this copy was in sync until then, and the arbiter agrees. "Was in sync until
   then" is a fact of this engine's life: after a restart nobody knows what the peer did meanwhile,
   and a node waits (rules 11, 12) unless its metadata says that the peer is the one behind, or an
   arbiter with a memory knows it.

Must never know how a step is carried out, or look at a clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from nbdmirror.core.cluster.view import (
    NEGOTIATING,
    Engine,
    OrderKind,
    Service,
    Standing,
    Verdict,
    View,
)


class Step(StrEnum):
    """What is done next. NOTHING is a place to stay, with a reason."""

    NOTHING = "nothing"
    CLEAN = "remove leftovers"
    SPEAK = "speak for the dead engine"
    START_ENGINE = "start the engine"
    STOP_ENGINE = "stop the engine"
    ENTER = "bring up the application"
    LEAVE = "take down the application"
    PROMOTE = "promote"
    DEMOTE = "demote"
    ALONE = "go on alone"
    ASK_PEER = "ask the peer to leave"
    ASK_ARBITER = "ask the arbiter"
    SETTLE = "settle the claim"


@dataclass(frozen=True, slots=True)
class Decision:
    """The row that applied, its step, and its sentence."""

    row: str
    step: Step
    reason: str


Test: TypeAlias = Callable[[View], bool]
Text: TypeAlias = Callable[[View], str]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    applies: Test
    step: Step
    reason: str | Text


# --- what the rows ask ---------------------------------------------------------------------


def runs_something(v: View) -> bool:
    """Whether anything of the application is here or on its way."""
    return v.service is not Service.DOWN


def is_primary(v: View) -> bool:
    """Whether the engine serves."""
    return v.engine is not None and v.engine.primary


def engine(v: View) -> Engine:
    """The engine, where a row above has made sure that there is one."""
    assert v.engine is not None
    return v.engine


def peer_serves(v: View) -> bool:
    """Whether the peer is primary, as far as heartbeats and channel tell."""
    return (v.peer.heard and v.peer.primary) or (v.engine is not None and v.engine.peer_primary)


def silent(v: View) -> bool:
    """Neither heartbeats nor channel: the peer may be dead, or cut off."""
    return not v.peer.heard and not v.listening and v.engine is not None and v.engine.phase == ""


def promotable(v: View) -> bool:
    """Whether this copy may serve without force, and nothing here stands against it."""
    return (
        v.engine is not None
        and not v.engine.promote_refusal
        and not v.engine.failed
        and not v.held_back
    )


def holds_right(v: View) -> bool:
    """Whether the metadata itself says that the peer is the one behind (rules 12 and 16)."""
    return v.engine is not None and (v.engine.right_alone or v.engine.peer_outdated)


def may_use_right(v: View) -> bool:
    """Whether a node that holds the right uses it: the last primary does in any case.

    With a memory the right is the record's to give (rules 11 and 12); beside a peer that is being
    copied to it needs no look, for such a peer may not claim.
    """
    given = engine(v).right_alone and (v.record is Standing.MINE or bool(engine(v).phase))
    return would_use_right(v) and (given or not v.settings.memory)


def would_use_right(v: View) -> bool:
    """Whether nothing but the record is open."""
    able = holds_right(v) and promotable(v) and not peer_serves(v) and not v.gave_way
    return able and (may_take_over(v) or engine(v).was_primary)


def must_claim(v: View) -> bool:
    """Whether the right has to come from the record first (rule 12: "peer outdated" is none)."""
    e = engine(v)
    return v.settings.memory and not e.right_alone and not e.phase


def must_be_read(v: View) -> bool:
    """Whether this node has the right, but for what the record says by now."""
    e = engine(v)
    return v.settings.memory and e.right_alone and not e.phase and v.record is not Standing.MINE


def may_take_over(v: View) -> bool:
    """Whether a secondary may act without an operator."""
    return v.settings.takeover and v.settings.failover


def was_last(v: View) -> bool:
    """Whether this node was the last primary, by its metadata or by its controller's memory."""
    return engine(v).was_primary or v.served


def own_facts(v: View) -> tuple[object, ...]:
    """What this node brings into an election. Whenever it changes, its `facts_id` changes, too."""
    was = v.engine is not None and was_last(v)
    return promotable(v), was, bool(v.held_back), v.wanted, v.engine is None, v.swap_to, v.settings


def candidate(v: View) -> int:
    """Which of two connected nodes without a primary becomes it; 0 for neither.

    The only one that can; else the one a swap goes to; else the last primary; else the preferred
    one; else the lower id. A function of both nodes' facts, so both come to the same answer.
    """
    s, p = v.settings, v.peer
    mine = promotable(v)
    theirs = p.heard and p.promotable and not p.held_back and p.wanted and p.engine
    target = v.swap_to or p.swap_to
    if mine and theirs and target in (s.node_id, s.peer_id):
        return target
    # Where failover is off a node keeps the role that it had, and takes no other one's.
    mine = mine and (s.failover or was_last(v))
    theirs = theirs and (p.was_primary or not p.passive)
    if not (mine and theirs):
        able = s.node_id if mine else s.peer_id if theirs else 0
        was = was_last(v) if mine else p.was_primary
        return able if s.takeover or was else 0
    last = [node for node, was in ((s.node_id, was_last(v)), (s.peer_id, p.was_primary)) if was]
    if len(last) == 1:
        return last[0]
    if not s.takeover:
        return 0
    return s.preferred_id or min(s.node_id, s.peer_id)


def elected(v: View) -> bool:
    """Whether both name this node, and the other one did so knowing what is true here now.

    Else a node that was held back for a moment, and had been named before it, would go on just when
    the other one does. With this, both would have to be named over the same facts of both nodes.
    A peer without a controller names nobody and takes nothing.
    """
    e, p, me = engine(v), v.peer, v.settings.node_id
    if not e.synced or peer_serves(v) or not promotable(v) or candidate(v) != me:
        return False
    if not p.heard:
        return not e.peer_attended and not v.listening
    return p.candidate == me and p.facts_seen == v.facts_id


def swap_back(v: View) -> bool:
    """Whether the peer is the preferred one, in sync, ready, and may serve."""
    s, p = v.settings, v.peer
    wanted = s.preferred_id == s.peer_id or (s.preferred_last and p.deposed)
    ready = p.role == "SECOND" and p.readiness == "ready" and p.promotable and not p.held_back
    return wanted and s.failover and engine(v).synced and p.heard and ready


def by_operator(v: View) -> str:
    """Why only an operator makes this node primary, and how; "" if it may become it by itself."""
    if not v.settings.takeover:
        return 'takeover = "operator": `nbdmirror prim` makes this node serve'
    if not v.settings.failover:
        return "failover is off: `nbdmirror failover on`, or `nbdmirror prim`"
    return ""


def moving_reason(v: View) -> str:
    """What becomes of the application, and what holds that up."""
    if v.service is Service.LEAVING:
        return "the application is being taken down"
    waits = f", which waits: {v.service_reason}" if v.service_reason else ""
    return f"the application is being started{waits}"


def unelected_reason(v: View) -> str:
    """Why neither of two connected nodes serves."""
    other = "neither node serves; the other one is to become primary" if candidate(v) else ""
    neither = f"neither node was primary last; {by_operator(v)}"
    return v.held_back or other or engine(v).promote_refusal or neither


def contact_reason(v: View) -> str:
    """Why a node waits that hears the other one's controller."""
    name = v.settings.peer_name
    stopped = f"{name} is stopped: `nbdmirror start` there" if not v.peer.wanted else ""
    missing = v.held_back or stopped or engine(v).refusal or "waiting for its engine to connect"
    unasked = by_operator(v) if holds_right(v) and promotable(v) else ""
    return f"{unasked}; {missing}" if unasked else missing


def silence_reason(v: View) -> str:
    """Why a node that hears nothing stays where it is; "" if nothing but the arbiter is open."""
    e = engine(v)
    # A record knows: who may not go on has not got its generation (rule 11).
    unknown = not e.met and not holds_right(v) and not v.settings.memory
    reasons = (
        v.held_back,
        f"this node's disk failed: {e.failed}" if e.failed else "",
        e.promote_refusal,
        by_operator(v),
        UNKNOWN_PEER if unknown else "",
    )
    return next(filter(None, reasons), "")


def waits_alone(v: View) -> bool:
    """A silent peer, and a reason not to take over."""
    return silent(v) and bool(silence_reason(v))


def verdict_is(*verdicts: Verdict) -> Test:
    """A test of the arbiter's answer."""
    return lambda v: v.verdict in verdicts


def says_yes(v: View) -> bool:
    """The yes of an arbiter without a memory. Of the others the record is the yes."""
    return v.verdict is Verdict.YES and not v.settings.memory


def order_is(kind: OrderKind) -> Test:
    """A test of the order."""
    return lambda v: v.order is kind


def ordered(v: View) -> bool:
    """Whether an operator wants this node to serve, and nobody does."""
    return v.order is OrderKind.PRIM and not peer_serves(v)


def both(*tests: Test) -> Test:
    """All of the tests."""
    return lambda v: all(test(v) for test in tests)


def primary_and(*tests: Test) -> Test:
    """All of the tests, of a primary."""
    return both(is_primary, *tests)


def frozen(v: View) -> bool:
    """Whether clients wait for a decision. Not while a new session is being agreed on."""
    e = engine(v)
    return e.frozen and e.asks and not e.changing and e.phase == ""


def gives_way(v: View) -> bool:
    """Whether this node must stop serving for its peer to be right."""
    e = engine(v)
    replaced = v.peer.heard and v.peer.primary and not e.right_alone and not e.synced
    # While the other copy is filled from this one the split brain is over, and in the joint step
    # the right is given up before that is stored.
    split = e.split and not e.right_alone and e.phase in ("", NEGOTIATING)
    return e.stop_first or split or replaced or deposed(v)


def deposed(v: View) -> bool:
    """Whether the record gave the right to the peer (rule 14)."""
    apart = engine(v).phase in ("", NEGOTIATING)
    return v.settings.memory and engine(v).right_alone and apart and v.record is Standing.PEER


def gives_way_reason(v: View) -> str:
    """Which of these it is."""
    e = engine(v)
    if e.stop_first or e.split:
        return e.refusal or "this node's copy is the one that waits"
    if deposed(v):
        return f"this node has lost the right: {v.record_reason}"
    return f"{v.settings.peer_name} serves, and this node has no right of its own"


def record_text(v: View) -> str:
    """What is known of the record, of a node that needs it to say more."""
    found = v.record_reason or "it was not read yet"
    return f"this node had the right; whether it still has says the arbiter's record: {found}"


def speaks(v: View) -> bool:
    """A dead engine that served, a peer that listens, and words not tried yet."""
    tried = v.spoken or not v.died_serving
    return v.engine is None and not tried and v.peer.heard and may_take_over(v)


def no_engine(v: View) -> bool:
    """Whether there is none."""
    return v.engine is None


# --- the table -----------------------------------------------------------------------------

UNKNOWN_PEER: Final = (
    "nobody knows here what the other node did since this engine started; start the other node, or "
    "type `nbdmirror prim` if it is gone for good"
)
LISTENS: Final = "this controller has just begun to listen: the other node may serve by now"
HANDS_OVER: Final = (OrderKind.SWAP, OrderKind.STOPSTART, OrderKind.WAIT)
MOVING: Final = (Service.ENTERING, Service.LEAVING)

TABLE: Final[tuple[Row, ...]] = (
    # 1. What must not run is ended.
    Row("engine died", speaks, Step.SPEAK, "the engine died while it served; the peer is told so"),
    Row(
        "stopping", lambda v: not v.wanted and v.service is Service.LEAVING, Step.NOTHING,
        "stopping: the application is being taken down",
    ),
    Row(
        "stop", lambda v: not v.wanted and runs_something(v), Step.LEAVE,
        lambda v: f"stopping: {v.stop_reason}",
    ),
    Row(
        "stop, the peer first",
        lambda v: not v.wanted and v.stop_both and is_primary(v)
        and (v.listening or (v.peer.heard and (v.peer.wanted or v.peer.engine))),
        Step.NOTHING, lambda v: f"stopping: waiting until {v.settings.peer_name} has stopped",
    ),
    # Of a stopped node, too: the peer may have taken over the address that is still here.
    Row(
        "leftovers", lambda v: v.leftovers and v.service is Service.DOWN, Step.CLEAN,
        "something of an earlier life is still here (rule 22)",
    ),
    Row(
        "stop engine", lambda v: not v.wanted and v.engine is not None, Step.STOP_ENGINE,
        lambda v: f"stopping: {v.stop_reason}",
    ),
    Row("stopped", lambda v: not v.wanted, Step.NOTHING, lambda v: v.stop_reason),
    Row(
        "going down", lambda v: not is_primary(v) and v.service is Service.LEAVING, Step.NOTHING,
        "the application is being taken down",
    ),
    Row(
        "not served", lambda v: not is_primary(v) and runs_something(v), Step.LEAVE,
        "the engine here does not serve any more: what runs on its device is taken down",
    ),
    # 2. The engine is kept alive.
    Row("given up", both(no_engine, lambda v: bool(v.engine_given_up)), Step.NOTHING,
        lambda v: v.engine_given_up),
    Row("no engine", no_engine, Step.START_ENGINE, "the engine of this node is not running"),
    # 3. A primary.
    Row(
        "gives way, going down", primary_and(gives_way, lambda v: v.service is Service.LEAVING),
        Step.NOTHING, gives_way_reason,
    ),
    Row("gives way", primary_and(gives_way, runs_something), Step.LEAVE, gives_way_reason),
    Row("gives way, demote", primary_and(gives_way), Step.DEMOTE, gives_way_reason),
    Row(
        "frozen, the peer talks",
        primary_and(frozen, lambda v: v.peer.heard and not v.asked_peer),
        Step.ASK_PEER,
        "the channel is lost, the controllers still talk: the peer is asked to leave",
    ),
    Row(
        "frozen, listening", primary_and(frozen, lambda v: v.listening), Step.NOTHING, LISTENS,
    ),
    Row(
        "frozen, no", primary_and(frozen, verdict_is(Verdict.NO)), Step.DEMOTE,
        lambda v: f"the arbiter says no: {v.verdict_reason}",
    ),
    Row(
        "frozen, yes", primary_and(frozen, says_yes), Step.ALONE,
        lambda v: f"the peer is lost and this node goes on alone: {v.verdict_reason}",
    ),
    Row(
        "frozen, too long",
        primary_and(frozen, verdict_is(Verdict.UNKNOWN), lambda v: engine(v).held,
                    lambda v: not engine(v).peer_outdated and may_take_over(v)),
        Step.DEMOTE, lambda v: f"nobody says whether the peer serves by now: {v.verdict_reason}",
    ),
    Row(
        "frozen, unknown", primary_and(frozen, verdict_is(Verdict.UNKNOWN)), Step.NOTHING,
        lambda v: f"the peer is lost, and the arbiter gives no answer: {v.verdict_reason}",
    ),
    Row(
        "frozen", primary_and(frozen), Step.ASK_ARBITER,
        "the peer is lost; the arbiter is asked whether this node may go on alone",
    ),
    Row(
        "restart, going down",
        primary_and(order_is(OrderKind.RESTART), lambda v: v.service in MOVING),
        Step.NOTHING, lambda v: f"restarting the application: {v.order_from}",
    ),
    Row(
        "restart", primary_and(order_is(OrderKind.RESTART), runs_something), Step.LEAVE,
        lambda v: f"restarting the application: {v.order_from}",
    ),
    Row(
        "hand over, going down",
        primary_and(lambda v: v.order in HANDS_OVER, lambda v: v.service is Service.LEAVING),
        Step.NOTHING, lambda v: f"stepping back: {v.order_from}",
    ),
    Row(
        "hand over", primary_and(lambda v: v.order in HANDS_OVER, runs_something), Step.LEAVE,
        lambda v: f"stepping back: {v.order_from}",
    ),
    Row(
        "hand over, demote", primary_and(lambda v: v.order in HANDS_OVER), Step.DEMOTE,
        lambda v: f"stepping back: {v.order_from}",
    ),
    Row(
        "entering", primary_and(lambda v: v.service in MOVING), Step.NOTHING,
        moving_reason,
    ),
    Row(
        "start failed", primary_and(lambda v: v.service is Service.FAILED), Step.NOTHING,
        lambda v: f"the application failed: {v.service_reason}",
    ),
    Row(
        "before", primary_and(lambda v: v.service is Service.DOWN and bool(v.before_down)),
        Step.NOTHING, lambda v: f"the application waits until this is well: {v.before_down}",
    ),
    Row(
        "left over", primary_and(lambda v: v.service is Service.DOWN and bool(v.held_back)),
        Step.NOTHING, lambda v: v.held_back,
    ),
    Row(
        "enter", primary_and(lambda v: v.service is Service.DOWN and not engine(v).frozen),
        Step.ENTER, "this node serves: its application is started",
    ),
    Row("alone", primary_and(lambda v: not engine(v).synced), Step.NOTHING,
        lambda v: "this node serves alone: " + (
            "the peer is being brought up to date" if engine(v).phase else
            engine(v).refusal or "the peer is not connected")),
    Row("primary", is_primary, Step.NOTHING, "this node serves, and the peer has every write"),
    # 4. A node that is not primary.
    Row(
        "listening", lambda v: v.listening and engine(v).phase == "", Step.NOTHING, LISTENS,
    ),
    Row(
        "ordered, held back", both(ordered, lambda v: bool(v.held_back)), Step.NOTHING,
        lambda v: f"to be made primary, but not yet: {v.held_back}",
    ),
    Row(
        "ordered, no", both(ordered, lambda v: not v.forced and must_claim(v),
                            verdict_is(Verdict.NO, Verdict.UNKNOWN)), Step.NOTHING,
        lambda v: f"to be made primary, but the arbiter does not let it: {v.verdict_reason}",
    ),
    Row(
        "ordered, claim", both(ordered, lambda v: not v.forced and must_claim(v)),
        Step.ASK_ARBITER, lambda v: f"to be made primary, the arbiter is asked: {v.order_from}",
    ),
    Row(
        "ordered, unread", both(ordered, lambda v: not v.forced and must_be_read(v)),
        Step.NOTHING, record_text,
    ),
    Row(
        "ordered", ordered, Step.PROMOTE,
        lambda v: f"made primary: {v.order_from}",
    ),
    Row("disk failed", lambda v: bool(engine(v).failed), Step.NOTHING,
        lambda v: f"this node's disk failed: {engine(v).failed}; look at it, then stop and start"),
    Row(
        "unsettled", lambda v: engine(v).claim_unsettled and v.peer.heard, Step.SETTLE,
        "a claim at the arbiter is not settled; until then the peer is not met",
    ),
    Row(
        "busy", lambda v: bool(engine(v).changing) or engine(v).phase == "negotiating",
        Step.NOTHING, "the two engines are comparing what they know",
    ),
    Row(
        "second", lambda v: engine(v).synced and engine(v).peer_primary, Step.NOTHING,
        lambda v: f"{v.settings.peer_name} serves; this node has every write",
    ),
    Row(
        "resync", lambda v: bool(engine(v).phase) and engine(v).peer_primary, Step.NOTHING,
        lambda v: f"{v.settings.peer_name} serves; this copy is being brought up to date",
    ),
    Row("elected", elected, Step.PROMOTE, "neither node serves, and both name this one"),
    Row(
        "not elected", lambda v: engine(v).synced, Step.NOTHING,
        unelected_reason,
    ),
    Row(
        "source", both(may_use_right, lambda v: bool(engine(v).phase)), Step.PROMOTE,
        "this copy is the newest: it serves while the peer is brought up to date",
    ),
    Row(
        "connected", lambda v: bool(engine(v).phase), Step.NOTHING,
        "the two engines are connected; neither serves until the copies are equal",
    ),
    Row(
        "peer serves", peer_serves, Step.NOTHING,
        lambda v: f"{v.settings.peer_name} serves; waiting for its engine to connect"
        + (f": {engine(v).refusal}" if engine(v).refusal else ""),
    ),
    Row(
        "right", may_use_right, Step.PROMOTE,
        lambda v: "the arbiter's record names this node" if v.settings.memory
        else "the peer is known to be behind, and this copy is complete",
    ),
    Row(
        "right, no", both(would_use_right, must_claim, verdict_is(Verdict.NO, Verdict.UNKNOWN)),
        Step.NOTHING, lambda v: f"the peer is known to be behind, but: {v.verdict_reason}",
    ),
    Row(
        "right, claim", both(would_use_right, must_claim), Step.ASK_ARBITER,
        "the peer is known to be behind; the arbiter is asked for the right",
    ),
    Row("right, unread", both(would_use_right, must_be_read), Step.NOTHING, record_text),
    Row("waits", waits_alone, Step.NOTHING, silence_reason),
    Row(
        "takeover, unknown", both(silent, verdict_is(Verdict.UNKNOWN)), Step.NOTHING,
        lambda v: f"the peer is silent, and the arbiter gives no answer: {v.verdict_reason}",
    ),
    Row(
        "takeover, not first", both(silent, lambda v: v.settings.memory and v.hesitates),
        Step.NOTHING, "the peer is silent; if it lives, it is the first to ask the arbiter",
    ),
    Row(
        "takeover, no", both(silent, verdict_is(Verdict.NO)), Step.NOTHING,
        lambda v: f"the peer is silent, and the arbiter says no: {v.verdict_reason}",
    ),
    Row(
        "takeover", both(silent, says_yes), Step.PROMOTE,
        lambda v: f"the peer is silent, on every network and on the channel: {v.verdict_reason}",
    ),
    Row(
        "silent", silent, Step.ASK_ARBITER,
        "the peer is silent; the arbiter is asked whether this node may take over",
    ),
    Row(
        "engine of the peer",
        lambda v: v.peer.heard and not v.peer.engine and promotable(v) and engine(v).met
        and may_take_over(v) and not v.asked_peer,
        Step.ASK_PEER, "the peer has no engine: it is asked to leave, so that this node can serve",
    ),
    Row(
        "waits for contact", lambda _v: True, Step.NOTHING,
        contact_reason,
    ),
)  # fmt: skip


def decide(view: View) -> Decision:
    """The next step. Every view has exactly one."""
    row = next(row for row in TABLE if row.applies(view))
    reason = row.reason if isinstance(row.reason, str) else row.reason(view)
    return Decision(row.name, row.step, reason)
