"""The text of a configuration file: how a value is written, and how one key is changed in place.

Owns no key and no file. Must never: change anything but the one key that was asked for, or return a
text that does not read as expected.
"""

import contextlib
import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any, Final

from nbdmirror.errors import RefusedError

_TABLE: Final = re.compile(r"\s*\[")


def toml(value: str | int | Sequence[str]) -> str:
    """A value as the file has it."""
    if not isinstance(value, str | int):
        return f"[{', '.join(toml(each) for each in value)}]"
    # A basic string of TOML is one of JSON, except that DEL has to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def header(node: str) -> str:
    """`[node.alpha]`; a name with a dot in quotes."""
    return f"[node.{toml(node) if '.' in node else node}]"


def with_key(text: str, table: tuple[str, ...], key: str, value: str) -> str:
    """The text with one more key, or another value for it; comments and order are kept.

    `table`: () for the top of the file, ("node", name), or the name of a table, which may be new.

    Raises:
        RefusedError: the file is written in a way that this cannot change and be sure.
    """
    expected = tomllib.loads(text)
    inner: dict[str, Any] = expected
    head = "" if not table else header(table[1]) if len(table) > 1 else f"[{table[0]}]"
    lines = text.splitlines()
    if len(table) == 1 and table[0] not in expected:
        lines += ["", head]
    for step in table:
        inner = inner.setdefault(step, {})
    inner[key] = value
    start, end = _span(lines, head)
    line = f"{key} = {toml(value)}"
    pattern = re.compile(rf"\s*{re.escape(key)}\s*=")
    present = [at for at in range(start, end) if pattern.match(lines[at])]
    if present:
        lines[present[0]] = line
    else:
        lines.insert(start, line)
    made = "\n".join(lines) + "\n"
    with contextlib.suppress(tomllib.TOMLDecodeError):
        if tomllib.loads(made) == expected:
            return made
    where = head or "the top of the file"
    raise RefusedError(
        f"{key} cannot be set in {where}: write `{line}` there on the first server, and make a new "
        "token with `nbdmirror invite`"
    )


def _span(lines: Sequence[str], head: str) -> tuple[int, int]:
    """The lines of one table, without its head."""
    start = 0
    if head:
        found = [at for at, line in enumerate(lines) if line.partition("#")[0].strip() == head]
        start = found[0] + 1 if found else len(lines)
    ends = [at for at in range(start, len(lines)) if _TABLE.match(lines[at])]
    return start, ends[0] if ends else len(lines)
