"""Mutants of the deciding code: rows and conditions of core/cluster, noticed with production's
controllers. Where another row guards the same, it is the defence.
"""

from typing import Final

from tests.sim.mutants.mutant import Mutant, core

PRODUCTION: Final = "production"
GIVES_WAY: Final = "    return e.stop_first or split or replaced or deposed(v)\n"

POLICY: Final = (
    Mutant(
        "believes-in-silence-at-once", 11,
        "a controller that was just started has heard nobody yet, and takes over beside a primary",
        core("cluster/policy", "    return not v.peer.heard and not v.listening and v.engine",
             "    return not v.peer.heard and v.engine"),
        sequences=("controller_is_reborn_in_a_cut-none",),
        defence=core("cluster/policy",
                     '        "listening", lambda v: v.listening and engine(v).phase == "",',
                     '        "listening", lambda _v: False,'),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "deaf-to-heartbeats", 11,
        "the peer is heard on another network, but only the channel counts: both serve",
        core("cluster/policy", "    return not v.peer.heard and not v.listening and v.engine",
             "    return not v.listening and v.engine"),
        sequences=("heartbeats_of_one_direction-none",),
        defence=core("cluster/policy", "    return (v.peer.heard and v.peer.primary) or (",
                     "    return ("),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "elected-over-old-facts", 11,
        "a checker that fails for a moment makes both nodes primary",
        core("cluster/policy",
             "    return p.candidate == me and p.facts_seen == v.facts_id\n",
             "    return p.candidate == me\n"),
        sequences=("held_back_for_a_moment-none",), controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "serves-on-beside-another", 19,
        "two that both went on meet, and both applications run on",
        core("cluster/policy", GIVES_WAY, "    return deposed(v)\n"),
        sequences=("alone_without_a_write-none",), controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "deposed-serves-on", 14,
        "an operator forces one node, and the other one does not give way",
        core("cluster/policy", GIVES_WAY, "    return e.stop_first or split or replaced\n"),
        arbiters=("memory",), sequences=("forced_peer_deposes-memory",),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "leftovers-stay", 22,
        "an application of an earlier life writes on beside the one of the new primary",
        core("cluster/policy",
             '        "leftovers", lambda v: v.leftovers and v.service is Service.DOWN,',
             '        "leftovers", lambda _v: False,'),
        sequences=("leftovers_are_removed-none",), controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "alone-without-asking", 16,
        "the peer lives, is left behind without a word, and does not know it",
        core("cluster/policy", "(frozen, lambda v: v.peer.heard and not v.asked_peer),",
             "(frozen, lambda _v: False),"),
        sequences=("channel_is_lost_controllers_talk-none",),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "stale-takes-over", 12,
        "a node that missed writes boots when the other one is gone, and serves the old state",
        core("cluster/policy",
             "    unknown = not e.met and not holds_right(v) and not v.settings.memory\n",
             "    unknown = False\n"),
        sequences=("stale_node_boots_alone-none",), controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "fell-back-and-named-by-nobody", 7,
        "any record confirms a node whose metadata had to fall back",
        core("cluster/claiming",
             "    return has_right and record.names(node_id, mine_of(state))\n",
             "    return has_right\n"),
        defence=core("claims", "        if Flags.ALONE not in sb.flags or generation != mine:\n",
                     "        if Flags.ALONE not in sb.flags or not mine:\n"),
        arbiters=("memory",), sequences=("record_of_another_confirms_nobody-memory",),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "right-without-a-look", 14,
        "a node that had the right boots and serves, while the record names the other one",
        core("cluster/policy",
             "    given = engine(v).right_alone and (v.record is Standing.MINE or "
             "bool(engine(v).phase))\n",
             "    given = engine(v).right_alone\n"),
        arbiters=("memory",), sequences=("record_was_given_away-memory",),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "no-is-no-answer", 11,
        "a primary that is cut off keeps role and application, while the other one serves",
        core("cluster/policy",
             '        "frozen, no", primary_and(frozen, verdict_is(Verdict.NO)), Step.DEMOTE,',
             '        "frozen, no", primary_and(frozen, verdict_is(Verdict.NO)), Step.NOTHING,'),
        arbiters=("ping",), sequences=("cut_off_primary_steps_back-ping",),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "router-is-believed-at-once", 11,
        "a switch comes back, both hear the router before they hear each other, and both serve",
        core("cluster/asking",
             "        if self._was_gone and not self._is_back_for(silence_ms, now_ms):\n",
             "        if not silence_ms:\n"),
        arbiters=("ping",), sequences=("switch_comes_back-ping",),
        controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "application-outlives-the-role", 22,
        "the application runs on where the engine does not serve any more",
        core("cluster/policy",
             '        "not served", lambda v: not is_primary(v) and runs_something(v), Step.LEAVE,',
             '        "not served", lambda _v: False, Step.LEAVE,'),
        sequences=("cut_off_primary_steps_back-ping",), controllers=PRODUCTION, quick=True,
    ),
    Mutant(
        "yesterdays-session-counts", 11,
        "the peer says that it went on alone, and this node still counts as in sync with it",
        core("cluster/observing",
             "replace(engine, met=False) if moment == self._superseded else engine", "engine"),
        sequences=("alone_is_heard_once-none",), controllers=PRODUCTION, quick=True,
    ),
)  # fmt: skip
