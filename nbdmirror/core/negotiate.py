"""What two nodes do when they meet: compare, decide, and start the session that follows.

One path per connection runs here from the end of the handshake to the moment the session is in
sync (or ends). Both sides send their STATE, decide by the same table, and send each other the
verdict: if the two are not mirror images of each other nothing happens. No data moves before that,
and the target is durably inconsistent before the first block is copied to it (rule 13).
"""

from collections.abc import Callable
from dataclasses import replace

from nbdmirror.core.decide import Decision, DecisionKind, NodeView, decide
from nbdmirror.core.durable import add_base, inconsistent
from nbdmirror.core.joint import joint_step, require_live
from nbdmirror.core.lease import begin_lease
from nbdmirror.core.messages import (
    Bye,
    MapEnd,
    MapPage,
    SourceBegin,
    State,
    TargetReady,
    UnionStored,
    Verdict,
)
from nbdmirror.core.node import Node, Role
from nbdmirror.core.ports import Path
from nbdmirror.core.resuming import hear_answers, may_resume, receive, resume, unsettled
from nbdmirror.core.resync import resync
from nbdmirror.core.session import Phase, Session
from nbdmirror.core.superblock import Flags, PendingKind, Superblock
from nbdmirror.core.view import (
    dirty_count,
    node_view,
    offers_fast_zero,
    state_message,
    view_of_state,
)
from nbdmirror.errors import (
    NbdMirrorError,
    PeerProtocolError,
    PeerRefusedError,
    RefusedError,
    SessionLostError,
    StoreError,
)
from nbdmirror.limits import READ_LEASE_MS_MAX, READ_LEASE_MS_MIN

COPIES = frozenset({DecisionKind.COPY_BY_MAP, DecisionKind.COPY_FULL})
RESUME_CODE = 255
# What the peer has to come to its own verdict, in a session that is to be ended.
VERDICT_S = 0.2
GOES_ON = COPIES | {DecisionKind.JOINT, DecisionKind.IN_SYNC}


def negotiate(node: Node, session: Session) -> Path:
    """Run one session from contact until it is in sync. Spawned once per connection."""
    try:
        yield from meet(node, session)
    except SessionLostError:
        pass
    except (PeerRefusedError, RefusedError) as error:
        node.refusal = str(error)
        node.shell.emit("refused", reason=str(error))
        session.tell(Bye(reason=str(error)))
        yield (session.link.kick,)
        node.lose_session(session, str(error))
    except PeerProtocolError as error:
        node.shell.emit("protocol-error", reason=str(error))
        session.tell(Bye(reason=str(error)))
        yield (session.link.kick,)
        node.lose_session(session, str(error))
    except StoreError as error:
        node.note_failure(str(error))
        node.lose_session(session, str(error))
    except NbdMirrorError as error:
        node.lose_session(session, str(error))


def meet(node: Node, session: Session) -> Path:
    """Exchange states and verdicts, then go one of the three ways."""
    require_fresh(node, session)
    yield from node.quiesce()
    yield from node.own_writes_ended()
    require_live(session)
    mine = state_message(node)
    session.tell(mine)
    yield (session.link.kick,)
    theirs = yield from session.expect(State)
    session.peer_primary = theirs.primary_now
    if not theirs.primary_now:
        node.lease.returned()
    require_known_peer(node, session)
    require_same_arbiter(mine, theirs)
    yield from agree_lease(node, session, mine, theirs)
    resumable = may_resume(mine, theirs, session)
    me = node_view(mine, node.sb.mirror_id, node.sb.node_id)
    peer = view_of_state(theirs, session.peer)
    decision = decide(me, peer)
    if resumable:
        code, text = RESUME_CODE, "resume: the same engines, nothing decided in between"
    else:
        code, text = verdict_code(decision, me, peer), decision.reason
    # The source begins as soon as it has this verdict, which may be before this path goes on.
    last = node.last_session
    session.may_receive = (
        last is not None and not last.sending
        if resumable
        else decision.kind in GOES_ON and decision.source_is_mine is False
    )
    session.tell(Verdict(decision=code, text=text))
    yield (session.link.kick,)
    answer = yield from session.expect(Verdict)
    if answer.decision != code:
        node.last_session = None
        raise PeerRefusedError(
            f"the two nodes decide differently: here {text!r}, there {answer.text!r}"
        )
    require_unchanged(node, mine)
    if resumable:
        yield from resume(node, session, mine, theirs)
        return
    yield from begin(node, session, decision, theirs)


def require_known_peer(node: Node, session: Session) -> None:
    """Rule 20: the peer is who this mirror was joined with; a replaced one is for the operator.

    Raises:
        PeerRefusedError: another identity.
    """
    known = node.sb.peer_uuid
    if any(known) and known != session.peer.node_uuid:
        raise PeerRefusedError(
            f"the peer has the identity {session.peer.node_uuid.hex()}, this mirror knows "
            f"{known.hex()}: if that node's metadata was made anew, accept it on node "
            f"{node.sb.node_id} with `nbdmirror engine accept-peer`"
        )


def require_same_arbiter(mine: State, theirs: State) -> None:
    """Rules 20 and 21: two nodes that ask different arbiters could both be told yes.

    Raises:
        PeerRefusedError: kind or store differ.
    """
    if (mine.arbiter, mine.arbiter_identity) != (theirs.arbiter, theirs.arbiter_identity):
        raise PeerRefusedError(
            f"the arbiter differs: {mine.arbiter.word} here, "
            f"{theirs.arbiter.word} there (or another store of that kind); "
            "make the two configurations equal"
        )


def agree_lease(node: Node, session: Session, mine: State, theirs: State) -> Path:
    """The longer read lease counts on both, and is stored before the peer relies on it (rule 17).

    The source begins when it has this node's verdict. An engine that starts after this one waits
    that long before it serves, whatever its configuration says then.

    Raises:
        PeerRefusedError: the peer's is out of bounds; 0 is a program that knows no lease.
    """
    if not node.arbiter_has_memory:
        return
    theirs_ms = theirs.read_lease_ms
    if not READ_LEASE_MS_MIN <= theirs_ms <= READ_LEASE_MS_MAX:
        raise PeerRefusedError(
            f"the peer's read lease is {theirs_ms} ms, allowed {READ_LEASE_MS_MIN} to "
            f"{READ_LEASE_MS_MAX}: make the two configurations, and the two programs, equal"
        )
    length_ms = max(mine.read_lease_ms, theirs_ms)
    node.lease.length_ms = max(node.lease.length_ms, length_ms)
    yield from node.change(while_live(session, lambda sb: replace(sb, read_lease_ms=length_ms)))
    require_live(session)
    node.lease.length_ms = length_ms


def verdict_code(decision: Decision, me: NodeView, peer: NodeView) -> int:
    """Kind and source in one byte, the same on both sides if and only if both decide the same."""
    source = 0
    if decision.source_is_mine is not None:
        source = 1 if decision.source_is_mine == (me.node_id < peer.node_id) else 2
    return list(DecisionKind).index(decision.kind) * 3 + source


def require_fresh(node: Node, session: Session) -> None:
    """One session per peer; none while a claim is unsettled or the node is going away.

    Raises:
        PeerRefusedError: with the reason, which both sides show.
        SessionLostError: the connection broke before this path began; it must not be taken, because
            nobody would ever lose it again.
    """
    require_live(session)
    if node.session is not None and node.session is not session:
        raise PeerRefusedError("there is a session with this peer already")
    if node.stopping:
        raise PeerRefusedError("this node is stopping")
    if node.changing:
        raise PeerRefusedError(f"a change of role ({node.changing}) is under way; try again")
    if node.failed:
        raise PeerRefusedError(f"this node's disk failed: {node.failed}; repair it and restart")
    if node.keep.hold:
        raise PeerRefusedError(node.keep.hold)
    if claim_unsettled(node):
        raise PeerRefusedError("a claim at the arbiter is not settled yet; try again")
    node.session = session


def claim_unsettled(node: Node) -> bool:
    """Whether a claim was stored and may have been sent, but is neither won nor lost (rule 11)."""
    return (
        node.sb.pending_kind is PendingKind.CLAIM
        and node.arbiter_has_memory
        and not node.sb.flags & Flags.ALONE
    )


def require_unchanged(node: Node, told: State) -> None:
    """What was told must still be true when it is acted upon.

    Raises:
        PeerRefusedError: role, generation or right changed meanwhile; the next contact decides
        anew.
    """
    now = state_message(node)
    if (
        now.generation,
        now.flags,
        now.pending,
        now.data_state,
        now.primary_now,
        now.resume_session,
    ) != (
        told.generation,
        told.flags,
        told.pending,
        told.data_state,
        told.primary_now,
        told.resume_session,
    ):
        raise PeerRefusedError("this node changed while the two were comparing; try again")


def begin(node: Node, session: Session, decision: Decision, theirs: State) -> Path:
    """Act on a decision that is not a resumption."""
    node.stop_first = decision.stop_first and node.role is Role.PRIMARY
    if decision.kind not in GOES_ON or decision.stop_first:
        if decision.kind is DecisionKind.SPLIT_BRAIN:
            yield from split_brain(node, session, theirs, waits=decision.stop_first)
        if peer_has_to_stop(decision):
            # A session that ends takes this node's verdict with it, and without it the other one
            # would never learn that it has to stop.
            yield (node.shell.waiter().wait, VERDICT_S)
            if not session.live:
                # What this node shows by now may be of a later contact, or of an operator's word.
                node.shell.emit("refused", reason=decision.reason)
                require_live(session)
        raise PeerRefusedError(decision.reason)
    settle_settings(node, theirs)
    node.shell.emit("decided", verdict=decision.kind.name, row=decision.row, reason=decision.reason)
    node.forget_peer()
    if decision.source_is_mine:
        yield from source(node, session, decision, theirs)
    else:
        yield from target(node, session, decision)


def peer_has_to_stop(decision: Decision) -> bool:
    """Whether the other node, if it is primary, stops serving by its own verdict of this moment."""
    over_it = decision.kind is DecisionKind.REFUSE and decision.source_is_mine is True
    return (over_it or decision.kind is DecisionKind.SPLIT_BRAIN) and not decision.stop_first


def split_brain(node: Node, session: Session, theirs: State, *, waits: bool) -> Path:
    """Record the verdict; the side that waits gives up its right, and stops serving if it does.

    Both copies are kept. The other side goes on alone; which of the two is given up is the
    operator's choice (rule 19). A force on the side that waits ends the session first, and counts;
    the side that goes on notes the verdict also where the other one has left already.
    """
    gone = Flags.ALONE | Flags.PEER_OUTDATED if waits else Flags(0)

    def edit(sb: Superblock) -> Superblock:
        if waits:
            require_live(session)
        return replace(sb, flags=(sb.flags | Flags.SPLIT) & ~gone)

    yield from node.change(edit)
    if waits:
        require_live(session)
    own_bytes, peer_bytes = (each * node.sb.extent_bytes for each in (
        dirty_count(node), theirs.dirty_count))  # fmt: skip
    split = node.split
    split.waits, split.peer_bytes = waits, peer_bytes
    if split.found_ms is None:
        split.found_ms = split.now_ms
    reason = "this node waits" if waits else "this node goes on alone"
    node.shell.emit(
        "split-brain", waits=waits, own_bytes=own_bytes, peer_bytes=peer_bytes, reason=reason
    )
    if waits and node.role is Role.PRIMARY:
        node.take_role(Role.NONE)
        node.answer()
        node.fence()


def settle_settings(node: Node, theirs: State) -> None:
    """What both can do is offered (trim that reads as zeros); of time-outs the larger counts.

    Of the arbiter's record both remember the highest counter that one of them saw (rule 21).
    """
    node.ack_timeout_ms = max(node.settings.ack_timeout_ms, theirs.ack_timeout_ms)
    node.arbiter_counter = max(node.arbiter_counter, theirs.arbiter_counter)
    node.trim_ok = bool(theirs.trim_ok) and node.own_trim_ok
    node.fast_zero_ok = bool(theirs.fast_zero_ok) and offers_fast_zero(node)


def source(node: Node, session: Session, decision: Decision, theirs: State) -> Path:
    """The side whose data counts: union, copy, joint step.

    From the first bit that is cleared the map is about this peer and no other, so it is known
    before (rule 20), and not only when the joint step is done.
    """
    yield from node.change(while_live(session, knows(session.peer.node_uuid)))
    require_live(session)
    copying = decision.kind in COPIES
    if copying:
        full = decision.kind is DecisionKind.COPY_FULL
        rewrite = node.peer_failed or Flags.FAILED in theirs.flags
        yield from collect_union(node, session, full=full, rewrite=rewrite)
    elif node.dirty.any():
        # Written since the states were told: the target has to be inconsistent first after all.
        copying = True
        yield from offer_union(node, session)
    require_live(session)
    start_sending(node, session, copying=copying)
    yield (session.link.kick,)
    if decision.kind is DecisionKind.IN_SYNC and not copying:
        yield from node.change(refreshed(node, keep_primary=True))
        require_live(session)
        node.in_sync(session)
        return
    yield from resync(node, session)
    # The peer may be found with what it has now, or with what a broken-off step left it.
    yield from node.change(
        lambda sb: replace(sb, base=add_base(sb.base, theirs.generation, theirs.pending))
    )
    yield from joint_step(node, session)


def collect_union(node: Node, session: Session, *, full: bool, rewrite: bool) -> Path:
    """Store the union of both maps durably, after this node has flushed (rule 13).

    `rewrite`: the target's page cache shows what its disk lost, so nothing is compared (rule 5).
    """
    yield from node.sync()
    end = yield from session.expect(MapEnd)
    if full or end.full:
        node.dirty.mark_all(suspect=not rewrite)
    if rewrite:
        node.dirty.suspect.setall(0)
    yield from offer_union(node, session)


def offer_union(node: Node, session: Session) -> Path:
    """Flush, make the map durable, and wait until the target is durably inconsistent."""
    yield from node.sync()
    yield from node.save_pages(node.dirty.unsaved_pages())
    require_live(session)
    session.tell(UnionStored(first_seq=0))
    yield (session.link.kick,)
    yield from session.expect(TargetReady)


def start_sending(node: Node, session: Session, *, copying: bool) -> None:
    """From here on every operation goes to both; frozen ones are sent again, in their order."""
    session.phase = Phase.RESYNC if copying else Phase.JOINT
    pending = unsettled(node)
    session.tell(SourceBegin(first_seq=node.seq + 1, resume=False))
    hear_answers(session)
    session.sending = True
    begin_lease(node, session)
    session.acked_seq = node.seq
    node.new_numbers(node.seq)
    for operation in pending:
        node.seq = operation.seq = node.seq + 1
        if operation.end > operation.offset:
            node.touch(operation.offset, operation.end, operation.seq)
            node.remember_unflushed(operation.seq, operation.offset, operation.end)
        session.submit(operation)
    node.frozen_reason = ""
    node.answer()


def target(node: Node, session: Session, decision: Decision) -> Path:
    """The side that receives: give away its map, be inconsistent, apply."""
    if decision.kind in COPIES:
        yield from send_map(node, session, full=decision.kind is DecisionKind.COPY_FULL)
    first = yield from session.expect_any((UnionStored, SourceBegin))
    if isinstance(first, UnionStored):
        yield from node.change(while_live(session, inconsistent))
        require_live(session)
        session.tell(TargetReady())
        yield (session.link.kick,)
        first = yield from session.expect(SourceBegin)
        session.phase = Phase.RESYNC
    else:
        session.phase = Phase.JOINT
    session.applied_seq = session.acked_seq = first.first_seq - 1
    session.flush_done_seq = first.first_seq - 1
    node.new_numbers(0)
    if decision.kind is DecisionKind.IN_SYNC and session.phase is Phase.JOINT:
        yield from node.change(refreshed(node, keep_primary=False))
        require_live(session)
        node.in_sync(session)
    receive(node, session)


def send_map(node: Node, session: Session, *, full: bool) -> Path:
    """Give the source every page of the map that has a bit."""
    count = 0
    for index in range(0 if full else node.geometry.page_count):
        if node.dirty.page_any(index):
            session.tell(MapPage(index=index, payload=node.dirty.page_bits(index)))
            count += 1
            if count % 64 == 0:
                yield (session.link.kick,)
                yield from session.drained()
    session.tell(MapEnd(pages=count, full=full))
    yield (session.link.kick,)


def while_live(
    session: Session, edit: Callable[[Superblock], Superblock]
) -> Callable[[Superblock], Superblock]:
    """`edit`, unless the session ended while it waited for its turn."""

    def checked(sb: Superblock) -> Superblock:
        require_live(session)
        return edit(sb)

    return checked


def knows(peer_uuid: bytes) -> Callable[[Superblock], Superblock]:
    """The edit that makes a machine the peer of this mirror: another one is refused after it."""
    return lambda sb: replace(sb, peer_uuid=peer_uuid)


def refreshed(node: Node, *, keep_primary: bool) -> Callable[[Superblock], Superblock]:
    """The edit of two copies found equal: this boot's page cache holds both."""

    def edit(sb: Superblock) -> Superblock:
        gone = Flags.CACHE_LOST | Flags.ZEROED
        if not keep_primary:
            gone |= Flags.WAS_PRIMARY
        return replace(sb, flags=sb.flags & ~gone, boot_id=node.boot_id, mount_id=node.mount_id)

    return edit
