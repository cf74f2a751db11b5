"""A small model of two nodes: the production `decide` and `candidate` over two abstract engines.

Owns the worlds that the model can be in and the events that lead from one to the next: every
heartbeat arrives late, never, or in the middle of anything; a role that is told inside the session
arrives late, too. It must never hold a rule of its own about who may serve: that is the policy's,
and what an engine refuses is as in core/roles.py and core/leave.py.

Where it is coarse: a step of a controller (look, decide, act) happens at once, so does the start
and stop of an application, a dialog of leaving, and the comparison of two engines that meet. A
dialog carries the newest heartbeats with it, whatever it ends with. A copy takes one event. Nothing
is ever lost of an engine's metadata, and no disk fails. Writes are not modelled: an engine that
goes on alone counts as one that acknowledged something alone. The arbiter is `none`, the weakest
one: it always says yes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from nbdmirror.core.cluster import policy, standing
from nbdmirror.core.cluster.policy import Decision, Step, candidate, decide
from nbdmirror.core.cluster.view import Engine, OrderKind, Peer, Service, Settings, Verdict, View

MAIL_MAX: Final = 2


@dataclass(frozen=True, slots=True)
class Metal:
    """An engine and its metadata. `peer_primary`: what it was told last of the other one's role.

    `lacks`: the other one may have acknowledged what this copy does not have; no engine knows that.
    """

    alive: bool = True
    primary: bool = False
    data: str = "uptodate"
    right: bool = False
    peer_outdated: bool = False
    was_primary: bool = False
    split: bool = False
    met: bool = False
    asks: bool = False
    lacks: bool = False
    stop_first: bool = False
    peer_primary: bool = False
    role_mail: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Brain:
    """A controller: what it wants, remembers, heard and said last, and what is on its way to it."""

    alive: bool = True
    wanted: bool = True
    up: bool = False
    held: bool = False
    order: OrderKind | None = None
    swap_to: int = 0
    verdict: Verdict = Verdict.UNASKED
    asked: bool = False
    died_serving: bool = False
    listening: bool = True
    facts: tuple[object, ...] = ()
    facts_number: int = 0
    peer: Peer = field(default_factory=Peer)
    said: Peer = field(default_factory=Peer)
    mail: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class World:
    """Both nodes; their ids are 1 and 2, their places 0 and 1. `source`: the place that sends."""

    metal: tuple[Metal, Metal]
    brain: tuple[Brain, Brain]
    settings: tuple[Settings, Settings]
    phase: str = ""
    source: int = 0
    heart: bool = True
    channel: bool = True


def put(pair: tuple[Any, Any], n: int, **fields: Any) -> tuple[Any, Any]:
    """The pair with some fields of one of the two changed."""
    one = replace(pair[n], **fields)
    return (one, pair[1]) if n == 0 else (pair[0], one)


def metal(w: World, n: int, **fields: Any) -> World:
    """The world with something of one engine changed."""
    return replace(w, metal=put(w.metal, n, **fields))


def brain(w: World, n: int, **fields: Any) -> World:
    """The world with something of one controller changed."""
    return replace(w, brain=put(w.brain, n, **fields))


# --- what a controller sees and says ---------------------------------------------------------


def sending(w: World, n: int) -> bool:
    """Whether this engine replicates to the other one."""
    return w.phase != "" and w.source == n


def engine_of(w: World, n: int) -> Engine | None:
    """What `state` answers."""
    m = w.metal[n]
    if not m.alive:
        return None
    refusal = "" if m.data == "uptodate" and (m.right or not m.split) else f"it is {m.data}"
    return Engine(
        instance="", epoch=0, primary=m.primary, data_state=m.data, generation="",
        frozen=m.primary and not m.right and not sending(w, n), asks=m.asks, right_alone=m.right,
        failed="", phase=w.phase, met=m.met, peer_primary=m.peer_primary and w.phase != "",
        peer_attended=w.phase != "" and w.brain[1 - n].alive, peer_outdated=m.peer_outdated,
        promote_refusal=refusal, was_primary=m.was_primary, stop_first=m.stop_first, split=m.split,
        refusal="", changing="",
    )  # fmt: skip


def view_of(w: World, n: int) -> View:
    """What the controller sees, with the other one as it was when its last heartbeat left."""
    b = w.brain[n]
    return View(
        settings=w.settings[n], wanted=b.wanted, engine=engine_of(w, n), peer=b.peer,
        died_serving=b.died_serving, spoken=not b.died_serving,
        service=Service.UP if b.up else Service.DOWN, verdict=b.verdict, asked_peer=b.asked,
        held_back="a checker is down" if b.held else "", order=b.order, swap_to=b.swap_to,
        facts_id=str(b.facts_number), listening=b.listening,
    )  # fmt: skip


def heartbeat(v: View) -> Peer:
    """What the conductor puts into its heartbeats, as the other one will see it."""
    e = v.engine
    connected = e is not None and e.synced and not e.primary
    return Peer(
        heard=True, ever_heard=True, role=standing.role_of(v).value,
        readiness=standing.readiness_of(v).value, wanted=v.wanted, engine=e is not None,
        primary=e is not None and e.primary, promotable=policy.promotable(v),
        was_primary=e is not None and e.was_primary, held_back=bool(v.held_back),
        candidate=candidate(v) if connected else 0, facts_id=v.facts_id,
        facts_seen=v.peer.facts_id, swap_to=v.swap_to, service=v.service,
    )  # fmt: skip


def say(w: World, n: int) -> World:
    """A heartbeat, if there is news; when too many are under way one of them is lost."""
    facts = policy.own_facts(view_of(w, n))
    if facts != w.brain[n].facts:
        w = brain(w, n, facts=facts, facts_number=w.brain[n].facts_number + 1)
    body = heartbeat(view_of(w, n))
    if body == w.brain[n].said:
        return w
    w = brain(w, n, said=body)
    return brain(w, 1 - n, mail=(*w.brain[1 - n].mail, body)[-MAIL_MAX:]) if w.heart else w


# --- what the engines do ---------------------------------------------------------------------


def tell_role(w: World, n: int, *, primary: bool) -> World:
    """A word inside the session; it arrives later."""
    if w.phase == "":
        return w
    return metal(w, 1 - n, role_mail=(*w.metal[1 - n].role_mail, primary)[-MAIL_MAX:])


def lose(w: World) -> World:
    """The session ends: a primary that has no right of its own freezes and asks."""
    if w.phase == "":
        return w
    met = w.phase == "synced"
    w = replace(w, phase="")
    for n in (0, 1):
        m = w.metal[n]
        w = metal(w, n, met=met, asks=m.primary and not m.right, peer_primary=False, role_mail=())
    return w


def promote(w: World, n: int) -> World:
    """core/roles.py, promote: what is refused changes nothing."""
    m, e = w.metal[n], engine_of(w, n)
    if e is None or m.primary or e.peer_primary or e.promote_refusal:
        return w
    if w.phase == "resync" and not sending(w, n):
        return w
    if sending(w, n):
        return tell_role(metal(w, n, primary=True, was_primary=True), n, primary=True)
    planned = w.phase == "synced"
    w = metal(lose(w), n, primary=True, was_primary=True, met=False)
    # With the session just closed it freezes, and asks when that lasts; else it takes the right.
    return metal(w, n, asks=True) if planned else metal(w, n, right=True)


def demote(w: World, n: int) -> World:
    """It keeps the session."""
    if not w.metal[n].primary:
        return w
    return tell_role(metal(w, n, primary=False, asks=False, stop_first=False), n, primary=False)


def left(w: World, n: int) -> World:
    """`n` is durably outdated, and the other one has stored that."""
    w = metal(w, n, data="outdated", met=False)
    stays = w.metal[1 - n]
    return metal(
        w, 1 - n, peer_outdated=True, met=False, right=stays.right or stays.primary, asks=False
    )


def may_part(w: World, leaver: int) -> bool:
    """Rule 16 by way of the controllers: the last session was in sync, and all is as it was."""
    goes, stays = w.metal[leaver], w.metal[1 - leaver]
    unchanged = not (goes.right or goes.peer_outdated or goes.split or goes.primary)
    living = goes.met if goes.alive else True
    able = stays.alive and stays.met and stays.data == "uptodate" and not stays.right
    return w.phase == "" and goes.data == "uptodate" and unchanged and living and able


def stop_engine(w: World, n: int) -> World:
    """In order: a peer that is in sync is asked to stay."""
    w = demote(w, n)
    parts = w.phase == "synced"
    w = lose(w)
    w = left(w, n) if parts else w
    return end_engine(w, n)


def end_engine(w: World, n: int) -> World:
    """The process is gone; what it stored is not."""
    return metal(lose(w), n, alive=False, primary=False, met=False, asks=False, stop_first=False)


def meet(w: World) -> World:
    """Two engines without a session compare (core/decide.py)."""
    a, b = w.metal
    if w.phase or not (w.channel and a.alive and b.alive):
        return w
    if a.right and b.right:
        stays = next((n for n in (0, 1) if w.metal[n].primary), 0)
        w = metal(w, stays, split=True, met=False)
        gone: dict[str, Any] = {"right": False, "peer_outdated": False, "primary": False}
        return metal(w, 1 - stays, split=True, met=False, **gone)
    if a.split or b.split:
        return w  # until an operator chooses
    ahead = [n for n in (0, 1) if w.metal[n].right or w.metal[n].peer_outdated]
    behind = [n for n in (0, 1) if w.metal[n].data != "uptodate"]
    if len(behind) == 2:
        w = metal(metal(w, 0, data="uptodate"), 1, data="uptodate")
    source = ahead[0] if ahead else 1 - behind[0] if len(behind) == 1 else equal_source(w)
    if w.metal[1 - source].primary:
        return metal(metal(w, source, met=False), 1 - source, stop_first=True, met=False)
    w = metal(w, 1 - source, was_primary=False)
    if not ahead and len(behind) != 1:
        return begin(replace(w, phase="synced", source=source))
    w = metal(w, 1 - source, data="inconsistent", right=False, peer_outdated=False)
    return begin(replace(w, phase="resync", source=source))


def equal_source(w: World) -> int:
    """Of two equal copies: the only primary, else the only last one, else the lower id."""
    serving = [n for n in (0, 1) if w.metal[n].primary]
    last = [n for n in (0, 1) if w.metal[n].was_primary]
    return next((each[0] for each in (serving, last) if len(each) == 1), 0)


def begin(w: World) -> World:
    """A new session: nothing of the last one counts, and each tells its role."""
    for n in (0, 1):
        other = w.metal[1 - n].primary
        w = metal(w, n, met=False, asks=False, role_mail=(), peer_primary=other)
    return w


def copied(w: World) -> World:
    """The joint step: both are equal, and neither may go on alone any more."""
    if w.phase != "resync":
        return w
    for n in (0, 1):
        w = metal(w, n, data="uptodate", right=False, peer_outdated=False, split=False, lacks=False)
    return replace(w, phase="synced")


# --- one step of a controller ----------------------------------------------------------------


def settle(w: World, n: int) -> World:
    """As conductor and orders do before they decide."""
    b, v = w.brain[n], view_of(w, n)
    e = v.engine
    if e is not None:
        w = brain(w, n, died_serving=False)
        if e.phase or not (e.frozen or policy.silent(v)):
            w = brain(w, n, asked=False, verdict=Verdict.UNASKED)
        if b.order is not None and b.order in policy.HANDS_OVER and not e.primary:
            w = brain(w, n, order=None)
    primary = e is not None and e.primary
    done = primary if b.swap_to == n + 1 else not primary and policy.peer_serves(v)
    return brain(w, n, swap_to=0) if b.swap_to and done else w


def carry_out(w: World, n: int, step: Step) -> World:
    """One step, at once."""
    acts: dict[Step, Callable[[World, int], World]] = {
        Step.NOTHING: lambda w, _: w,
        Step.SPEAK: speak,
        Step.START_ENGINE: lambda w, n: metal(w, n, alive=True),
        Step.STOP_ENGINE: stop_engine,
        Step.ENTER: partial(brain, up=True),
        Step.LEAVE: partial(brain, up=False),
        Step.PROMOTE: promote_by_order,
        Step.DEMOTE: demote,
        Step.ALONE: alone,
        Step.ASK_PEER: ask_peer,
        Step.ASK_ARBITER: partial(brain, verdict=Verdict.YES),
    }
    return acts[step](w, n)


def promote_by_order(w: World, n: int) -> World:
    """A swap that ends here is over."""
    w = promote(w, n)
    return brain(w, n, swap_to=0) if w.metal[n].primary else w


def alone(w: World, n: int) -> World:
    """core/roles.py, alone."""
    m = w.metal[n]
    if not m.primary or m.right or w.phase == "synced":
        return w
    return metal(lose(w), n, right=True, met=False, asks=False)


def dialog(w: World, n: int) -> bool:
    """Whether question and answer get through."""
    return w.heart and w.brain[n].alive and w.brain[1 - n].alive


def speak(w: World, n: int) -> World:
    """For the own dead engine."""
    w = brain(w, n, died_serving=False)
    return left(w, n) if dialog(w, n) and may_part(w, n) else w


def ask_peer(w: World, n: int) -> World:
    """The other one leaves, if it may."""
    w = brain(w, n, asked=True)
    if not dialog(w, n):
        return w
    w = left(w, 1 - n) if may_part(w, 1 - n) else w
    w = say(w, 1 - n)
    return brain(w, n, peer=w.brain[1 - n].said, mail=())


def decided(w: World, n: int) -> tuple[World, Decision]:
    """Look and say."""
    w = say(settle(w, n), n)
    return w, decide(view_of(w, n))


def step(w: World, n: int) -> World:
    """Look, say, decide, act."""
    if not w.brain[n].alive:
        return w
    w, decision = decided(w, n)
    return carry_out(w, n, decision.step)


def deliver(w: World, n: int) -> World:
    """The oldest heartbeat that is on its way to `n` arrives."""
    b = w.brain[n]
    if not (b.mail and b.alive):
        return w
    return brain(w, n, peer=b.mail[0], mail=b.mail[1:], listening=False)


def deliver_role(w: World, n: int) -> World:
    """The oldest word about the role that is on its way inside the session arrives."""
    m = w.metal[n]
    return metal(w, n, peer_primary=m.role_mail[0], role_mail=m.role_mail[1:]) if m.role_mail else w


# --- what happens to the two -----------------------------------------------------------------


def repeat(w: World, n: int) -> World:
    """Heartbeats say the same until it changes: a lost one comes again."""
    other = w.brain[1 - n]
    if not (w.heart and other.alive) or w.brain[n].mail:
        return w
    return brain(w, n, mail=(other.said,))


def hush(w: World, n: int) -> World:
    """A silence has lasted: only where nothing can come through."""
    b = w.brain[n]
    if (w.heart and w.brain[1 - n].alive) or b.mail:
        return w
    return brain(w, n, peer=replace(b.peer, heard=False), listening=False)


def cut_heart(w: World, _n: int = 0) -> World:
    """Every network of heartbeats is cut; what was under way is lost."""
    return brain(brain(replace(w, heart=False), 0, mail=()), 1, mail=())


def cut_channel(w: World, _n: int = 0) -> World:
    """The channel between the engines is cut."""
    return replace(lose(w), channel=False)


def heal(w: World, _n: int = 0) -> World:
    """Both networks are back."""
    return replace(w, heart=True, channel=True)


def kill_engine(w: World, n: int) -> World:
    """The engine dies; its controller sees that, and what the engine was."""
    m, b = w.metal[n], w.brain[n]
    served = m.primary and w.phase == "synced" and b.wanted and b.alive
    return brain(end_engine(w, n), n, died_serving=served)


def kill_controller(w: World, n: int) -> World:
    """The controller dies: what it remembered is gone; the application goes on."""
    b = w.brain[n]
    return brain(w, n, alive=False, order=None, swap_to=0, peer=Peer(), mail=(), up=b.up)


def boot(w: World, n: int) -> World:
    """A controller begins; one that finds its engine serving adopts the application."""
    b = w.brain[n]
    if b.alive:
        return w
    fresh = Brain(wanted=b.wanted, up=b.up, held=b.held, facts_number=b.facts_number + 1)
    return replace(w, brain=put(w.brain, n, **{k: getattr(fresh, k) for k in Brain.__slots__}))


def crash(w: World, n: int) -> World:
    """The whole host is gone."""
    return brain(kill_controller(end_engine(w, n), n), n, up=False, died_serving=False)


def toggle(w: World, n: int) -> World:
    """A checker of this node fails, or is well again."""
    return brain(w, n, held=not w.brain[n].held)


def swap(w: World, n: int) -> World:
    """An operator types `swap` on the primary."""
    v, p = view_of(w, n), w.brain[n].peer
    able = p.promotable and p.role == "SECOND" and p.readiness == "ready" and p.wanted
    if v.engine is None or not v.engine.primary or not v.engine.synced or not (p.heard and able):
        return w
    return brain(w, n, order=OrderKind.SWAP, swap_to=2 - n)


def expire(w: World, n: int) -> World:
    """A swap that did not happen in time is forgotten."""
    kept = w.brain[n].order
    return brain(w, n, swap_to=0, order=None if kept is OrderKind.SWAP else kept)


def stop(w: World, n: int) -> World:
    """An operator types `stop`."""
    return brain(w, n, wanted=False, order=None, swap_to=0)


def go(w: World, n: int) -> World:
    """An operator types `start`."""
    return brain(w, n, wanted=True)
