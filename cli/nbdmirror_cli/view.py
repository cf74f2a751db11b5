"""How facts look on a terminal: tables, sizes, the state of an engine, and the promise in force.

Owns the words for what an engine answers. Must never fail on a field that is missing or new: an
engine of another version answers, too.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nbdmirror.core.cluster.promise import mode_of, promises

WIDTH_WITHOUT_TERMINAL: Final = 120

# What the engine waits for, and the commands that answer it.
QUESTIONS: Final = {
    "frozen": "writes wait for the peer. `nbdmirror engine alone` goes on without it (the peer is "
    "then behind), `nbdmirror engine demote` steps back; nothing to do if the link returns",
    "local-failure": "the local disk failed. `nbdmirror engine demote` steps back, so that the "
    "peer can be promoted",
    "record-joint": "the arbiter's record has to be set before the copies count as equal",
}
SPLIT_BRAIN: Final = "Split brain"
SPLIT_BRAIN_REMEDY: Final = (
    "on the node whose copy is given up (and nowhere else): `nbdmirror engine demote` if it is "
    "primary, then `nbdmirror engine give-up`; what it holds is kept for `nbdmirror kept export`"
)
_SHOWN: Final = {
    *("mirror", "node", "node_id", "role", "right_alone", "data_state", "generation"),
    *("frozen", "frozen_reason", "question", "failed", "refusal", "arbiter"),
    *("dirty_bytes", "dirty_extents", "device_bytes", "session", "resync"),
    *("split", "kept", "resync_waits"),
}


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns: name, value. Wide where no terminal limits it, so that programs can cut it."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(printable(value)))
    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    Console(width=width, highlight=False).print(table)


def printable(text: str) -> str:
    """Without what could steer a terminal: some of it comes from the peer."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)


def bytes_text(count: object) -> str:
    """Like `1.5 GiB (1610612736)`."""
    if not isinstance(count, int):
        return "-"
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit} ({count})"
    return f"{count} B"


def print_state(state: dict[str, Any]) -> None:
    """The table of `engine state`."""
    rows = [
        ("role", str(state.get("role", "?"))),
        ("mode", mode_of(state)),
        ("data state", str(state.get("data_state", "?"))),
        ("generation", id_text(state.get("generation"))),
        ("dirty", bytes_text(state.get("dirty_bytes"))),
        ("device", bytes_text(state.get("device_bytes"))),
        ("session", _session_text(state)),
    ]
    resync = _resync_text(state)
    if resync:
        rows.append(("resync", resync))
    rows += [
        (name, str(state[key]))
        for name, key in (("frozen", "frozen_reason"), ("failed", "failed"), ("refused", "refusal"))
        if state.get(key)
    ]
    rows += [
        (name, text)
        for name, text in (
            ("resync waits", str(state.get("resync_waits") or "")),
            ("split brain", split_text(state, lambda s: f"{s} s" if isinstance(s, int) else "")),
            ("kept", kept_text(state)),
        )
        if text
    ]
    if SPLIT_BRAIN in str(state.get("refusal", "")):  # the peer's words have a prefix
        rows.append(("remedy", SPLIT_BRAIN_REMEDY))
    rows += [
        (key.replace("_", " "), plain(value)) for key, value in state.items() if key not in _SHOWN
    ]
    if state.get("question"):
        question = str(state["question"])
        rows.append(("WAITS FOR", QUESTIONS.get(question, question)))
    rows += [("promise", line) for line in promises(state, str(state.get("arbiter", "none")))]
    node = state.get("node") or f"node {state.get('node_id', '?')}"
    print_table(printable(f"mirror {state.get('mirror', '?')}, {node}"), rows)


def _session_text(state: dict[str, Any]) -> str:
    session = state.get("session")
    if not isinstance(session, dict):
        return "none: the peer is not connected"
    peer = "primary" if session.get("peer_primary") else "not primary"
    parts = [str(session.get("number", "?")), str(session.get("phase", "?")), f"the peer is {peer}"]
    return ", ".join(filter(None, [*parts, protection_text(session)]))


def protection_text(session: dict[str, Any]) -> str:
    """What guards the frames of a session, like `mac, TLSv1.3 TLS_AES_256_GCM_SHA384`."""
    return ", ".join(str(session[key]) for key in ("integrity", "tls") if session.get(key))


def _resync_text(state: dict[str, Any]) -> str:
    resync = state.get("resync")
    if not isinstance(resync, dict) or not isinstance(resync.get("total_bytes"), int):
        return ""
    total = max(resync["total_bytes"], 1)
    done = resync.get("examined_bytes", 0) + resync.get("zeroed_bytes", 0)
    percent = min(100.0, 100 * done / total)
    return (
        f"{percent:.1f} % of {bytes_text(resync['total_bytes'])}, "
        f"{bytes_text(resync.get('copied_bytes'))} copied"
    )


def id_text(value: object) -> str:
    """A generation or another id; "-" for none, which is empty or all zeros."""
    return str(value) if value and str(value).strip("0") else "-"


def plain(value: object) -> str:
    """A fact of no special kind."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else str(value)


def given_up(engine: dict[str, Any], *, keep: bool, peer: str = "the other node") -> str:
    """What giving up a copy means, as far as this node's engine knows."""
    split = engine.get("split")
    size = engine.get("device_bytes")
    flags = engine.get("flags")
    if not isinstance(flags, list) or "split" not in flags:
        whole = f"All {bytes_text(size)} of this" if isinstance(size, int) else "The whole of this"
        return (
            f"{whole} node's copy are given up and filled from {peer}. This node is no side of a "
            "split brain, so nothing of it is kept: whatever only this copy holds is lost."
        )
    text = f"This node's copy is given up: it becomes that of {peer}"
    if isinstance(split, dict):
        own, theirs = bytes_text(split.get("own_bytes")), bytes_text(split.get("peer_bytes"))
        text += f", which lacks up to {own} of what was written here and has up to {theirs} more"
    limit = split.get("keep_limit_bytes") if isinstance(split, dict) else None
    if not keep or limit == 0:
        return f"{text}. Nothing of it is kept: whatever only this copy holds is lost."
    most = f" up to {bytes_text(limit)}" if isinstance(limit, int) else ""
    return (
        f"{text}. What it holds is kept{most} (`nbdmirror kept export`) until `nbdmirror kept "
        "discard`; where that is not enough the resync waits."
    )


def split_text(engine: dict[str, Any], duration: Callable[[object], str]) -> str:
    """What each side wrote and since when, "" where there is no split brain."""
    split = engine.get("split")
    if not isinstance(split, dict):
        return ""
    texts = [
        f"this side wrote up to {bytes_text(split.get('own_bytes'))}",
        f"the other one up to {bytes_text(split.get('peer_bytes'))}",
        f"found {duration(split.get('found_s')) or '?'} ago",
    ]
    if parted := duration(split.get("parted_s")):
        texts.append(f"last in sync {parted} ago")
    return ", ".join(texts)


def kept_text(engine: dict[str, Any]) -> str:
    """What is kept of a copy that was given up, "" where nothing is."""
    kept = engine.get("kept")
    if not isinstance(kept, dict):
        return ""
    used, limit = bytes_text(kept.get("used_bytes")), bytes_text(kept.get("limit_bytes"))
    whole = "" if kept.get("complete") is True else ", NOT COMPLETE: see `nbdmirror kept show`"
    problem = f", {kept['problem']}" if kept.get("problem") else ""
    return f"what was given up here, {used} of {limit} used{whole}{problem}"


def force_loss(state: dict[str, Any]) -> str:
    """What may be lost by promoting this node by force, as far as it knows."""
    data_state = str(state.get("data_state", "unknown"))
    lost = {
        "uptodate": "Writes that only the other node acknowledged since the two parted are lost.",
        "outdated": "This copy is known to be behind: every write that the other node "
        "acknowledged since then is lost.",
        "inconsistent": "This copy stopped in the middle of a resync: it is a mix of old and new "
        "blocks, and a file system on it may be beyond repair.",
        "blank": "This copy never held the data of the mirror: everything is lost.",
    }.get(data_state, "How far this copy is behind is not known.")
    return (
        f"This node's copy is {data_state}. {lost} If the other node is alive and primary, both "
        "acknowledge from now on, and the writes of one side will be given up."
    )
