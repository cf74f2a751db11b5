"""The model's rules, held against what the simulated engines really store.

Owns the table of steps: every change of a superblock, and every change of the arbiter's record,
must be one that `tests/model/protocol.py` has, under the condition that it has there. The model
walks through all orders of few events; the simulator draws long ones from the production code.
This is what ties the two: if an engine does a step that the model does not know, the model proves
nothing about it. It reads what is durable and never looks at data.

A step of the model is one moment, a store takes time: what else is durable is judged as it was when
the store began. So each part of a step has to be durable before the next one begins; and a store
that comes to light late, because its sync failed or a kill cut it short, is what it was. What the
other node did meanwhile it did without a look at this disk, so the two could as well have happened
in the order that the model has.
"""

from collections.abc import Callable
from typing import NamedTuple

from nbdmirror.core.describe import describe
from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.superblock import DataState, Flags, PendingKind, Superblock
from tests.sim.arbiter import LOST, NOBODY, Arbiter, Held
from tests.sim.checks import Checker
from tests.sim.host import Host
from tests.sim.world import ViolationError

RIGHTS = Flags.ALONE | Flags.PEER_OUTDATED
UNUSABLE = frozenset({DataState.INCONSISTENT, DataState.BLANK})


class Begun(NamedTuple):
    """A store that was begun, and what else was durable at that moment."""

    superblock: Superblock
    theirs: Superblock
    record: Held | None


class Step(NamedTuple):
    """One change of one superblock, with what else was durable when it began."""

    me: int
    before: Superblock
    after: Superblock
    theirs: Superblock
    record: Held | None
    forced: bool
    fresh: bool  # nobody has heard of the generation that is pending afterwards
    offered: (
        bool  # the other one had given up its right for this generation, and the record held it
    )

    @property
    def gained(self) -> Flags:
        """Rights that it takes."""
        return self.after.flags & ~self.before.flags & RIGHTS

    @property
    def lost(self) -> Flags:
        """Rights that it gives up."""
        return self.before.flags & ~self.after.flags & RIGHTS

    @property
    def keeps_line(self) -> bool:
        """Whether generation and data state stay."""
        before, after = self.before, self.after
        return before.generation == after.generation and before.data_state is after.data_state

    @property
    def keeps_pending(self) -> bool:
        """Whether what is pending stays."""
        before, after = self.before, self.after
        return (before.pending, before.pending_kind) == (after.pending, after.pending_kind)

    @property
    def base_added(self) -> frozenset[bytes]:
        """What is new in the base."""
        return frozenset(self.after.base) - frozenset(self.before.base)


def is_aside(s: Step) -> bool:
    """Nothing of the model's: clean stop, term, boot, failure."""
    return s.keeps_line and s.keeps_pending and not s.gained | s.lost and not s.base_added


def is_base(s: Step) -> bool:
    """The source names what the peer may be found with, before it begins the joint step."""
    known = {s.theirs.generation, s.theirs.pending, *s.theirs.base, *s.theirs.history}
    named = bool(s.base_added) and s.base_added <= known
    return named and s.keeps_line and s.keeps_pending and not s.gained | s.lost


def is_reserved(s: Step) -> bool:
    """A fresh generation is pending; a joint one that was pending becomes the current one."""
    before, after = s.before, s.after
    line = before.generation
    if before.pending_kind is PendingKind.JOINT and after.generation != before.generation:
        line = before.pending
    return (
        after.pending_kind is PendingKind.CLAIM
        and s.fresh
        and after.generation == line
        and after.data_state is DataState.UPTODATE
        and not s.lost
    )


def is_claim(s: Step) -> bool:
    """Rule 11: stored before it is sent."""
    return s.record is not None and is_reserved(s) and not s.gained


def is_alone(s: Step) -> bool:
    """Rules 11 and 14: without a memory, or by force, the right comes with the generation."""
    by_itself = s.record is None or s.forced
    return by_itself and is_reserved(s) and s.gained in (Flags.ALONE, Flags(0))


def is_won(s: Step) -> bool:
    """Rule 11: the record names me, by whichever generation."""
    named = s.forced or (s.record is not None and s.record.owner == s.me)
    return s.keeps_line and s.keeps_pending and s.gained == Flags.ALONE and named


def is_given_up(s: Step) -> bool:
    """A claim that the record did not take is forgotten."""
    return (
        s.record is not None
        and s.keeps_line
        and not s.gained | s.lost
        and s.before.pending_kind is PendingKind.CLAIM
        and Flags.ALONE not in s.before.flags
        and s.after.pending_kind is PendingKind.NONE
        and (s.forced or (s.record.owner, s.record.generation) != (s.me, s.before.pending))
    )


def is_begun(s: Step) -> bool:
    """The generation of a right begins with the first write under it; the old one is a base."""
    before, after = s.before, s.after
    return (
        before.pending_kind is PendingKind.CLAIM
        and Flags.ALONE in before.flags
        and after.generation == before.pending
        and after.pending_kind is PendingKind.NONE
        and before.data_state is after.data_state is DataState.UPTODATE
        and before.generation in (*after.base, NO_GENERATION)
        and not s.gained | s.lost
    )


def is_joint_a(s: Step) -> bool:
    """Rule 9 (a): the right is gone, a joint generation is pending, the base names the old one."""
    before, after = s.before, s.after
    return (
        s.keeps_line
        and after.data_state not in UNUSABLE
        and after.pending_kind is PendingKind.JOINT
        and (s.fresh or s.keeps_pending)
        and not after.flags & RIGHTS
        and (before.pending in (*after.base, NO_GENERATION) or s.keeps_pending)
    )


def is_joint_c(s: Step) -> bool:
    """Rule 9 (c): after the source has given up its right, and after the record.

    The flush in between may take so long that the source has gone on from there.
    """
    return is_joined(s.after) and s.offered


def is_joint_d(s: Step) -> bool:
    """Rule 9 (d): the target has taken it before."""
    before, after, theirs = s.before, s.after, s.theirs
    return (
        is_joined(after)
        and before.pending_kind is PendingKind.JOINT
        and before.pending == after.generation
        and after.generation in (theirs.generation, *theirs.base, *theirs.history)
    )


def is_joined(sb: Superblock) -> bool:
    """What a node holds after it took a joint generation."""
    return (
        sb.data_state is DataState.UPTODATE
        and sb.pending_kind is PendingKind.NONE
        and not sb.base
        and not sb.flags & RIGHTS
    )


def is_written_off(s: Step) -> bool:
    """Rule 13: the target is no copy any more, whatever it had is a base."""
    before, after = s.before, s.after
    return (
        after.data_state is DataState.INCONSISTENT
        and before.generation == after.generation
        and after.pending_kind is PendingKind.NONE
        and before.pending in (*after.base, NO_GENERATION)
        and not after.flags & RIGHTS
        and s.theirs.data_state not in UNUSABLE
    )


def is_left(s: Step) -> bool:
    """Rule 16: outdated, while the one that stays is not."""
    return (
        s.before.data_state is DataState.UPTODATE
        and s.after.data_state is DataState.OUTDATED
        and s.before.generation == s.after.generation == s.theirs.generation
        and s.theirs.data_state is DataState.UPTODATE
        and s.keeps_pending
        and not s.gained
    )


def is_staying(s: Step) -> bool:
    """Rule 16: the stayer stores what it was told, and takes the right if it serves."""
    told = s.theirs.data_state is not DataState.UPTODATE
    serves = is_reserved(s) and s.gained == RIGHTS
    waits = s.keeps_line and s.keeps_pending and s.gained == Flags.PEER_OUTDATED
    return told and (serves or waits)


def is_split(s: Step) -> bool:
    """Rule 19: the side that waits after a split brain gives up its right as it records it."""
    return (
        Flags.SPLIT in s.after.flags
        and (s.record is None or s.forced)
        and s.keeps_line
        and s.keeps_pending
        and (s.lost == Flags.ALONE or (s.forced and bool(s.lost & Flags.ALONE)))
        and not s.gained
    )


def is_operator(s: Step) -> bool:
    """Rule 14: `discard` and `--force` do what they say."""
    after = s.after
    blank = after.data_state is DataState.BLANK and not after.flags & RIGHTS
    good = after.data_state is DataState.UPTODATE and Flags.ALONE in after.flags
    return s.forced and (blank or good)


STEPS: tuple[Callable[[Step], bool], ...] = (
    is_aside, is_base, is_claim, is_alone, is_won, is_given_up, is_begun, is_joint_a, is_joint_c,
    is_joint_d, is_written_off, is_left, is_staying, is_split,
    is_operator,
)  # fmt: skip


class Abstract:
    """Follows both superblocks and the record, event by event."""

    def __init__(self, hosts: tuple[Host, Host], arbiter: Arbiter | None, checker: Checker) -> None:
        self.hosts = hosts
        self.arbiter = arbiter
        self.checker = checker
        self.blocks = [host.sb for host in hosts]
        self.record = arbiter.held if arbiter is not None else None
        self.heard = {g for sb in self.blocks for g in (sb.generation, sb.pending)}
        self.joints: set[bytes] = set()
        # What a power cut may still bring back: a store that a kill cut short is in the cache only.
        self.unsure: list[Superblock | None] = [None, None]
        # Per node: what it has begun to store, by sequence, and what else was durable then.
        self.begun: tuple[dict[int, Begun], dict[int, Begun]] = ({}, {})
        # Per node that asked by way of the controllers: the one that stays, as it answered.
        self.stays: dict[int, Superblock] = {}
        # Joint generations that could be taken, and what the other one had when they last could.
        self.offers: dict[bytes, Superblock] = {}
        self.steps: list[Step] = []
        for host in hosts:
            host.on_begin = self.begins

    def counts(self) -> dict[str, int]:
        """How often each rule alone allowed a step: a rule without any is not needed."""
        alone = dict.fromkeys((rule.__name__ for rule in STEPS), 0)
        for step in self.steps:
            names = [rule.__name__ for rule in STEPS if rule(step)]
            if len(names) == 1:
                alone[names[0]] += 1
        return alone

    def answered(self, asker: int) -> None:
        """The peer of this node said that it stays."""
        self.stays[asker] = self.hosts[1 - asker].sb

    def step(self) -> None:
        """After each event: whether something durable changed."""
        for index in (0, 1):
            if self.hosts[index].sb is not self.blocks[index]:
                self.stored(index)
        if self.arbiter is not None and self.arbiter.held is not self.record:
            self.swapped(self.arbiter.held)

    def begins(self, index: int, superblock: Superblock) -> None:
        """A node begins to store a superblock; an earlier one of that number came to nothing."""
        theirs = self.hosts[1 - index].sb
        record = self.arbiter.held if self.arbiter is not None else None
        self.begun[index][superblock.sequence] = Begun(superblock, theirs, record)

    def stored(self, index: int) -> None:
        """A superblock changed."""
        before, after = self.blocks[index], self.hosts[index].sb
        self.blocks[index] = after
        unsure, is_down = self.unsure[index], self.hosts[index].is_silent
        if after == before or (is_down and after == unsure):
            return
        self.unsure[index] = before if is_down else None
        forced = self.checker.forced
        fresh = after.pending not in self.heard
        self.heard |= {after.generation, after.pending}
        if after.pending_kind is PendingKind.JOINT:
            self.joints.add(after.pending)
        begun = self.begun[index].get(after.sequence)
        if begun is None or begun.superblock != after:
            # Not a store, but what is found on the disk after a power cut.
            begun = Begun(after, self.hosts[1 - index].sb, self.record)
        theirs = begun.theirs
        if after.data_state is DataState.OUTDATED is not before.data_state:
            # The question and what follows from the answer are one step of the model's.
            said = self.stays.pop(index, theirs)
            # An answer of an earlier line came to nothing.
            theirs = said if said.generation == after.generation else theirs
        offered = self.offers.get(after.generation) == before
        step = Step(index, before, after, theirs, begun.record, forced, fresh, offered)
        self.steps.append(step)
        if not any(rule(step) for rule in STEPS):
            raise ViolationError(f"model: no step leads {'AB'[index]} there: {told(step)}")
        split = Flags.SPLIT in after.flags and Flags.SPLIT not in before.flags
        if split and self.arbiter is not None and not forced:
            raise ViolationError(f"B2: a split brain under an arbiter with a memory: {told(step)}")
        self.offer()
        node = self.hosts[index].node
        if node is not None:
            describe(node)

    def offer(self) -> None:
        """Parts (a) and (b) of a joint step are done, and nothing else was since."""
        for sb, theirs in (self.blocks, reversed(self.blocks)):
            if sb.pending_kind is not PendingKind.JOINT or sb.flags & RIGHTS:
                continue
            if self.record is None or (
                (self.record.generation, self.record.owner) == (sb.pending, NOBODY)
            ):
                self.offers[sb.pending] = theirs

    def swapped(self, after: Held) -> None:
        """The record changed: a claim from what it may be claimed from, or a joint step."""
        before, self.record = self.record, after
        assert before is not None
        assert self.arbiter is not None
        self.offer()
        if LOST in (before, after):
            # An empty store: nobody claims from that, and only a joint step ends it.
            if after is not LOST and after.owner != NOBODY and not self.checker.forced:
                raise ViolationError("model 11: a claim where no record was")
            return
        written_as_it_was = (after.generation, after.owner) == (before.generation, before.owner)
        if self.checker.forced or written_as_it_was:
            return
        if after.owner == NOBODY:
            # Perhaps late, when its node has dropped it again: the next joint step sets another.
            if after.generation not in self.joints:
                raise ViolationError("model 9b: the record is set to what was never joint")
            return
        sb = self.blocks[after.owner]
        if after.generation not in (sb.generation, sb.pending):
            raise ViolationError("model 11: the record takes a claim that was given up")
        mine = {sb.generation, *sb.history}
        from_base = Flags.PEER_OUTDATED in sb.flags and before.generation in sb.base
        if before.generation not in mine and before.owner != after.owner and not from_base:
            raise ViolationError("model 11: the record is claimed from a generation of the peer's")


def told(step: Step) -> str:
    """A step, for whoever has to find out why."""
    return " -> ".join(brief(sb) for sb in (step.before, step.after)) + (
        f"; peer {brief(step.theirs)}; record {brief_record(step.record)}"
    )


def brief(sb: Superblock) -> str:
    """One superblock in one line."""
    base = ",".join(g.hex()[:6] for g in sb.base)
    return (
        f"[{sb.data_state.name} {sb.generation.hex()[:6]} {sb.pending_kind.name}"
        f" {sb.pending.hex()[:6]} base({base}) {sb.flags!r}]"
    )


def brief_record(record: Held | None) -> str:
    """The record in one line."""
    return f"{record.generation.hex()[:6]} of {record.owner}" if record is not None else "none"
