"""What the controller's table must never do, whatever a controller may see.

Owns the rules, and for each a table that breaks it, so that every rule is seen to fail. They are
looked at over random views, and over all views that lie one or two facts beside a view of
test_policy.py, which has the rows and their sentences.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nbdmirror.core.cluster.policy import (
    TABLE,
    Decision,
    Row,
    Step,
    decide,
    elected,
    frozen,
    holds_right,
    is_primary,
    peer_serves,
    promotable,
    silent,
)
from nbdmirror.core.cluster.view import (
    Engine,
    OrderKind,
    Peer,
    Service,
    Settings,
    Standing,
    Verdict,
    View,
)
from tests.unit.test_policy import CASES

FLAG: Final = st.booleans()
RARELY: Final = st.sampled_from((False, False, False, True))
SOME: Final = st.sampled_from(("", "", "", "a reason"))
IDS: Final = st.integers(0, 2)
IDS_TRIED: Final = (0, 1, 2)

ENGINES: Final = st.builds(
    Engine, instance=st.just("i"), epoch=st.just(1), primary=FLAG,
    data_state=st.sampled_from(("uptodate", "outdated", "inconsistent", "blank")),
    generation=st.just("g"), frozen=FLAG, asks=FLAG, right_alone=RARELY, failed=SOME,
    phase=st.sampled_from(("", "", "negotiating", "resync", "joint", "synced", "synced")),
    met=FLAG, peer_primary=RARELY, peer_attended=FLAG, peer_outdated=RARELY,
    promote_refusal=SOME, was_primary=FLAG, stop_first=RARELY, split=RARELY, refusal=SOME,
    changing=st.sampled_from(("", "", "", "leave")), claim_unsettled=RARELY, held=FLAG,
)  # fmt: skip
PEERS: Final = st.builds(
    Peer, heard=FLAG, ever_heard=FLAG, role=st.sampled_from(("WAIT", "SECOND", "PRIM")),
    readiness=st.sampled_from(("ready", "transient")), wanted=FLAG, engine=FLAG, primary=RARELY,
    promotable=FLAG, was_primary=FLAG, held_back=FLAG, candidate=IDS,
    facts_id=st.sampled_from(("a", "b")), facts_seen=st.sampled_from(("a", "b")), swap_to=IDS,
    deposed=FLAG, stop_both=FLAG, service=st.sampled_from([each.value for each in Service]),
)  # fmt: skip
VIEWS: Final = st.builds(
    View,
    settings=st.builds(
        Settings, node_id=st.just(1), peer_id=st.just(2), preferred_id=IDS, preferred_last=FLAG,
        takeover=st.sampled_from((True, True, False)),
        failover=st.sampled_from((True, True, False)), memory=FLAG,
    ),
    wanted=st.sampled_from((True, True, False)), stop_reason=st.just("a reason"), stop_both=FLAG,
    engine=st.none() | ENGINES | ENGINES, engine_given_up=SOME, died_serving=FLAG, spoken=FLAG,
    peer=PEERS, listening=RARELY,
    service=st.sampled_from((Service.DOWN, Service.DOWN, *Service)), service_reason=SOME,
    leftovers=RARELY, before_down=SOME, verdict=st.sampled_from(Verdict), verdict_reason=SOME,
    asked_peer=FLAG, held_back=SOME, order=st.none() | st.sampled_from(OrderKind),
    order_from=SOME, forced=FLAG, hesitates=FLAG, record=st.sampled_from(Standing),
    record_reason=SOME, swap_to=IDS, facts_id=st.sampled_from(("a", "b")),
)  # fmt: skip

# What is tried beside a view that was written by hand.
FACTS: Final[dict[str, tuple[Any, ...]]] = {
    "wanted": (False,), "stop_both": (True,), "engine": (None,), "engine_given_up": ("it ended",),
    "died_serving": (True,), "spoken": (False,), "peer": (Peer(),), "listening": (True,),
    "service": tuple(Service), "leftovers": (True,), "before_down": ("full",),
    "verdict": tuple(Verdict), "asked_peer": (True, False), "held_back": ("a mount",),
    "order": (None, *OrderKind), "swap_to": IDS_TRIED, "facts_id": ("newer",),
    "record": tuple(Standing), "forced": (True, False), "settings.memory": (True, False),
    "engine.claim_unsettled": (True, False), "engine.held": (True, False),
    "settings.takeover": (False,), "settings.failover": (False,),
    "settings.preferred_id": IDS_TRIED,
    "engine.primary": (True, False), "engine.frozen": (True, False), "engine.asks": (True, False),
    "engine.right_alone": (True, False), "engine.failed": ("EIO",),
    "engine.phase": ("", "negotiating", "resync", "synced"), "engine.met": (True, False),
    "engine.peer_primary": (True, False), "engine.peer_attended": (True, False),
    "engine.peer_outdated": (True, False), "engine.promote_refusal": ("", "it is behind"),
    "engine.was_primary": (True, False), "engine.stop_first": (True,), "engine.split": (True,),
    "engine.changing": ("leave",),
    "peer.heard": (True, False), "peer.wanted": (True, False), "peer.engine": (True, False),
    "peer.primary": (True, False), "peer.promotable": (True, False), "peer.held_back": (True,),
    "peer.was_primary": (True, False), "peer.candidate": IDS_TRIED,
    "peer.facts_seen": ("newer", "f"), "peer.swap_to": IDS_TRIED,
}  # fmt: skip

Broken = Callable[[View, Step], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """`broken` by a step in a view; `spoilt` is what to do to a row so that the table breaks it."""

    name: str
    broken: Broken
    row: str
    spoilt: dict[str, Any]


def rule(name: str, broken: Broken, row: str, **spoilt: Any) -> Rule:
    """A rule with the row that is spoilt to see it fail."""
    return Rule(name, broken, row, spoilt)


def of_engine(v: View) -> Engine:
    """The engine, of which there is one."""
    assert v.engine is not None
    return v.engine


def by_order(v: View) -> bool:
    """Whether an operator wants this node to serve."""
    return v.order is OrderKind.PRIM


def without_contact(v: View) -> bool:
    """A promotion that nobody ordered and that no session is there for."""
    return not by_order(v) and of_engine(v).phase == ""


def by_silence(v: View) -> bool:
    """A promotion because nobody answers, by a node that holds no right of its own."""
    return without_contact(v) and not v.peer.heard and not holds_right(v)


def may(v: View) -> bool:
    """Whether this node acts without an operator."""
    return v.settings.takeover and v.settings.failover


RULES: Final = (
    rule("a promotion takes an engine that does not serve",
         lambda v, s: s is Step.PROMOTE and (v.engine is None or v.engine.primary),
         "gives way, demote", step=Step.PROMOTE),
    rule("nothing is promoted on top of what still runs",
         lambda v, s: s is Step.PROMOTE and v.service is not Service.DOWN,
         "not served", step=Step.PROMOTE),
    rule("nothing is promoted on top of leftovers",
         lambda v, s: s is Step.PROMOTE and (v.leftovers or bool(v.held_back)),
         "ordered, held back", applies=lambda _v: False),
    rule("nothing is promoted beside a peer that is known to serve",
         lambda v, s: s is Step.PROMOTE and peer_serves(v),
         "ordered", applies=by_order),
    rule("nothing is promoted by itself against its metadata",
         lambda v, s: s is Step.PROMOTE and not by_order(v) and not promotable(v),
         "waits", applies=lambda v: silent(v) and not of_engine(v).met),
    rule("silence needs an arbiter's yes",
         lambda v, s: s is Step.PROMOTE and by_silence(v) and v.verdict is not Verdict.YES,
         "silent", step=Step.PROMOTE),
    rule("silence needs a session that was in sync until then",
         lambda v, s: s is Step.PROMOTE and by_silence(v) and not of_engine(v).met,
         "waits", applies=lambda v: silent(v) and not promotable(v)),
    rule("silence needs the operator's consent",
         lambda v, s: s is Step.PROMOTE and by_silence(v) and not may(v),
         "waits", applies=lambda v: silent(v) and not (promotable(v) and of_engine(v).met)),
    rule("a right is used by the last primary, or with the operator's consent",
         lambda v, s: s is Step.PROMOTE and without_contact(v)
         and not (may(v) or (holds_right(v) and of_engine(v).was_primary)),
         "right", applies=lambda v: holds_right(v) and promotable(v)),
    rule("a peer that talks is not silent",
         lambda v, s: s is Step.PROMOTE and without_contact(v) and v.peer.heard
         and not holds_right(v),
         "engine of the peer", step=Step.PROMOTE),
    rule("nobody is elected whom the other one did not name over the same facts",
         lambda v, s: s is Step.PROMOTE and not by_order(v) and of_engine(v).synced
         and v.peer.heard and (v.peer.candidate, v.peer.facts_seen) != (1, v.facts_id),
         "elected", applies=lambda v: elected(replace(v, facts_id=v.peer.facts_seen))),
    rule("nobody is elected over the head of a controller that was not heard yet",
         lambda v, s: s is Step.PROMOTE and not by_order(v) and of_engine(v).synced
         and not v.peer.heard and (of_engine(v).peer_attended or v.listening),
         "elected", applies=lambda v: elected(replace(v, listening=False))),
    rule("a controller listens before it decides without its peer",
         lambda v, s: s in (Step.PROMOTE, Step.ALONE, Step.ASK_ARBITER) and v.listening
         and not v.peer.heard and of_engine(v).phase == "",
         "listening", applies=lambda _v: False),
    rule("with a memory nobody is promoted without contact but by the record, or by force",
         lambda v, s: s is Step.PROMOTE and v.settings.memory and of_engine(v).phase == ""
         and not (by_order(v) and v.forced)
         and not (of_engine(v).right_alone and v.record is Standing.MINE),
         "right, claim", step=Step.PROMOTE),
    rule("with a memory the record is claimed, not asked for a yes",
         lambda v, s: s is Step.ALONE and v.settings.memory,
         "frozen", step=Step.ALONE),
    rule("a right that the record gave to the peer is not used",
         lambda v, s: s in (Step.ENTER, Step.PROMOTE) and v.settings.memory and v.wanted
         and of_engine(v).right_alone and of_engine(v).phase == ""
         and v.record is Standing.PEER and not (by_order(v) and v.forced),
         "gives way, demote", applies=lambda _v: False),
    rule("an application is started on a primary that serves, and when all is well",
         lambda v, s: s is Step.ENTER and not (
             is_primary(v) and not of_engine(v).frozen and v.service is Service.DOWN
             and v.wanted and not v.before_down and not v.held_back and not v.leftovers),
         "left over", step=Step.ENTER),
    rule("no application is started on a frozen engine",
         lambda v, s: s is Step.ENTER and of_engine(v).frozen,
         "enter", applies=lambda v: is_primary(v) and v.service is Service.DOWN),
    rule("a primary goes on alone when it is asked to, and the arbiter says yes",
         lambda v, s: s is Step.ALONE
         and not (is_primary(v) and frozen(v) and v.verdict is Verdict.YES),
         "frozen", step=Step.ALONE),
    rule("a primary goes on alone only after its peer was asked, if that talks",
         lambda v, s: s is Step.ALONE and v.peer.heard and not v.asked_peer,
         "frozen, the peer talks", applies=lambda _v: False),
    rule("a primary whose peer serves does not go on",
         lambda v, s: s is Step.ALONE and v.peer.heard and v.peer.primary
        and not of_engine(v).right_alone,
         "gives way, demote", step=Step.ALONE),
    rule("a demotion comes after the application, unless the arbiter has said no",
         lambda v, s: s is Step.DEMOTE and not (
             is_primary(v) and (v.service is Service.DOWN or v.verdict is Verdict.NO
                                or (v.verdict is Verdict.UNKNOWN and of_engine(v).held))),
         "gives way", step=Step.DEMOTE),
    rule("an engine is started for a node that shall run, while nobody gave it up",
         lambda v, s: s is Step.START_ENGINE
         and not (v.wanted and v.engine is None and not v.engine_given_up),
         "stopped", step=Step.START_ENGINE),
    rule("an engine is stopped because the node is, with nothing on it",
         lambda v, s: s is Step.STOP_ENGINE and (v.wanted or v.service is not Service.DOWN),
         "stop", step=Step.STOP_ENGINE),
    rule("a node that shall stop only ends things",
         lambda v, s: not v.wanted and s not in (
             Step.SPEAK, Step.CLEAN, Step.LEAVE, Step.STOP_ENGINE, Step.NOTHING),
         "stop, the peer first", step=Step.ENTER),
    rule("nothing is said but for an engine that served, once, and to a peer that listens",
         lambda v, s: s is Step.SPEAK and not (
             v.engine is None and v.died_serving and not v.spoken and v.peer.heard),
         "engine died", applies=lambda v: v.engine is None and v.died_serving),
    rule("leftovers are removed while nothing is being started or ended",
         lambda v, s: s is Step.CLEAN and v.service is not Service.DOWN,
         "leftovers", applies=lambda v: v.leftovers),
)  # fmt: skip
IDS_OF_RULES: Final = [each.name.replace(" ", "-") for each in RULES]


def decided_by(table: tuple[Row, ...], v: View) -> Step:
    """The step that a table takes."""
    return next(row for row in table if row.applies(v)).step


def changed(v: View, field: str, value: Any) -> View:
    """The view with one fact changed; a fact of an engine that is not there changes nothing."""
    part, _, name = field.rpartition(".")
    if not part:
        return replace(v, **{name: value})
    owner = getattr(v, part)
    return v if owner is None else replace(v, **{part: replace(owner, **{name: value})})


def beside(v: View) -> Iterator[View]:
    """Every view that differs in one fact."""
    for field, values in FACTS.items():
        for value in values:
            other = changed(v, field, value)
            if other != v:
                yield other


@given(VIEWS)
@settings(max_examples=300)
def test_every_view_has_a_decision_with_a_sentence(v: View) -> None:
    """Breaks in the field: the controller ends with an exception in a state nobody thought of, or
    `status` does not say why a node is where it is.
    """
    made = decide(v)
    assert isinstance(made, Decision)
    assert made.reason.strip()
    assert TABLE[-1].applies(v), "the last row takes what is left"
    assert not [one.name for one in RULES if one.broken(v, made.step)]


@pytest.mark.slow
def test_no_view_breaks_a_rule() -> None:
    """Breaks in the field: two nodes serve, a stale copy does, or an application runs on a device
    that nothing carries.
    """
    seen = {near for case in CASES for one in (case[3], *beside(case[3])) for near in beside(one)}
    assert len(seen) > 10_000
    for v in seen:
        step = decide(v).step
        for one in RULES:
            assert not one.broken(v, step), (one.name, v)


@pytest.mark.parametrize("one", RULES, ids=IDS_OF_RULES)
def test_every_rule_can_be_broken(one: Rule) -> None:
    """Breaks in the field: a rule above is written so that it never fails, and a change of the
    table breaks it unseen.
    """
    assert one.row in {row.name for row in TABLE}
    spoilt = tuple(replace(row, **one.spoilt) if row.name == one.row else row for row in TABLE)
    near = (v for case in CASES for v in (case[3], *beside(case[3])))
    assert any(one.broken(v, decided_by(spoilt, v)) for v in near)


def down(v: View, step: Step) -> View:
    """What becomes of a node that stops, when each step does what it says."""
    ended: dict[Step, dict[str, Any]] = {
        Step.SPEAK: {"spoken": True},
        Step.CLEAN: {"leftovers": False},
        Step.LEAVE: {"service": Service.DOWN},
        Step.STOP_ENGINE: {"engine": None},
        # What is under way ends, and the peer does what it is waited for.
        Step.NOTHING: {"service": Service.DOWN, "peer": Peer(), "listening": False},
    }
    return replace(v, **ended[step])


@given(VIEWS)
@settings(max_examples=300)
def test_a_stop_leads_down_to_the_end(v: View) -> None:
    """Breaks in the field: `nbdmirror stop` never ends, or leaves something running or mounted."""
    assume(not v.wanted)
    for _ in range(8):
        v = down(v, decide(v).step)
    assert decide(v).row == "stopped"
    assert v.engine is None
    assert (v.service, v.leftovers) == (Service.DOWN, False)
