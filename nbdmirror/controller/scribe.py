"""A node's hand at an arbiter with a memory: reads, claims, keeps the record true, proves its way.

Drives the paths of core/cluster/claiming.py: a `Read` and a `Swap` go to the store, a `Command` to
the engine. One path at a time. Claims are steps of the policy; everything else goes on beside it,
so that neither the application nor the probe waits for a store: the joint step's part, the record
of a right that the peer's word gave, the look once a second of a node that is alone (rule 14), and
the proof once a minute that this node could claim (rule 21). Must never decide who serves.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.arbiters.choose import open_store
from nbdmirror.arbiters.port import Held, RecordStore
from nbdmirror.controller.heart import boottime_ms
from nbdmirror.core.cluster.claiming import (
    MOVED,
    Claimant,
    Outcome,
    Read,
    State,
    Steps,
    Swap,
    confirms,
    require_not_set_back,
    standing_of,
    told,
)
from nbdmirror.core.cluster.view import Standing, Verdict
from nbdmirror.core.record import NOBODY, Record
from nbdmirror.errors import ArbiterError, NbdMirrorError, RefusedError, StaleCommandError

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

FRESH_MS: Final = 3_000
LOOK_S: Final = 0.25
READ_MS: Final = 1_000
PROVE_MS: Final = 60_000
AGAIN_MS: Final = 1_000


class Scribe:
    """One controller's. Without a memory it has nothing to do."""

    def __init__(self, conductor: "Conductor", mirror_id: bytes) -> None:
        self._c = conductor
        self.mirror_id = mirror_id
        config = conductor.config
        memory = config.arbiter.has_memory
        self._store: RecordStore | None = open_store(config, mirror_id) if memory else None
        self._claimant = Claimant(mirror_id, config.me.id)
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._proof: asyncio.Task[Held] | None = None
        self._deciding = 0
        self._known = False
        self._tried_ms = float("-inf")
        self._read_ms = float("-inf")
        self._proven_ms = float("-inf")
        self._told_reachable = ("", True)
        # Whether the store said anything this time: also one that lost the record can be written.
        self._answered = False
        # An operator's force of this life that the record does not show yet (rule 14).
        self._force_is_open = False
        self.record: Record | None = None
        self.record_reason = ""
        self.trouble = ""

    # --- for the view and the status ------------------------------------------------------------

    def standing(self) -> Standing:
        """Whom the record names, if it was read a moment ago."""
        state, record = self._c.engine_state, self.record
        if record is None or state is None or boottime_ms() - self._read_ms > FRESH_MS:
            return Standing.UNREAD
        if record.counter < int(state.get("arbiter_counter", 0)):
            return Standing.UNREAD  # the store was set back: it says nothing
        if self._force_is_open:
            return Standing.NOBODY
        return standing_of(record, state, self._c.config.me.id, self._c.config.peer.id)

    def facts(self) -> dict[str, Any]:
        """For `status`; without secrets."""
        if self._store is None:
            return {}
        now_ms, record = boottime_ms(), self.record
        return {
            "where": self._store.where,
            "trouble": self.trouble,
            "proven_s": ago_s(now_ms, self._proven_ms),
            "read_s": ago_s(now_ms, self._read_ms),
            "record": None
            if record is None
            else {
                "owner": self._name_of(record.owner),
                "generation": record.generation.hex(),
                "counter": record.counter,
                "moved": record.moved,
            },
        }

    def _name_of(self, node_id: int) -> str:
        me, peer = self._c.config.me, self._c.config.peer
        return {me.id: me.name, peer.id: peer.name, NOBODY: ""}.get(node_id, f"node {node_id}")

    # --- claims: steps of the policy ------------------------------------------------------------

    async def claim(self) -> tuple[Verdict, str]:
        """Go for the right; the engine knows when it was won."""
        return await self._decided(self._claimant.claim)

    async def settle(self) -> tuple[Verdict, str]:
        """End a claim that is not to be pursued."""
        return await self._decided(self._claimant.settle)

    async def force(self) -> None:
        """Name this node in the record, whatever that holds; later again if it cannot be now."""
        if self._store is not None:
            self._force_is_open = True
            await self._decided(self._make_good)

    def forget_force(self) -> None:
        """This copy was given up: an order to serve with it is over."""
        self._force_is_open = False

    def _make_good(self, state: State) -> Steps:
        return self._claimant.make_good(state, forced_now=self._force_is_open)

    async def close_record(self, *, in_sync: bool) -> None:
        """Let the record say that the mirror was moved (rule 21).

        Raises:
            RefusedError: it may not. ArbiterError: no clear answer.
        """
        if self._store is None:
            raise RefusedError(
                "arbiter move: this controller was started with the new file already, and cannot "
                "close the old record: put the old arbiter back into the file, restart the "
                "controller, then change the file and type it again"
            )
        async with self._turn:
            await self._require_store()
            outcome = await self._drive(self._claimant.move_away(self._state(), in_sync=in_sync))
        if not outcome.won:
            raise RefusedError(f"arbiter move: {outcome.reason}")

    async def _decided(self, path: Callable[[State], Steps]) -> tuple[Verdict, str]:
        self._deciding += 1
        if self._proof is not None:
            self._proof.cancel()  # it is begun again, and may last where the store is slow
        try:
            async with self._turn:
                await self._require_store()
                outcome = await self._drive(path(self._state()))
                self._force_is_open = self._force_is_open and not outcome.won
        except NbdMirrorError as error:
            self._note_trouble(error)
            return Verdict.UNKNOWN, str(error)
        finally:
            self._deciding -= 1
        return (Verdict.UNASKED if outcome.won else Verdict.NO), outcome.reason

    # --- beside it ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start to look after the record."""
        if self._store is not None:
            self._task = asyncio.create_task(self._run(), name="scribe")

    async def close(self) -> None:
        """Let go of the store; the record stays as it is."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._store is not None:
            await self._store.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._c.engine_state is None or boottime_ms() - self._tried_ms < self._pause_ms():
                continue
            async with self._turn:
                try:
                    await self._look_after(self._state())
                except StaleCommandError:
                    pass  # its role has changed meanwhile: what is due now is another thing
                except (AssertionError, ValueError, LookupError, TypeError) as error:
                    # A mistake of this program; the record is looked after all the same.
                    self._note_trouble(ArbiterError(f"an error inside the controller: {error!r}"))
                    self._tried_ms = boottime_ms()
                except NbdMirrorError as error:
                    self._note_trouble(error)
                    self._tried_ms = boottime_ms()
                    with contextlib.suppress(NbdMirrorError):
                        await self._tell_engine(reachable=self._answered)
            # What was done shows in the engine's next state; else it would be done again.
            self._c.looked.clear()
            self._c.wake()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._c.looked.wait(), AGAIN_MS / 1000)

    def _pause_ms(self) -> int:
        return AGAIN_MS if self.trouble else 0

    async def _look_after(self, state: State) -> None:
        """What is due now: at most one thing. Raises NbdMirrorError."""
        now_ms = boottime_ms()
        self._answered = False
        await self._require_store()
        if state.get("question") == "record-joint":
            await self._record_joint(state)
        elif not self._claimant.is_fresh:
            outcome = await self._drive(self._claimant.refresh(state))
            if not outcome.won:
                raise ArbiterError(outcome.reason)
        elif state.get("right_alone") or state.get("claim_unsettled"):
            if now_ms - self._read_ms < READ_MS:
                return
            await self._read()
            require_not_set_back(self.record, state)
            await self._confirm(state)
            if state.get("right_alone") and self.standing() is Standing.NOBODY:
                outcome = await self._drive(self._make_good(state))
                self._force_is_open = self._force_is_open and not outcome.won
        elif now_ms - self._proven_ms >= PROVE_MS or self.trouble:
            if not await self._prove():
                return
            if self.record is not None and self.record.moved:
                raise ArbiterError(MOVED)
        else:
            return
        self.trouble = ""
        await self._tell_engine(reachable=True)

    async def _confirm(self, state: State) -> None:
        """Metadata that had to fall back count where the record names what they say (rule 7)."""
        if self.record is not None and confirms(self.record, state, self._c.config.me.id):
            generation = self.record.generation.hex()
            await self._c.link.command("named", state, generation=generation)

    async def _record_joint(self, state: State) -> None:
        """Also where the record is lost, or was set back: this is how it is made anew."""
        outcome = await self._drive(self._claimant.record_joint(state))
        if not outcome.won:
            raise ArbiterError(outcome.reason)

    async def _prove(self) -> bool:
        """Whether it came to its end: a claim or the like does not wait for it."""
        assert self._store is not None
        found = await self._read()
        require_not_set_back(found.record, self._state())
        self._proof = proof = asyncio.create_task(self._store.prove(found), name="proof")
        try:
            while not self._is_wanted():
                if (await asyncio.wait({proof}, timeout=LOOK_S))[0]:
                    break
        finally:
            self._proof = None
            proof.cancel()
            await asyncio.wait({proof})
        if proof.cancelled():
            return False
        self._note(proof.result().record)
        self._proven_ms = boottime_ms()
        return True

    def _is_wanted(self) -> bool:
        """Whether something waits that a proof must not hold up."""
        return self._deciding > 0 or self._state().get("question") == "record-joint"

    async def _read(self) -> Held:
        assert self._store is not None
        held = await self._store.read()
        self._answered = True
        if held is None:
            self.record = None
            raise ArbiterError(f"{self._store.where} holds no record of this mirror")
        self._note(held.record)
        return held

    async def _tell_engine(self, *, reachable: bool) -> None:
        """What the engine has to know: rule 9 waits for an arbiter, rule 21 remembers a counter."""
        state = self._state()
        counter = self.record.counter if self.record is not None else 0
        seen = int(state.get("arbiter_counter", 0))
        told_now = (str(state.get("instance", "")), reachable)
        if told_now == self._told_reachable and counter <= seen:
            return
        await self._c.link.command("seen", state, reachable=reachable, counter=max(counter, seen))
        self._told_reachable = told_now

    # --- driving --------------------------------------------------------------------------------

    def _state(self) -> State:
        state = self._c.engine_state
        if state is None:
            raise ArbiterError("the engine of this node is not running")
        return state

    async def _require_store(self) -> None:
        """Rule 21: the store is the one that both nodes agreed on. Raises ArbiterError."""
        assert self._store is not None
        if self._known:
            return
        found, agreed = await self._store.identity(), self._state().get("arbiter_identity")
        if found.hex() != agreed:
            raise ArbiterError(
                f"{self._store.where} is not the store that this mirror was created with: its "
                "address was changed, or it was made anew; a node never goes on alone by another "
                "one's word"
            )
        self._known = True

    async def _drive(self, steps: Steps) -> Outcome:
        """Raises ArbiterError, or what the engine refuses with."""
        assert self._store is not None
        return await drive(steps, self._store, self._command, self._saw)

    async def _command(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        return await self._c.link.command(name, self._state(), **args)

    def _saw(self, record: Record | None) -> None:
        self._answered = True
        if record is not None:
            self._note(record)

    def _note(self, record: Record) -> None:
        self.record, self._read_ms = record, boottime_ms()
        self.record_reason = f"the arbiter's record names {told(record)}"

    def _note_trouble(self, error: NbdMirrorError) -> None:
        if str(error) != self.trouble:
            self._c.tell(f"arbiter: {error}")
        self.trouble = str(error)


Tell = Callable[[str, dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


async def drive(
    steps: Steps,
    store: RecordStore,
    command: Tell,
    saw: Callable[[Record | None], None] = lambda _record: None,
) -> Outcome:
    """Answer the requests of one path. `saw` is called with what the store holds, when it says so.

    Raises:
        ArbiterError: no clear answer of the store. NbdMirrorError: the engine refuses.
    """
    answer: Any = None
    error: NbdMirrorError | None = None
    while True:
        try:
            request = steps.throw(error) if error is not None else steps.send(answer)
        except StopIteration as ended:
            outcome: Outcome = ended.value
            return outcome
        answer, error = None, None
        try:
            if isinstance(request, Read):
                answer = await store.read()
                saw(answer.record if answer is not None else None)
            elif isinstance(request, Swap):
                answer = await store.swap(request.held, request.record)
                if answer:
                    saw(request.record)
            else:
                answer = await command(request.name, request.args)
        except NbdMirrorError as raised:
            error = raised


def ago_s(now_ms: float, then_ms: float) -> float | None:
    """Seconds since then; None for never."""
    return round((now_ms - then_ms) / 1000, 1) if then_ms > float("-inf") else None
