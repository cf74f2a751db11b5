"""What a node does at an arbiter with a memory, request by request. The long orders of events are
the simulator's, which drives the same paths.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import pytest

from nbdmirror.core.cluster.claiming import Claimant, Command, Outcome, Read, Request, Steps, Swap
from nbdmirror.core.record import NOBODY, Held, Record
from nbdmirror.errors import ArbiterError, NbdMirrorError, RefusedError, StaleCommandError

MIRROR: Final = bytes(range(16))
ME: Final = 1
PEER: Final = 2
OLD, MINE, THEIRS, JOINT = (bytes([n]) * 16 for n in (1, 2, 3, 4))
LOST: Final = ArbiterError("no answer")


class Store:
    """A record, and an engine that reserves MINE. What goes wrong is listed, request by request."""

    def __init__(self, record: Record | None, *wrong: NbdMirrorError | None) -> None:
        self.record = record
        self.wrong: Iterator[NbdMirrorError | None] = iter(wrong)
        self.requests: list[Request] = []
        self.late: list[Swap] = []
        self.holds = [OLD.hex()]

    def run(self, steps: Steps) -> Outcome:
        """Drive a path."""
        answer: Any = None
        error: NbdMirrorError | None = None
        while True:
            try:
                request = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as ended:
                outcome: Outcome = ended.value
                return outcome
            self.requests.append(request)
            answer, error = None, next(self.wrong, None)
            if error is None:
                answer = self.answer(request)
            elif isinstance(request, Swap):
                self.late.append(request)

    def answer(self, request: Request) -> Any:
        """As store and engine would."""
        if isinstance(request, Read):
            return None if self.record is None else Held(str(self.record.counter), self.record)
        if isinstance(request, Swap):
            return self.apply(request)
        return {"generation": MINE.hex(), "record_holds": self.holds}

    def apply(self, swap: Swap) -> bool:
        """Whether the condition held."""
        found = None if self.record is None else str(self.record.counter)
        if found != (None if swap.held is None else swap.held.version):
            return False
        self.record = swap.record
        return True

    def told(self) -> list[tuple[str, bool | None]]:
        """The commands, each with how it ended for the engine."""
        return [(r.name, r.args.get("won")) for r in self.requests if isinstance(r, Command)]  # type: ignore[misc]


def state(**fields: Any) -> dict[str, Any]:
    """An engine that is up to date, under OLD."""
    return {
        "generation": OLD.hex(), "pending": "", "base": [], "history": [], "forced_over": "",
        "record_holds": [OLD.hex()], "arbiter_counter": 5, "claim_unsettled": False, **fields,
    }  # fmt: skip


def record(counter: int = 5, generation: bytes = OLD, owner: int = NOBODY, **more: Any) -> Record:
    """A record of this mirror."""
    return Record(MIRROR, counter, generation, owner, **more)


def fresh() -> Claimant:
    """A controller that has settled everything of its earlier lives."""
    made = Claimant(MIRROR, ME)
    assert Store(record()).run(made.refresh(state())).won
    assert made.is_fresh
    return made


def test_a_claim_is_read_reserved_and_swapped() -> None:
    """Breaks in the field: nobody takes over; or the record names a generation that no node has."""
    store = Store(record())
    assert store.run(fresh().claim(state())).won
    assert store.record == record(6, MINE, ME)
    assert [type(r) for r in store.requests] == [Read, Command, Swap, Command]
    assert store.told() == [("claim", None), ("claimed", True)]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (record(6, THEIRS, PEER), "names node 2"),
        (record(6, THEIRS), "names nobody"),
        (record(6, OLD, PEER), "names node 2"),
        (record(6, moved=True), "moved to another arbiter"),
        (None, "lost it"),
    ],
    ids=["theirs", "unknown", "theirs-of-old", "moved", "lost"],
)
def test_what_a_record_does_not_let_is_not_claimed(held: Record | None, words: str) -> None:
    """Breaks in the field: a node that lacks writes takes over."""
    store = Store(held)
    outcome = store.run(fresh().claim(state()))
    assert not outcome.won
    assert words in outcome.reason
    assert store.record == held
    assert ("claimed", True) not in store.told()


def test_the_peer_is_faster() -> None:
    """Breaks in the field: both nodes believe that they won."""
    store = Store(record())
    steps = fresh().claim(state())
    assert isinstance(next(steps), Read)
    assert isinstance(steps.send(store.answer(Read())), Command)
    swap = steps.send({"generation": MINE.hex(), "record_holds": [OLD.hex()]})
    assert isinstance(swap, Swap)
    store.record = record(6, THEIRS, PEER)
    assert isinstance(steps.send(store.apply(swap)), Read)
    ended = steps.send(store.answer(Read()))
    assert isinstance(ended, Command)
    assert ended.args["won"] is False


def test_a_proof_of_the_peer_is_no_claim_of_it() -> None:
    """Breaks in the field: the peer proves each minute that it could claim, and a primary whose
    claim met that steps back with nobody to take over.
    """
    store = Store(record())
    steps = fresh().claim(state())
    request = next(steps)
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(request, Swap) and not store.requests:
                store.requests.append(request)
                request = steps.send(False)
            else:
                request = steps.send(store.answer(request))
    assert store.record is not None
    assert store.record.names(ME, MINE)


def test_no_answer_is_no_no() -> None:
    """Breaks in the field: the claim was done, its answer was lost, and nobody serves."""
    claimant, store = fresh(), Store(record(), None, None, LOST)
    with pytest.raises(ArbiterError):
        store.run(claimant.claim(state()))
    assert store.told() == [("claim", None)], "nothing is settled"
    store.apply(store.late[0])
    again = state(claim_unsettled=True, pending=MINE.hex(), record_holds=[OLD.hex()])
    assert store.run(claimant.claim(again)).won
    assert store.record is not None
    assert store.record.names(ME, MINE)


def test_what_is_still_on_its_way_comes_too_late() -> None:
    """Breaks in the field: a swap that was given up a minute ago is done now, and undoes what was
    decided since.
    """
    claimant, store = fresh(), Store(record(), None, None, LOST)
    with pytest.raises(ArbiterError):
        store.run(claimant.record_joint(state(pending=JOINT.hex())))
    store.requests.clear()
    assert store.run(claimant.claim(state())).won
    assert [type(r) for r in store.requests][:3] == [Read, Swap, Read], "written as it is, first"
    assert not store.apply(store.late[0])


def test_each_life_begins_with_a_fence() -> None:
    """Breaks in the field: what the controller that was killed had sent is done after all."""
    claimant, store = Claimant(MIRROR, ME), Store(record())
    assert not claimant.is_fresh
    before = Swap(Held("5", record()), record(6, JOINT))
    assert store.run(claimant.claim(state())).won
    assert not store.apply(before)
    assert store.record == record(7, MINE, ME)


def test_a_store_that_was_set_back_is_not_believed() -> None:
    """Breaks in the field: the etcd comes out of a backup, and the node that lacks the last hour
    goes on by its word.
    """
    for path in (fresh().claim, fresh().settle, fresh().make_good, fresh().refresh):
        with pytest.raises(ArbiterError, match="set back"):
            Store(record(4)).run(path(state()))


def test_the_engine_may_be_busy() -> None:
    """Breaks in the field: a claim that came a moment too early makes a primary step back."""
    with pytest.raises(RefusedError):
        Store(record(), None, RefusedError("the peer is connected")).run(fresh().claim(state()))
    unsettled = state(claim_unsettled=True, pending=MINE.hex())
    store = Store(record(), None, StaleCommandError("another change is under way"))
    with pytest.raises(StaleCommandError):
        store.run(fresh().claim(unsettled))
    assert store.told() == [("claim", None)]


def test_a_claim_that_can_not_be_pursued_is_settled() -> None:
    """Breaks in the field: the disk fails while a claim is on its way; the node refuses its peer
    for ever, because the claim is not settled.
    """
    store = Store(record(), None, RefusedError("its disk failed a flush"))
    unsettled = state(claim_unsettled=True, pending=MINE.hex())
    outcome = store.run(fresh().claim(unsettled))
    assert not outcome.won
    assert "disk" in outcome.reason
    assert store.told()[-1] == ("claimed", False)


def test_a_claim_is_given_up_only_when_it_can_not_be_done_any_more() -> None:
    """Breaks in the field: a node meets its peer while its claim is on its way."""
    claimant, store = fresh(), Store(record(), None, None, LOST)
    with pytest.raises(ArbiterError):
        store.run(claimant.claim(state()))
    assert not store.run(claimant.settle(state(claim_unsettled=True, pending=MINE.hex()))).won
    assert store.told()[-1] == ("claimed", False)
    assert not store.apply(store.late[0])


def test_a_claim_that_was_done_is_not_given_up() -> None:
    """Breaks in the field: the record names this node, this node does not know it, and nobody can
    take over any more.
    """
    store = Store(record(6, MINE, ME))
    assert store.run(fresh().settle(state(claim_unsettled=True, pending=MINE.hex()))).won
    assert store.told() == [("claimed", True)]


def test_a_claim_of_the_peer_is_not_overwritten_by_a_late_joint_step() -> None:
    """Breaks in the field: the cable goes while the joint step asks a slow store; the peer claims
    and serves, and the joint step takes the record from it: both serve.
    """
    store = Store(record(9, THEIRS, PEER))
    steps = fresh().record_joint(state(pending=JOINT.hex()))
    assert next(steps) == Read()
    asked = steps.send(store.answer(Read()))
    assert asked == Command("confirm-joint", {"generation": JOINT.hex()})
    with pytest.raises(RefusedError, match="the session ended"):
        steps.throw(RefusedError("the session ended"))
    assert store.record == record(9, THEIRS, PEER)


def test_a_record_that_was_moved_stays_so() -> None:
    """Breaks in the field: a controller that starts with the old file opens the old record again;
    each node is let go on by a store of its own.
    """
    store = Store(record(9, moved=True))
    assert store.run(Claimant(MIRROR, ME).refresh(state())).won
    assert store.record is not None
    assert store.record.moved
    # Closed by the peer between the look and the swap.
    claimant, store = fresh(), Store(record())
    steps = claimant.claim(state())
    request, outcome = next(steps), None
    while outcome is None:
        if isinstance(request, Swap):
            store.record = record(6, moved=True)
        try:
            request = steps.send(store.answer(request))
        except StopIteration as ended:
            outcome = ended.value
    assert not outcome.won
    assert store.record == record(6, moved=True)


@pytest.mark.parametrize("held", [record(), record(2, THEIRS, PEER), record(9, moved=True), None])
def test_the_joint_generation_is_recorded_over_whatever_is_there(held: Record | None) -> None:
    """Breaks in the field: a store that lost the record, or was set back, never gets it again."""
    store = Store(held)
    assert store.run(Claimant(MIRROR, ME).record_joint(state(pending=JOINT.hex()))).won
    assert store.record is not None
    assert (store.record.generation, store.record.owner) == (JOINT, NOBODY)
    assert store.record.counter > 5, "above what was seen"
    assert not store.record.moved
    assert [type(r) for r in store.requests] == [Read, Command, Swap, Command]
    assert store.told() == [("confirm-joint", None), ("recorded", None)]


def test_a_joint_generation_that_is_there_is_not_written_again() -> None:
    """Breaks in the field: each question raises the counter, and no claim ever fits."""
    store = Store(record(6, JOINT))
    assert store.run(fresh().record_joint(state(pending=JOINT.hex()))).won
    assert not any(isinstance(each, Swap) for each in store.requests)


def test_a_right_that_came_by_word_is_made_good() -> None:
    """Breaks in the field: the peer has left by its word, the record still names both, and after a
    restart this node has no right.
    """
    store = Store(record())
    alone = state(pending=MINE.hex(), right_alone=True)
    assert store.run(fresh().make_good(alone)).won
    assert store.record == record(6, MINE, ME)


@pytest.mark.parametrize("held", [record(6, THEIRS, PEER), record(6, moved=True), None])
def test_a_right_is_not_made_good_over_what_is_not_known(held: Record | None) -> None:
    """Breaks in the field: two nodes fight for the record, each with writes of its own."""
    store = Store(held)
    assert not store.run(fresh().make_good(state(pending=MINE.hex(), right_alone=True))).won
    assert store.record == held


@pytest.mark.parametrize("held", [record(6, THEIRS, PEER), record(6, moved=True), record(2), None])
def test_force_replaces_whatever_is_there(held: Record | None) -> None:
    """Breaks in the field: the owner is gone for good, and an operator cannot do anything."""
    store = Store(held)
    forced = state(pending=MINE.hex(), right_alone=True, forced_over=OLD.hex())
    assert store.run(fresh().make_good(forced, forced_now=True)).won
    assert store.record is not None
    assert store.record.names(ME, MINE)
    assert store.record.counter > 5
