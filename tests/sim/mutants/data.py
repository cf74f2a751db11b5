"""Mutants of the rules about data: 1 to 8 and 13."""

from typing import Final

from tests.sim.mutants.mutant import Mutant, core

# Regions that were hot at a crash are forgotten.
HOT_NOT_DIRTY: Final = core(
    "opening", "            dirty.mark_region(region, suspect=True)\n", "            del region\n"
)
# The list of what is not flushed does not name a request that came while the node was frozen.
FROZEN_NOT_LISTED: Final = core(
    "io",
    "        # Frozen: if the session is resumed this goes out under the same number.\n"
    "        node.remember_unflushed(seq, offset, end)\n",
    "        pass\n",
)

DATA: Final = (
    # --- 1: on both, or on one that durably knows ------------------------------------------------
    Mutant(
        "ack-before-peer", 1,
        "a write is acknowledged before the peer has it: lost when this node dies",
        core("io", "        session.submit(operation)\n        return version, session\n",
             "        session.submit(operation)\n        operation.settle(Verdict.ACKNOWLEDGED)\n"
             "        return version, session\n"),
        quick=True,
    ),
    Mutant(
        "alone-without-marking", 1,
        "a write acknowledged alone is not in the map: the peer never gets it",
        core("io",
             "        node.dirty.mark(offset, end)\n        operation.verdict = Verdict.ALONE\n",
             "        operation.verdict = Verdict.ALONE\n"),
        quick=True,
    ),
    Mutant(
        "generation-skipped", 1,
        "a write alone under the common generation: the peer, promoted later, seems to be equal",
        core("io", "        yield from node.begin_generation()\n", "        yield from ()\n"),
        quick=True,
    ),
    # --- 2: intent before data -------------------------------------------------------------------
    Mutant(
        "intent-late", 2,
        "data is written before its intent is durable: a crash leaves a difference nobody knows",
        core("io", "                        yield from node.commit(version)\n",
             "                        node.shell.spawn('intent', node.commit(version))\n"),
        quick=True,
    ),
    Mutant(
        "replica-intent-late", 2,
        "the same on the receiving node",
        core("replica", "            yield from node.commit(version)\n",
             "            node.shell.spawn('intent', node.commit(version))\n"),
        quick=True,
    ),
    Mutant(
        "evict-without-pages", 2,
        "a region leaves the log while its dirty extents are in memory only",
        core("durable",
             "        yield from self.save_pages(\n"
             "            sorted({page for r in regions for page in"
             " self.dirty.unsaved_pages_of_region(r)})\n        )\n"
             "        limit = highest()\n"
             "        gone = [\n            r\n            for r in regions\n"
             "            if self.log.is_evictable(r, limit) and not"
             " self.dirty.unsaved_pages_of_region(r)\n        ]\n",
             "        yield from ()\n        gone = regions\n"),
        sequences=("evicted_region_is_in_the_map",), quick=True,
    ),
    Mutant(
        "evict-unstable", 2,
        "a region leaves the log before both nodes have flushed it",
        core("node",
             "            return min(limit, self.stable_seq) if self.unflushed or self.frozen"
             " else limit\n",
             "            return self.seq if self.unflushed or self.frozen else limit\n"),
        sequences=("unflushed_region_stays_hot",), quick=True,
    ),
    Mutant(
        "hot-not-dirty", 2,
        "regions hot at a crash are not compared with the peer",
        HOT_NOT_DIRTY,
        sequences=("target_map_cut_off",), quick=True,
    ),
    Mutant(
        "intent-failure-ignored", 2,
        "data is written although its intent could not be",
        core("durable", "                log.abort_commit(begun)\n                raise\n",
             "                log.abort_commit(begun)\n                return\n"),
        sequences=("intent_not_written",), quick=True,
    ),
    # --- 3: what becomes and stays dirty ---------------------------------------------------------
    Mutant(
        "clear-on-copy", 3,
        "a bit goes when its copy is sent, not when it is flushed there",
        core("resync",
             "    node.pending_clear.append((node.seq, offset // size,"
             " (end + size - 1) // size))\n",
             "    node.dirty.clear(offset // size, (end + size - 1) // size)\n"),
        sequences=("target_dies_in_resync",), quick=True,
    ),
    Mutant(
        "forget-unflushed", 3,
        "what the peer acknowledged but did not flush is forgotten when it is lost",
        core("node",
             "        for _, offset, end in self.unflushed:\n"
             "            self.dirty.mark(offset, end)\n", ""),
        # The peer's own log names these regions, too, and so does ours after a restart.
        defence=HOT_NOT_DIRTY, sequences=("secondary_loses_power_idle",), quick=True,
    ),
    Mutant(
        "forget-in-flight", 3,
        "what was in flight when the peer went is not marked",
        core("node",
             "            if operation.end > operation.offset:\n"
             "                self.dirty.mark(operation.offset, operation.end)\n",
             "            del operation\n"),
        defence=FROZEN_NOT_LISTED, sequences=("frozen_then_alone",), quick=True,
    ),
    Mutant(
        "fenced-forgotten", 3,
        "a frozen write whose outcome is unknown stays on one copy, unmarked",
        core("node",
             "            if operation.end > operation.offset and operation.verdict is None:\n"
             "                self.mark_different(operation.offset, operation.end)\n", ""),
        defence=FROZEN_NOT_LISTED, sequences=("second_claim_loses",), quick=True,
    ),
    Mutant(
        "late-clear", 3,
        "the clear of an older copy takes the mark of what differs since",
        core("node",
             "            copy for copy in self.pending_clear if copy[2] <= first or"
             " last <= copy[1]\n",
             "            copy for copy in self.pending_clear if first <= last\n"),
        sequences=("no_space_during_resync",), quick=True,
    ),
    Mutant(
        "stable-before-local", 3,
        "a flush of both is taken to cover writes that are not yet on the local file",
        core("io", "            return operation.seq - 1\n", "            return node.seq\n"),
        sequences=("flush_does_not_cover_a_write_under_way",), quick=True,
    ),
    # --- 4: equal bytes --------------------------------------------------------------------------
    Mutant(
        "no-range-lock", 4,
        "overlapping writes reach the two files in different orders",
        core("ranges",
             "            if start < other.end and other.start < end and"
             " (exclusive or other.exclusive):\n",
             "            if start > end and other.exclusive:\n"),
        quick=True,
    ),
    Mutant(
        "read-ignores-writes", 4,
        "a read shows what a failover takes back",
        core("io", "    hold = node.locks.acquire(offset, offset + len(buffer), False)\n",
             "    hold = node.locks.acquire(1 << 62, (1 << 62) + 1, False)\n"),
        quick=True,
    ),
    Mutant(
        "resync-without-lock", 4,
        "the resync reads while a client writes, and sends the older bytes after the newer ones",
        core("resync",
             "    hold = node.locks.acquire(offset, end, False)\n    try:\n"
             "        if hold.waiter is not None:\n            yield (hold.waiter.wait,)\n"
             "        buffer = ",
             "    hold = node.locks.acquire(1 << 62, (1 << 62) + 1, False)\n    try:\n"
             "        if hold.waiter is not None:\n            yield (hold.waiter.wait,)\n"
             "        buffer = "),
    ),
    # --- 5: flushes and failures -----------------------------------------------------------------
    Mutant(
        "flush-local-only", 5,
        "a flush is acknowledged when it is done on this node",
        core("io",
             "    node.require_primary()\n    yield from flush_pair(node)\n",
             "    node.require_primary()\n    yield (node.store.fdatasync,)\n"),
        quick=True,
    ),
    Mutant(
        "replica-flush-lies", 5,
        "the peer reports a flush that it did not do",
        core("replica",
             "            yield (node.store.fdatasync,)\n            if node.sb.data_state",
             "            yield (node.shell.pace, 0)\n            if node.sb.data_state"),
        quick=True,
    ),
    Mutant(
        "replica-flush-overstates", 5,
        "the peer reports what it applied while the flush ran as durable",
        core("replica",
             "            seq = session.applied_seq\n            yield (node.store.fdatasync,)\n",
             "            yield (node.store.fdatasync,)\n            seq = session.applied_seq\n"),
    ),
    Mutant(
        "late-write-lands", 6,
        "a write of a term that has ended lands on top of what the peer sends",
        core("node",
             "        if self.role is not Role.PRIMARY:\n"
             "            yield from self.legs_ended(lambda _: True)\n",
             "        if self.stopping:\n"
             "            yield from self.legs_ended(lambda _: True)\n"),
        sequences=("late_write_before_a_swap", "late_write_behind_a_cut"), quick=True,
    ),
    Mutant(
        "failure-ends-the-wait", 6,
        "a copy that fails beside its own hung write meets the peer with that write under way",
        core("node",
             "            if any(not op.local_done for op in self.inflight):\n",
             "            if any(op.local_done is None for op in self.inflight):\n"),
        sequences=("failure_beside_a_hung_write",), quick=True,
    ),
    Mutant(
        "earlier-term-goes-on", 6,
        "a request that waited over a step-back is carried out in the next term",
        core("node", "        if epoch != self.epoch:\n", "        if epoch > self.epoch:\n"),
        sequences=("request_of_an_earlier_term",), quick=True,
    ),
    Mutant(
        "local-leg-wakes-nobody", 8,
        "a decision waits for a local write that has ended, for ever",
        core("node",
             "        operation.local_done = True\n        if self._leg_waiters:\n",
             "        operation.local_done = True\n        if not self._leg_waiters:\n"),
        sequences=("pieces_and_a_decision", "pieces_and_the_peers_word"), quick=True,
    ),
    Mutant(
        "one-answer-per-batch", 8,
        "a slow peer that makes progress is lost",
        core("replica", "            if unacknowledged >= ACK_BYTES:\n",
             "            if unacknowledged < 0:\n"),
        sequences=("slow_peer_makes_progress",), quick=True,
    ),
    Mutant(
        "block-status-early", 4,
        "block status shows zeros that a failover takes back",
        core("io",
             "            yield (hold.waiter.wait,)\n            node.require_primary()\n"
             "        runs =",
             "            pass\n        runs ="),
        sequences=("block_status_waits_for_a_zero",), quick=True,
    ),
    Mutant(
        "local-failure-acknowledged", 5,
        "a write that failed here is acknowledged because the peer has it",
        core("io",
             "                    yield from local_failure("
             "node, operation, as_store_error(error))\n"
             "                node.local_leg_ended(operation)\n",
             "                    del error\n"
             "                node.local_leg_ended(operation)\n"),
        sequences=("local_disk_fails",), quick=True,
    ),
    Mutant(
        "failed-acknowledges", 5,
        "a primary whose disk failed acknowledges what only its peer's page cache has",
        core("io",
             "                yield from conclude(node, operation)\n        if node.failed:\n",
             "                yield from conclude(node, operation)\n        if node.stopping:\n"),
        sequences=("failed_primary_acknowledges_nothing",), quick=True,
    ),
    Mutant(
        "own-error-told", 5,
        "a client is told of an error of this disk although another copy may serve",
        core("io",
             "    if not node.right:\n        yield from step_aside(node)\n    raise error\n",
             "    raise error\n"),
        sequences=("full_in_the_joint_step",), quick=True,
    ),
    Mutant(
        "full-means-failed", 5,
        "a full disk of the only copy takes the mirror down until an operator comes",
        core("io",
             "    if isinstance(error, OutOfSpaceError) and node.right:\n",
             "    if isinstance(error, OutOfSpaceError) and not node.right:\n"),
        sequences=("last_copy_is_full",), quick=True,
    ),
    Mutant(
        "told-before-stored", 5,
        "the peer goes on over a failure that a restart of the failed side forgets",
        core("replica",
             "    if node.failure_lost:\n        yield from node.record_failure()\n", ""),
        sequences=("failure_is_stored_before_it_is_told",), quick=True,
    ),
    Mutant(
        "failed-copy-compared", 5,
        "a copy whose sync failed is compared by its page cache, which shows what the disk lost",
        core("negotiate", "node.peer_failed or Flags.FAILED in theirs.flags", "False"),
        sequences=("remote_flush_fails",), quick=True,
    ),
    Mutant(
        "failed-sync-forgotten", 5,
        "a sync that failed is tried again and believed",
        core("node", "            self.note_failure(str(error))\n"
             "            yield from self.record_failure()\n            raise\n"
             "        if self.failed:\n",
             "            raise\n        if self.failed:\n"),
        sequences=("failed_sync_is_remembered",), quick=True,
    ),
    Mutant(
        "failed-stop-not-recorded", 5,
        "an engine that is stopped over a failed flush leaves a copy that is believed again",
        core("roles",
             "        if node.failure_lost:\n"
             "            # The process ends now, and the next one would believe the page cache.\n"
             "            yield from node.record_failure()\n        return\n",
             "        return\n"),
        sequences=("failed_flush_at_the_stop_is_recorded",), quick=True,
    ),
    Mutant(
        "told-failure-forgotten", 5,
        "a side that told of its failure, and could not store that, is compared by its page cache",
        core("negotiate", "node.peer_failed or Flags.FAILED in theirs.flags",
             "Flags.FAILED in theirs.flags"),
        sequences=("failure_that_could_not_be_stored",), quick=True,
    ),
    # --- 6: fenced by session --------------------------------------------------------------------
    Mutant(
        "promotion-does-not-wait", 6,
        "the gate opens while frames of the old session are still being written",
        core("roles",
             "        node.lose_session(session, \"promoted\")\n    yield from node.quiesce()\n",
             "        node.lose_session(session, \"promoted\")\n"),
        sequences=("promoted_while_applying",), quick=True,
    ),
    Mutant(
        "closed-session-applied", 6,
        "frames of a closed session are applied",
        core("replica",
             "            if not session.live:\n"
             "                raise SessionLostError(session.reason)\n", ""),
        sequences=("promoted_while_applying",), quick=True,
    ),
    # --- 7: metadata -----------------------------------------------------------------------------
    Mutant(
        "memory-before-disk", 7,
        "a state is used before it is durable",
        core("durable",
             "            yield (self.meta.write_superblock, wanted)\n"
             "            self.sb = wanted\n",
             "            self.sb = wanted\n"
             "            yield (self.meta.write_superblock, wanted)\n"),
    ),
    Mutant(
        "fall-back-forgotten", 7,
        "a node that had to use an older superblock is promoted and leads",
        core("opening",
             "        fell_back=chosen.fell_back or bool(sb.flags & Flags.FELL_BACK),\n",
             "        fell_back=False,\n"),
        sequences=("torn_superblock",), quick=True,
    ),
    Mutant(
        "damaged-log-is-clean", 7,
        "a damaged intent log counts as empty",
        core("opening", "        dirty.mark_all(suspect=True)\n", "        pass\n"),
        sequences=("damaged_log",), quick=True,
    ),
    Mutant(
        "cached-page-believed", 7,
        "a page of the map that is in the page cache only counts as saved: a power cut takes it",
        core("opening", "        dirty.doubt_saved()\n", "        pass\n"),
        sequences=("page_of_the_map_in_the_cache_only",), quick=True,
    ),
    Mutant(
        "damaged-page-is-clean", 7,
        "a damaged page of the map counts as clean",
        core("dirtymap",
             "            extents = self.geometry.extents_of_page(index)\n"
             "            self._set(extents.start, extents.stop)\n",
             "            extents = self.geometry.extents_of_page(index)\n"),
        sequences=("damaged_map",), quick=True,
    ),
    # --- 8: bounds -------------------------------------------------------------------------------
    Mutant(
        "no-ack-timeout", 8,
        "a peer that answers echoes but no write freezes the clients for ever",
        core("upkeep", "        if now_ms - self.acked_mark[1] > timeout:\n",
             "        if timeout < 0:\n"),
        sequences=("peer_disk_hangs",), quick=True,
    ),
    Mutant(
        "no-echo-timeout", 8,
        "a connection that is half open stays for ever",
        core("upkeep", "        elif now_ms - self.heard_ms > timeout:\n",
             "        elif timeout < 0:\n"),
        sequences=("idle_link_cut",), quick=True,
    ),
    Mutant(
        "no-local-bound", 8,
        "a disk that does not return freezes the primary for ever beside a good peer",
        core("upkeep", "            if now_ms - since_ms > limit_ms:\n",
             "            if limit_ms < 0:\n"),
        sequences=("local_disk_hangs",), quick=True,
    ),
    Mutant(
        "right-over-a-failure", 5,
        "a copy that fails while its flush is under way goes on alone, and acknowledges",
        core("node", "        if self.failed:\n            raise RefusedError(f\"this node's disk",
             "        if False:\n            raise RefusedError(f\"this node's disk"),
        sequences=("failure_while_the_right_is_taken",),
    ),
    Mutant(
        "tidied-again-and-again", 8,
        "a disk that hangs takes one worker more every five seconds, until none is left",
        core("upkeep", "            self.tidying = True\n", ""),
        sequences=("one_tidying_at_a_time",),
    ),
    Mutant(
        "no-sync-bound", 8,
        "a primary whose disk takes no sync any more serves on, and every flush hangs for ever",
        core("upkeep", "        if not operation.local_done or operation in node.syncing:\n",
             "        if not operation.local_done:\n"),
        sequences=("flush_hangs",), quick=True,
    ),
    Mutant(
        "no-read-bound", 8,
        "a primary whose disk does not return a read serves on, though its peer could read it",
        core("upkeep", "node.locks.oldest_shared()\n", "None\n"),
        sequences=("read_hangs",),
    ),
    Mutant(
        "no-window-bound", 8,
        "a peer that does not read makes this node hold everything in memory",
        core("session", "        ) or not self.live\n\n    def room",
             "        ) or True\n\n    def room"),
        sequences=("window_is_bounded",), quick=True,
    ),
    # --- 13: before the target is written off ----------------------------------------------------
    Mutant(
        "target-not-marked", 13,
        "a half-written target still says that it is up to date",
        core("negotiate",
             "        yield from node.change(while_live(session, inconsistent))\n"
             "        require_live(session)\n",
             "        require_live(session)\n"),
        quick=True,
    ),
    Mutant(
        "source-not-flushed", 13,
        "the target is written off while the source has the data in its page cache only",
        (
            *core("negotiate",
                  "    yield from node.sync()\n    end = yield from session.expect(MapEnd)\n",
                  "    end = yield from session.expect(MapEnd)\n"),
            *core("negotiate",
                  "    yield from node.sync()\n"
                  "    yield from node.save_pages(node.dirty.unsaved_pages())\n"
                  "    require_live(session)\n    session.tell(UnionStored",
                  "    yield from node.save_pages(node.dirty.unsaved_pages())\n"
                  "    require_live(session)\n    session.tell(UnionStored"),
        ),
        sequences=("source_flushes_before_target_is_written_off",), quick=True,
    ),
    Mutant(
        "equal-means-clean", 13,
        "equal generations count as equal data",
        core("decide", "    if pair.mine.dirty or pair.theirs.dirty or _has_right(",
             "    if _has_right("),
        sequences=("secondary_loses_power_idle",), quick=True,
    ),
    Mutant(
        "unflushed-not-told", 13,
        "only the map counts at contact, not what is in flight or not flushed",
        core("view", "    return max(node.dirty.count, int(pending))\n",
             "    del pending\n    return node.dirty.count\n"),
        # The peer's log tells of them, too, and the source looks again before it sends.
        defence=(
            *HOT_NOT_DIRTY,
            *core("negotiate",
                  "    elif node.dirty.any():\n        # Written since the states were told",
                  "    elif node.stopping:\n        # Written since the states were told"),
        ),
        sequences=("source_flushes_before_target_is_written_off", "primary_killed_returns"),
        quick=True,
    ),
    Mutant(
        "their-map-ignored", 13,
        "what only the target calls dirty is not copied",
        core("dispatch", "        node.dirty.merge_page(message.index, message.payload)\n",
             "        pass\n"),
        sequences=("target_map_cut_off",), quick=True,
    ),
    Mutant(
        "target-forgets-first", 13,
        "the target clears its map before the source has stored the union",
        core("negotiate",
             "    first = yield from session.expect_any((UnionStored, SourceBegin))\n",
             "    node.dirty.clear(0, node.geometry.extent_count)\n"
             "    first = yield from session.expect_any((UnionStored, SourceBegin))\n"),
        sequences=("target_map_cut_off",), quick=True,
    ),
    Mutant(
        "no-drain", 13,
        "dirty extents stay while the peer is connected",
        core("upkeep",
             "    if session is not None and session.phase is Phase.SYNCED and node.dirty.any():\n",
             "    if session is not None and node.failed:\n"),
        sequences=("dirty_in_sync_drains",), quick=True,
    ),
)  # fmt: skip
