"""What the driver needs to know of one parser.

`feed` gives one input to the parser and returns whether it was accepted. It raises nothing but an
AssertionError (a promise of the parser was broken) and what the parser should not have raised: the
errors of the project that mean "refused" are turned into False by `refused`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nbdmirror.errors import NbdMirrorError
from tests.fuzz.mutate import Mutator, changed_bytes


def unchanged(data: bytes) -> bytes:
    """The seal of a format that has none."""
    return data


@dataclass(frozen=True)
class Parser:
    """One parser: where its inputs begin, how they change, what may come of it.

    `refusals`: the classes that say "no". `seal` mends checksums and proofs of a changed input; it
    has to bear anything. `weight`: the share of the time that it gets. `batch`:
    how many inputs a replay feeds.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    feed: Callable[[bytes], bool]
    refusals: tuple[type[NbdMirrorError], ...]
    seal: Callable[[bytes], bytes] = field(default=unchanged)
    mutate: Mutator = changed_bytes
    weight: int = 1
    batch: int = 500

    def refused(self, data: bytes) -> bool:
        """Feed it; True if it was refused as it should be."""
        try:
            return not self.feed(data)
        except self.refusals:
            return True
