"""Changes to valid inputs, drawn from a seeded generator: bytes, fields, trees of JSON, lines.

Owns no knowledge of a format: what a parser's fields are comes from the parser's own description.
The same generator and the same pool give the same input for ever, which is what a replay needs.
"""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, TypeAlias

Mutator: TypeAlias = Callable[[Random, bytes, Sequence[bytes]], bytes]
Field: TypeAlias = tuple[int, int]
"""Offset and size of one field, in bytes."""

INTERESTING: Final = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 63, 64, 127, 128, 255, 256, 511, 512, 513, 4095),
    *(4096, 4097, 65535, 65536, 1 << 20, (1 << 20) + 1, 1 << 30, (1 << 31) - 1, 1 << 31),
    *((1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
DEEP: Final = 20_000
TREE_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, -1, 255, 256, 2**31, 2**53, 2**63, 2**64, -(2**63), 1e308, 0.1),
    *("", "0", "a", "\x00", "\ud800", "\u202e", "\x1b[2J", "\U0001f600", "x" * 300, "0" * 32),
    *("f" * 32, "g" * 32, "0" * 31, "-1", "1e9", "none", [], {}, [[]], [0] * 70, {"": 0}),
)
LITERALS: Final = (
    *('""', "''", "0", "-1", "1", "65536", "1e400", "nan", "inf", "true", "[]", "{}", "[[]]"),
    *('"x"', '"\\u0000"', '"\\U0001F600"', "1979-05-27", "07:32:00", "0x" + "f" * 17, "[1, 'a']"),
    *('"127.0.0.1:0"', '"[::1]:65535"', '":"', '"/"', '"../.."', '"/dev/null"', '"' + "y" * 5000),
    *("{a = 1}", "[{}]", '"""\n"""', "0x" + "f" * 5000, "9" * 5000, "[" * DEEP, "{a=" * DEEP),
    *("[" * n + "]" * n for n in (20, 90, 150, 300)),
)


def changed_bytes(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """One change that knows nothing but bytes."""
    work = bytearray(data)
    at = rng.randrange(len(work) + 1)
    what = rng.randrange(9)
    if what <= 1 and work:
        work[at % len(work)] ^= 1 << rng.randrange(8)
    elif what == 2 and work:
        work[at % len(work)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif what == 3:
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice(INTERESTING) % (1 << 8 * size)
        work[at : at + size] = value.to_bytes(size, "big")
    elif what == 4:
        del work[at : at + rng.choice((1, 2, 4, 16, 64, 512))]
    elif what == 5:
        work[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 64)))
    elif what == 6:
        start = rng.randrange(len(work) + 1)
        work[at:at] = work[start : start + rng.choice((1, 8, 48, 512))]
    elif what == 7:
        del work[at:]
    else:
        other = rng.choice(pool)
        cut = rng.randrange(len(other) + 1)
        work[at:] = other[cut:]
    return bytes(work)


def by_fields(fields: Sequence[Field], stride: int = 0) -> Mutator:
    """A mutator that sets whole fields; with a stride, of one of the records of that length."""

    def change(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if not fields or rng.random() < 0.25:
            return changed_bytes(rng, data, pool)
        work = bytearray(data)
        offset, size = rng.choice(fields)
        if stride:
            offset += stride * rng.randrange(max(1, len(work) // stride))
        what = rng.randrange(4)
        if what == 0:
            value = (rng.choice(INTERESTING) % (1 << 8 * size)).to_bytes(size, "big")
        elif what == 1:
            value = rng.randbytes(size)
        elif what == 2:
            value = bytes((rng.choice((0, 0xFF)),)) * size
        else:
            other = rng.choice(pool)
            value = other[offset : offset + size].ljust(size, b"\0")
        work[offset : offset + size] = value
        return bytes(work)

    return change


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        keys: Any = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                todo.append(node[key])
    return found


def changed_json(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """A change of the tree where there is one, else of the bytes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict | list) or rng.random() < 0.2:
        if rng.random() < 0.02:
            depth = rng.choice((100, 200, 400, DEEP))
            return b'{"a":' * depth + b"0" + b"}" * depth if rng.random() < 0.5 else b"[" * depth
        return changed_bytes(rng, data, pool)
    places = _places(tree)
    if not places or rng.random() < 0.1:
        tree = rng.choice((tree, [tree], {"a": tree}, rng.choice(TREE_VALUES)))
    else:
        _change_place(rng, *rng.choice(places))
    return json.dumps(tree, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


def _change_place(rng: Random, node: Any, key: Any) -> None:
    what = rng.randrange(6)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[rng.choice(("", "a", "v", "id", "x" * 100))] = rng.choice(TREE_VALUES)
    elif what == 2 and isinstance(node[key], str) and node[key]:
        text = node[key]
        at = rng.randrange(len(text))
        node[key] = text[:at] + rng.choice(("", "\x00", "z", "0", "\u2028", text)) + text[at + 1 :]
    elif what == 3 and type(node[key]) is int:
        node[key] += rng.choice((-1, 1, 256, 2**32, 2**64, -(2**64)))
    else:
        node[key] = rng.choice(TREE_VALUES)


def changed_lines(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """A change of a text of `key = value` lines."""
    if rng.random() < 0.2:
        return changed_bytes(rng, data, pool)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    what = rng.randrange(5)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, rng.choice(rng.choice(pool).split(b"\n")))
    elif what == 2:
        lines[at] = rng.choice((b"[a]", b"[[a]]", b"[a.b]", b"=", b"a = 1", b"[node.gamma]"))
    elif b"=" in lines[at]:
        key = lines[at].partition(b"=")[0]
        lines[at] = key + b"= " + rng.choice(LITERALS).encode()
    return b"\n".join(lines)
