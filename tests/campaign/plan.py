"""What happens in a run, drawn from its seed and nothing else. Pure.

Owns the catalogue: the name of each accident and how often it is drawn.
"""

from dataclasses import dataclass
from random import Random
from typing import Final

ROLES: Final = ("primary", "secondary")
# What the operator does about it: nothing, until all is healed; or what the design says.
ANSWERS: Final = ("wait", "decide")
ENGINES: Final = {
    "kill": 6,  # SIGKILL of an engine at a random moment
    "kill at a frame": 8,  # the same when a frame of some type is on its way
    "pause": 4,  # SIGSTOP, then SIGCONT, for less or more than any deadline
    "pause at a frame": 4,
    "cut": 5,  # the link, both directions, until it is healed
    "one-way cut": 5,  # what one of them says is lost, and no end is told
    "reset": 4,  # the connection, a few times, also inside a frame
    "frame": 10,  # one frame is harmed
    "EIO": 4,  # writes or flushes of one disk fail
    "ENOSPC": 3,
    "hang": 2,  # one disk answers nothing
    "power": 4,  # the power of one node, or of both
    "restart": 4,  # of both, in either order, in order or by a kill
    "crash in a swap": 5,
    "crash in a resync": 8,
    "blank disk": 2,
    "larger disk": 1,
    "smaller disk": 1,
    "old copy": 3,  # a disk comes back as it was a while ago
}
CLUSTER: Final = {
    "kill engine": 3,
    "pause engine": 2,
    "kill controller": 2,
    "lose node": 3,
    "swap": 2,
}
CLUSTER_SHARE: Final = 0.08
SECOND_SHARE: Final = 0.4
INTEGRITIES: Final = ("crc", "crc", "mac")
ANSWERS_MAX: Final = 200


@dataclass(frozen=True)
class Accident:
    """One of them. `after`: how many answers clients get before; `seed`: of its details."""

    name: str
    role: str
    answer: str
    after: int
    seed: int

    def __str__(self) -> str:
        return f"{self.name} ({self.role}, {self.answer})"


@dataclass(frozen=True)
class Plan:
    """One run. `heal`: whether all is well again before a second accident."""

    seed: int
    controllers: bool
    integrity: str
    heal: bool
    accidents: tuple[Accident, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.accidents))


def drawn(seed: int, only: str = "") -> Plan:
    """The plan of a seed. `only`: nothing but this accident, with engines alone."""
    dice = Random(seed)
    controllers = dice.random() < CLUSTER_SHARE and not only
    catalogue = CLUSTER if controllers else ENGINES
    count = 2 if dice.random() < SECOND_SHARE else 1
    names = dice.choices(list(catalogue), list(catalogue.values()), k=count)
    integrity, heal = dice.choice(INTEGRITIES), dice.random() < 0.5
    accidents = tuple(
        Accident(only or name, dice.choice(ROLES), dice.choice(ANSWERS),
                 dice.randrange(ANSWERS_MAX), dice.randrange(1 << 32))
        for name in names
    )  # fmt: skip
    return Plan(seed, controllers, integrity, heal, accidents)
