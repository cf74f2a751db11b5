"""A simulated arbiter: one record, compare-and-swap, linearizable reads, an unreliable way there.

A request can be slow, can be applied although its answer is lost, or long after whoever sent it has
given up waiting, and the arbiter can be down. It never lies: that is the contract of an arbiter
with a memory. `at_arbiter` drives production's paths (core/cluster/claiming.py) over it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdmirror.core import joint, record, roles
from nbdmirror.core.cluster.claiming import Outcome, Read, Steps, Swap
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path
from nbdmirror.errors import ArbiterError, NbdMirrorError
from tests.sim.host import MIRROR_ID
from tests.sim.world import World, sleep

NOBODY = -1


@dataclass(frozen=True)
class Held:
    """The record: who may acknowledge alone, under which generation; owner -1 is nobody."""

    counter: int
    generation: bytes
    owner: int


LOST = Held(0, b"", NOBODY)
"""What a store holds that was started again empty."""


class Arbiter:
    """The store of the record."""

    def __init__(self, world: World, generation: bytes, owner: int) -> None:
        self.world = world
        self.held = Held(1, generation, owner)
        self.down = False
        self.unreliable = True

    @property
    def generation(self) -> bytes:
        """What the record names now, for the checks."""
        return self.held.generation

    def lose(self) -> None:
        """It is started again, empty."""
        self.held = LOST
        self.world.note("record: lost")

    def _way(self) -> Path:
        """One direction of a request; returns whether it got through."""
        rng = self.world.rng["net"]
        delay_ms = rng.randrange(1, 30)
        if self.unreliable and rng.random() < 0.06:
            delay_ms = rng.randrange(100, 2500)
        yield (sleep, delay_ms)
        return not self.down and not (self.unreliable and rng.random() < 0.06)

    def read(self) -> Path:
        """The record, or None when no answer came."""
        if not (yield from self._way()):
            return None
        held = self.held
        if not (yield from self._way()):
            return None
        return held

    def _arrives(self, counter: int, after: Held) -> None:
        self._apply(counter, after)

    def _apply(self, counter: int, after: Held) -> bool:
        if self.held.counter != counter:
            return False
        self.held = after
        name = "AB"[after.owner] if after.owner >= 0 else "nobody"
        self.world.note(f"record: {after.generation.hex()[:8]} of {name}, counter {after.counter}")
        return True

    def swap(self, counter: int, after: int, generation: bytes, owner: int) -> Path:
        """Replace the record if its counter is still `counter`: True, False, or None (unknown)."""
        if not (yield from self._way()):
            return None
        rng = self.world.rng["net"]
        if self.unreliable and rng.random() < 0.05:
            # It waits in a queue on the way, and whoever sent it does not wait for so long.
            late = (counter, Held(after, generation, owner))
            self.world.at(rng.randrange(10, 6000), self.world.life, self._arrives, *late)
            return None
        done = self._apply(counter, Held(after, generation, owner))
        if not (yield from self._way()):
            return None
        return done


def node_id(life: Any) -> int:
    """What production calls the node of this engine."""
    return int(life.node.sb.node_id)


def at_arbiter(
    arbiter: Arbiter, steps: Steps, slowly: Callable[[], Path], command: Callable[..., Path]
) -> Path:
    """Drive one path; returns its Outcome. `command` carries out what is for the engine.

    Raises:
        NbdMirrorError: as the path.
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
                yield from slowly()
                answer = yield from read_record(arbiter)
            elif isinstance(request, Swap):
                yield from slowly()
                answer = yield from swap_record(arbiter, request.held, request.record)
            else:
                answer = yield from command(request.name, **request.args)
        except NbdMirrorError as raised:
            error = raised


def read_record(arbiter: Arbiter) -> Path:
    """What the store holds, in production's form; None: no record. Raises ArbiterError."""
    held = yield from arbiter.read()
    if held is None:
        raise ArbiterError("no answer")
    if held is LOST:
        return None
    owner = held.owner + 1
    return record.Held(
        str(held.counter), record.Record(MIRROR_ID, held.counter, held.generation, owner)
    )


def swap_record(arbiter: Arbiter, held: record.Held | None, wanted: record.Record) -> Path:
    """Replace what was read; returns whether it was there still. Raises ArbiterError."""
    version = int(held.version) if held is not None else LOST.counter
    done = yield from arbiter.swap(version, wanted.counter, wanted.generation, wanted.owner - 1)
    if done is None:
        raise ArbiterError("no answer")
    return done


def command_of(node: Node, name: str, **args: Any) -> Path:
    """As the engine's control socket does it, for whoever commands without looking."""
    generation = bytes.fromhex(args["generation"])
    if "counter" in args:
        node.note_counter(args["counter"])
    if name == "claim":
        prepared = yield from roles.claim(node, generation)
        holds = [each.hex() for each in prepared["record_holds"]]
        return {"generation": prepared["generation"].hex(), "record_holds": holds}
    if name == "claimed":
        yield from roles.claimed(node, generation, won=args["won"])
    elif name == "confirm-joint":
        yield from joint.confirm(node, generation)
    else:
        assert name == "recorded"
        roles.recorded(node, generation)
    return {}
