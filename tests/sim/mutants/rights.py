"""Mutants of the rules about the right to acknowledge and about leaving: 9 to 12, 14, 16, 19, 20,
and of the decision at contact. Every rule of the model (tests/model) that can be taken away is
here.
"""

from typing import Final

from tests.sim.mutants.mutant import Mutant, core

RIGHTS: Final = (
    # --- 20: who the peer is ---------------------------------------------------------------------
    Mutant(
        "peer-known-when-joined", 20,
        "a map that was cleared for one machine is believed of another one that comes instead",
        core("negotiate",
             "    yield from node.change(while_live(session, knows(session.peer.node_uuid)))\n",
             ""),
        sequences=("old_peer_after_its_replacement",), quick=True,
    ),
    Mutant(
        "accepted-by-the-old-map", 20,
        "a peer that an operator accepted is compared with the map of the one before it",
        core("roles",
             "    node.dirty.mark_all(suspect=True)\n"
             "    yield from node.save_pages(node.dirty.unsaved_pages())\n    if node.right:\n",
             "    if node.right:\n"),
        sequences=("old_peer_after_its_replacement",),
    ),
    Mutant(
        "accepted-in-a-session", 20,
        "copies made to the peer of the session clear bits that were set for the accepted one",
        core("roles",
             "        node.lose_session(session, \"another peer is to be taken\", ask=False)\n",
             "        pass\n"),
        sequences=("another_peer_in_a_session",),
    ),
    Mutant(
        "accepted-on-the-old-line", 20,
        "the old peer returns, holds the same generation and a page cache, and leads",
        core("roles",
             "    if node.right:\n        yield from node.begin_generation()\n", ""),
        sequences=("old_peer_with_its_page_cache",),
    ),
    Mutant(
        "resync-without-number", 13,
        "a target set back to a snapshot is taken for one that has every block whose bit is clear",
        core("replica",
             "            if node.sb.data_state is DataState.INCONSISTENT:\n"
             "                yield from node.commit_anew()\n", ""),
        sequences=("set_back_to_before_the_resync",),
    ),
    Mutant(
        "resync-number-unheard", 13,
        "the same, where the source has not heard of the number when it clears the bit",
        core("replica",
             "                session.queue(FrameType.ECHO_REQUEST, 0, 0, 0, node.log.txn,"
             " EMPTY)\n",
             ""),
        sequences=("set_back_in_the_resync",),
    ),
    Mutant(
        "new-but-written", 13,
        "a peer made anew is not copied to, though a session has written before it was joined",
        core("decide", "        and not (pair.mine.own_txn or pair.theirs.own_txn)\n", ""),
        sequences=("written_in_the_first_session",), quick=True,
    ),
    Mutant(
        "word-lost-to-a-slow-disk", 16,
        "a peer left in order, one local write took its time, and nobody goes on by himself",
        core("leave", "        yield (node.shell.waiter().wait, STAY_AGAIN_S)\n",
             "        return\n"),
        sequences=("peer_left_behind_a_late_write",),
    ),
    # --- 9: the joint step -----------------------------------------------------------------------
    Mutant(
        "joint-keeps-right", 9,
        "(a) skipped: the source may still acknowledge alone after the target has taken J",
        core("joint", "            flags=sb.flags & ~(Flags.ALONE | Flags.PEER_OUTDATED),\n",
             "            flags=sb.flags,\n"),
        quick=True,
    ),
    Mutant(
        "joint-over-a-difference", 9,
        "a write that found no space after the resync: in sync, and the copies differ",
        core("joint", "    require_equal(node, session)\n", ""),
        sequences=("full_before_the_joint_step",), quick=True,
    ),
    Mutant(
        "joint-right-in-memory", 9,
        "a session lost while (a) is stored goes on alone under a right that is being given up",
        core("joint", "    node.giving_up = True\n", "    node.giving_up = False\n"),
        sequences=("cut_in_joint_step",),
    ),
    Mutant(
        "joint-without-record", 9,
        "(b) skipped: the record still names the source, which may claim again",
        core("joint", "    yield from record(node, session, generation)\n", ""),
        arbiters=("memory",), quick=True,
    ),
    Mutant(
        "joint-source-first", 9,
        "(c) and (d) swapped: the source takes J before the target",
        core("joint", "    session.tell(JointTake(generation=generation, last_seq=node.seq))\n",
             "    yield from node.change(joined(node, session, generation, keep_primary=True))\n"
             "    session.tell(JointTake(generation=generation, last_seq=node.seq))\n"),
        quick=True,
    ),
    Mutant(
        "joint-target-not-flushed", 9,
        "the target takes J while what it received is in its page cache",
        core("replica",
             "        yield (node.store.fdatasync,)\n        yield from take_joint",
             "        yield from take_joint"),
    ),
    Mutant(
        "joint-not-mine", 9,
        "(pendrow) a joint generation that is pending does not count as mine at contact",
        core("decide",
             "        self.my_held = _real((mine.generation, mine.pending))\n"
             "        self.their_held = _real((theirs.generation, theirs.pending))\n",
             "        self.my_held = _real((mine.generation,))\n"
             "        self.their_held = _real((theirs.generation,))\n"),
        sequences=("joint_taken_is_lost",), quick=True,
    ),
    Mutant(
        "joint-base-forgotten", 9,
        "the source does not remember what the target may be found with after a broken joint step",
        core("negotiate",
             "        lambda sb: replace(sb, base=add_base(sb.base, theirs.generation,"
             " theirs.pending))\n",
             "        lambda sb: sb\n"),
        sequences=("joint_step_broken_off_often",), quick=True,
    ),
    Mutant(
        "joint-pending-replaced", 9,
        "(joint) the next step forgets the joint generation that the target may have taken",
        core("joint",
             "    generation = node.sb.pending if again else node.shell.random_bytes(16)\n",
             "    generation = node.shell.random_bytes(16)\n"),
        sequences=("joint_step_broken_off_again",), quick=True,
    ),
    Mutant(
        "record-only-from-mine", 9,
        "(reseed) the record is set only from what the source knows: the pair never gets in sync",
        core("cluster/claiming",
             "            record = self._after(record, state, joint, NOBODY)\n",
             "            if record is None or record.generation.hex() != state['generation']:\n"
             "                return Outcome(False, 'of another line')\n"
             "            record = self._after(record, state, joint, NOBODY)\n"),
        arbiters=("memory",),
    ),
    Mutant(
        "joint-over-a-claim", 9,
        "(b) the record is set though the session that asked for it may have ended long ago",
        core("cluster/claiming",
             '            yield Command("confirm-joint", {"generation": joint.hex()})\n',
             ""),
        arbiters=("memory",), sequences=("late_look_at_the_record",), quick=True,
    ),
    Mutant(
        "joint-without-an-echo", 9,
        "(b) this node takes its own word for it that the peer is in the session",
        core("joint",
             "    while session.live and lease.answered_number < number:\n",
             "    while False:\n"),
        arbiters=("memory",), sequences=("late_look_at_the_record",), quick=True,
    ),
    Mutant(
        "claimed-in-the-joint-step", 9,
        "(a) a claim is settled by what was true before its store had its turn: the right is back",
        core("roles",
             "    if sb.pending_kind is not PendingKind.CLAIM or sb.pending != generation:\n"
             "        raise StaleCommandError(",
             "    if sb.generation == generation:\n"
             "        raise StaleCommandError("),
        arbiters=("memory",), sequences=("claim_settled_in_joint_step",), quick=True,
    ),
    # --- 10: freeze, flush, then the right -------------------------------------------------------
    Mutant(
        "alone-without-flush", 10,
        "(flushfirst) the right is taken over data that a power cut takes back",
        core("roles",
             "    yield from node.sync()\n    fresh = node.shell.random_bytes(16)\n"
             "    yield from node.change(\n",
             "    fresh = node.shell.random_bytes(16)\n    yield from node.change(\n"),
        arbiters=("none",), sequences=("alone_flushes_first",), quick=True,
    ),
    Mutant(
        "claim-without-flush", 10,
        "(flushfirst) the same before a claim at the arbiter",
        core("claims",
             "    yield from node.sync()\n    holds = record_may_hold(node)\n",
             "    holds = record_may_hold(node)\n"),
        arbiters=("memory",), sequences=("claim_flushes_first",), quick=True,
    ),
    Mutant(
        "take-over-without-flush", 10,
        "(flushfirst) the same at a take-over without an arbiter",
        core("roles",
             "    yield from node.sync()\n    claim = node.shell.random_bytes(16)\n",
             "    claim = node.shell.random_bytes(16)\n"),
        arbiters=("none",), sequences=("take_over_flushes_first",), quick=True,
    ),
    Mutant(
        "stay-without-flush", 10,
        "the peer's word of leaving is relied on before the data is durable here",
        core("leave",
             "    yield from node.sync()\n    if node.sb.pending != NO_GENERATION",
             "    if node.sb.pending != NO_GENERATION"),
        sequences=("words_make_durable", "leave_under_load"), quick=True,
    ),
    # --- 11: the right is taken at the decision --------------------------------------------------
    Mutant(
        "claim-forgotten", 11,
        "(pend) a restart forgets the claim that the record may hold",
        core("opening", "        flags = sb.flags & ~Flags.CLEAN\n",
             "        flags = sb.flags & ~Flags.CLEAN\n"
             "        if sb.pending_kind.name == 'CLAIM':\n"
             "            none = type(sb.pending_kind)(0)\n"
             "            sb = replace(sb, pending=bytes(16), pending_kind=none)\n"),
        arbiters=("memory",), sequences=("claim_applied_then_killed",),
    ),
    Mutant(
        "claim-unsettled-meets", 11,
        "(resolve) the two go on as a pair while a claim may still be applied",
        core("negotiate", "    if claim_unsettled(node):\n        raise",
             "    if node.stopping:\n        raise"),
        arbiters=("memory",), sequences=("claim_applied_late",),
    ),
    Mutant(
        "alone-unasked", 11,
        "a primary goes on alone although the arbiter has to agree",
        core("roles",
             "    if node.arbiter_has_memory:\n"
             "        raise RefusedError(\"alone: the arbiter decides; use claim and claimed\")\n",
             ""),
        sequences=("arbiter_has_to_agree",), quick=True,
    ),
    Mutant(
        "take-over-unasked", 11,
        "a secondary is promoted without the record",
        core("roles", "    if node.arbiter_has_memory and not force:\n",
             "    if node.failed and not force:\n"),
        sequences=("arbiter_has_to_agree",), quick=True,
    ),
    Mutant(
        "generation-without-base", 11,
        "a line alone forgets where it left the peer: no map fits any more",
        core("durable", "            base = add_base(sb.base, sb.generation)\n",
             "            base = sb.base\n"),
        sequences=("peer_dies_alone_writes",), quick=True,
    ),
    # --- 12: the page cache ----------------------------------------------------------------------
    Mutant(
        "power-cut-ignored", 12,
        "(reb) a node that lost its page cache takes over without acknowledged writes",
        core("promotable", "    if not view.cache_survived and not _may_resume(",
             "    if view.fell_back and not _may_resume("),
        sequences=("power_cut_bars_promotion",), quick=True,
    ),
    Mutant(
        "boot-ignored", 12,
        "another boot counts as the same life",
        core("opening",
             "    same_life = sb.boot_id == boot_id and sb.mount_id == mount_id and any(boot_id)\n",
             "    same_life = any(boot_id)\n"),
        sequences=("power_cut_bars_promotion",), quick=True,
    ),
    Mutant(
        "lost-cache-not-stored", 12,
        "a clean stop makes the next start believe in a page cache that was lost before",
        core("opening", "            return replace(sb, flags=flags | Flags.CACHE_LOST)\n",
             "            return replace(sb, flags=flags)\n"),
        sequences=("lost_cache_survives_a_clean_stop",), quick=True,
    ),
    # --- 14: what is never promoted or a source --------------------------------------------------
    Mutant(
        "inconsistent-promoted", 14,
        "a half-synced copy becomes primary",
        (
            *core("promotable",
                  "    if view.data_state is not DataState.UPTODATE:\n        return 14",
                  "    if view.data_state is DataState.BLANK:\n        return 14"),
            *core("roles",
                  "        if sb.data_state is not DataState.UPTODATE and \"data_state\" not in"
                  " changes:\n",
                  "        if sb.data_state is DataState.BLANK and \"data_state\" not in"
                  " changes:\n"),
        ),
        sequences=("source_dies_in_resync", "left_node_does_not_start"), quick=True,
    ),
    Mutant(
        "inconsistent-leads", 14,
        "a half-synced copy is a source",
        core("decide", "frozenset({DataState.UPTODATE, DataState.OUTDATED})",
             "frozenset({DataState.UPTODATE, DataState.OUTDATED, DataState.INCONSISTENT})"),
        sequences=("source_dies_in_resync",),
    ),
    # --- 16: leaving -----------------------------------------------------------------------------
    Mutant(
        "leave-without-answer", 16,
        "the last one to stop is outdated: nobody can start",
        core("leave",
             "    if not answer.stay or answer.generation != node.sb.generation or not"
             " session.live:\n", "    if not session.live:\n"),
        sequences=("both_stop_at_once",), quick=True,
    ),
    Mutant(
        "leaver-stays", 16,
        "a node that is leaving itself answers that it stays",
        core("leave",
             "    if node.stopping or node.changing in (\"leave\", \"stop\"):\n",
             "    if node.failed and node.stopping:\n"),
        sequences=("both_stop_at_once",), quick=True,
    ),
    Mutant(
        "leave-not-stored", 16,
        "a node says that it is outdated before it is",
        core("leave",
             "    yield from node.change(left)\n    session.tell(\n", "    session.tell(\n"),
        sequences=("left_node_does_not_start",), quick=True,
    ),
    Mutant(
        "word-of-another-life", 16,
        "a node that lost its page cache since stays, and goes on without what the leaver had",
        core("leave", "    elif last is None:\n", "    elif False:\n"),
        sequences=("no_word_from_another_life",), quick=True,
    ),
    Mutant(
        "word-of-another-line", 16,
        "a node stays for a leaver that has gone on alone, and whose writes it lacks",
        core("leave",
             "        if node.right or node.sb.pending != NO_GENERATION or generation !="
             " node.sb.generation:\n",
             "        if node.right or node.sb.pending != NO_GENERATION:\n"),
        sequences=("no_word_about_another_line",),
    ),
    Mutant(
        "word-to-both", 16,
        "both nodes are asked at once, both stay and both leave: nobody may serve",
        core("leave", "    if node.stays_after == word.session:\n", "    if False:\n"),
        sequences=("both_asked_without_a_link",),
    ),
    # --- contact: split brain, roll-back, replay -------------------------------------------------
    Mutant(
        "split-brain-resolved", 19,
        "one of two lines of acknowledged writes is overwritten without an operator",
        core("decide",
             "        _fixed(DecisionKind.SPLIT_BRAIN), _nobody,\n"
             "        \"Split brain: nodes {low} and {high} both went on alone",
             "        _fixed(DecisionKind.COPY_BY_MAP), _lower_id,\n"
             "        \"Split brain: nodes {low} and {high} both went on alone"),
        arbiters=("none",), sequences=("both_alone",), quick=True,
    ),
    Mutant(
        "quiet-line-asked-about", 19,
        "an operator has to choose between a copy that wrote and one that wrote nothing",
        core("decide", "    return None if bad else writer\n",
             "    return None if bad or writer else writer\n"),
        arbiters=("none",), sequences=("flushed_alone_but_never_wrote",),
    ),
    Mutant(
        "overwritten-before-kept", 19,
        "a resync overwrites what the copy held that was given up before it is kept",
        core("replica",
             "    if kind in WRITES:\n        yield from keep_old(node, frame)\n", ""),
        arbiters=("none",), sequences=("given_up_copy_is_kept",), quick=True,
    ),
    Mutant(
        "overwritten-by-clients", 19,
        "a client of the promoted loser overwrites what it held when it was given up",
        core("io", "        yield from keep(node, operation.offset, operation.end)\n",
             "        del keep\n"),
        arbiters=("none",), sequences=("given_up_copy_is_kept",),
    ),
    Mutant(
        "kept-in-the-cache-only", 19,
        "what is kept is not durable when the data is overwritten: a power cut takes both",
        core("keeping",
             "kept.entry_at(kept.count))\n        yield (kept.file.fdatasync,)\n",
             "kept.entry_at(kept.count))\n"),
        arbiters=("none",), sequences=("kept_through_power_cuts", "kept_whatever_happens"),
        quick=True,
    ),
    Mutant(
        "torn-batch-believed", 19,
        "half a batch of before the crash is taken for kept, and its extents are overwritten",
        core("keeping", "            if crc32c(bytes(content)) != entry.content_crc:\n"
             "                break\n", ""),
        arbiters=("none",), sequences=("half_a_batch",),
    ),
    Mutant(
        "no-room-no-matter", 19,
        "where the space is used up, the resync overwrites what is not kept",
        core("keeping", "    if is_overwritten(node, kept):\n        raise",
             "    if not node:\n        raise"),
        arbiters=("none",), sequences=("no_room_to_keep",),
    ),
    Mutant(
        "closed-in-memory-only", 19,
        "that an image is not complete is forgotten by a restart",
        core("keeping",
             "        yield (kept.file.pwrite, encode_mark(kept.header.image_id), "
             "MARK_OFFSET_BYTES)\n", ""),
        arbiters=("none",), sequences=("full_after_the_resync",),
    ),
    Mutant(
        "roll-back-unseen", 9,
        "a node restored from a backup is believed because its generation fits",
        core("decide",
             "        self.mine_rolled = mine.own_txn < theirs.peer_txn\n"
             "        self.theirs_rolled = theirs.own_txn < mine.peer_txn\n",
             "        self.mine_rolled = self.theirs_rolled = False\n"),
        sequences=("rolled_back",), quick=True,
    ),
    Mutant(
        "replay-with-gaps", 4,
        "a session goes on although the primary no longer has all that the peer lacks",
        core("resuming",
             "    if applied > node.seq or wanted != list(range(applied + 1, node.seq + 1)):\n",
             "    if applied > node.seq:\n        del wanted\n"),
        sequences=("replay_cut_off",), quick=True,
    ),
)  # fmt: skip
