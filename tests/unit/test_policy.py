"""Every row of the controller's table, each reached by a view that was written by hand for it.

Owns the words and steps of single rows. What must hold whatever a controller sees is in
test_policy_rules.py, what two of them do together in test_policy_pair.py.
"""

from dataclasses import replace
from typing import Any, Final

import pytest

from nbdmirror.core.cluster.policy import TABLE, UNKNOWN_PEER, Step, candidate, decide
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

ME: Final = Settings(node_id=1, peer_id=2, peer_name="beta")
IDLE: Final = Engine(
    instance="i", epoch=1, primary=False, data_state="uptodate", generation="g", frozen=False,
    asks=False, right_alone=False, failed="", phase="", met=False, peer_primary=False,
    peer_attended=False, peer_outdated=False, promote_refusal="", was_primary=False,
    stop_first=False, split=False, refusal="", changing="",
)  # fmt: skip
TALKS: Final = Peer(heard=True, ever_heard=True, role="WAIT", wanted=True, engine=True)


def engine(**fields: Any) -> Engine:
    """An engine that is up to date, in no role and without a peer, but for what is given."""
    return replace(IDLE, **fields)


def primary(**fields: Any) -> Engine:
    """An engine that serves in sync."""
    return engine(**{"primary": True, "was_primary": True, "phase": "synced", **fields})


def frozen(**fields: Any) -> Engine:
    """A primary that lost its peer and asks."""
    return primary(**{"phase": "", "frozen": True, "asks": True, "met": True, **fields})


def peer(**fields: Any) -> Peer:
    """A peer that talks and has an engine."""
    return replace(TALKS, **fields)


def view(**fields: Any) -> View:
    """A node that shall run; the peer is silent."""
    return View(**{"settings": ME, "stop_reason": "why", **fields})


SECOND: Final = peer(role="SECOND", readiness="ready", promotable=True)
NAMES_ME: Final = peer(promotable=True, candidate=1, facts_seen="f")
UP: Final = Service.UP
MET: Final = engine(met=True)
MEMORY: Final = replace(ME, memory=True)
RIGHT: Final = engine(right_alone=True, was_primary=True)

# (row, step, a part of its sentence, the view)
CASES: Final[tuple[tuple[str, Step, str, View], ...]] = (
    ("engine died", Step.SPEAK, "the peer is told", view(
        died_serving=True, spoken=False, peer=TALKS, service=UP)),
    ("stopping", Step.NOTHING, "being taken down", view(
        wanted=False, engine=primary(), service=Service.LEAVING)),
    ("stop", Step.LEAVE, "stopping: why", view(
        wanted=False, engine=primary(), service=UP)),
    ("stop, the peer first", Step.NOTHING, "until beta has stopped", view(
        wanted=False, stop_both=True, engine=primary(), peer=SECOND)),
    ("stop, the peer first", Step.NOTHING, "until beta has stopped", view(
        wanted=False, stop_both=True, engine=primary(), listening=True)),
    ("leftovers", Step.CLEAN, "rule 22", view(leftovers=True)),
    ("leftovers", Step.CLEAN, "rule 22", view(
        wanted=False, leftovers=True)),
    ("leftovers", Step.CLEAN, "rule 22", view(
        wanted=False, leftovers=True, engine=primary())),
    ("stop engine", Step.STOP_ENGINE, "stopping: why", view(
        wanted=False, engine=primary())),
    ("stopped", Step.NOTHING, "why", view(wanted=False)),
    ("going down", Step.NOTHING, "being taken down", view(
        engine=engine(), service=Service.LEAVING)),
    ("not served", Step.LEAVE, "does not serve any more", view(engine=engine(), service=UP)),
    ("not served", Step.LEAVE, "does not serve any more", view(service=Service.FAILED)),
    ("given up", Step.NOTHING, "its log is", view(engine_given_up="its log is here")),
    ("no engine", Step.START_ENGINE, "not running", view()),
    ("no engine", Step.START_ENGINE, "not running", view(died_serving=True, peer=TALKS)),
    ("gives way, going down", Step.NOTHING, "beta serves", view(
        engine=frozen(), peer=peer(primary=True), service=Service.LEAVING)),
    ("gives way", Step.LEAVE, "no right of its own", view(
        engine=frozen(), peer=peer(primary=True), service=UP)),
    ("gives way", Step.LEAVE, "will be overwritten", view(
        engine=primary(phase="", stop_first=True, right_alone=True, refusal="will be overwritten"),
        service=UP)),
    ("gives way, demote", Step.DEMOTE, "copy is the one that waits", view(
        engine=frozen(split=True), verdict=Verdict.YES)),
    ("frozen, the peer talks", Step.ASK_PEER, "asked to leave", view(
        engine=frozen(), peer=TALKS, service=UP)),
    ("frozen, listening", Step.NOTHING, "begun to listen", view(
        engine=frozen(), listening=True, service=UP, verdict=Verdict.YES)),
    ("frozen, no", Step.DEMOTE, "the router is silent", view(
        engine=frozen(), service=UP, verdict=Verdict.NO, verdict_reason="the router is silent")),
    ("frozen, yes", Step.ALONE, "everybody may", view(
        engine=frozen(), service=UP, verdict=Verdict.YES, verdict_reason="everybody may")),
    ("frozen, yes", Step.ALONE, "goes on alone", view(
        engine=frozen(), peer=TALKS, asked_peer=True, verdict=Verdict.YES)),
    ("frozen", Step.ASK_ARBITER, "the arbiter is asked", view(engine=frozen(), service=UP)),
    ("frozen", Step.ASK_ARBITER, "the arbiter is asked", view(
        engine=frozen(), settings=MEMORY, verdict=Verdict.YES)),
    ("frozen, unknown", Step.NOTHING, "no answer: time-out", view(
        engine=frozen(), settings=MEMORY, verdict=Verdict.UNKNOWN, verdict_reason="time-out")),
    ("frozen, unknown", Step.NOTHING, "no answer", view(
        engine=frozen(held=True, peer_outdated=True), settings=MEMORY, verdict=Verdict.UNKNOWN)),
    ("frozen, too long", Step.DEMOTE, "by now: time-out", view(
        engine=frozen(held=True), settings=MEMORY, verdict=Verdict.UNKNOWN,
        verdict_reason="time-out", service=UP)),
    ("gives way", Step.LEAVE, "lost the right: it names beta", view(
        engine=primary(phase="", right_alone=True), settings=MEMORY, service=UP,
        record=Standing.PEER, record_reason="it names beta")),
    ("restart, going down", Step.NOTHING, "restarting", view(
        engine=primary(), order=OrderKind.RESTART, order_from="him", service=Service.LEAVING)),
    ("restart", Step.LEAVE, "restarting the application: him", view(
        engine=primary(), order=OrderKind.RESTART, order_from="him", service=UP)),
    ("hand over, going down", Step.NOTHING, "stepping back", view(
        engine=primary(), order=OrderKind.SWAP, order_from="him", service=Service.LEAVING)),
    ("hand over", Step.LEAVE, "stepping back: him", view(
        engine=primary(), order=OrderKind.STOPSTART, order_from="him", service=Service.FAILED)),
    ("hand over, demote", Step.DEMOTE, "stepping back: him", view(
        engine=primary(), order=OrderKind.WAIT, order_from="him")),
    ("entering", Step.NOTHING, "being started", view(engine=primary(), service=Service.ENTERING)),
    ("entering", Step.NOTHING, "being taken down", view(
        engine=primary(), service=Service.LEAVING)),
    ("start failed", Step.NOTHING, "exit code 1", view(
        engine=primary(), service=Service.FAILED, service_reason="exit code 1")),
    ("before", Step.NOTHING, "disk is full", view(
        engine=primary(), before_down="disk is full", held_back="disk is full")),
    ("left over", Step.NOTHING, "a mount", view(engine=primary(), held_back="a mount is left")),
    ("enter", Step.ENTER, "is started", view(engine=primary())),
    ("alone", Step.NOTHING, "alone: the peer is not connected", view(
        engine=primary(phase="", right_alone=True), service=UP)),
    ("alone", Step.NOTHING, "another key", view(
        engine=primary(phase="", right_alone=True, refusal="another key"), service=UP)),
    ("alone", Step.NOTHING, "brought up to date", view(
        engine=primary(phase="resync", right_alone=True), service=UP)),
    # The operator gave the other copy up: (a) of the joint step, before the flag is gone.
    ("alone", Step.NOTHING, "brought up to date", view(
        engine=primary(phase="joint", split=True), service=UP)),
    ("alone", Step.NOTHING, "not connected", view(engine=frozen(asks=False))),
    ("primary", Step.NOTHING, "has every write", view(engine=primary(), service=UP)),
    ("listening", Step.NOTHING, "begun to listen", view(
        engine=engine(right_alone=True, was_primary=True), listening=True)),
    ("ordered, held back", Step.NOTHING, "not yet: a mount", view(
        engine=engine(), order=OrderKind.PRIM, held_back="a mount is left")),
    ("ordered", Step.PROMOTE, "made primary: him", view(
        engine=engine(data_state="outdated", promote_refusal="it is outdated"),
        order=OrderKind.PRIM, order_from="him")),
    ("ordered", Step.PROMOTE, "made primary", view(
        engine=engine(), order=OrderKind.PRIM, settings=MEMORY, forced=True)),
    ("ordered", Step.PROMOTE, "made primary", view(
        engine=RIGHT, order=OrderKind.PRIM, settings=MEMORY, record=Standing.MINE)),
    ("ordered, claim", Step.ASK_ARBITER, "asked: him", view(
        engine=engine(), order=OrderKind.PRIM, order_from="him", settings=MEMORY)),
    ("ordered, no", Step.NOTHING, "names beta", view(
        engine=engine(), order=OrderKind.PRIM, settings=MEMORY, verdict=Verdict.NO,
        verdict_reason="it names beta")),
    ("ordered, unread", Step.NOTHING, "not read yet", view(
        engine=RIGHT, order=OrderKind.PRIM, settings=MEMORY)),
    ("unsettled", Step.SETTLE, "not settled", view(
        engine=engine(claim_unsettled=True), peer=TALKS, settings=MEMORY)),
    ("right, claim", Step.ASK_ARBITER, "asked for the right", view(
        engine=engine(peer_outdated=True), settings=MEMORY)),
    ("right, no", Step.NOTHING, "names beta", view(
        engine=engine(peer_outdated=True), settings=MEMORY, verdict=Verdict.NO,
        verdict_reason="it names beta")),
    ("right, unread", Step.NOTHING, "not read yet", view(engine=RIGHT, settings=MEMORY)),
    ("right, unread", Step.NOTHING, "it names beta", view(
        engine=RIGHT, settings=MEMORY, record=Standing.PEER, record_reason="it names beta")),
    ("right", Step.PROMOTE, "names this node", view(
        engine=RIGHT, settings=MEMORY, record=Standing.MINE)),
    ("takeover, unknown", Step.NOTHING, "no answer: time-out", view(
        engine=MET, settings=MEMORY, verdict=Verdict.UNKNOWN, verdict_reason="time-out")),
    ("silent", Step.ASK_ARBITER, "may take over", view(
        engine=MET, settings=MEMORY, verdict=Verdict.YES)),
    ("silent", Step.ASK_ARBITER, "may take over", view(engine=engine(), settings=MEMORY)),
    ("takeover, not first", Step.NOTHING, "the first to ask", view(
        engine=MET, settings=MEMORY, hesitates=True)),
    ("disk failed", Step.NOTHING, "EIO", view(engine=engine(failed="EIO"), peer=TALKS)),
    ("busy", Step.NOTHING, "comparing", view(engine=engine(phase="negotiating"), peer=TALKS)),
    ("busy", Step.NOTHING, "comparing", view(engine=engine(changing="leave", met=True))),
    ("second", Step.NOTHING, "beta serves; this node has every write", view(
        engine=engine(phase="synced", peer_primary=True))),
    ("second", Step.NOTHING, "beta serves", view(
        engine=engine(phase="synced", peer_primary=True), order=OrderKind.PRIM)),
    ("resync", Step.NOTHING, "brought up to date", view(
        engine=engine(phase="resync", peer_primary=True, data_state="inconsistent"))),
    ("elected", Step.PROMOTE, "both name this one", view(
        engine=engine(phase="synced", peer_attended=True), peer=NAMES_ME, facts_id="f")),
    ("elected", Step.PROMOTE, "both name this one", view(engine=engine(phase="synced"))),
    ("not elected", Step.NOTHING, "the other one is to become", view(
        engine=engine(phase="synced"), peer=peer(promotable=True, was_primary=True))),
    ("not elected", Step.NOTHING, "a checker", view(
        engine=engine(phase="synced"), peer=NAMES_ME, facts_id="f", held_back="a checker")),
    ("not elected", Step.NOTHING, "neither", view(
        engine=engine(phase="synced", peer_attended=True), peer=NAMES_ME, facts_id="newer")),
    ("source", Step.PROMOTE, "the newest", view(
        engine=engine(phase="resync", right_alone=True, was_primary=True), peer=TALKS)),
    ("connected", Step.NOTHING, "until the copies are equal", view(
        engine=engine(phase="resync", data_state="inconsistent", promote_refusal="mixed"),
        peer=TALKS)),
    ("peer serves", Step.NOTHING, "to connect: another key", view(
        engine=engine(right_alone=True, refusal="another key"), peer=peer(primary=True))),
    ("right", Step.PROMOTE, "known to be behind", view(engine=engine(peer_outdated=True))),
    ("right", Step.PROMOTE, "known to be behind", view(
        engine=engine(right_alone=True, was_primary=True), peer=TALKS,
        settings=replace(ME, takeover=False))),
    ("waits", Step.NOTHING, UNKNOWN_PEER, view(engine=engine(), verdict=Verdict.YES)),
    ("waits", Step.NOTHING, 'takeover = "operator"', view(
        engine=MET, verdict=Verdict.YES, settings=replace(ME, takeover=False))),
    ("waits", Step.NOTHING, "failover is off", view(
        engine=MET, verdict=Verdict.YES, settings=replace(ME, failover=False))),
    ("waits", Step.NOTHING, "a checker", view(
        engine=MET, verdict=Verdict.YES, held_back="a checker is down")),
    ("waits", Step.NOTHING, "is behind", view(
        engine=engine(met=True, promote_refusal="it is behind"), verdict=Verdict.YES)),
    ("takeover, no", Step.NOTHING, "no echo", view(
        engine=MET, verdict=Verdict.NO, verdict_reason="no echo")),
    ("takeover", Step.PROMOTE, "on every network", view(engine=MET, verdict=Verdict.YES)),
    ("silent", Step.ASK_ARBITER, "may take over", view(engine=MET)),
    ("engine of the peer", Step.ASK_PEER, "has no engine", view(
        engine=MET, peer=peer(engine=False))),
    ("waits for contact", Step.NOTHING, "to connect", view(engine=MET, peer=TALKS)),
    ("waits for contact", Step.NOTHING, "another key", view(
        engine=engine(refusal="another key"), peer=TALKS)),
    ("waits for contact", Step.NOTHING, "to connect", view(
        engine=MET, peer=peer(engine=False), asked_peer=True)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "step", "words", "seen"), CASES, ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)]
)
def test_a_view_reaches_its_row(row: str, step: Step, words: str, seen: View) -> None:
    """Breaks in the field: the controller does something else in a situation that was thought of,
    or says something else than what is the matter.
    """
    made = decide(seen)
    assert (made.row, made.step) == (row, step), made.reason
    assert words in made.reason


def test_every_row_is_reached() -> None:
    """Breaks in the field: a row that nobody can reach hides the rule that it stands for."""
    names = [row.name for row in TABLE]
    assert len(names) == len(set(names)), "a name in status means one row"
    assert {case[0] for case in CASES} == set(names)


THEIRS: Final = peer(promotable=True)
PREFERS_PEER: Final = replace(ME, preferred_id=2)
OPERATOR: Final = replace(ME, takeover=False)

# (whom, why, the view)
CANDIDATES: Final[tuple[tuple[int, str, View], ...]] = (
    (1, "the lower id", view(engine=engine(), peer=THEIRS)),
    (2, "the preferred one", view(engine=engine(), peer=THEIRS, settings=PREFERS_PEER)),
    (1, "the last primary", view(
        engine=engine(was_primary=True), peer=THEIRS, settings=PREFERS_PEER)),
    (2, "the last primary", view(engine=engine(), peer=replace(THEIRS, was_primary=True))),
    (2, "a swap goes there", view(engine=engine(was_primary=True), peer=THEIRS, swap_to=2)),
    (1, "a swap of the peer's", view(engine=engine(), peer=replace(THEIRS, swap_to=1,
                                                                  was_primary=True))),
    (1, "the only one", view(engine=engine(), peer=TALKS, settings=PREFERS_PEER, swap_to=2)),
    (1, "it stops", view(engine=engine(), peer=replace(THEIRS, wanted=False, was_primary=True))),
    (1, "it is held back", view(engine=engine(), peer=replace(THEIRS, held_back=True, swap_to=2))),
    (1, "what it said is old", view(
        engine=engine(), peer=replace(THEIRS, heard=False, was_primary=True))),
    (2, "the only one", view(engine=engine(promote_refusal="behind"), peer=THEIRS)),
    (0, "neither can", view(engine=engine(failed="EIO"), peer=TALKS)),
    (1, "the last one, by an operator's rule", view(
        engine=engine(was_primary=True), peer=THEIRS, settings=OPERATOR)),
    (0, "neither was, by an operator's rule", view(
        engine=engine(), peer=THEIRS, settings=OPERATOR)),
    (0, "not the last, by an operator's rule", view(
        engine=engine(), peer=TALKS, settings=OPERATOR)),
    (0, "both were, by an operator's rule", view(
        engine=engine(was_primary=True), peer=replace(THEIRS, was_primary=True),
        settings=OPERATOR)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("whom", "seen"),
    [(whom, seen) for whom, _, seen in CANDIDATES],
    ids=[f"{n}-{why}" for n, (_, why, _) in enumerate(CANDIDATES)],
)
def test_who_is_to_become_primary(whom: int, seen: View) -> None:
    """Breaks in the field: after a start of both hosts the application runs on the wrong one, or
    nowhere.
    """
    assert candidate(seen) == whom
