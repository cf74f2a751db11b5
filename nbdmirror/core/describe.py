"""One engine's state as plain facts, for the control socket. Reads; changes nothing."""

from typing import Any

from nbdmirror.core.claims import record_may_hold
from nbdmirror.core.lease import is_needed
from nbdmirror.core.negotiate import claim_unsettled
from nbdmirror.core.node import Node, Role
from nbdmirror.core.promotable import promotable
from nbdmirror.core.superblock import Flags
from nbdmirror.core.view import dirty_count, node_view, state_message


def describe(node: Node) -> dict[str, Any]:
    """Facts for the state command; every count is of this moment."""
    sb = node.sb
    return {
        "mirror": sb.mirror_name,
        "node_id": sb.node_id,
        "role": node.role.value,
        "data_state": sb.data_state.name.lower(),
        "generation": sb.generation.hex() if any(sb.generation) else "",
        "base": [g.hex() for g in sb.base],
        "pending": sb.pending.hex() if any(sb.pending) else "",
        "pending_kind": sb.pending_kind.name.lower(),
        "flags": [f.name.lower() for f in Flags if f.name and f & sb.flags],
        "right_alone": node.right,
        "frozen": node.frozen,
        "frozen_reason": node.frozen_reason,
        "question": node.question,
        "held": node.held,
        "reads": reads(node),
        "read_lease_ms": node.lease.length_ms,
        "failed": node.failed,
        "refusal": node.refusal,
        "fell_back": node.fell_back,
        "cache_survived": node.cache_survived,
        "attended": node.attended,
        "stop_first": node.stop_first,
        "changing": node.changing,
        "promote_refusal": promote_refusal(node),
        "last_session": f"{node.last_session.number:016x}" if node.last_session else "",
        "relayed_count": node.relayed_count,
        "dirty_extents": node.dirty.count,
        "dirty_bytes": min(node.dirty.count * sb.extent_bytes, sb.device_bytes),
        "device_bytes": sb.device_bytes,
        "hot_regions": len(node.log.hot),
        "intent_txn": node.log.txn,
        "term": sb.term,
        "claim_unsettled": claim_unsettled(node),
        "record_holds": [g.hex() for g in record_may_hold(node) if any(g)],
        "forced_over": sb.forced_over.hex() if any(sb.forced_over) else "",
        "history": [g.hex() for g in sb.history if any(g)],
        "arbiter_counter": node.arbiter_counter,
        "arbiter_identity": sb.arbiter_identity.hex(),
        "arbiter": sb.arbiter.word,
        "in_flight": len(node.inflight),
        "unflushed_bytes": node.unflushed_bytes,
        "session": node.session.describe() if node.session is not None else None,
        "resync": dict(node.resync),
        "resync_waits": node.keep.hold,
        "split": split_facts(node),
        "kept": kept_facts(node),
    }


def split_facts(node: Node) -> dict[str, Any] | None:
    """What is known of a split brain; None where there is none.

    Durations are of this engine's life. What a side wrote is counted in whole extents, and after a
    crash in whole regions that it was writing.
    """
    sb, split = node.sb, node.split
    if Flags.SPLIT not in sb.flags or split.found_ms is None:
        return None
    parted = split.parted_ms
    return {
        "waits": split.waits,
        "found_s": (split.now_ms - split.found_ms) // 1000,
        "parted_s": (split.now_ms - parted) // 1000 if parted is not None else None,
        "own_bytes": dirty_count(node) * sb.extent_bytes,
        "peer_bytes": split.peer_bytes,
        "keep_limit_bytes": node.keep.limit_bytes,
    }


def kept_facts(node: Node) -> dict[str, Any] | None:
    """What is kept of a copy that was given up; None where nothing is."""
    kept = node.keep.kept
    if kept is None:
        return None
    return {
        "generation": kept.header.generation.hex(),
        "complete": not kept.closed,
        "used_bytes": kept.used_bytes,
        "limit_bytes": node.keep.limit_bytes,
        "problem": kept.damage or kept.problem,
    }


def reads(node: Node) -> str:
    """One word about reads (rule 17).

    none: this node does not serve. stale-possible: a primary that was replaced answers until it
    notices, for the arbiter has no memory. alone: the peer cannot serve. lease, confirm: answered
    by the peer's leave. frozen, waiting: held until the session, or an echo, is there.
    """
    if node.role is not Role.PRIMARY:
        return "none"
    if not is_needed(node):
        return "alone" if node.arbiter_has_memory else "stale-possible"
    if node.frozen:
        return "frozen"
    if node.lease.confirms:
        return "confirm"
    return "lease" if node.shell.now_ms() < node.lease.until_ms else "waiting"


def promote_refusal(node: Node) -> str:
    """Why this node may not be promoted without force, by its metadata alone; "" if it may."""
    view = node_view(state_message(node), node.sb.mirror_id, node.sb.node_id)
    refusal = promotable(view, node.session is not None, node.arbiter_has_memory)
    return refusal.reason if refusal is not None else ""
