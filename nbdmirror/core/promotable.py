"""Whether one node's own metadata lets it become primary without force (rules 5, 7, 12, 14, 19).

Owns the reasons against it and their order. Must never look at anything but the view: the command
line, the controller and the engine ask the same question and have to get the same answer.
"""

from dataclasses import dataclass
from typing import Final

from nbdmirror.core.decide import FORCE_COMMAND, NodeView
from nbdmirror.core.superblock import DataState, Flags, PendingKind


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node may not be promoted without force; `rule` is its number in docs/safety.md."""

    rule: int
    reason: str


_STATE_REFUSALS: Final = {
    DataState.BLANK: "its copy is blank, promoting it loses everything the mirror ever stored",
    DataState.INCONSISTENT: (
        "its copy is in the middle of a resync, old and new blocks are mixed and a file system on"
        " it will be damaged"
    ),
    DataState.OUTDATED: (
        "its copy is known to be behind, promoting it loses what its peer acknowledged since"
        " it left"
    ),
}


def _may_resume(view: NodeView, *, arbiter_has_memory: bool) -> bool:
    """Whether a node without its page cache may resume: nobody else can hold what it acknowledged.

    With a memory the record still has to name this node or let it claim, which is the controller's
    part; an own claim that is pending may be such a record.
    """
    if Flags.PEER_OUTDATED in view.flags or Flags.ALONE in view.flags:
        return True
    return arbiter_has_memory and view.pending_kind is PendingKind.CLAIM


def _obstacle(view: NodeView, *, arbiter_has_memory: bool) -> tuple[int, str] | None:
    """(rule, what is wrong and what is lost) of the first rule that stands in the way."""
    if view.data_state is not DataState.UPTODATE:
        return 14, _STATE_REFUSALS[view.data_state]
    if Flags.FAILED in view.flags:
        return 5, "its disk failed a flush, writes that were acknowledged may be missing from it"
    if view.fell_back:
        return 7, (
            "it had to fall back to older metadata that nobody confirmed, its peer may hold writes"
            " that are lost by promoting it"
        )
    if Flags.SPLIT in view.flags and Flags.ALONE not in view.flags:
        return 19, (
            "it waits after a split brain while its peer goes on alone, promoting it makes both"
            " copies go further apart"
        )
    if not view.cache_survived and not _may_resume(view, arbiter_has_memory=arbiter_has_memory):
        return 12, (
            "it lost its page cache since it was last in sync, the last writes that both nodes"
            " acknowledged may be on its peer only and are lost by promoting it"
        )
    return None


def promotable(
    view: NodeView,
    peer_connected: bool,  # noqa: FBT001 - a plain fact
    arbiter_has_memory: bool,  # noqa: FBT001 - a plain fact
) -> Refusal | None:
    """Why this node may not be promoted without force; None when its metadata allows it.

    None is not yet the right to acknowledge: with an arbiter that has a memory the claim comes
    first.
    """
    obstacle = _obstacle(view, arbiter_has_memory=arbiter_has_memory)
    if obstacle is None:
        return None
    rule, what = obstacle
    remedy = (
        "promote its peer, or wait until the resync with it has ended"
        if peer_connected
        else "bring its peer back"
    )
    return Refusal(
        rule,
        f"Node {view.node_id} is not promoted: {what} (rule {rule}); {remedy}; to do it all the"
        f" same, type `{FORCE_COMMAND}`.",
    )
