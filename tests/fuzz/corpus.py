"""The inputs that are kept: small ones that each reached lines which no other one reached.

Owns `corpus/`: a file of JSON for each parser, an input a line, packed. `python -m tests.fuzz
--collect` draws new inputs and keeps the smallest set that reaches as much; findings that were
mended are added by hand under `found`, with the reason, and stay.
"""

import base64
import json
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

CORPUS: Final = Path(__file__).resolve().parent / "corpus"
PACKAGE: Final = str(Path(__file__).resolve().parents[2] / "nbdmirror")
Lines = frozenset[tuple[str, int]]


def pack(data: bytes) -> str:
    """As it is stored."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def unpack(text: str) -> bytes:
    """As it is fed."""
    return zlib.decompress(base64.b64decode(text))


def read(name: str) -> dict[str, Any]:
    """The file of one parser."""
    path = CORPUS / f"{name}.json"
    if not path.exists():
        return {"reached": [], "found": []}
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def stored_inputs(name: str) -> list[bytes]:
    """All inputs that are kept for a parser."""
    stored = read(name)
    return [unpack(each) for each in stored["reached"]] + [
        unpack(each["input"]) for each in stored["found"]
    ]


def write(name: str, reached: Iterable[bytes]) -> None:
    """Keep these, and what was found."""
    stored = {"reached": [pack(each) for each in reached], "found": read(name)["found"]}
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.json").write_text(json.dumps(stored, indent=0) + "\n", encoding="utf-8")


def lines_of(call: Callable[[], object]) -> Lines:
    """Which lines of the package a call reached."""
    seen: set[tuple[str, int]] = set()

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return frozenset(seen)


def smallest_cover(candidates: dict[bytes, Lines], covered: Lines) -> list[bytes]:
    """Few and short inputs that reach together what all reach, beyond what is covered."""
    left = frozenset[tuple[str, int]]().union(*candidates.values()) - covered
    chosen = []
    while left:
        best = max(candidates, key=lambda data: (len(candidates[data] & left), -len(data)))
        chosen.append(best)
        left -= candidates[best]
    return sorted(chosen)
