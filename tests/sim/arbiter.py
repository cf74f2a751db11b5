"""A simulated arbiter: one record, compare-and-swap, linearizable reads, an unreliable way there.

A request can be slow, can be applied although its answer is lost, and the arbiter can be down. It
never lies: that is the contract of an arbiter with a memory.
"""

from dataclasses import dataclass

from nbdmirror.core.ports import Path
from tests.sim.world import World, sleep

NOBODY = -1


@dataclass(frozen=True)
class Held:
    """The record: who may acknowledge alone, under which generation; owner -1 is nobody."""

    counter: int
    generation: bytes
    owner: int


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

    def swap(self, counter: int, generation: bytes, owner: int) -> Path:
        """Replace the record if its counter is still `counter`: True, False, or None (unknown)."""
        if not (yield from self._way()):
            return None
        done = self.held.counter == counter
        if done:
            self.held = Held(counter + 1, generation, owner)
            name = "AB"[owner] if owner >= 0 else "nobody"
            self.world.note(f"record: {generation.hex()[:8]} of {name}, counter {counter + 1}")
        if not (yield from self._way()):
            return None
        return done
