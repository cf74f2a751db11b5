"""The invariants, checked by somebody who sees both nodes, both disks and every client.

Owns the judgement. The names (A1, C3, ...) are explained in docs/simulator.md. `holders` are the
nodes whose copy must hold every acknowledged write by what was promised: both after a joint step;
the one that acknowledges alone; a power cut takes a node out while another one holds, and lowers
what is demanded to what was flushed when nobody else does (the fault atlas).
"""

from collections.abc import Callable
from typing import Any

from nbdmirror.core.geometry import EXTENTS_PER_PAGE
from nbdmirror.core.node import Role
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import DataState, Flags, PendingKind, Superblock
from nbdmirror.limits import MAP_OFFSET_BYTES, MAP_PAGE_HEADER_BYTES
from tests.sim import force, kept
from tests.sim.copies import Copies, is_quiet
from tests.sim.disk import BLOCK_BYTES, SECTOR_BYTES, Blocks
from tests.sim.history import Bound, History, Record
from tests.sim.host import GEOMETRY, Host
from tests.sim.world import World

COVER_EVERY_STEPS = 40


class Checker(Copies):
    """All checks of one run."""

    def __init__(self, world: World, *, memory: bool) -> None:
        super().__init__()
        self.world = world
        self.memory = memory
        self.history = History()
        self.holders = [True, False]
        self.lost_by_fault = [False, False]
        self.alone_acks = [False, False]
        self.forced = False
        # Forced while the other one may live, or against a record: which of them counts is known
        # when both are in sync again, and no earlier.
        self.open_force = False
        # Whose copy an operator gives up, where that is judged by what is stored.
        self.gives_up: int | None = None
        self.force_is_stored = False
        self.record: Any = None
        # Of whoever judges the controllers: a node takes the right, or becomes primary.
        self.on_serving: Callable[[Host], None] = lambda _host: None
        self.counts = {
            "acked": 0, "alone": 0, "flushes": 0, "reads": 0, "syncs": 0, "joints": 0,
            "covers": 0, "stale_reads": 0, "lowered": 0, "unknown": 0, "splits": 0, "equal": 0,
            "resumed": 0, "refused": 0, "leaves": 0, "disk_errors": 0, "kept": 0,
            "deposed_reads": 0,
            "evicted_alone": 0, "evicted_in_sync": 0, "evicted_by_replica": 0,
            "ESHUTDOWN": 0, "EIO": 0, "ENOSPC": 0, "EINVAL": 0,
        }  # fmt: skip
        self._had_right = [False, False]
        self._next_cover = 0
        self._known: list[tuple[Any, bool]] = [(None, False), (None, False)]

    def other(self, host: Host) -> Host:
        """The other node."""
        return self.hosts[1 - host.index]

    @property
    def now(self) -> int:
        """The count of events: the order of everything."""
        return self.world.steps

    # --- what clients are told ------------------------------------------------------------------

    def issue(self, sectors: range, *, zero: bool) -> Record:
        """A write goes out."""
        powers = (self.hosts[0].power_count, self.hosts[1].power_count)
        return self.history.issue(sectors, zero=zero, now=self.now, powers=powers)

    def unknown(self, record: Record) -> None:
        """A write ended without an answer, or with an error."""
        self.history.end(record, self.now)
        self.counts["unknown"] += 1

    def acked(self, host: Host, record: Record, *, fua: bool) -> None:
        """A write was acknowledged by `host`."""
        self.history.end(record, self.now)
        record.acked = self.now
        self.counts["acked"] += 1
        node, other = host.node, self.other(host)
        assert node is not None
        session = node.sending_session()
        synced = session is not None and session.phase is Phase.SYNCED
        self._require_counting(host)
        if self._lacks(host.data.cache, record):
            self.fail(f"A1: {host.name} acknowledged write {record.number} and does not hold it")
        other_lacks = self._lacks(other.data.cache, record)
        begun = node.right and node.sb.pending_kind is not PendingKind.CLAIM
        if other_lacks or (session is None and begun):
            self._acked_alone(host, record, other_lacks=other_lacks)
        elif not synced and session is not None and not self._took_joint(other, host):
            self.holders = [i == host.index for i in (0, 1)]
        if self.split:
            return
        self.history.demand(record)
        for index in (0, 1):
            self.history.unflushed[index].append(record)
        if fua:
            for index in (0, 1) if synced else (host.index,):
                self.history.promise_durable(record, index)
                self._require_durable(index, record, "A3 FUA")

    def _require_counting(self, host: Host) -> None:
        """Rule 5: a primary whose disk failed acknowledges nothing that its peer has to keep."""
        node = host.node
        assert node is not None
        if node.failed and not node.right:
            self.fail(f"5: {host.name} acknowledges, but its copy failed: {node.failed}")

    def _took_joint(self, target: Host, source: Host) -> bool:
        """Whether part (c) of a joint step is done: from there on the target holds everything."""
        joint = source.sb.pending_kind is PendingKind.JOINT
        return joint and target.sb.generation == source.sb.pending

    def _lacks(self, blocks: Blocks, record: Record) -> bool:
        return self.history.stale_sector(blocks, record) is not None

    def _acked_alone(self, host: Host, record: Record, *, other_lacks: bool) -> None:
        """Rule 1: on one node that durably knows that the other lacks it."""
        node, other = host.node, self.other(host)
        assert node is not None
        if other_lacks and record.powers[other.index] != other.power_count:
            # The other one had it, acknowledged it and lost its page cache since.
            return
        sb = host.sb
        if Flags.ALONE not in sb.flags or sb.pending_kind is PendingKind.CLAIM:
            self.fail(
                f"rule 1: {host.name} acknowledged write {record.number} that {other.name} lacks; "
                f"on disk: {sb.flags!r}, pending {sb.pending_kind.name}"
            )
        theirs, history = other.data.cache, self.history
        lacking = {
            sector * SECTOR_BYTES // BLOCK_BYTES
            for sector in record.sectors
            if history.is_stale(history.value(theirs, sector), sector, record.issued)
        }
        clean = sorted(block for block in lacking if not node.dirty._bits[block])
        if clean:
            self.fail(f"rule 3: acknowledged alone, but extents {clean} are not dirty")
        self.counts["alone"] += 1
        if self.alone_acks[other.index] and not self.forced:
            if self.memory:
                self.fail(f"B1: {host.name} and {other.name} both acknowledged alone")
            if not self.split:
                self.counts["splits"] += 1
                self.world.note("check: split brain began")
            self.split = True
        elif not self.holders[host.index] and not self.split:
            self._require(host.data.cache, self.history.bound, f"B5 {host.name} serves alone")
        self.alone_acks[host.index] = True
        self.holders = [i == host.index for i in (0, 1)]

    def flush_acked(self, host: Host, issued: int) -> None:
        """A flush was acknowledged: what was acknowledged before it was sent is durable."""
        self.counts["flushes"] += 1
        node = host.node
        assert node is not None
        self._require_counting(host)
        if self.split:
            return
        session = node.sending_session()
        synced = session is not None and session.phase is Phase.SYNCED
        if not self.holders[host.index] and self.alone_acks[1 - host.index]:
            return
        for index in (0, 1) if synced else (host.index,):
            waiting = self.history.unflushed[index]
            keep: list[Record] = []
            for record in waiting:
                if record.acked is not None and record.acked < issued:
                    self.history.promise_durable(record, index)
                    self._require_durable(index, record, "A2 flush")
                else:
                    keep.append(record)
            waiting[:] = keep

    def _require_durable(self, index: int, record: Record, rule: str) -> None:
        host = self.hosts[index]
        sector = self.history.stale_sector(host.data.durable, record)
        if sector is not None:
            number = self.history.value(host.data.durable, sector)
            self.fail(
                f"{rule}: write {record.number}, sector {sector}: the disk of {host.name} "
                f"holds {number}"
            )

    def is_deposed(self, host: Host) -> bool:
        """Whether the other node has acknowledged without this one, which still takes requests."""
        return not self.holders[host.index] and self.alone_acks[1 - host.index]

    def read_begins(self, host: Host, sectors: range) -> list[int]:
        """A client reads; returns what the read has to show at least."""
        self.counts["deposed_reads"] += self.memory and self.is_deposed(host)
        return self.history.demanded(sectors)

    def read_done(self, host: Host, sectors: range, data: bytes, began: list[int]) -> None:
        """A read was answered: what it shows is recent enough, and does not vanish (A5)."""
        self.counts["reads"] += 1
        if self.split:
            return
        numbers = {
            sector: self.history.value_of(data[place * 512 : place * 512 + 512], sector)
            for place, sector in enumerate(sectors)
        }
        if self._is_current(host, numbers, began) and not self.is_deposed(host):
            for sector, number in numbers.items():
                if number:
                    self._shown(host, sector, self.history.records[number])

    def _is_current(self, host: Host, numbers: dict[int, int], began: list[int]) -> bool:
        """A4, A6: no read shows less than was acknowledged, by anybody, before it began.

        By a lease (rule 17) nothing that the new primary has acknowledged when it is answered. Only
        a node whose arbiter has no memory is let off, and one that an operator forced aside.
        """
        history, node = self.history, host.node
        assert node is not None
        deposed, leased = self.is_deposed(host), self.memory and not self.forced
        # Under a lease a read may be held, and a write that it does not show be acknowledged.
        late = leased and (not deposed or node.settings.confirm_reads)
        for (sector, number), least in zip(numbers.items(), began, strict=True):
            bound = history.bound.get(sector, -1)
            if not history.is_stale(number, sector, min(bound, least) if late else bound):
                continue
            if deposed and not leased:
                self.counts["stale_reads"] += 1
                return False
            rule = "A6: the deposed" if deposed else "A4:"
            self.fail(f"{rule} {host.name} read sector {sector} as {number}, which is too old")
        return True

    def _shown(self, host: Host, sector: int, record: Record) -> None:
        """A5: from here on it must be there, or something not older."""
        issued, other = record.issued, self.other(host)
        if self.history.bound.get(sector, -1) >= issued:
            return
        node = host.node
        assert node is not None
        there = self.history.value(other.data.cache, sector)
        if self.history.is_stale(there, sector, issued):
            session = node.sending_session()
            if session is not None and session.phase is Phase.SYNCED:
                self.fail(f"A5: {host.name} showed write {record.number}, which {other.name} lacks")
            self.holders = [i == host.index for i in (0, 1)]
        self.history.bound[sector] = issued

    # --- crashes and operators ------------------------------------------------------------------

    def ended_life(self, host: Host, *, power: bool) -> None:
        """An engine died; with its page cache if the power was cut."""
        other = self.other(host)
        self.check_kept(host, "power cut" if power else "kill")
        self._had_right[host.index] = False
        self._known[host.index] = (None, False)
        if self.split:
            return
        if self.holders[other.index]:
            self._require(other.data.cache, self.history.bound, f"A1 loss of {host.name}")
        if power:
            self._lost_cache(host)
        self.check_cover()

    def _lost_cache(self, host: Host) -> None:
        index, other = host.index, self.other(host)
        history = self.history
        if not self.holders[index]:
            return
        if self.holders[other.index]:
            self.holders[index] = False
            self.lost_by_fault[index] = True
            return
        self.counts["lowered"] += 1
        self._require(host.data.durable, history.flushed[index], f"A2 power cut of {host.name}")
        history.bound = dict(history.flushed[index])
        if self.lost_by_fault[other.index] and not self.alone_acks[index]:
            theirs = history.flushed[other.index]
            history.bound = {s: min(b, theirs[s]) for s, b in history.bound.items() if s in theirs}
            self.holders = [True, True]
            self.lost_by_fault = [False, False]
            self._require(other.data.cache, history.bound, f"A2 power cut of both, {other.name}")
        history.limit_flushed()

    def disk_failed(self, host: Host) -> None:
        """A copy failed, by its own word: from here on the promise rests on the other one."""
        if not self.split:
            self._lost_cache(host)

    def operator_decided(self, keeper: Host) -> None:
        """An operator declared one copy the truth (discard of the other, force on this one)."""
        self.history.rebase(keeper.data.cache)
        self.open_force = False
        self.split = False
        self.alone_acks = [False, False]
        self.alone_acks[keeper.index] = True
        self.holders = [i == keeper.index for i in (0, 1)]
        self.lost_by_fault = [False, False]

    def evicted(self, host: Host, count: int) -> None:
        """Regions left the intent log to make room, or because they were cold."""
        node = host.node
        if node is not None and not node.stopping:
            sending = node.sending_session() is not None
            role = "in_sync" if sending else "alone"
            role = "by_replica" if node.role is Role.SECONDARY else role
            self.counts[f"evicted_{role}"] += count

    def check_kept(self, host: Host, when: str) -> None:
        """K1: what was given up is still there."""
        self.counts["kept"] += kept.check(host, when)

    # --- what the nodes do ----------------------------------------------------------------------

    def emitted(self, host: Host, kind: str, facts: dict[str, object]) -> None:
        """An event of the core."""
        if kind == "kept-begun":
            kept.remember(host, str(facts["image"]))
        elif kind == "in-sync":
            self.world.at(0, self.world.life, self._in_sync)
        elif kind == "role" and facts.get("role") == "primary":
            self._promoted(host)
        elif kind == "protocol-error":
            self.fail(f"D1: {host.name}: {facts.get('reason')}")
        elif kind == "local-failure":
            self.disk_failed(host)
        elif kind == "resumed":
            self.counts["resumed"] += 1
        elif kind == "refused":
            self.counts["refused"] += 1
        elif kind == "leave" and facts.get("stays"):
            self.counts["leaves"] += 1

    def _promoted(self, host: Host) -> None:
        other = self.other(host)
        self.on_serving(host)
        if host.sb.data_state is not DataState.UPTODATE:
            self.fail(f"B4: {host.name} became primary as {host.sb.data_state.name}")
        if self.split or self.forced:
            return
        if self.alone_acks[other.index] and not self.holders[host.index]:
            # Without the right it was paused over a session that is gone, and acknowledges nothing.
            if self.memory and (host.node is None or host.node.right):
                self.fail(f"B3: {host.name} became primary behind {other.name}")
            return
        self._require(host.data.cache, self.history.bound, f"B3 {host.name} became primary")

    def both_synced(self) -> bool:
        """Whether both nodes are in sync, in one session."""
        nodes = [host.node for host in self.hosts]
        sessions = [node.session if node is not None else None for node in nodes]
        first, second = sessions
        return (
            first is not None
            and second is not None
            and first.number == second.number
            and first.phase is second.phase is Phase.SYNCED
        )

    def _in_sync(self) -> None:
        """Both know that they are in sync: from here on both hold everything."""
        if not self.both_synced():
            return
        self.counts["syncs"] += 1
        for host in self.hosts:
            self.check_kept(host, "in sync")
        force.ends(self)
        if self.split:
            self.fail("B9: a split brain ended without an operator")
        for host in self.hosts:
            self._require(host.data.cache, self.history.bound, f"in sync, {host.name}")
        merged = dict(self.history.flushed[0])
        for sector, issued in self.history.flushed[1].items():
            merged[sector] = max(issued, merged.get(sector, -1))
        for index in (0, 1):
            self.history.flushed[index].update(merged)
            self._require(
                self.hosts[index].data.durable, merged, f"A2 in sync, disk of {'AB'[index]}"
            )
        self.holders = [True, True]
        self.lost_by_fault = [False, False]
        self.alone_acks = [False, False]
        self.forced = False

    def superblock_stored(self, host: Host, before: Superblock, after: Superblock) -> None:
        """A superblock is durable in both slots."""
        other = self.other(host)
        force.stored(self, host, before, after)
        if after.data_state is DataState.INCONSISTENT is not before.data_state:
            self._written_off(host)
        if after.generation != before.generation:
            self._generation_taken(host, other, before, after)

    def _written_off(self, host: Host) -> None:
        """Rule 13: a copy may be written off only when the other one is durable."""
        other = self.other(host)
        if self.holders[host.index] and not self.split:
            self._require(other.data.cache, self.history.bound, f"13: source {other.name}")
            self._require(
                other.data.durable, self.history.bound, f"13: disk of the source {other.name}"
            )
            self.history.flushed[other.index].update(self.history.bound)
            self.holders = [i == other.index for i in (0, 1)]

    def _generation_taken(
        self, host: Host, other: Host, before: Superblock, after: Superblock
    ) -> None:
        """Rule 9: the order of the joint step."""
        taken = after.generation
        theirs = other.sb
        if theirs.pending == taken and theirs.pending_kind is PendingKind.JOINT:
            self.counts["joints"] += 1
            if Flags.ALONE in theirs.flags:
                self.fail(f"9: {host.name} took J while {other.name} has the right on disk")
            if self.memory and self.record.generation != taken:
                self.fail(f"9: {host.name} took J before the record")
            missing = self.history.missing(host.data.durable, self.history.bound)
            if missing and not self.split:
                self.fail(f"9: {host.name} took J without its writes on disk: {missing[:3]}")
            if not self.split:
                self.holders[host.index] = True
                self.lost_by_fault[host.index] = False
                self.alone_acks = [False, False]
        elif before.pending == taken and before.pending_kind is PendingKind.JOINT:
            alone = Flags.ALONE in after.flags or after.pending_kind is PendingKind.CLAIM
            # The other one may have gone on from it since this store began.
            if not alone and taken not in (theirs.generation, *theirs.base, *theirs.history):
                self.fail(f"9: {host.name} took J before {other.name}")

    def write_starts(self, host: Host, path: str, offset: int, end: int) -> None:
        """A change of the backing file begins: C1, rule 6, C5."""
        node = host.node
        assert node is not None
        if path == "replica" and node.sb.data_state is DataState.INCONSISTENT:
            # The source keeps its bits until both have flushed, and this copy can only be a target.
            return
        log = node.log
        for region in GEOMETRY.regions(offset, end):
            hot = log.hot.get(region)
            named = hot is not None and hot.version <= log.durable
            # It may have left the log, and be hot again for another write, under one in flight.
            if named or self._in_saved_map(host, region, offset, end):
                continue
            if path == "replica" and host.sb.data_state is DataState.INCONSISTENT:
                # Blocks of a resync need no intent: the source keeps their bits.
                continue
            self.fail(f"C1: {host.name} writes region {region} before its intent is durable")
        if path != "replica":
            return
        if node.role is Role.PRIMARY:
            self.fail(f"6: {host.name} is primary and applies a frame")
        if node.session is None or not node.session.receiving:
            self.fail(f"6: {host.name} applies a frame of a session that ended")

    def _in_saved_map(self, host: Host, region: int, offset: int, end: int) -> bool:
        """Whether a region left the log because the map on disk names what is written there."""
        extents = GEOMETRY.extents_of_region(region)
        touched = GEOMETRY.extents(offset, end)
        for extent in range(max(extents.start, touched.start), min(extents.stop, touched.stop)):
            page, bit = divmod(extent, EXTENTS_PER_PAGE)
            block = host.meta.durable[MAP_OFFSET_BYTES // BLOCK_BYTES + page]
            if not block[MAP_PAGE_HEADER_BYTES + bit // 8] & (0x80 >> bit % 8):
                return False
        return True

    # --- after every step -----------------------------------------------------------------------

    def step(self) -> None:
        """Cheap checks, and the others now and then."""
        for index, host in enumerate(self.hosts):
            life = host.life
            if life is None:
                continue
            node = life.node
            known = self._known[index]
            if known[0] is node.sb and known[1] is node.giving_up:
                continue
            self._known[index] = (node.sb, node.giving_up)
            right = node.right
            if right is not self._had_right[index]:
                self._had_right[index] = right
                if right:
                    self._right_taken(host)
        if self.world.steps >= self._next_cover:
            self.check_cover()
            self._check_equal()
            # Many differences cost time and tell little: then look less often.
            self._next_cover = self.world.steps + COVER_EVERY_STEPS + len(self._different) // 4

    def _right_taken(self, host: Host) -> None:
        """B1, and rule 10: freeze, flush, then the right."""
        index, other = host.index, self.other(host)
        self.on_serving(host)
        if self.memory and self._had_right[1 - index] and not self.forced:
            nodes = [h.node for h in self.hosts]
            if all(n is not None and n.role is Role.PRIMARY for n in nodes):
                self.fail("B1: both nodes are primary with the right to acknowledge alone")
        if self.holders == [True, True] and not self.split and not self.forced:
            bound = self.history.bound
            self._require(host.data.durable, bound, f"10: disk of {host.name}, {other.name} lost")
            self.history.flushed[index].update(bound)

    def _check_equal(self) -> None:
        """C10 and A8: in sync and idle means equal, byte for byte."""
        if not self.both_synced():
            return
        if not all(is_quiet(host) for host in self.hosts):
            return
        self.counts["equal"] += 1
        if self.different():
            self.fail(f"C10: in sync and idle, but blocks {self.different()[:8]} differ")

    # --- helpers --------------------------------------------------------------------------------

    def _require(self, blocks: Blocks, bound: Bound, what: str) -> None:
        missing = self.history.missing(blocks, bound)
        if missing:
            sector, number = missing[0]
            self.fail(
                f"{what}: {len(missing)} sectors lost, e.g. {sector} holds {number}, "
                f"must not end before {bound[sector]}"
            )
