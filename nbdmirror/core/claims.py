"""Claims: how a node prepares to ask the arbiter for the right (rule 11).

Owns the edit that reserves a generation, and what is refused before anything is stored for a claim.
Must never take the right: that is for whoever settles the claim (`claimed` in roles.py). Reading
and swapping the record is for whoever commands.
"""

from dataclasses import replace

from nbdmirror.core.durable import NO_GENERATION, add_base
from nbdmirror.core.negotiate import claim_unsettled
from nbdmirror.core.node import Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.promotable import promotable
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import (
    DataState,
    Flags,
    PendingKind,
    Superblock,
    advance_generation,
)
from nbdmirror.core.view import node_view, state_message
from nbdmirror.errors import RefusedError


def claimed_edit(sb: Superblock, claim: bytes, record: bytes = NO_GENERATION) -> Superblock:
    """Reserve `claim`. What becomes of a pending joint generation J is up to the record.

    Where the record holds J (or there is no record) the peer may have taken it: J was mine already
    and becomes current. Where it does not, part (b) never happened, so nobody has J: it is
    forgotten. Either way `base` names what the peer may be found with.
    """
    if sb.pending_kind is PendingKind.JOINT:
        joint = sb.pending
        base = add_base(sb.base, sb.generation, joint)
        taken = record in (joint, NO_GENERATION)
        sb = replace(advance_generation(sb, joint) if taken else sb, base=base)
    return replace(sb, pending=claim, pending_kind=PendingKind.CLAIM)


def claim_now(node: Node, record: bytes) -> Path:
    """The body of claim."""
    if node.right:
        # Taken already: by the peer's word, by force, or by a claim that was won. What is left is
        # that the record says so, and that needs neither a flush nor the end of a session.
        held = node.sb.pending if any(node.sb.pending) else node.sb.generation
        return {"generation": held, "record_holds": record_may_hold(node)}
    require_claimable(node, record)
    if node.session is not None and node.session.phase is Phase.SYNCED:
        raise RefusedError("claim: the peer is connected and in sync; nothing to claim")
    if node.failed:
        raise RefusedError(f"claim: this node's disk failed: {node.failed}")
    if node.session is not None:
        node.lose_session(node.session, "a claim begins")
    if node.role is not Role.PRIMARY:
        state = state_message(node)
        view = node_view(state, node.sb.mirror_id, node.sb.node_id)
        refusal = promotable(view, False, node.arbiter_has_memory)
        if refusal is not None:
            raise RefusedError(f"claim: {refusal.reason}")
    node.last_session = None
    yield from node.quiesce()
    yield from node.sync()
    holds = record_may_hold(node)
    fresh = node.shell.random_bytes(16)
    if not claim_unsettled(node):

        def reserve(sb: Superblock) -> Superblock:
            require_uptodate(sb, "claim")
            return claimed_edit(sb, fresh, record)

        yield from node.change(reserve)
    return {"generation": node.sb.pending, "record_holds": holds}


def require_claimable(node: Node, record: bytes) -> None:
    """Nothing is stored for a claim that the record already answers with no.

    A record that moved on may have moved on *from* a pending joint generation: forgetting that one
    would make the peer's line look like a split brain.

    Raises:
        RefusedError: the record was not read, or names what this node may not claim from. Whoever
            commands takes it for a lost claim.
    """
    if not node.arbiter_has_memory:
        return
    if record == NO_GENERATION:
        raise RefusedError("claim: say what the record holds: it is read before a claim")
    if record not in (*record_may_hold(node), node.sb.pending):
        raise RefusedError(
            f"claim: lost already: the record names {record.hex()}, from which this node may not "
            "go on; demote it and let it meet its peer"
        )


def require_uptodate(sb: Superblock, what: str) -> None:
    """Rule 14, asked again at the moment of storing: a store under way may have changed it.

    Raises:
        RefusedError: this copy became a target meanwhile.
    """
    if sb.data_state is not DataState.UPTODATE:
        raise RefusedError(f"{what}: this node became {sb.data_state.name.lower()} meanwhile")


def record_may_hold(node: Node) -> list[bytes]:
    """The generations from which this node may claim (rule 11)."""
    holds = [node.sb.generation]
    if node.sb.pending_kind is PendingKind.JOINT:
        holds.append(node.sb.pending)
    if node.sb.flags & Flags.PEER_OUTDATED:
        holds.extend(node.sb.base)
    return holds


def named(node: Node, generation: bytes) -> Path:
    """The arbiter's record names this node under the generation of its right.

    So nobody relies on anything newer: metadata that had to fall back are what counts (rule 7). A
    state of which that would not be true is one in which the record was set anew, or the peer's.

    Raises:
        RefusedError: this node has no right, or under another generation.
        StoreError: it cannot be stored; the doubt stays.
    """

    def edit(sb: Superblock) -> Superblock:
        # At the moment of storing: a joint step may have given the right up meanwhile.
        mine = sb.pending if any(sb.pending) else sb.generation
        if Flags.ALONE not in sb.flags or generation != mine:
            raise RefusedError(f"named: {generation.hex()} is not what this node goes on under")
        return replace(sb, flags=sb.flags & ~Flags.FELL_BACK)

    yield from node.change(edit)
    node.fell_back = False
