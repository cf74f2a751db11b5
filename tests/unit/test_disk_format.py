"""docs/disk-format.md against the schemas of record."""

import re
from pathlib import Path
from typing import Any

import pytest

from nbdmirror.core.dirtymap import PAGE
from nbdmirror.core.geometry import EXTENTS_PER_PAGE
from nbdmirror.core.intentlog import HOT_REGIONS_MAX, RING_BYTES, SECTOR
from nbdmirror.core.superblock import SCHEMA, Flags
from nbdmirror.limits import LOG_OFFSET_BYTES, MAP_OFFSET_BYTES, SUPERBLOCK_SLOT_OFFSETS_BYTES

TEXT = (Path(__file__).parents[2] / "docs" / "disk-format.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| (\d+)(?: \u00d7 (\d+))? \|", re.MULTILINE)


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0].split("\n### ")[0]


def documented(title: str) -> list[tuple[int, int]]:
    """(offset, bytes) of every row of a section's offset table."""
    return [
        (int(offset), int(count) * int(size or 1))
        for offset, count, size in ROW.findall(section(title))
    ]


def specified(schema: Any) -> list[tuple[int, int]]:
    """(offset, bytes) of every field of a schema; nested ones in place."""
    found: list[tuple[int, int]] = []
    at = 0
    for sub in schema.subcons:
        nested = getattr(getattr(sub, "subcon", None), "subcons", None)
        if nested is not None:
            found += [(at + offset, size) for offset, size in specified(sub.subcon)]
        else:
            found.append((at, sub.sizeof()))
        at += sub.sizeof()
    return found


@pytest.mark.parametrize(
    ("title", "schema"), [("Superblock", SCHEMA), ("Intent log", SECTOR), ("Dirty map", PAGE)]
)
def test_documented_offsets_are_the_real_ones(title: str, schema: Any) -> None:
    """An operator repairs the wrong bytes, or a tool reads fields from the wrong place."""
    assert documented(title) == specified(schema)


def test_documented_flags_are_the_real_ones() -> None:
    """A flag seen in a dump is taken for another one."""
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| ", section("Superblock"), re.MULTILINE)
    assert {name.upper().replace(" ", "_"): 1 << int(bit) for name, bit in rows} == {
        flag.name: flag.value for flag in Flags
    }


def test_documented_places_are_the_real_ones() -> None:
    """The commands at the end of the page show something else than they say."""
    assert SUPERBLOCK_SLOT_OFFSETS_BYTES == (0, 8 * 4096)
    assert (LOG_OFFSET_BYTES, RING_BYTES) == (16 * 4096, 64 * 4096)
    assert MAP_OFFSET_BYTES == 256 * 4096
    assert f"at most {HOT_REGIONS_MAX} regions" in TEXT
    assert f"one page per {EXTENTS_PER_PAGE} extents" in TEXT
