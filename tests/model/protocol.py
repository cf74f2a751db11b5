"""The protocol of generations, record and joint step as a finite machine, walked through
completely.

Owns the machine: two nodes, one link, one arbiter's record, one block that is written a few times,
and a budget of cuts, crashes and leavings. Every order of events is a path through it. The
comparison of two nodes is not modelled but *called*: `decide` and `promotable` of production, so
that table and model cannot drift apart. Must never be cleverer than a node: a step may use what
that node durably knows, or what a message told it, not what the model knows.

A copy's content is the set of writes that it has seen, as a bit mask: `cache` is what a read would
return, `disk` what a power cut leaves. Three promises are bookkeeping beside the nodes:

- `joint`: acknowledged in PRIM/SECOND. Survives as long as not both nodes lost power since (`cut`).
- `solo[i]`: acknowledged while only node i promised anything. Node i's power cut may lose it,
  nothing else may; in particular no resync may overwrite it and, with a memory, nobody may serve
  without it.

Limits: a write reaches both nodes in one step, there is no read lease, no forcing, no damaged
metadata and no controller beside the engine; the simulator has those. Generations are small
integers, renamed after each step, so their number is bounded by what is still held by somebody.

`python -m tests.model` walks through the whole of one bound.
"""

from collections.abc import Callable, Iterator
from functools import partial

from nbdmirror.core.decide import Decision, DecisionKind, NodeView
from nbdmirror.core.superblock import DataState, PendingKind
from tests.model.rules import Rule, Violation
from tests.model.state import (
    LEADS,
    NO_SESSION,
    NOBODY,
    Node,
    Role,
    Stage,
    State,
    begun,
    blocked,
    both,
    canonical,
    change,
    compared,
    connected,
    cool_down,
    fenced,
    fresh,
    held,
    joined,
    parted,
    protected,
    view,
    with_node,
)

TWO_LINES = "one side wrote nothing"


class Model:
    """The steps that are possible in a state, under a set of rules."""

    def __init__(
        self, rules: frozenset[Rule], *, memory: bool, no_false_alarm: bool = False
    ) -> None:
        self.rules = rules
        self.memory = memory
        self.no_false_alarm = no_false_alarm  # only without crashes: a power cut forgets who wrote

    def initial(self, state: State) -> State:
        """The state under its canonical names."""
        return canonical(state)

    def steps(self, s: State) -> Iterator[tuple[str, State | str]]:
        """Every step: its label, and the state after it or the promise that it breaks."""
        if s.split:
            return
        trouble = self.trouble(s)
        if trouble:
            yield "and now", trouble
            return
        for label, step in self.offers(s):
            try:
                after = step()
            except Violation as violation:
                yield label, str(violation)
            else:
                if after is not None:
                    yield label, canonical(after)

    def trouble(self, s: State) -> str:
        """What must be true in every state, whatever comes next."""
        if not self.memory:
            return ""
        if s.source != NOBODY and s.stage is Stage.SETTLED and Rule.JOINT_STEP in self.rules:
            gens = {node.gen for node in s.nodes}
            if gens != {s.record} or s.owner != NOBODY:
                return "a pair in sync of which the record lets one node or none take over"
        if any(self.is_stranded(s, i) for i in (0, 1)):
            return "the only good copy may not go on, though its peer is outdated"
        return ""

    def is_stranded(self, s: State, i: int) -> bool:
        """Whether a restarted node that was told to stay has no step left to go on."""
        node = s.nodes[i]
        waits = node.up and node.role is Role.NONE and node.alone and node.peer_outdated
        if not waits or connected(s) or node.request != (0, 0):
            return False
        return self.claim(s, i) is None and self.resume(s, i) is None

    def offers(self, s: State) -> Iterator[tuple[str, Callable[[], State | None]]]:
        """Label and thunk of every step that may be possible; a thunk returns None if it is not."""
        if s.link and s.cuts:
            yield "cut", lambda: parted(s)._replace(link=False, cuts=s.cuts - 1)
        if not s.link:
            yield "heal", lambda: s._replace(link=True)
        for i in (0, 1):
            for name, step in (
                ("kill", self.kill), ("power", self.power), ("boot", self.boot),
                ("flush", self.flush), ("claim", self.claim), ("apply", self.apply),
                ("drop", self.drop), ("settle", self.settle), ("resume", self.resume),
                ("apply joint", self.apply_joint), ("drop joint", self.drop_joint),
                ("look late", self.look_late),
                ("go alone", self.go_alone), ("demote", self.demote), ("write", self.write),
                ("leave", self.leave), ("leave by word", self.leave_by_word),
                ("hear the word", self.hear),
            ):  # fmt: skip
                yield f"{name} {i}", partial(step, s, i)
        if connected(s):
            yield (
                ("contact", lambda: self.contact(s))
                if s.source == NOBODY
                else (f"session: {s.stage.name.lower()}", lambda: self.advance(s))
            )

    # Faults and the page cache.

    def kill(self, s: State, i: int) -> State | None:
        """The engine dies; the page cache survives."""
        node = s.nodes[i]
        if not node.up or not s.crashes:
            return None
        s = parted(s)
        node = self.forget_volatile(s.nodes[i])
        return with_node(s, i, node)._replace(crashes=s.crashes - 1)

    def power(self, s: State, i: int) -> State | None:
        """The node loses power: what was not flushed is gone."""
        node = s.nodes[i]
        if not s.crashes or not (node.up or node.cache != node.disk):
            return None
        s = parted(s)
        node = self.forget_volatile(s.nodes[i])._replace(cache=node.disk, lost_cache=True)
        after = with_node(s, i, node)._replace(
            crashes=s.crashes - 1,
            solo=both(s.solo, i, s.solo[i] & node.disk),
            cut=both(s.cut, i, s.cut[i] | s.joint),
        )
        if protected(after) & ~(after.nodes[0].cache | after.nodes[1].cache):
            raise Violation("a write acknowledged by both is gone")
        return after

    def forget_volatile(self, node: Node) -> Node:
        """What a restart forgets; without rule 11 that is also the claim that was sent."""
        node = node._replace(up=False, role=Role.NONE, met=False)
        if Rule.PENDING_FIRST not in self.rules and node.kind is PendingKind.CLAIM:
            node = node if node.alone else node._replace(pending=0, kind=PendingKind.NONE)
        return node

    def boot(self, s: State, i: int) -> State | None:
        """The engine starts, in no role."""
        return None if s.nodes[i].up else change(s, i, up=True)

    def flush(self, s: State, i: int) -> State | None:
        """The background flush; when both have flushed, the regions cool down."""
        node = s.nodes[i]
        if not node.up or node.cache == node.disk:
            return None
        after = change(s, i, disk=node.cache)
        if s.source != NOBODY and s.stage is Stage.SETTLED:
            after = cool_down(after)
        return after

    # The right to acknowledge.

    def view(self, i: int, node: Node) -> NodeView:
        """The node for the table: content and network left out, so that the cache works."""
        slim = node._replace(up=True, met=False, cache=0, disk=0, request=(0, 0))
        return view(i, slim, memory=self.memory)

    def may_lead(self, i: int, node: Node, *, linked: bool) -> bool:
        """Production's word on promotion; a node that is primary has it already."""
        if node.data is not DataState.UPTODATE:
            return False
        if Rule.REBOOT not in self.rules:
            node = node._replace(lost_cache=False)
        mine = self.view(i, node)
        return node.role is Role.PRIMARY or not blocked(mine, linked=linked, memory=self.memory)

    def claimable(self, s: State, i: int) -> bool:
        """Rule 11: the record holds this node's generation, or names it, or is in its base."""
        node = s.nodes[i]
        own = {node.gen} | ({node.pending} if node.kind is PendingKind.JOINT else set())
        from_base = node.peer_outdated and Rule.MAKE_GOOD in self.rules and s.record in node.base
        return s.record in own or s.owner == i or from_base

    def claim(self, s: State, i: int) -> State | None:
        """Store a generation and ask the arbiter for the right; or ask again for the same one."""
        node = s.nodes[i]
        if not self.memory or connected(s) or not node.up or node.request != (0, 0):
            return None
        if node.alone and (not node.peer_outdated or s.owner == i):
            return None
        if not self.may_lead(i, node, linked=False) or not self.claimable(s, i):
            return None
        if node.joint[1] and Rule.FENCE in self.rules:
            s = fenced(s)
            node = s.nodes[i]
        node = self.made_durable(node)
        if not node.alone and node.kind is not PendingKind.CLAIM:
            node = self.with_claim(s, node)
        wanted = node.pending or node.gen
        return with_node(s, i, node._replace(request=(s.record, wanted), met=False))

    def made_durable(self, node: Node) -> Node:
        """Rule 10."""
        return node._replace(disk=node.cache) if Rule.FLUSH_FIRST in self.rules else node

    def with_claim(self, s: State, node: Node) -> Node:
        """The node with a fresh generation pending.

        The target can hold the pending joint generation only if the record does, part (b) being
        before part (c): then it becomes this node's own, else it is forgotten.
        """
        wanted = Rule.KEEP_JOINT if s.record == node.pending else Rule.ONLY_RECORDED
        if node.kind is PendingKind.JOINT and (wanted is Rule.KEEP_JOINT) is (wanted in self.rules):
            node = node._replace(base=(*node.base, node.gen), gen=node.pending)
        return node._replace(pending=fresh(s), kind=PendingKind.CLAIM)

    def apply(self, s: State, i: int) -> State | None:
        """The arbiter executes a request, however late."""
        expected, wanted = s.nodes[i].request
        if not wanted:
            return None
        after = change(s, i, request=(0, 0))
        return after._replace(record=wanted, owner=i) if s.record == expected else after

    def drop(self, s: State, i: int) -> State | None:
        """A request is lost on its way."""
        return change(s, i, request=(0, 0)) if s.nodes[i].request[1] else None

    def apply_joint(self, s: State, i: int) -> State | None:
        """The arbiter executes part (b) of a joint step, however late."""
        expected, wanted = s.nodes[i].joint
        if not wanted:
            return None
        after = change(s, i, joint=(0, 0))
        return after._replace(record=wanted, owner=NOBODY) if s.record == expected else after

    def drop_joint(self, s: State, i: int) -> State | None:
        """The same, lost on its way."""
        return change(s, i, joint=(0, 0)) if s.nodes[i].joint[1] else None

    def look_late(self, s: State, i: int) -> State | None:
        """A controller that was told to do part (b) reads the record after that session's end."""
        node = s.nodes[i]
        ended = s.source != i or not connected(s)
        if Rule.ASKED_SINCE in self.rules or not (self.memory and node.up and ended):
            return None
        if node.kind is not PendingKind.JOINT or node.joint[1] or s.record == node.pending:
            return None
        return change(s, i, joint=(s.record, node.pending))

    def settle(self, s: State, i: int) -> State | None:
        """Read the record: it names this node, by whichever generation, or the claim is lost.

        A record that has not moved may still be taken by a request on its way: writing the same
        value again (with a higher counter) makes every such request fail.
        """
        node = s.nodes[i]
        if not self.memory or not node.up or node.kind is not PendingKind.CLAIM or node.alone:
            return None
        if s.source != NOBODY:
            return None
        if s.owner == i and (s.record == node.pending or Rule.NAMED_HAS_WON in self.rules):
            return self.served(change(s, i, alone=True, **LEADS), i)
        if self.claimable(s, i) and Rule.FENCE in self.rules:
            s = fenced(s)
        return change(s, i, pending=0, kind=PendingKind.NONE)

    def resume(self, s: State, i: int) -> State | None:
        """A node that durably was alone goes on after a restart, if nobody can have taken over."""
        node = s.nodes[i]
        if not node.up or not node.alone or node.role is Role.PRIMARY or connected(s):
            return None
        if self.memory and s.owner != i:
            return None
        return self.served(change(s, i, **LEADS), i)

    def go_alone(self, s: State, i: int) -> State | None:
        """Without a memory the right is taken at once."""
        node = s.nodes[i]
        if self.memory or connected(s) or not node.up or node.alone:
            return None
        if not self.may_lead(i, node, linked=False):
            return None
        node = self.made_durable(node)
        if node.kind is not PendingKind.JOINT:
            node = self.with_claim(s, node)
        return self.served(with_node(s, i, node._replace(alone=True, met=False, **LEADS)), i)

    def demote(self, s: State, i: int) -> State | None:
        """A frozen primary reads that the other node took over."""
        node = s.nodes[i]
        frozen = node.role is Role.PRIMARY and not node.alone and s.source == NOBODY
        return change(s, i, role=Role.NONE) if frozen and s.owner == 1 - i else None

    def served(self, s: State, i: int) -> State:
        """Whoever has the right to acknowledge alone must have what was acknowledged."""
        node = s.nodes[i]
        if protected(s) & ~node.cache:
            raise Violation("a node serves without a write that both had acknowledged")
        if self.memory and s.solo[1 - i] & ~node.cache:
            raise Violation("a node serves without what its peer acknowledged alone")
        return s

    # Writes and leaving.

    def write(self, s: State, i: int) -> State | None:
        """The next write of the client: by both, or by one that has the right."""
        node, other = s.nodes[i], s.nodes[1 - i]
        if not s.written or not node.up or node.role is not Role.PRIMARY:
            return None
        bit = 1 << (s.written - 1)
        s = s._replace(written=s.written - 1)
        if connected(s) and s.source == i and s.stage is Stage.SETTLED:
            s = change(s, i, cache=node.cache | bit, dirty=True)
            s = change(s, 1 - i, cache=other.cache | bit, dirty=True)
            return s._replace(joint=s.joint | bit)
        if s.source != NOBODY and (s.source != i or s.stage is Stage.COPYING):
            return None
        if s.source == NOBODY and not node.alone:
            return None
        if node.alone and self.memory and other.up and other.alone and other.role is Role.PRIMARY:
            raise Violation("two nodes acknowledge")
        if s.source == i:
            s = change(s, 1 - i, cache=other.cache | bit, dirty=True)
        node = begun(s, node)._replace(cache=node.cache | bit, dirty=True)
        return with_node(s, i, node)._replace(solo=both(s.solo, i, s.solo[i] | bit))

    def leave(self, s: State, i: int) -> State | None:
        """Ask, hear "I stay", be outdated; without the question a leaver just says so."""
        node = s.nodes[i]
        if not s.leaves or not node.up or node.data is not DataState.UPTODATE:
            return None
        asked = connected(s) and s.source != NOBODY and s.stage is Stage.SETTLED
        if Rule.QUESTION in self.rules and not asked:
            return None
        after = change(s, i, data=DataState.OUTDATED, role=Role.NONE, disk=node.cache)
        after = after._replace(leaves=s.leaves - 1, **NO_SESSION)
        return after._replace(word=1 - i) if asked else after

    def leave_by_word(self, s: State, i: int) -> State | None:
        """The controllers ask and tell for a dead engine, or for two without a channel.

        They may have a network that the engines do not have. Whoever stays has been in sync until
        now: it answers by what it remembers, not by what its metadata says.
        """
        node, other = s.nodes[i], s.nodes[1 - i]
        if not s.leaves or s.source != NOBODY or not other.up:
            return None
        if node.up and (node.role is Role.PRIMARY or not node.met):
            return None
        equal = node.gen == other.gen and not (node.alone or other.alone)
        plain = {node.kind, other.kind} == {PendingKind.NONE}
        good = {node.data, other.data} == {DataState.UPTODATE}
        if not (equal and plain and good and (other.met or Rule.SINCE not in self.rules)):
            return None
        after = change(s, i, data=DataState.OUTDATED, role=Role.NONE, met=False)
        return after._replace(leaves=s.leaves - 1, word=1 - i)

    def hear(self, s: State, i: int) -> State | None:
        """The stayer hears the word: flush, store it, go on with a generation of its own."""
        node = s.nodes[i]
        if s.word != i or not node.up or s.source != NOBODY or node.kind is not PendingKind.NONE:
            return None
        node = self.with_claim(s, self.made_durable(node))
        node = node._replace(peer_outdated=True, alone=True, met=False, **LEADS)
        return self.served(with_node(s, i, node)._replace(word=NOBODY), i)

    # Contact, resync and joint step.

    def contact(self, s: State) -> State | None:
        """Two nodes meet: production decides, and the session begins."""
        for i in (0, 1):
            node = s.nodes[i]
            if self.memory and node.kind is PendingKind.CLAIM and not node.alone:
                if Rule.RESOLVE_FIRST not in self.rules:
                    s = change(s, i, pending=0, kind=PendingKind.NONE)
                else:
                    return None  # settle first
        s = change(change(s, 0, met=False), 1, met=False)
        mine, theirs = (self.seen(i, s.nodes[i]) for i in (0, 1))
        decision = compared(mine, theirs)
        return self.follow(s._replace(word=NOBODY), decision)

    def seen(self, i: int, node: Node) -> NodeView:
        """The view for the comparison; without its rule a pending generation is not shown."""
        if Rule.PENDING_IS_MINE not in self.rules:
            node = node._replace(pending=0, kind=PendingKind.NONE)
        return self.view(i, node)

    def follow(self, s: State, decision: Decision) -> State:
        """Do what the decision says."""
        if decision.kind is DecisionKind.SPLIT_BRAIN and not self.memory:
            if self.no_false_alarm and 0 in s.solo:
                raise Violation("a split brain is reported though one side acknowledged nothing")
            return s._replace(split=True)
        if decision.source_is_mine is None or (self.memory and decision.row == TWO_LINES):
            # With a memory there never are two lines, also where the table finds a way out.
            raise Violation(f"the table has no way on: {decision.kind.name}, {decision.row}")
        source = 0 if decision.source_is_mine else 1
        if decision.kind is DecisionKind.REFUSE:
            return change(s, 1 - source, role=Role.NONE)
        lead, follower = s.nodes[source], s.nodes[1 - source]
        if self.may_lead(source, lead, linked=True):
            s = change(s, source, **LEADS)
        s = change(s, 1 - source, role=Role.SECONDARY, was_primary=False)
        if decision.kind in (DecisionKind.COPY_BY_MAP, DecisionKind.COPY_FULL):
            return self.write_off(s, source)
        if lead.cache != follower.cache:
            raise Violation("copies that differ are taken for equal")
        stage = Stage.SETTLED if decision.kind is DecisionKind.IN_SYNC else Stage.COPIED
        return s._replace(source=source, stage=stage)

    def write_off(self, s: State, source: int) -> State:
        """Rule 13: flush the source, then the target is no copy any more."""
        lead, target = s.nodes[source], s.nodes[1 - source]
        if target.cache & ~lead.cache & (protected(s) | s.solo[1 - source]):
            raise Violation("a resync overwrites an acknowledged write")
        if Rule.SOURCE_FLUSH in self.rules:
            lead = lead._replace(disk=lead.cache)
        base = tuple({*lead.base, *held(target)} - held(lead))
        s = with_node(s, source, lead._replace(base=base, dirty=True))
        s = change(
            s, 1 - source,
            data=DataState.INCONSISTENT, alone=False, peer_outdated=False,
            pending=0, kind=PendingKind.NONE,
        )  # fmt: skip
        return s._replace(source=source, stage=Stage.COPYING)

    def advance(self, s: State) -> State | None:
        """The next part of resync and joint step, each durable before the next."""
        lead, target = s.nodes[s.source], s.nodes[1 - s.source]
        step = {
            Stage.COPYING: self.copy,
            Stage.COPIED: self.give_up,
            Stage.GIVEN_UP: self.set_record,
            Stage.RECORDED: self.target_takes,
            Stage.TAKEN: self.source_takes,
        }.get(s.stage)
        return step(s, lead, target) if step is not None else None

    def copy(self, s: State, lead: Node, target: Node) -> State:
        """The last block has arrived and is flushed on the target."""
        target = target._replace(cache=lead.cache, disk=lead.cache)
        return with_node(s, 1 - s.source, target)._replace(stage=Stage.COPIED)

    def give_up(self, s: State, lead: Node, target: Node) -> State:
        """Part (a)."""
        if Rule.JOINT_STEP not in self.rules:
            return s._replace(stage=Stage.RECORDED)
        base, pending = lead.base, lead.pending
        if lead.kind is not PendingKind.JOINT or Rule.SAME_JOINT not in self.rules:
            base, pending = (*base, pending) if pending else base, fresh(s)
        lead = lead._replace(
            alone=False, peer_outdated=False, base=base, pending=pending, kind=PendingKind.JOINT
        )
        return with_node(s, s.source, lead)._replace(stage=Stage.GIVEN_UP)

    def set_record(self, s: State, lead: Node, target: Node) -> State | None:
        """Part (b): read the record, hear from the peer in this session, swap; then read again."""
        if not self.memory or (s.record, s.owner) == (lead.pending, NOBODY):
            return s._replace(stage=Stage.RECORDED)
        if Rule.RESEED not in self.rules and s.record not in held(lead):
            return None
        if lead.joint[1]:
            return None
        return change(s, s.source, joint=(s.record, lead.pending))

    def target_takes(self, s: State, lead: Node, target: Node) -> State:
        """Part (c)."""
        gen = lead.pending if Rule.JOINT_STEP in self.rules else lead.gen
        s = with_node(s, 1 - s.source, joined(target, gen)._replace(disk=target.cache))
        return s._replace(stage=Stage.TAKEN)

    def source_takes(self, s: State, lead: Node, target: Node) -> State:
        """Part (d); from here on both promise together what one of them had."""
        gen = lead.pending if Rule.JOINT_STEP in self.rules else lead.gen
        s = with_node(s, s.source, joined(lead, gen)._replace(**LEADS))
        if lead.cache != target.cache:
            raise Violation("a resync ends with copies that differ")
        safe = s.nodes[0].disk & s.nodes[1].disk
        s = s._replace(
            stage=Stage.SETTLED,
            joint=s.joint | s.solo[0] | s.solo[1],
            solo=(0, 0),
            cut=(s.cut[0] & ~safe, s.cut[1] & ~safe),
        )
        return cool_down(s)
