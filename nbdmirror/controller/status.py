"""What `status` answers: everything that a controller knows about its mirror, as plain facts.

Owns the names of these facts; they stay. Reads; changes nothing. Must never hold a secret, or fail
because a part of it is not known.
"""

import os
from typing import TYPE_CHECKING, Any

from nbdmirror import __version__
from nbdmirror.controller.heart import boottime_ms
from nbdmirror.core.cluster import policy, standing
from nbdmirror.core.cluster.promise import promises
from nbdmirror.core.cluster.view import OrderKind, Role, Verdict, View

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

STARTED_MS = boottime_ms()


def status_of(c: "Conductor") -> dict[str, Any]:
    """The whole answer; docs/cli.md names the facts."""
    v = c.look_at_everything()
    role, readiness = standing.role_of(v), standing.readiness_of(v)
    now_ms = boottime_ms()
    return {
        "mirror": c.config.mirror,
        "node": c.config.me.name,
        "node_id": c.config.me.id,
        "peer_name": c.config.peer.name,
        "role": role.value,
        "readiness": readiness.value,
        "exit_code": standing.EXIT_CODES[role],
        "reason": c.decision.reason,
        "row": c.decision.row,
        "step": c.decision.step.value,
        "remedy": remedy(v, c.orders.error, (c.engine_state or {}).get("resync_waits") or ""),
        "wanted": v.wanted,
        "serving": c.serving(),
        "since_s": round((now_ms - c.decided_ms) / 1000, 1),
        "explain": explain(c, v),
        "engine": c.engine_state,
        "engine_reason": v.engine_given_up or (c.engine_reason if v.engine is None else ""),
        "peer": peer_facts(c, v),
        "links": links(c),
        "service": c.service.facts(),
        "addresses": [
            {"address": a.address, "interface": a.interface, "held": a.held, "reason": a.reason}
            for a in c.service.addresses.facts()
        ],
        "checkers": checkers(c),
        "switches": {
            "checkers": c.switches.now.checkers,
            "failover": c.switches.now.failover,
            "boot": c.switches.now.boot,
        },
        "actions": actions(c),
        "arbiter": {
            "kind": c.config.arbiter.word,
            "verdict": v.verdict.value,
            "reason": c.questions.reason,
            **c.scribe.facts(),
        },
        "takeover": c.config.takeover,
        "preferred": c.config.preferred,
        "promise": promises(c.engine_state or {}, c.config.arbiter.word, c.scribe.trouble),
        "order": order_of(v),
        "controller": {
            "pid": os.getpid(),
            "uptime_s": round((now_ms - STARTED_MS) / 1000, 1),
            "version": __version__,
        },
    }


def order_of(v: View) -> str | None:
    """What is being carried out; a swap that this node asked the other one for, too."""
    if v.order is not None:
        return v.order.value
    return OrderKind.SWAP.value if v.swap_to == v.settings.node_id else None


def peer_facts(c: "Conductor", v: View) -> dict[str, Any]:
    """The other node, as its newest heartbeat has it."""
    body = c.peer_body
    return {
        "heard": v.peer.heard,
        "role": v.peer.role,
        "readiness": v.peer.readiness,
        "reason": body.reason if body is not None else "",
        "data_state": body.data_state if body is not None else "",
        "silent_ms": c.heart.silent_ms() if c.heart.ever_heard() else None,
        "config_differs": c.config_differs(),
        "config_differences": c.comparison.differences if c.config_differs() else [],
    }


def links(c: "Conductor") -> list[dict[str, Any]]:
    """Every way that heartbeats take."""
    return [
        {
            "name": link.name,
            "local": link.local,
            "remote": link.remote,
            "up": link.up,
            "silent_ms": link.silent_ms,
            "rtt_ms": link.rtt_ms,
            "reason": link.reason,
        }
        for link in c.heart.links()
    ]


def checkers(c: "Conductor") -> list[dict[str, Any]]:
    """What is watched."""
    now_ms = boottime_ms()
    return [
        {
            "name": each.name,
            "kind": each.kind,
            "state": each.state,
            "reason": each.reason,
            "action": each.action,
            "when": each.when,
            "since_s": round(max(0.0, now_ms - each.since_ms) / 1000, 1),
        }
        for each in c.checkers.facts()
    ]


def actions(c: "Conductor") -> dict[str, Any]:
    """What was done by itself within the window."""
    limits = c.config.controller
    done = c.switches.actions_within(limits.actions_window_h)
    return {
        "count": len(done),
        "max": limits.actions_max,
        "window_h": limits.actions_window_h,
        "last": done[-1] if done else "",
    }


def explain(c: "Conductor", v: View) -> list[str]:
    """Why this role, why not ready, what stands in the way: one sentence each."""
    engine = v.engine
    held = engine is not None and not engine.primary
    under_way = f"{v.order.value!r}: {v.order_from}" if v.order is not None else ""
    pairs = (
        (f"Row {c.decision.row!r} of the policy decided", c.decision.reason),
        ("The last order was refused", c.orders.error),
        ("The last step was not done", c.trouble),
        ("Under way is the order", under_way),
        ("There is no engine", (c.engine_reason or "none was started") if engine is None else ""),
        ("It may not become primary", engine.promote_refusal if engine and held else ""),
        ("The split brain", split_brain(c, v)),
        ("The resync waits", (c.engine_state or {}).get("resync_waits") or ""),
        ("The two engines refused each other", engine.refusal if engine else ""),
        ("This node's disk failed", engine.failed if engine else ""),
        ("It is held back", v.held_back),
        ("The application", c.service.reason),
        ("The other node", "" if v.peer.heard else "it is not heard on any network"),
        ("The configurations differ", differences(c)),
    )
    return [f"{what}: {why}" for what, why in pairs if why]


def split_brain(c: "Conductor", v: View) -> str:
    """Since when, and how much each side wrote that the other one lacks; "" where there is none."""
    facts = (c.engine_state or {}).get("split")
    if not isinstance(facts, dict):
        return ""
    peer, parted = v.settings.peer_name, facts.get("parted_s")
    since = "" if parted is None else f", and they were in sync {parted} s ago"
    return (
        f"it was found {facts.get('found_s')} s ago{since}; this node wrote up to "
        f"{facts.get('own_bytes')} bytes that {peer} lacks, {peer} up to {facts.get('peer_bytes')} "
        "bytes that this node lacks"
    )


def differences(c: "Conductor") -> str:
    """What the two configurations do not have in common, "" while they are equal."""
    if not c.config_differs():
        return ""
    return "; ".join(c.comparison.differences) or "what differs is being found out"


def record_is_in_the_way(v: View) -> bool:
    """Whether an order without force would wait: the record names the peer, or cannot be read."""
    unclear = v.verdict in (Verdict.NO, Verdict.UNKNOWN)
    return v.settings.memory and (unclear or policy.must_be_read(v))


def remedy(v: View, error: str, waits: str = "") -> str:
    """What an operator could type, "" where nothing has to be done."""
    role = standing.role_of(v)
    engine = v.engine
    if waits:
        return (
            "`nbdmirror kept limit SIZE` here gives more space (lasting: `keep_bytes` in [engine]),"
            " `nbdmirror kept discard` keeps nothing of what this copy held"
        )
    if role is Role.STOP:
        return "`nbdmirror start`"
    if engine is None and v.engine_given_up:
        return "look at the log of the engine, then `nbdmirror start`"
    if engine is not None and engine.split and not engine.primary:
        return (
            "`nbdmirror second --force` here: this copy is given up, what it holds is kept; or, to "
            "give the other one up: `nbdmirror stop` there, `nbdmirror prim --force` here, then "
            "there `nbdmirror start` and `nbdmirror second --force`"
        )
    gone = not v.peer.heard or not v.peer.wanted
    if role is Role.WAIT and engine is not None and gone and not v.held_back:
        forced = " --force" if engine.promote_refusal or record_is_in_the_way(v) else ""
        return (
            "start the other node; if it is gone for good, `nbdmirror prim"
            f"{forced}` makes this one serve, and says what may be lost"
        )
    return "see the reason above" if error else ""
