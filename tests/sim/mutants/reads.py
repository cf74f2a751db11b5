"""Mutants of the rule about reads: 17."""

from typing import Final

from tests.sim.mutants.mutant import Mutant, core

CHECK: Final = (
    "    if node.shell.now_ms() >= node.lease.until_ms and not may_answer(node, mark):\n"
    "        yield from permission(node, epoch, mark)\n"
)
READ: Final = "            yield (node.store.pread, buffer, offset)\n"
MEMORY: Final = ("memory",)

READS: Final = (
    Mutant(
        "lease-not-checked", 17,
        "a primary that was deposed goes on to answer reads from what it has",
        core("io", f"{CHECK}\n\ndef extents(", "\n\ndef extents("),
        arbiters=MEMORY, sequences=("stopped_primary_wakes_up",), quick=True,
    ),
    Mutant(
        "block-status-not-checked", 17,
        "a primary that was deposed tells that a range reads as zeros, which has data by now",
        core("io", f"{CHECK}    return runs\n", "    return runs\n"),
        arbiters=MEMORY, sequences=("block_status_is_held",), quick=True,
    ),
    Mutant(
        "lease-checked-first", 17,
        "the lease is looked at before the local read, which may take as long as it likes",
        core("io", READ,
             "            if not may_answer(node, mark):\n"
             f"                yield from permission(node, epoch, mark)\n{READ}")
        + core("io", f"{CHECK}\n\ndef extents(", "\n\ndef extents("),
        arbiters=MEMORY, sequences=("read_that_takes_long",), quick=True,
    ),
    Mutant(
        "lease-not-waited-out", 17,
        "the promoted node serves while the old one still answers reads under its lease",
        core("roles", "    yield from wait_out(node)\n", ""),
        arbiters=MEMORY, sequences=("deposed_primary_answers_nothing",), quick=True,
    ),
    Mutant(
        "lease-not-lent", 17,
        "the same: it does not remember that it has answered an echo",
        core("dispatch", "            node.lease.lend(node.shell.now_ms())\n",
             "            pass\n"),
        arbiters=MEMORY, sequences=("deposed_primary_answers_nothing",), quick=True,
    ),
    Mutant(
        "lease-from-receipt", 17,
        "an answer that was on its way for long lends more than the peer waits for",
        core("dispatch", "            node.lease.answered(frame.seq)\n",
             "            node.lease.answered(frame.seq)\n"
             "            node.lease.until_ms = node.shell.now_ms() + node.lease.length_ms\n"),
        arbiters=MEMORY, sequences=("late_echo_lends_nothing",), quick=True,
    ),
    Mutant(
        "lease-forgotten-by-a-restart", 17,
        "an engine that was restarted does not know what it lent, and takes it for nothing",
        core("lease", "        self._lent_ms: int | None = now_ms\n",
             "        self._lent_ms: int | None = None\n"),
        arbiters=MEMORY, sequences=("engine_that_knows_nothing_waits",), quick=True,
    ),
    Mutant(
        "lease-not-stored", 17,
        "the next engine waits as long as its own configuration says, its peer's lease is longer",
        core("negotiate", "lambda sb: replace(sb, read_lease_ms=length_ms)", "lambda sb: sb"),
        arbiters=MEMORY, sequences=("longer_lease_counts",), quick=True,
    ),
    Mutant(
        "lease-of-ones-own", 17,
        "two nodes with leases of two lengths each take their own",
        core("negotiate", "    length_ms = max(mine.read_lease_ms, theirs_ms)\n",
             "    length_ms = mine.read_lease_ms\n"),
        arbiters=MEMORY, sequences=("longer_lease_counts",), quick=True,
    ),
    Mutant(
        "lease-with-a-stranger", 17,
        "the peer's program knows no lease, and serves while this node still answers",
        core("negotiate", "    if not READ_LEASE_MS_MIN <= theirs_ms <= READ_LEASE_MS_MAX:\n",
             "    if theirs_ms > READ_LEASE_MS_MAX:\n"),
        arbiters=MEMORY, sequences=("no_session_without_a_lease",), quick=True,
    ),
    Mutant(
        "lease-from-before-the-role", 17,
        "an echo that the peer answered to one that did not serve counts for one that does",
        core("roles", "        begin_lease(node, session)\n", ""),
        arbiters=MEMORY, sequences=("promoted_before_it_was_told",), quick=True,
    ),
    Mutant(
        "lease-beyond-the-session", 17,
        "reads go on when the session is gone and the writes are frozen",
        core("node", "            self.lease.forget()\n", ""),
        arbiters=MEMORY, sequences=("reads_freeze_with_the_writes",), quick=True,
    ),
    Mutant(
        "held-read-not-ended", 17,
        "a read that is held when the node steps back is never answered",
        core("lease", "        node.require_term(epoch)\n", ""),
        arbiters=MEMORY, sequences=("deposed_primary_answers_nothing",), quick=True,
    ),
    Mutant(
        "held-read-keeps-its-lock", 17,
        "a read that is held counts as a disk that hangs, and keeps writes out",
        core("io",
             "        node.require_primary()\n    finally:\n        node.locks.release(hold)\n"
             f"{CHECK}\n\ndef extents(",
             "        node.require_primary()\n"
             "        if not may_answer(node, mark):\n"
             "            yield from permission(node, epoch, mark)\n"
             "    finally:\n        node.locks.release(hold)\n\n\ndef extents("),
        arbiters=MEMORY, sequences=("long_read_locks_nothing",), quick=True,
    ),
    Mutant(
        "confirmed-by-an-old-echo", 17,
        "with `confirm`, an echo that was answered before the machine stood still is enough",
        core("lease", "lease.answered_number > mark if", "lease.answered_number >= mark if"),
        arbiters=MEMORY, sequences=("clock_that_stood_still",), quick=True,
    ),
    Mutant(
        "swap-waits", 17,
        "the old primary has said that it serves no more, and is waited for all the same",
        core("dispatch", "            node.lease.returned()\n", "            pass\n"),
        arbiters=MEMORY, sequences=("swap_waits_for_nothing",), quick=True,
    ),
    Mutant(
        "word-waits", 17,
        "a controller has said that its engine is dead, and that is waited for all the same",
        core("leave",
             "    require_unchanged_since(node, word, \"peer left\")\n    node.lease.returned()\n",
             "    require_unchanged_since(node, word, \"peer left\")\n"),
        arbiters=MEMORY, sequences=("word_waits_for_nothing",), quick=True,
    ),
    Mutant(
        "echoes-too-seldom", 17,
        "an idle primary's lease runs out between two echoes, and reads wait",
        core("upkeep", "min(every_ms, node.lease.length_ms // 3 - TICK_MS)",
             "3 * KEEPALIVE_MS"),
        arbiters=MEMORY, sequences=("idle_pair_reads_at_once",), quick=True,
    ),
)  # fmt: skip
