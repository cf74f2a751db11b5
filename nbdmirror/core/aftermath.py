"""What a node remembers, in this life, of a split brain and of a copy that was given up.

Owns facts only: found out in negotiate.py, used in keeping.py, shown by describe.py.
"""

from dataclasses import dataclass

from nbdmirror.core.kept import Kept
from nbdmirror.core.ports import KeptFile


@dataclass(slots=True)
class Split:
    """A split brain, as the last contact found it; times are of this engine's clock.

    `now_ms`: the last tick. `parted_ms`: when the two were in sync last, `found_ms`: since when the
    split brain is known; None if not in this engine's life.
    """

    now_ms: int = 0
    parted_ms: int | None = None
    found_ms: int | None = None
    peer_bytes: int = 0
    waits: bool = False


@dataclass(slots=True)
class Keep:
    """What is kept of a copy that was given up.

    `limit_bytes`: the space that was given for it. `file`: where it goes, None where nothing can be
    kept. `kept`: what is there, None if nothing is. `hold`: why a resync waits for room.
    """

    limit_bytes: int
    file: KeptFile | None = None
    kept: Kept | None = None
    hold: str = ""
