"""What a node says of itself in its heartbeats, from its view of this moment.

Owns which fact becomes which field. Must never say what the view does not hold.
"""

from nbdmirror.core.cluster import policy, standing
from nbdmirror.core.cluster.body import Body
from nbdmirror.core.cluster.view import View


def said_of(v: View, *, names: bool) -> Body:
    """The facts. `names`: whether it may name a candidate: not while it becomes primary itself."""
    engine = v.engine
    connected = engine is not None and engine.synced and not engine.primary
    return Body(
        role=standing.role_of(v).value,
        readiness=standing.readiness_of(v).value,
        wanted=v.wanted,
        engine=engine is not None,
        primary=policy.is_primary(v),
        promotable=policy.promotable(v),
        was_primary=engine is not None and policy.was_last(v),
        passive=not v.settings.failover,
        held_back=bool(v.held_back),
        candidate=policy.candidate(v) if connected and names else 0,
        facts_id=v.facts_id,
        facts_seen=v.peer.facts_id,
        swap_to=v.swap_to,
        deposed=v.served and not policy.is_primary(v),
        # For as long as it waits for the other one, and no longer: one that does not serve any more
        # has nothing to say about the one that does.
        stop_both=v.stop_both and policy.is_primary(v),
        alone=engine is not None and engine.right_alone,
        service=v.service.value,
        data_state=engine.data_state if engine is not None else "",
    )
