"""What a node does at an arbiter with a memory: claim, settle, make good, record (rules 9, 11, 21).

Each is a path: a generator that yields one request (`Read`, `Swap`, or a `Command` for the engine
of this node), and is sent the answer, or thrown the error. Production and simulator drive the same
paths. A path is short and may be broken off anywhere: it is begun again with what the engine and
the record say then, and comes to the same end.

    claim           read, reserve a generation in the engine, swap, and if the answer is not a clear
                    yes, read: a record that names this node and its generation was won
    settle          end a claim that is not to be pursued any more
    record_joint    part (b) of the joint step: read, hear from the peer, swap: nobody is named
    refresh         nothing that an earlier life sent can still change the record
    move_away, move_in   the mirror gets another arbiter: the old record, the new one
    make_good       the right was given by the peer's word or by force; the record says so, too

**What may still arrive.** A swap without a clear answer may be applied long after it was given up:
the store has it in a queue, or the kernel of this host has. It can do so only while the store holds
the version that it was conditional on. So before something else is decided from the very same
version (`fence`), the record is written as it is: it has another version then, and whatever is on
its way comes too late. What an earlier life of this controller has sent nobody knows, so the first
decision of each life begins with a fence.

Must never repeat a swap, or take a time-out for a no.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from nbdmirror.core.cluster.view import Standing
from nbdmirror.core.record import NOBODY, Held, Record
from nbdmirror.errors import ArbiterError, RefusedError, StaleCommandError

State: TypeAlias = Mapping[str, Any]
EARLIER_LIFE: Final = "?"
TRIES_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class Read:
    """Answered with a Held, or None; ArbiterError."""


@dataclass(frozen=True, slots=True)
class Swap:
    """Answered with True or False; ArbiterError: not known."""

    held: Held | None
    record: Record


@dataclass(frozen=True, slots=True)
class Command:
    """Answered with what the engine says; RefusedError."""

    name: str
    args: dict[str, object] = field(default_factory=dict)


Request: TypeAlias = Read | Swap | Command
Steps: TypeAlias = Generator[Request, Any, "Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a path ended: whether this node has what it went for, and a sentence."""

    won: bool
    reason: str


class Claimant:
    """One life of a controller at the arbiter of its mirror."""

    def __init__(self, mirror_id: bytes, node_id: int) -> None:
        self._mirror_id = mirror_id
        self._me = node_id
        # The version that an unsettled swap is conditional on; EARLIER_LIFE: nobody knows.
        self._in_doubt: str | None = EARLIER_LIFE

    # --- the paths -----------------------------------------------------------------------

    def claim(self, state: State) -> Steps:
        """Go for the right to acknowledge alone, as far as the record lets this node.

        Raises:
            ArbiterError: no clear answer; begin again. RefusedError: the engine cannot now.
        """
        held = usable((yield Read()), state)
        if held is None:
            return missing(state)
        if held.record.moved:
            return Outcome(False, MOVED)
        held = yield from self._fence(held)
        try:
            prepared = yield Command("claim", noted(held, generation=held.record.generation.hex()))
        except StaleCommandError:
            raise  # a moment later it may be done
        except RefusedError as refusal:
            allowed = self._may_claim(held.record, [*state["record_holds"], str(state["pending"])])
            why = str(refusal) if allowed else f"the record names {told(held.record)}"
            if state.get("claim_unsettled"):
                # Nothing else would: until it is settled this node meets nobody.
                return (yield from self._end(held, state, why))
            if allowed:
                raise
            return Outcome(False, why)
        wanted = bytes.fromhex(prepared["generation"])
        return (yield from self._take(held, wanted, prepared["record_holds"]))

    def settle(self, state: State) -> Steps:
        """End a claim of an earlier moment that this node may not or need not pursue.

        Raises:
            ArbiterError: no clear answer; begin again. RefusedError: the engine cannot now.
        """
        held = usable((yield Read()), state)
        if held is None:
            return missing(state)
        return (yield from self._end(held, state, "the claim is not pursued any more"))

    def record_joint(self, state: State) -> Steps:
        """Set the record to the joint generation that the engine asks for.

        Over whatever it holds: a claim of the peer that this node never heard of is one that it
        gave up in this session. To know that, the peer has to answer in it after the record was
        read; a question of a session that has ended is old, and the peer may have claimed since.

        Raises:
            ArbiterError: no clear answer; begin again. RefusedError: the engine asks no more.
        """
        joint = bytes.fromhex(str(state["pending"]))
        held = yield Read()
        record = held.record if held is not None else None
        behind = record is not None and record.counter < int(state.get("arbiter_counter", 0))
        if record is None or behind or (record.generation, record.owner) != (joint, NOBODY):
            yield Command("confirm-joint", {"generation": joint.hex()})
            record = self._after(record, state, joint, NOBODY)
            if not (yield from self._swap(held, record)):
                return Outcome(False, "the record changed meanwhile")
        yield Command("recorded", {"generation": joint.hex(), "counter": record.counter})
        return Outcome(True, "the record names both nodes' generation")

    def make_good(self, state: State, *, forced_now: bool = False) -> Steps:
        """Write into the record that this node has the right, which it got without it.

        `forced_now`: an operator forces it at this very moment, so whatever the record holds is
        replaced (rule 14). Later only what this node knows of is.

        Raises:
            ArbiterError: no clear answer; begin again. RefusedError: the engine cannot now.
        """
        held = yield Read()
        if not forced_now and usable(held, state) is None:
            return missing(state)
        record = held.record if held is not None else None
        prepared = yield Command("claim", {"generation": mine_of(state).hex()})
        wanted = bytes.fromhex(prepared["generation"])
        if record is None or not record.names(self._me, wanted):
            mine = record is not None and record.owner == self._me and not record.moved
            if record is not None and not (forced_now or mine or is_known(record, state)):
                return Outcome(False, f"the record names {told(record)}, which is not known here")
            record = self._after(record, state, wanted, self._me)
            if not (yield from self._swap(held, record)):
                return Outcome(False, "the record changed meanwhile")
        yield from claimed(wanted, record, won=True)
        return Outcome(True, "the record names this node")

    def move_away(self, state: State, *, in_sync: bool) -> Steps:
        """Let nobody claim from this record any more: the mirror has another one from now on.

        Raises:
            ArbiterError: no clear answer; begin again.
        """
        held = yield Read()
        if held is not None and held.record.moved:
            return Outcome(True, "it says so already")
        if not in_sync:
            return Outcome(False, "the nodes are not in sync, and the record still counts")
        record = held.record if held is not None else None
        generation = bytes.fromhex(str(state["generation"]))
        if record is not None and (record.owner, record.generation) != (NOBODY, generation):
            return Outcome(False, f"the record names {told(record)}; both have to share it first")
        closed = replace(self._after(record, state, generation, NOBODY), moved=True)
        done = yield from self._swap(held, closed)
        return Outcome(done, "the record is closed" if done else "the record changed meanwhile")

    def move_in(self, state: State, *, in_sync: bool, peer_asks: bool) -> Steps:
        """Make the record in a store that the mirror moves to; it has no owner.

        `peer_asks`: the peer asks this store already, so its record is the one that counts, whoever
        owns it. Else whatever an earlier life has left there is replaced, while both are in sync.

        Raises:
            ArbiterError: no clear answer; begin again.
        """
        held = yield Read()
        generation = bytes.fromhex(str(state["generation"]))
        record = held.record if held is not None else None
        if peer_asks:
            there = record is not None and not record.moved
            return Outcome(there, "it is there" if there else "the peer's record is not there")
        if not in_sync:
            return Outcome(False, "the nodes are not in sync")
        if record is not None and (record.owner, record.generation, record.moved) == (
            NOBODY, generation, False,
        ):  # fmt: skip
            return Outcome(True, "it is there")
        counter = record.counter + 1 if record is not None else 1
        made = Record(self._mirror_id, counter, generation, NOBODY)
        done = yield from self._swap(held, made)
        return Outcome(done, "it is made" if done else "somebody else made it; type it again")

    def refresh(self, state: State) -> Steps:
        """Make sure that no earlier life of this controller can still change the record.

        Raises:
            ArbiterError: no clear answer; begin again.
        """
        held = usable((yield Read()), state)
        if held is None:
            return missing(state)
        yield from self._fence(held)
        return Outcome(True, "nothing of an earlier life is on its way")

    @property
    def is_fresh(self) -> bool:
        """Whether every swap of this and every earlier life is settled."""
        return self._in_doubt is None

    # --- their parts --------------------------------------------------------------------------

    def _take(self, held: Held, wanted: bytes, holds: list[str]) -> Steps:
        """Swap, and again where the record was written as it is meanwhile: the peer's proof."""
        record = held.record
        for _ in range(TRIES_MAX):
            if record.names(self._me, wanted) or not self._may_claim(record, holds):
                break
            if (yield from self._swap(held, record.next(wanted, self._me))):
                record = record.next(wanted, self._me)
                break
            now = yield Read()
            if now is None:
                raise ArbiterError("the record was removed while it was being claimed")
            held, record = now, now.record
        else:
            raise ArbiterError("the record is written again and again by somebody else")
        won = record.names(self._me, wanted)
        yield from claimed(wanted, record, won=won)
        return Outcome(won, f"the record names {'this node' if won else told(record)}")

    def _may_claim(self, record: Record, holds: list[str]) -> bool:
        """Rule 11: the record names this node by an older claim, or a generation that it holds."""
        if record.moved:
            return False
        if record.owner == self._me:
            return True
        return record.owner == NOBODY and record.generation.hex() in holds

    def _end(self, held: Held, state: State, why: str) -> Steps:
        """Settle what is pending, after which nothing of it can be applied any more."""
        pending = bytes.fromhex(str(state["pending"]))
        if not held.record.names(self._me, pending):
            held = yield from self._fence(held, always=True)
        won = held.record.names(self._me, pending)
        yield from claimed(pending, held.record, won=won)
        return Outcome(won, "the record names this node" if won else why)

    def _fence(self, held: Held, *, always: bool = False) -> Generator[Request, Any, Held]:
        """Returns what is held once nothing that was sent before can be applied any more."""
        if not always and self._in_doubt not in (held.version, EARLIER_LIFE):
            self._in_doubt = None
            return held
        record = held.record
        as_it_is = record.next(record.generation, record.owner, moved=record.moved)
        yield from self._swap(held, as_it_is)
        now: Held | None = yield Read()
        if now is None:
            raise ArbiterError("the record was removed while it was being written")
        return now

    def _swap(self, held: Held | None, record: Record) -> Generator[Request, Any, bool]:
        """A swap; its condition is in doubt until there is a clear answer."""
        self._in_doubt = held.version if held is not None else ""
        done = bool((yield Swap(held, record)))
        self._in_doubt = None
        return done

    def _after(self, record: Record | None, state: State, generation: bytes, owner: int) -> Record:
        """What follows the record; with a counter above every one that was seen."""
        seen = int(state.get("arbiter_counter", 0))
        counter = max(seen, record.counter if record is not None else 0) + 1
        return Record(self._mirror_id, counter, generation, owner)


MOVED: Final = (
    "the record says that the mirror was moved to another arbiter, and this node still asks this "
    "one: put the new one into the configuration file and type `nbdmirror arbiter move` here"
)


def usable(held: Held | None, state: State) -> Held | None:
    """What was read, unless the store was set back (rule 21). Raises ArbiterError: it was."""
    require_not_set_back(held.record if held is not None else None, state)
    return held


def require_not_set_back(record: Record | None, state: State) -> None:
    """Raises ArbiterError: both nodes may have seen more than the store knows (rule 21)."""
    seen = int(state.get("arbiter_counter", 0))
    if record is not None and record.counter < seen:
        raise ArbiterError(
            f"the record has counter {record.counter}, and {seen} was seen before: the store was "
            "set back, and nobody claims from it; `nbdmirror resync` in sync makes it anew"
        )


def missing(state: State) -> Outcome:
    """There is no record. One that was there before is not made anew by one node (rule 21)."""
    seen = int(state.get("arbiter_counter", 0))
    return Outcome(
        False,
        "the store holds no record of this mirror"
        + (f", and one with counter {seen} was seen before: the store lost it" if seen else ""),
    )


def claimed(generation: bytes, record: Record, *, won: bool) -> Generator[Request, Any, None]:
    """Tell the engine how it ended."""
    args = {"generation": generation.hex(), "won": won, "counter": record.counter}
    yield Command("claimed", args)


def noted(held: Held, **args: object) -> dict[str, object]:
    """Arguments of a command, with the counter that goes with them."""
    return {**args, "counter": held.record.counter}


def mine_of(state: State) -> bytes:
    """The generation that this node has the right under: the reserved one until it begins."""
    return bytes.fromhex(str(state.get("pending") or state.get("generation") or "00" * 16))


def is_known(record: Record, state: State) -> bool:
    """Whether this node ever held the record's generation, or knows its peer to hold it."""
    names = ("generation", "pending", "forced_over")
    lists = ("base", "history", "record_holds")
    one_by_one = {str(state.get(name, "")) for name in names}
    known = one_by_one.union(*(set(state.get(name, ())) for name in lists))
    return not record.moved and record.generation.hex() in known


def standing_of(record: Record, state: State, node_id: int, peer_id: int) -> Standing:
    """Whom the record names, for the node whose engine is in `state`."""
    if record.names(node_id, mine_of(state)):
        return Standing.MINE
    # An operator forced this node over what it knows: that is to be replaced (rule 14).
    replaces = bool(state.get("forced_over")) and is_known(record, state)
    return Standing.PEER if record.owner == peer_id and not replaces else Standing.NOBODY


def confirms(record: Record, state: State, node_id: int) -> bool:
    """Whether the record settles what metadata that had to fall back leave open (rule 7)."""
    has_right = bool(state.get("right_alone")) and bool(state.get("fell_back"))
    return has_right and record.names(node_id, mine_of(state))


def told(record: Record) -> str:
    """The record in a few words."""
    who = f"node {record.owner}" if record.owner != NOBODY else "nobody"
    moved = ", moved to another arbiter" if record.moved else ""
    return (
        f"{who}, with generation {record.generation.hex()[:8]} and counter {record.counter}{moved}"
    )
