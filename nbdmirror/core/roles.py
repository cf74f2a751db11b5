"""Commands that change what this engine is: promote, demote, claim, go alone, stop, discard.

Each is a path that checks, makes the new state durable, and only then lets anybody see it. A
refusal names the rule and the remedy. One such change at a time. Which node should have which role
is decided elsewhere; what the metadata forbids is refused here (rules 9 to 14).
"""

from dataclasses import replace

from nbdmirror.core.claims import claim_now, claimed_edit
from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.io import flush_pair
from nbdmirror.core.lease import begin_lease, wait_out
from nbdmirror.core.leave import Word, ask_to_leave, leave_by_word, left_by_word, would_stay
from nbdmirror.core.messages import Role as RoleMessage
from nbdmirror.core.node import OWN_CHANGES, STEP_BACK, Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.promotable import promotable
from nbdmirror.core.session import Phase, Session
from nbdmirror.core.superblock import (
    ArbiterKind,
    DataState,
    Flags,
    PendingKind,
    Superblock,
)
from nbdmirror.core.view import node_view, state_message
from nbdmirror.errors import NbdMirrorError, RefusedError, StaleCommandError
from nbdmirror.limits import COMMAND_TIMEOUT_MS, NEGOTIATION_TIMEOUT_MS

DRAIN_TIMEOUT_S = 5.0
NEGOTIATION_POLL_MS = 20


def exclusively(node: Node, name: str, path: Path) -> Path:
    """Run one change of role; a second one meanwhile is refused, not queued.

    Raises:
        RefusedError: another change is under way.
    """
    try:
        node.begin_change(name)
    except RefusedError:
        path.close()
        raise
    try:
        return (yield from path)
    finally:
        node.end_change()


def decided_under(node: Node, epoch: int, path: Path) -> Path:
    """`path`, if the role is still of `epoch` at its first step, under the same hold of the lock.

    A command that meets a change which this engine began by itself waits for it, bounded: whoever
    looked and decided right is not refused for the milliseconds that storing takes.

    Raises:
        StaleCommandError: the role changed after the command was decided.
    """
    try:
        while node.changing in OWN_CHANGES:
            if not (yield from node.change_ended(COMMAND_TIMEOUT_MS / 1000)):
                break
        if node.epoch != epoch:
            raise StaleCommandError(
                f"decided under epoch {epoch}; the role changed to that of epoch {node.epoch}: "
                "look again"
            )
    except NbdMirrorError:
        path.close()
        raise
    return (yield from path)


def wait_for_negotiation(node: Node) -> Path:
    """Let a session that is being set up get somewhere first; bounded."""
    for _ in range(NEGOTIATION_TIMEOUT_MS // NEGOTIATION_POLL_MS):
        session = node.session
        if session is None or session.phase is not Phase.NEGOTIATING:
            return
        yield (node.shell.waiter().wait, NEGOTIATION_POLL_MS / 1000)


def promote(node: Node, *, force: bool = False) -> Path:
    """Become primary: with the peer as secondary, or alone.

    Raises:
        RefusedError: the metadata, a failed disk, or a primary peer forbids it.
    """
    return (yield from exclusively(node, "promote", promote_now(node, force=force)))


def promote_now(node: Node, *, force: bool) -> Path:
    """The body of promote."""
    if node.role is Role.PRIMARY:
        return
    if node.failed:
        raise RefusedError(f"promote: this node's disk failed: {node.failed}")
    if node.stopping:
        raise RefusedError("promote: this node is stopping")
    yield from wait_for_negotiation(node)
    session = node.session
    if session is not None and session.peer_primary and not force:
        raise RefusedError("promote: the peer is primary; demote it first")
    state = state_message(node)
    view = node_view(state, node.sb.mirror_id, node.sb.node_id)
    refusal = promotable(view, session is not None, node.arbiter_has_memory)
    if refusal is not None and not force:
        raise RefusedError(f"promote: {refusal.reason}")
    if session is not None and session.sending and refusal is None:
        yield from become_primary(node, {})
        session.tell(RoleMessage(primary=True, term=node.sb.term))
        begin_lease(node, session)
        yield (session.link.kick,)
        return
    planned = session is not None and session.phase is Phase.SYNCED and refusal is None
    if session is not None:
        # Rule 6: close the session, let what was received end, and only then open the gate.
        if not planned and not force:
            raise RefusedError("promote: a session is being set up or copied; wait for it")
        node.lose_session(session, "promoted")
    yield from node.quiesce()
    node.forget_peer()
    if planned:
        yield from become_primary(node, {})
        node.frozen_reason = "promoted; waiting for the peer to come back as secondary"
        return
    yield from take_over(node, force=force)


def take_over(node: Node, *, force: bool) -> Path:
    """Become primary without the peer, with the right to acknowledge alone."""
    if node.right and not force:
        yield from become_primary(node, {})
        return
    if node.arbiter_has_memory and not force:
        raise RefusedError("promote: the arbiter has not given this node the right; claim it first")
    yield from node.sync()
    claim = node.shell.random_bytes(16)
    changes: dict[str, object] = {}
    if force:
        changes["forced_over"] = node.sb.generation
        changes["data_state"] = DataState.UPTODATE
        # The operator has named this copy the good one: what barred it is settled.
        doubts = Flags.FELL_BACK | Flags.SPLIT | Flags.CACHE_LOST | Flags.FAILED
        yield from node.change(lambda sb: replace(sb, flags=sb.flags & ~doubts))
        node.fell_back = False
        node.keep.hold = ""
    yield from become_primary(node, changes, claim=claim)


def become_primary(node: Node, changes: dict[str, object], claim: bytes = NO_GENERATION) -> Path:
    """Store that this node is primary in a new term, then open the gate.

    Not before the old primary has stopped to answer reads (rule 17): the session is closed, so it
    is lent nothing more. No session begins meanwhile, because this change is under way.

    Raises:
        RefusedError: a session began meanwhile that this node is not the source of.
    """

    def edit(sb: Superblock) -> Superblock:
        if sb.data_state is not DataState.UPTODATE and "data_state" not in changes:
            raise RefusedError(f"promote: this node became {sb.data_state.name.lower()} meanwhile")
        flags = sb.flags | Flags.WAS_PRIMARY
        edited = claimed_edit(sb, claim) if any(claim) else sb
        if any(claim):
            flags |= Flags.ALONE | Flags.TOOK_OVER
        return replace(edited, flags=flags, term=sb.term + 1, **changes)  # type: ignore[arg-type]

    yield from wait_out(node)
    yield from node.change(edit)
    session = node.session
    if session is not None and not session.sending:
        node.lose_session(session, "promoted")
        yield from node.quiesce()
    node.take_role(Role.PRIMARY)


def demote(node: Node) -> Path:
    """Stop serving: close the gate, let what is in flight end, flush, keep the session."""
    return (yield from exclusively(node, "demote", demote_now(node)))


def demote_now(node: Node) -> Path:
    """The body of demote."""
    if node.role is not Role.PRIMARY:
        return
    was_frozen = node.frozen or bool(node.failed)
    node.take_role(Role.NONE)
    node.answer()
    if was_frozen:
        yield from fence_sent(node)
    if not (yield from node.drain(DRAIN_TIMEOUT_S)):
        yield from fence_sent(node)
        yield from node.drain(DRAIN_TIMEOUT_S)
    node.frozen_reason = ""
    session = node.sending_session()
    try:
        yield from flush_pair(node)
    except NbdMirrorError as error:
        node.shell.emit("demote-without-flush", reason=str(error))
    if session is not None:
        session.tell(RoleMessage(primary=False, term=node.sb.term))
        yield (session.link.kick,)


def hand_over(node: Node) -> Path:
    """Step back for good because nobody commands this engine; its peer's controller takes over.

    Only to a peer that is in sync and commanded; looked at again at the moment of doing it.
    """
    return (yield from exclusively(node, STEP_BACK, hand_over_now(node)))


def hand_over_now(node: Node) -> Path:
    """The body of hand_over."""
    session = node.sending_session()
    synced = session is not None and session.phase is Phase.SYNCED
    if session is not None and synced and session.peer_attended and not node.attended:
        node.shell.emit("hand-over", reason="this engine has lost its controller, its peer has one")
        yield from demote_now(node)


def stay_word(node: Node, generation: bytes) -> dict[str, object]:
    """What this node answers to "do you stay?" that the controllers carry."""
    reason, number = would_stay(node, generation)
    return {
        "stay": not reason,
        "reason": reason or "I stay",
        "generation": node.sb.generation.hex(),
        "session": f"{number:016x}",
    }


def leave_for_peer(node: Node, word: Word) -> Path:
    """Leave by a word that the controllers carried.

    Raises:
        RefusedError: see leave_by_word.
    """
    return (yield from exclusively(node, "leave", leave_by_word(node, word)))


def peer_has_left(node: Node, word: Word) -> Path:
    """Go on without a peer that left by a word that the controllers carried.

    Raises:
        RefusedError: see left_by_word.
    """
    return (yield from exclusively(node, "peer left", left_by_word(node, word)))


def fence_sent(node: Node) -> Path:
    """Fence what is in flight, but give no buffer back that a queued frame still shows.

    With a live session its frames leave first; where they do not, the session is closed, which
    drops them.
    """
    session = node.sending_session()
    if session is not None:
        left = yield (session.link.drain,)
        if session.live and (left is False or session.outgoing):
            node.lose_session(session, "stepping back, and the peer does not read")
    node.fence()


def claim(node: Node, record: bytes = NO_GENERATION) -> Path:
    """Prepare a claim at the arbiter: everything acknowledged is durable, G' is stored as pending.

    `record` is the generation that the record holds: it is read before a claim (rule 11).

    Returns the generation to claim and the generations that the record may hold for it (rule 11).

    Raises:
        RefusedError: the peer is connected, or this node may not act alone at all.
    """
    return (yield from exclusively(node, "claim", claim_now(node, record)))


def claimed(node: Node, generation: bytes, *, won: bool) -> Path:
    """The claim is settled: by a clear yes, or by a linearizable read of the record."""
    return (yield from exclusively(node, "claimed", claimed_now(node, generation, won=won)))


def claimed_now(node: Node, generation: bytes, *, won: bool) -> Path:
    """The body of claimed."""
    if won and node.right and generation in (node.sb.pending, node.sb.generation):
        return  # the record says now what was so before
    if node.sb.pending_kind is not PendingKind.CLAIM or node.sb.pending != generation:
        raise RefusedError(f"claimed: {generation.hex()} is not the pending claim of this node")
    if not won:
        yield from node.change(
            lambda sb: replace(
                pending_claim(sb, generation),
                pending=NO_GENERATION,
                pending_kind=PendingKind.NONE,
            )
        )
        if node.role is Role.PRIMARY:
            yield from demote_now(node)
        return
    yield from node.change(
        lambda sb: replace(pending_claim(sb, generation), flags=sb.flags | Flags.ALONE)
    )
    if node.role is Role.PRIMARY and node.sending_session() is None:
        node.go_on_alone()


def pending_claim(sb: Superblock, generation: bytes) -> Superblock:
    """`sb`, of which that claim is pending; asked again at the moment of storing.

    Raises:
        StaleCommandError: a joint step gave the right up meanwhile, and the record is set anew.
    """
    if sb.pending_kind is not PendingKind.CLAIM or sb.pending != generation:
        raise StaleCommandError(f"claimed: {generation.hex()} was given up meanwhile: look again")
    return sb


def alone(node: Node) -> Path:
    """Answer a freeze: go on without the peer. Only where no arbiter with a memory has to agree.

    Raises:
        RefusedError: not primary, the peer is connected, or the arbiter decides.
    """
    return (yield from exclusively(node, "alone", alone_now(node)))


def alone_now(node: Node) -> Path:
    """The body of alone: rule 10 (flush first), then the right and its generation, then the
    replies.
    """
    if node.role is not Role.PRIMARY:
        raise RefusedError(f"alone: this node is {node.role.value}; promote it instead")
    if node.right:
        return
    if node.arbiter_has_memory:
        raise RefusedError("alone: the arbiter decides; use claim and claimed")
    if node.failed:
        raise RefusedError(f"alone: this node's disk failed: {node.failed}; demote it")
    session = node.session
    if session is not None:
        if session.phase is Phase.SYNCED:
            raise RefusedError("alone: the peer is connected and in sync")
        node.lose_session(session, "going on alone")
    yield from node.sync()
    fresh = node.shell.random_bytes(16)
    yield from node.change(
        lambda sb: replace(claimed_edit(sb, fresh), flags=sb.flags | Flags.ALONE)
    )
    begun = node.session
    if begun is not None:
        node.lose_session(begun, "going on alone")
    node.go_on_alone()


def recorded(node: Node, generation: bytes) -> None:
    """Part (b) of the joint step is done: the record holds (J, no owner)."""
    if node.sb.pending_kind is not PendingKind.JOINT or node.sb.pending != generation:
        raise RefusedError(f"recorded: {generation.hex()} is not the pending joint generation")
    node.recorded = generation
    node.answer()


def seen(node: Node, *, reachable: bool) -> Path:
    """The arbiter was asked: whether it answers (rule 9), and the counter that was noted before.

    Raises:
        StoreError: the counter could not be stored.
    """
    node.arbiter_reachable = reachable
    if node.question == "arbiter-unreachable" and reachable:
        node.answer()
    if node.sb.arbiter_counter < node.arbiter_counter:
        yield from node.change(lambda sb: sb, always=True)


def move_arbiter(
    node: Node, kind: ArbiterKind, identity: bytes, counter: int, *, meet: bool
) -> Path:
    """Ask another arbiter from now on (rule 21). Whoever commands has closed the old one's record.

    `meet`: the peer asks the same one already; what depends on it is agreed anew, in a new session.

    Raises:
        RefusedError: this node has a right, or a step that only the old arbiter can settle.
    """
    path = move_arbiter_now(node, kind, identity, counter, meet=meet)
    return (yield from exclusively(node, "move arbiter", path))


def move_arbiter_now(
    node: Node, kind: ArbiterKind, identity: bytes, counter: int, *, meet: bool
) -> Path:
    """The body of move_arbiter."""

    def edit(sb: Superblock) -> Superblock:
        if sb.flags & Flags.ALONE or sb.pending_kind is not PendingKind.NONE:
            raise RefusedError(
                "move arbiter: this node has a right, or a step is pending, under the old one"
            )
        return replace(sb, arbiter=kind, arbiter_identity=identity, arbiter_counter=counter)

    before, node.arbiter_counter = node.arbiter_counter, counter
    try:
        yield from node.change(edit)
    except NbdMirrorError:
        node.arbiter_counter = before
        raise
    node.shell.emit("arbiter", arbiter=kind.word)
    if meet and node.session is not None:
        node.lose_session(node.session, "the arbiter has changed: meeting anew", ask=False)


def accept_peer(node: Node) -> Path:
    """Forget the peer's identity and what was seen from it: the next one with the key is taken.

    Raises:
        RefusedError: another change of role is under way.
    """
    return (yield from exclusively(node, "accept peer", accept_peer_now(node)))


def accept_peer_now(node: Node) -> Path:
    """The body of accept_peer. What was known of the old peer's copy goes before its identity.

    The next one may have none of it: everything is dirty, durably, and a generation that the old
    peer may hold is not this node's own any more. The session ends first, so that no copy made in
    it clears a bit. The log's own memory of the peer's number goes before the superblock's.
    """
    session = node.session
    if session is not None:
        node.lose_session(session, "another peer is to be taken", ask=False)
    node.last_session = None
    node.pending_clear.clear()
    node.dirty.mark_all(suspect=True)
    yield from node.save_pages(node.dirty.unsaved_pages())
    if node.right:
        yield from node.begin_generation()
    node.log.peer_txn = 0
    yield from node.commit_anew()
    yield from node.change(lambda sb: replace(sb, peer_uuid=NO_GENERATION, peer_txn=0))


def drain(node: Node) -> Path:
    """Wait until nothing is in flight and everything is durable on every connected node."""
    if not (yield from node.drain(DRAIN_TIMEOUT_S)):
        raise RefusedError("drain: requests keep coming; stop the clients first")
    yield from flush_pair(node)


def resync_full(node: Node) -> Path:
    """Compare everything with the peer, starting with the next contact.

    Raises:
        RefusedError: this node would not be the source.
    """
    session = node.session
    if node.role is not Role.PRIMARY and not (session is not None and session.sending):
        raise RefusedError("resync: only the primary (or the source) can start it")
    node.dirty.mark_all(suspect=True)
    yield from node.save_pages(node.dirty.unsaved_pages())
    if session is not None:
        node.lose_session(session, "a full comparison was asked for", ask=False)
        # Else the next contact would resume, and compare nothing.
        node.forget_peer_after_loss(session)


def discard(node: Node) -> Path:
    """Declare this node's data worthless: it becomes blank and the peer's copy replaces all of it.

    Raises:
        RefusedError: it is primary. Whether the peer has a good copy is for the operator to know.
    """
    return (yield from exclusively(node, "discard", discard_now(node)))


def discard_now(node: Node) -> Path:
    """The body of discard."""
    if node.role is Role.PRIMARY:
        raise RefusedError("discard: this node is primary; demote it first")
    session: Session | None = node.session
    if session is not None:
        node.lose_session(session, "the local data was discarded")
    yield from node.quiesce()
    yield from node.own_writes_ended()
    # Whoever says so waits no longer for room to keep any of it.
    node.keep.hold = ""
    yield from node.change(
        lambda sb: replace(
            sb,
            data_state=DataState.BLANK,
            generation=NO_GENERATION,
            base=(),
            pending=NO_GENERATION,
            pending_kind=PendingKind.NONE,
            # What a failed sync left behind stays unbelievable (rule 5).
            flags=sb.flags & (Flags.SPARSE | Flags.FAILED),
        )
    )


def stop(node: Node) -> Path:
    """Leave in order: hand over by question if the peer stays, flush, mark the stop as clean."""
    yield from node.wait_to_change("stop")
    try:
        yield from stop_now(node)
    finally:
        node.end_change()


def stop_now(node: Node) -> Path:
    """The body of stop. The process ends afterwards, whatever happens here."""
    yield from demote_now(node)
    session = node.session
    left = False
    if session is not None and session.phase is Phase.SYNCED and not node.failed:
        left = yield from ask_to_leave(node, session)
    node.stopping = True
    if node.session is not None:
        node.lose_session(node.session, "left" if left else "stopped")
    node.fence()
    yield from node.quiesce()
    if not node.failed:
        yield from node.legs_ended(lambda _: True)
    node.forget_peer()
    if node.failed:
        if node.failure_lost:
            # The process ends now, and the next one would believe the page cache.
            yield from node.record_failure()
        return
    yield from node.sync()
    yield from node.save_pages(node.dirty.stale_pages())
    if node.log.hot:
        node.log.drop(list(node.log.hot))
        yield from node.commit(node.log.version)
    yield from node.change(lambda sb: replace(sb, flags=sb.flags | Flags.CLEAN))


def step_back(node: Node) -> Path:
    """Rule 5: the local disk failed under a primary whose peer is up to date: hand over to it."""
    return (yield from exclusively(node, STEP_BACK, step_back_now(node)))


def step_back_now(node: Node) -> Path:
    """The body of step_back. If the metadata cannot be written, the survivor's generation marks
    it.
    """
    if node.role is Role.PRIMARY:
        node.take_role(Role.NONE)
        node.answer()
        yield from fence_sent(node)
        yield from node.drain(DRAIN_TIMEOUT_S)
    session = node.session
    if session is None:
        return
    try:
        yield from ask_to_leave(node, session)
    except NbdMirrorError as error:
        node.shell.emit("leave", stays=False, reason=str(error))
    node.lose_session(session, f"the local disk failed: {node.failed}")
