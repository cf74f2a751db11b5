"""Commands about a copy that lost a split brain: give it up, give what it held space, forget it.

Owns what an operator's word does to the loser (rule 19). It must never overwrite anything itself:
afterwards this node is the target of a resync like any other, by map where the maps of the two know
each other, which the decision table finds out at the next contact.
"""

from nbdmirror.core import keeping
from nbdmirror.core.durable import inconsistent
from nbdmirror.core.node import Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.roles import discard_now, exclusively
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.core.view import dirty_count
from nbdmirror.errors import RefusedError


def give_up(node: Node, *, keep: bool) -> Path:
    """Give this copy up for the peer's. `keep`: what it holds can be had until it is discarded.

    Returns whether it is kept. A copy that is no side of a split brain is discarded: all of it is
    copied anew, and nothing kept.

    Raises:
        RefusedError: it is primary, its disk failed, or something of an earlier day is kept.
        StoreError: nothing was given up.
    """
    return (yield from exclusively(node, "give up", give_up_now(node, keep=keep)))


def give_up_now(node: Node, *, keep: bool) -> Path:
    """The body of give_up: everything durable, then the file of what is kept, then the word."""
    if node.role is Role.PRIMARY:
        raise RefusedError("give-up: this node is primary; demote it first")
    sb = node.sb
    if Flags.SPLIT not in sb.flags or sb.data_state not in (DataState.UPTODATE, DataState.OUTDATED):
        yield from discard_now(node)
        return False
    if node.failed:
        raise RefusedError(f"give-up: this node's disk failed: {node.failed}; restart its engine")
    session = node.session
    if session is not None:
        node.lose_session(session, "this copy was given up")
    yield from node.quiesce()
    yield from node.own_writes_ended()
    yield from node.sync()
    keep = keep and node.keep.limit_bytes > 0 and node.keep.file is not None
    if keep:
        assert node.keep.file is not None
        size = sb.extent_bytes
        own_bytes = dirty_count(node) * size
        yield from keeping.begin(node, node.keep.file, own_bytes, node.split.peer_bytes)
    yield from node.change(inconsistent)
    node.refusal = ""
    node.shell.emit("given-up", kept=keep)
    return keep


def discard_kept(node: Node) -> Path:
    """Forget what the copy held that was given up.

    Raises:
        RefusedError: nothing is kept. StoreError: the file cannot be removed.
    """
    return (yield from exclusively(node, "discard what is kept", keeping.discard(node)))


def give_space(node: Node, limit_bytes: int) -> Path:
    """Let so much be kept, until this engine ends; a resync that waits for it goes on.

    Raises:
        StoreError: the file cannot be read.
    """
    return (yield from exclusively(node, "give space", keeping.give_space(node, limit_bytes)))
