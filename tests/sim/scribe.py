"""A simulated controller's hand at an arbiter with a memory.

Owns when which path of core/cluster/claiming.py is due, in the order of production's
nbdmirror/controller/scribe.py. Must never decide who serves.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nbdmirror.core.cluster.claiming import (
    Claimant,
    Read,
    State,
    Steps,
    Swap,
    confirms,
    standing_of,
    told,
)
from nbdmirror.core.cluster.view import Standing, Verdict
from nbdmirror.core.ports import Path
from nbdmirror.core.record import Record
from nbdmirror.errors import ArbiterError, NbdMirrorError, StaleCommandError
from tests.sim.arbiter import Arbiter, at_arbiter, read_record
from tests.sim.host import MIRROR_ID
from tests.sim.world import sleep

if TYPE_CHECKING:
    from tests.sim.conducted import Controller

FRESH_MS = 3_000
LOOK_MS = 250
READ_MS = 1_000
AGAIN_MS = 1_000
PROVE_MS = 60_000
NEVER_MS = -(10**9)


class Scribe:
    """One controller's. Without a memory it has nothing to do."""

    def __init__(self, controller: "Controller", arbiter: Arbiter | None) -> None:
        self._c = controller
        self._arbiter = arbiter
        self._claimant = Claimant(MIRROR_ID, controller.index + 1)
        self._busy = False
        self._read_ms = self._tried_ms = self._proven_ms = NEVER_MS
        self._told_reachable: bool | None = None
        self._answered = False
        self.record: Record | None = None
        self.record_reason = ""
        self.trouble = ""

    def standing(self) -> Standing:
        """Whom the record names, if it was read a moment ago."""
        state, record, now_ms = self._c.engine_state, self.record, self._c.world.now_ms
        if record is None or state is None or now_ms - self._read_ms > FRESH_MS:
            return Standing.UNREAD
        return standing_of(record, state, self._c.index + 1, 2 - self._c.index)

    # --- claims: steps of the policy --------------------------------------------------------------

    def claim(self) -> Path:
        """Go for the right; returns a verdict and a reason."""
        return (yield from self._decided(self._claimant.claim))

    def settle(self) -> Path:
        """End a claim that is not to be pursued."""
        return (yield from self._decided(self._claimant.settle))

    def force(self) -> Path:
        """Name this node in the record, whatever that holds."""
        if self._arbiter is not None:
            yield from self._decided(partial(self._claimant.make_good, forced_now=True))

    def _decided(self, path: Callable[[State], Steps]) -> Path:
        yield from self._take_turn()
        try:
            outcome = yield from self._drive(path(self._state()))
        except NbdMirrorError as error:
            self.trouble = str(error)
            return Verdict.UNKNOWN, str(error)
        finally:
            self._busy = False
        return (Verdict.UNASKED if outcome.won else Verdict.NO), outcome.reason

    def _take_turn(self) -> Path:
        while self._busy:
            yield (sleep, 20)
        self._busy = True

    # --- beside it --------------------------------------------------------------------------------

    def run(self) -> Path:
        """Look after the record."""
        while True:
            yield (sleep, LOOK_MS)
            pause_ms = AGAIN_MS if self.trouble else 0
            now_ms = self._c.world.now_ms
            if self._c.engine_state is None or now_ms - self._tried_ms < pause_ms:
                continue
            yield from self._take_turn()
            try:
                yield from self._look_after(self._state())
            except StaleCommandError:
                pass
            except NbdMirrorError as error:
                self.trouble = str(error)
                self._tried_ms = self._c.world.now_ms
                try:
                    yield from self._tell_engine(reachable=self._answered)
                except NbdMirrorError as refused:
                    self._c.note(f"the engine is not told of its arbiter: {refused}")
            finally:
                self._busy = False
            self._c.wake()

    def _look_after(self, state: State) -> Path:
        """What is due now: at most one thing. Raises NbdMirrorError."""
        now_ms = self._c.world.now_ms
        self._answered = False
        if state.get("question") == "record-joint":
            yield from self._drive(self._claimant.record_joint(state))
        elif not self._claimant.is_fresh:
            outcome = yield from self._drive(self._claimant.refresh(state))
            if not outcome.won:
                raise ArbiterError(outcome.reason)
        elif state.get("right_alone") or state.get("claim_unsettled"):
            if now_ms - self._read_ms < READ_MS:
                return
            yield from self._read()
            if self.record is not None and confirms(self.record, state, self._c.index + 1):
                yield from self._c.command("named", generation=self.record.generation.hex())
            if state.get("right_alone") and self.standing() is Standing.NOBODY:
                yield from self._drive(self._claimant.make_good(state))
        elif now_ms - self._proven_ms >= PROVE_MS or self.trouble:
            yield from self._read()
            self._proven_ms = now_ms
        else:
            return
        self.trouble = ""
        yield from self._tell_engine(reachable=True)

    def _read(self) -> Path:
        assert self._arbiter is not None
        yield from self._reach()
        held = yield from read_record(self._arbiter)
        self._answered = True
        if held is None:
            self.record = None
            raise ArbiterError("the store holds no record of this mirror")
        self._note(held.record)

    def _tell_engine(self, *, reachable: bool) -> Path:
        state = self._state()
        counter = self.record.counter if self.record is not None else 0
        seen = int(state.get("arbiter_counter", 0))
        if reachable == self._told_reachable and counter <= seen:
            return
        yield from self._c.command("seen", reachable=reachable, counter=max(counter, seen))
        self._told_reachable = reachable

    # --- driving ----------------------------------------------------------------------------------

    def _state(self) -> State:
        state = self._c.engine_state
        if state is None:
            raise ArbiterError("the engine of this node is not running")
        return state

    def _reach(self) -> Path:
        """The way from this node to the store."""
        yield from self._c.pair.slowly()
        if self._c.pair.is_far(self._c.index):
            raise ArbiterError("no way to the store")

    def _drive(self, steps: Steps) -> Path:
        assert self._arbiter is not None
        yield from self._reach()
        outcome = yield from at_arbiter(
            self._arbiter, self._noting(steps), self._reach, self._c.command
        )
        self._c.note(f"at the arbiter: {outcome.won}, {outcome.reason}")
        return outcome

    def _noting(self, steps: Steps) -> Any:
        """The same path; what it reads is remembered."""
        answer: Any = None
        error: NbdMirrorError | None = None
        while True:
            try:
                request = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as ended:
                return ended.value
            answer, error = None, None
            try:
                answer = yield request
            except NbdMirrorError as raised:
                error = raised
                continue
            self._take(request, answer)

    def _take(self, request: Any, answer: Any) -> None:
        if isinstance(request, Read):
            self._answered = True
            if answer is not None:
                self._note(answer.record)
        elif isinstance(request, Swap) and answer:
            self._note(request.record)

    def _note(self, record: Record) -> None:
        self.record, self._read_ms = record, self._c.world.now_ms
        self.record_reason = f"the arbiter's record names {told(record)}"
