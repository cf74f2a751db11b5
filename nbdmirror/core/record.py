"""The arbiter's record: who may acknowledge without the other one, and under which generation.

Owns what the record holds and its form as bytes. One record belongs to one mirror. Every change
raises the counter, so no two contents of one record are ever the same: a store that tells versions
apart by their content (an ETag) cannot mistake an old one for the present one, and a conditional
write that was delayed for ever finds another version when it arrives.

    {"format": 1, "mirror": "<32 hex>", "counter": 7, "generation": "<32 hex>", "owner": 1,
     "moved": false}

Must never: be believed without being checked. Whoever may write to the store can write anything.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from nbdmirror.core.superblock import ID_BYTES, NO_ID
from nbdmirror.errors import ArbiterError

FORMAT: Final = 1
NOBODY: Final = 0
OWNER_MAX: Final = 255
COUNTER_MAX: Final = (1 << 62) - 1
# Read is only what leaves room for all that may follow it.
COUNTER_READ_MAX: Final = COUNTER_MAX // 2
RECORD_BYTES_MAX: Final = 1024
_HEX: Final = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")


@dataclass(frozen=True, slots=True)
class Record:
    """One content of the record. `owner`: the node that may go on alone, NOBODY while both may.

    `moved`: the mirror has another arbiter since; nobody may claim from this one (rule 21).
    """

    mirror_id: bytes
    counter: int
    generation: bytes
    owner: int = NOBODY
    moved: bool = False

    def __post_init__(self) -> None:
        assert len(self.mirror_id) == len(self.generation) == ID_BYTES
        assert self.generation != NO_ID
        assert 0 <= self.owner <= OWNER_MAX
        assert 0 < self.counter <= COUNTER_MAX

    def next(self, generation: bytes, owner: int, *, moved: bool = False) -> "Record":
        """What follows this one."""
        return replace(
            self, counter=self.counter + 1, generation=generation, owner=owner, moved=moved
        )

    def names(self, node_id: int, generation: bytes) -> bool:
        """Whether this node has the right under this generation."""
        return not self.moved and (self.owner, self.generation) == (node_id, generation)


@dataclass(frozen=True, slots=True)
class Held:
    """What a read found. `version` is the store's own word for this content, for its `swap`."""

    version: str
    record: Record


def encode(record: Record) -> bytes:
    """The bytes that are stored; the same for the same record."""
    facts = {
        "format": FORMAT,
        "mirror": record.mirror_id.hex(),
        "counter": record.counter,
        "generation": record.generation.hex(),
        "owner": record.owner,
        "moved": record.moved,
    }
    return json.dumps(facts).encode() + b"\n"


def decode(data: bytes, mirror_id: bytes) -> Record:
    """The record in these bytes.

    Raises:
        ArbiterError: they hold no record, or that of another mirror or of a later format.
    """
    facts = _parsed(data)
    if facts.get("format") != FORMAT:
        raise ArbiterError(
            f"the record has format {facts.get('format')!r:.40}, this program knows {FORMAT}: use "
            "the version of nbdmirror that wrote it"
        )
    found, generation = _identifier(facts, "mirror"), _identifier(facts, "generation")
    if found != mirror_id:
        raise ArbiterError(
            f"the record is that of mirror {found.hex()}, this one is {mirror_id.hex()}: give each "
            "mirror a place of its own"
        )
    if generation == NO_ID:
        raise ArbiterError("the record names no generation")
    moved = facts.get("moved")
    if not isinstance(moved, bool):
        raise ArbiterError(f"the record's moved is {moved!r:.40}, neither true nor false")
    counter = _number(facts, "counter", 1, COUNTER_READ_MAX)
    owner = _number(facts, "owner", NOBODY, OWNER_MAX)
    return Record(mirror_id, counter, generation, owner, moved)


def _parsed(data: bytes) -> dict[str, Any]:
    if len(data) > RECORD_BYTES_MAX:
        raise ArbiterError(
            f"the record has {len(data)} bytes, at most {RECORD_BYTES_MAX} are possible: something "
            "else lies in its place"
        )
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArbiterError(
            f"the record is no JSON ({type(error).__name__}): something else lies in its place"
        ) from error
    if not isinstance(facts, dict):
        raise ArbiterError("the record is no JSON object: something else lies in its place")
    return facts


def _identifier(facts: dict[str, Any], name: str) -> bytes:
    text = facts.get(name)
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise ArbiterError(f"the record's {name} is {text!r:.60}, not {2 * ID_BYTES} hex digits")
    return bytes.fromhex(text)


def _number(facts: dict[str, Any], name: str, least: int, most: int) -> int:
    number = facts.get(name)
    if type(number) is not int or not least <= number <= most:
        raise ArbiterError(f"the record's {name} is {number!r:.40}, not {least} to {most}")
    return number
