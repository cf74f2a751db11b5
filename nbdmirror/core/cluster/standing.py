"""Where a node stands, in the words that users know: role, readiness, exit code, promise.

Owns the mapping from a view to these words, and nothing that decides.
"""

from typing import Final

from nbdmirror.core.cluster.view import Readiness, Role, Service, View

# What `nbdmirror status --quiet` ends with; as users of such clusters know it.
EXIT_CODES: Final = {Role.STOP: 0, Role.WAIT: 1, Role.ALONE: 2, Role.PRIM: 3, Role.SECOND: 4}


def role_of(view: View) -> Role:
    """ALONE is a primary without an up-to-date peer; a target of a resync is SECOND already."""
    engine = view.engine
    if engine is None:
        stopped = not view.wanted and view.service is Service.DOWN
        return Role.STOP if stopped else Role.WAIT
    if engine.primary:
        return Role.PRIM if engine.synced else Role.ALONE
    if engine.phase and engine.peer_primary:
        return Role.SECOND
    return Role.WAIT


def readiness_of(view: View) -> Readiness:
    """Ready: it does what its role says. Transient: it will, by itself. Else not ready.

    What holds a node back makes it not ready: something left over (rule 22), or a checker.
    """
    role, engine = role_of(view), view.engine
    if role is Role.STOP:
        return Readiness.NOT_READY
    if engine is None or role is Role.WAIT:
        moving = view.service in (Service.ENTERING, Service.LEAVING)
        coming = view.wanted and not view.engine_given_up and engine is None
        return Readiness.TRANSIENT if moving or coming else Readiness.NOT_READY
    if view.held_back and view.service is Service.DOWN:
        return Readiness.NOT_READY
    if role is Role.SECOND:
        ready = engine.synced and engine.data_state == "uptodate"
        return Readiness.READY if ready else Readiness.TRANSIENT
    if view.service is Service.FAILED or engine.failed:
        return Readiness.NOT_READY
    up = view.service is Service.UP and view.wanted and not engine.frozen
    return Readiness.READY if up else Readiness.TRANSIENT


def serves(view: View) -> bool:
    """What the health probe says: a ready PRIM or ALONE."""
    primary = role_of(view) in (Role.PRIM, Role.ALONE)
    return primary and readiness_of(view) is Readiness.READY
