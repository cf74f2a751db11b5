"""What a client is told when its request fails: the errno that was promised, and only where it is.

Owns the judgement of errors; what was acknowledged is judged in checks.py. docs/troubleshooting.md
has the promise: ESHUTDOWN where this node is not, or no longer, primary; EIO and ENOSPC only from
the disk under the only copy; EINVAL for a trim that the two nodes did not agree on.
"""

import errno
from typing import TYPE_CHECKING, NamedTuple

from nbdmirror.core.node import Role
from nbdmirror.core.session import Phase
from nbdmirror.errors import (
    NbdMirrorError,
    NotPrimaryError,
    NotSupportedError,
    OutOfSpaceError,
    StoreError,
)

if TYPE_CHECKING:
    from tests.sim.checks import Checker
    from tests.sim.host import Host


class DiskError(NamedTuple):
    """A call on a disk that failed: when, and whether its node held the only copy that counts."""

    step: int
    only_copy: bool


def is_only_copy(host: "Host") -> bool:
    """Whether this node has the right to go on alone, and does."""
    node = host.node
    session = node.sending_session() if node is not None else None
    in_sync = session is not None and session.phase is Phase.SYNCED
    return node is not None and node.right and not in_sync


def failed(checker: "Checker", host: "Host", name: str, error: Exception, began: int) -> None:
    """A request on `host` that came at step `began` ended with this error, at this instant."""
    wrong = what_is_wrong(host, name, error, began)
    if wrong:
        checker.fail(f"5: {host.name}: {name} fails with {type(error).__name__}: {wrong}: {error}")
    if isinstance(error, NbdMirrorError):
        checker.counts[errno.errorcode[error.nbd_errno]] += 1


def what_is_wrong(host: "Host", name: str, error: Exception, began: int) -> str:
    """Why a client should not have been told that, or ""."""
    if isinstance(error, NotPrimaryError):
        return ""
    if isinstance(error, NotSupportedError):
        agreed = host.can_trim and host.peer.can_trim
        return "both offer it" if agreed or name != "trim" else ""
    node = host.node
    assert node is not None
    # The verdict of the peer is waited for: what was so when the disk failed may not be any more.
    alone = is_only_copy(host) or any(e.step >= began and e.only_copy for e in host.errors)
    counts = not node.failed and node.role is Role.PRIMARY
    reasons = (
        (not isinstance(error, StoreError), "no client knows what that means"),
        (not host.errors, "an error of the other disk, which costs redundancy only"),
        (not alone, "another copy may serve"),
        (counts and not isinstance(error, OutOfSpaceError), "this copy failed, and still counts"),
    )
    return next((reason for holds, reason in reasons if holds), "")
