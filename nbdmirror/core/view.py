"""A node as its peer sees it: the STATE message, and the view that the decision is made from.

Both nodes decide from the two messages, not from what only one of them knows, so the two decisions
are made from the same facts.
"""

from nbdmirror.core.decide import NodeView
from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.handshake import Identity
from nbdmirror.core.messages import State
from nbdmirror.core.node import Node, Role, is_write


def state_message(node: Node) -> State:
    """What this node tells at contact, as of now."""
    sb = node.sb
    last = node.last_session
    return State(
        device_bytes=sb.device_bytes,
        extent_bytes=sb.extent_bytes,
        region_bytes=sb.region_bytes,
        generation=sb.generation,
        base=sb.base,
        pending=sb.pending,
        pending_kind=sb.pending_kind,
        history=sb.history,
        data_state=sb.data_state,
        flags=sb.flags,
        primary_now=node.role is Role.PRIMARY,
        cache_survived=node.cache_survived,
        fell_back=node.fell_back,
        own_txn=max(node.log.txn, sb.own_txn),
        peer_txn=max(node.log.peer_txn, sb.peer_txn),
        dirty_count=dirty_count(node),
        arbiter=sb.arbiter,
        arbiter_identity=sb.arbiter_identity,
        arbiter_counter=sb.arbiter_counter,
        ack_timeout_ms=node.settings.ack_timeout_ms,
        read_lease_ms=node.settings.read_lease_ms,
        term=sb.term,
        trim_ok=node.own_trim_ok,
        fast_zero_ok=offers_fast_zero(node),
        resume_session=last.number if last is not None else 0,
        resume_applied=last.applied_seq if last is not None else 0,
        peer_instance=last.peer.instance if last is not None else NO_GENERATION,
        claim_unsettled=False,
        forced_over=sb.forced_over,
    )


def offers_fast_zero(node: Node) -> bool:
    """Not where the old content of a range has to be kept first: its pieces have to be short."""
    return node.own_fast_zero_ok and node.keep.kept is None


def dirty_count(node: Node) -> int:
    """Extents that the peer may lack; at least 1 if anything is in flight or not yet flushed."""
    pending = bool(node.unflushed) or any(is_write(op) for op in node.inflight)
    return max(node.dirty.count, int(pending))


def node_view(state: State, mirror_id: bytes, node_id: int) -> NodeView:
    """The view of one node from its message and its authenticated identity."""
    return NodeView(
        mirror_id=mirror_id,
        node_id=node_id,
        device_bytes=state.device_bytes,
        extent_bytes=state.extent_bytes,
        region_bytes=state.region_bytes,
        generation=state.generation,
        base=frozenset(state.base),
        pending=state.pending,
        pending_kind=state.pending_kind,
        history=state.history,
        data_state=state.data_state,
        flags=state.flags,
        primary_now=state.primary_now,
        cache_survived=state.cache_survived,
        fell_back=state.fell_back,
        own_txn=state.own_txn,
        peer_txn=state.peer_txn,
        dirty=state.dirty_count > 0,
        arbiter=state.arbiter,
        arbiter_identity=state.arbiter_identity,
        arbiter_counter=state.arbiter_counter,
    )


def view_of_state(state: State, peer: Identity) -> NodeView:
    """The view of the peer."""
    return node_view(state, peer.mirror_id, peer.node_id)
