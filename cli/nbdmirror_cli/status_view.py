"""How the answers of a controller look on a terminal: status, reasons, plans and events.

Owns the words and colours for what a controller answers. Must never fail on a field that is
missing, new or of another type (a controller of another version answers, too), and never pass on
to the terminal what could steer it: some of it comes from the peer.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nbdmirror.core.cluster.promise import mode_of, phase_of
from nbdmirror_cli.view import (
    QUESTIONS,
    SPLIT_BRAIN,
    SPLIT_BRAIN_REMEDY,
    WIDTH_WITHOUT_TERMINAL,
    bytes_text,
    kept_text,
    plain,
    printable,
    protection_text,
    split_text,
)

Facts = dict[str, Any]
Row = tuple[str, RenderableType]

BAR_COLUMNS: Final = 40
VALUE_CHARS_MAX: Final = 2000
# The name of the link that is the peer channel; networks are named by their numbers.
CHANNEL: Final = "channel"
_READY: Final = {"PRIM": "bold green", "SECOND": "bold green", "ALONE": "bold yellow"}
_READINESS: Final = {"transient": "bold yellow", "not-ready": "bold red"}
_RULE: Final = re.compile(r"\brule (\d+)\b")
# Keys of the status that have a row of their own, or belong to one.
_SHOWN: Final = {
    *("mirror", "node", "node_id", "peer_name", "role", "readiness", "exit_code", "reason", "row"),
    *("step", "remedy", "wanted", "serving", "since_s", "explain", "engine", "engine_reason"),
    *("peer", "links", "service", "addresses", "checkers", "switches", "actions", "arbiter"),
    *("takeover", "preferred", "promise", "order", "controller", "done"),
}


class Screen(Console):
    """Standard output; wide where no terminal limits it, so that programs can cut it."""

    def __init__(self) -> None:
        super().__init__(
            width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False
        )

    def on_broken_pipe(self) -> None:
        """Whoever read went away: that is for the one place that knows what to do then."""
        raise BrokenPipeError


# --- facts of any shape ---------------------------------------------------------------------------


def part(facts: Facts, key: str) -> Facts:
    """A member that should be an object; {} if it is none."""
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def parts(facts: Facts, key: str) -> list[Facts]:
    """A member that should be a list of objects; what is none is left out."""
    value = facts.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def word(facts: Facts, key: str) -> str:
    """A member as one bounded line that cannot steer a terminal; "" if it is missing or null."""
    value = facts.get(key)
    return "" if value is None or value == "" else _line(plain(value))


def words(facts: Facts, key: str) -> list[str]:
    """A member that should be a list of sentences."""
    value = facts.get(key)
    return [_line(str(each)) for each in value] if isinstance(value, list) else []


def _line(text: str) -> str:
    """In one line: a line break of the peer's could draw rows that are none."""
    return printable(" ".join(text.split()))[:VALUE_CHARS_MAX]


def duration_text(seconds: object) -> str:
    """Like `12 s`, `5 min`, `3 h 20 min`, `4 d 2 h`; "" for what is no time."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 1e12:
        return ""
    whole = int(seconds)
    for unit, factor, smaller, less in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= factor:
            rest = whole % factor // less
            return f"{whole // factor} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def _ms_text(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g} ms" if number else ""


def _round_trip_text(link: Facts) -> str:
    """With two significant digits; of the channel it is the time between two looks, no network's"""
    value = link.get("rtt_ms")
    if word(link, "name") == CHANNEL or not isinstance(value, int | float):
        return ""
    return _ms_text(value if isinstance(value, bool) else float(f"{value:.2g}"))


def _joined(*texts: str, by: str = ", ") -> str:
    return by.join(text for text in texts if text)


# --- the status -----------------------------------------------------------------------------------


def headline(facts: Facts) -> str:
    """Role and readiness, like `PRIM ready`."""
    return f"{word(facts, 'role') or '?'} {word(facts, 'readiness') or '?'}"


def summary(facts: Facts) -> str:
    """The status in one line, without what changes by the mere passing of time."""
    peer, service = part(facts, "peer"), part(facts, "service")
    heard = headline(peer) if peer.get("heard") else "not heard"
    data = word(part(facts, "engine"), "data_state")
    line = _joined(
        headline(facts),
        f"data {data}" if data else "",
        f"peer {heard}",
        f"service {word(service, 'state')}" if service else "",
        f"resync {percent(facts):.0f} %" if resyncs(facts) else "",
    )
    return f"{line}: {word(facts, 'reason')}"


def status_view(facts: Facts) -> RenderableType:
    """The whole status as something that rich prints."""
    node = word(facts, "node") or "?"
    title = f"mirror {word(facts, 'mirror') or '?'}, {node} (node {word(facts, 'node_id') or '?'})"
    rows: list[Row] = [
        ("role", _role_text(facts)),
        *_texts(("reason", word(facts, "reason")), ("to do", word(facts, "remedy"))),
        *_texts(("order", word(facts, "order"))),
        *_engine_rows(facts),
        *_resync_rows(facts),
        *_peer_rows(facts),
        *_service_rows(facts),
        *_checker_rows(facts),
        *_setting_rows(facts),
        *_texts(*((key.replace("_", " "), word(facts, key)) for key in facts if key not in _SHOWN)),
        *_texts(*(("promise", line) for line in words(facts, "promise"))),
    ]
    return grid(title, rows)


def grid(title: str, rows: Iterable[Row]) -> RenderableType:
    """Two columns: name, value."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(printable(name)), value)
    return Group(Text(printable(title), style="italic"), table)


def _texts(*rows: tuple[str, str]) -> list[Row]:
    """Rows of plain text; those without any are left out."""
    return [(name, Text(printable(text))) for name, text in rows if text]


def _role_text(facts: Facts) -> Text:
    role, readiness = word(facts, "role") or "?", word(facts, "readiness") or "?"
    style = _READINESS.get(readiness, "") if role != "STOP" else "bold"
    if readiness == "ready":
        style = _READY.get(role, "bold")
    text = Text(f"{role} {readiness}", style=style)
    since = duration_text(facts.get("since_s"))
    serving = "serves the application" if facts.get("serving") is True else ""
    text.append(f"  {_joined(serving, f'for {since}' if since else '')}".rstrip(), style="default")
    return text


def _engine_rows(facts: Facts) -> list[Row]:
    engine = part(facts, "engine")
    reason = word(facts, "engine_reason")
    if not engine:
        return _texts(("engine", _joined("does not run", reason, by=": ")))
    data = _joined(
        word(engine, "data_state") or "?",
        f"of {bytes_text(engine.get('device_bytes'))}",
        f"the peer may lack {bytes_text(engine['dirty_bytes'])}"
        if engine.get("dirty_bytes")
        else "",
    )
    asked = QUESTIONS.get(word(engine, "question"), word(engine, "question"))
    split = SPLIT_BRAIN in word(engine, "refusal")
    return _texts(
        ("engine", _joined(mode_of(engine), reason, by=": ")),
        ("data", data),
        ("frozen", word(engine, "frozen_reason")),
        ("waits for", asked if engine.get("frozen") else ""),
        ("failed", word(engine, "failed")),
        ("refused", word(engine, "refusal")),
        ("split brain", split_text(engine, duration_text)),
        ("way out", SPLIT_BRAIN_REMEDY if split and not word(facts, "remedy") else ""),
        ("resync waits", word(engine, "resync_waits")),
        ("kept", kept_text(engine)),
        ("channel", _line(protection_text(part(engine, "session")))),
    )


def resyncs(facts: Facts) -> bool:
    """Whether a resync runs, or was cut off and goes on later."""
    total = part(part(facts, "engine"), "resync").get("total_bytes")
    return isinstance(total, int) and not isinstance(total, bool)


def percent(facts: Facts) -> float:
    """How much of the resync is done; 0 if none runs."""
    resync = part(part(facts, "engine"), "resync")
    total, done = _count(resync, "total_bytes"), _done_bytes(resync)
    return min(100.0, 100 * done / max(total, 1))


def _count(facts: Facts, key: str) -> int:
    value = facts.get(key)
    return max(value, 0) if isinstance(value, int) else 0


def _done_bytes(resync: Facts) -> int:
    return _count(resync, "examined_bytes") + _count(resync, "zeroed_bytes")


def _resync_rows(facts: Facts) -> list[Row]:
    if not resyncs(facts):
        return []
    engine = part(facts, "engine")
    resync = part(engine, "resync")
    total, speed = _count(resync, "total_bytes"), _count(resync, "bytes_per_s")
    left = max(total - _done_bytes(resync), 0)
    text = _joined(
        f"{percent(facts):.1f} % of {bytes_text(total)}",
        f"{bytes_text(resync.get('copied_bytes'))} copied",
        f"{bytes_text(speed).partition(' (')[0]}/s" if speed else "",
        f"about {duration_text(left / speed)} left" if speed and left else "",
        "" if phase_of(engine) else "goes on when the peer is back",
    )
    rows: list[Row] = [("resync", Text(printable(text)))]
    if sys.stdout.isatty():
        bar = ProgressBar(total=100, completed=percent(facts), width=BAR_COLUMNS)
        rows.append(("", bar))
    return rows


def _peer_rows(facts: Facts) -> list[Row]:
    peer = part(facts, "peer")
    name = word(facts, "peer_name") or "the other node"
    silent = _ms_text(peer.get("silent_ms"))
    if peer.get("heard"):
        data = word(peer, "data_state")
        said = _joined(headline(peer), f"data {data}" if data else "", word(peer, "reason"))
    else:
        said = _joined("not heard", f"silent for {silent}" if silent else "")
    rows = [("peer", f"{name}: {said}")]
    if peer.get("config_differs") is True:
        rows.append(
            ("warning", f"the configuration of {name} is another one; make them equal, then apply")
        )
        rows += [("differs", each) for each in words(peer, "config_differences")]
    for link in parts(facts, "links"):
        ends = _joined(word(link, "local"), word(link, "remote"), by=" - ")
        silent, rtt = _ms_text(link.get("silent_ms")), _round_trip_text(link)
        told = _joined(
            "up" if link.get("up") is True else "DOWN",
            ends,
            f"silent for {silent}" if silent else "",
            f"round trip {rtt}" if rtt else "",
            word(link, "reason"),
        )
        rows.append((f"link {word(link, 'name') or '?'}", told))
    return _texts(*rows)


def _service_rows(facts: Facts) -> list[Row]:
    service = part(facts, "service")
    state, application = word(service, "state"), word(service, "application")
    device, point = word(service, "device"), word(service, "mount_point")
    mounted = "mounted at" if service.get("mounted") is True else "not mounted; its place is"
    failed = state == "failed" or bool(word(service, "reason"))
    rows = [
        ("service", _joined(state, word(service, "reason"), by=": ")),
        ("application", "" if application == "none" else application),
        ("log", word(service, "log") if failed else ""),
        ("device", _joined(device, word(service, "attach"), by=", by ") if device else ""),
        ("mount", f"{mounted} {point}" if point else ""),
    ]
    for each in parts(facts, "addresses"):
        where = _joined(word(each, "address") or "?", word(each, "interface"), by=" on ")
        held = "held" if each.get("held") is True else "not held"
        rows.append(("address", _joined(f"{where}: {held}", word(each, "reason"))))
    return _texts(*rows)


def _checker_rows(facts: Facts) -> list[Row]:
    rows = []
    for each in parts(facts, "checkers"):
        since = duration_text(each.get("since_s"))
        state = word(each, "state") or "?"
        shown = state.upper() if state == "down" else state
        told = _joined(
            f"{shown} for {since}" if since else shown,
            word(each, "kind"),
            f"when {word(each, 'when')}" if word(each, "when") else "",
            f"then {word(each, 'action')}" if word(each, "action") else "",
        )
        name = f"checker {word(each, 'name') or '?'}"
        rows.append((name, _joined(told, word(each, "reason"), by=": ")))
    return _texts(*rows)


def switches_text(facts: Facts) -> str:
    """Like `checkers on, failover off, boot on`."""
    states = {True: "on", False: "OFF"}
    return ", ".join(
        f"{printable(name)} {states.get(value, '?') if isinstance(value, bool) else '?'}"
        for name, value in part(facts, "switches").items()
    )


def _setting_rows(facts: Facts) -> list[Row]:
    actions, arbiter = part(facts, "actions"), part(facts, "arbiter")
    controller = part(facts, "controller")
    bound = "" if actions.get("max") == 0 else f" of {word(actions, 'max') or '?'}"
    window = f" within {word(actions, 'window_h') or '?'} h"
    last = word(actions, "last")
    verdict = word(arbiter, "verdict")
    uptime = duration_text(controller.get("uptime_s"))
    return _texts(
        ("switches", switches_text(facts)),
        (
            "actions",
            _joined(
                f"{word(actions, 'count') or '?'}{bound}{window}", f"last: {last}" if last else ""
            )
            if actions
            else "",
        ),
        (
            "arbiter",
            _joined(
                word(arbiter, "kind") or "?",
                word(arbiter, "where"),
                verdict if verdict != "unasked" else "not asked",
                word(arbiter, "reason"),
            ),
        ),
        *_record_rows(arbiter),
        ("takeover", word(facts, "takeover")),
        ("preferred", word(facts, "preferred")),
        (
            "controller",
            _joined(
                word(controller, "version"),
                f"process {word(controller, 'pid')}" if word(controller, "pid") else "",
                f"up for {uptime}" if uptime else "",
            ),
        ),
    )


def _record_rows(arbiter: Facts) -> list[tuple[str, str]]:
    """What an arbiter with a memory holds, and whether this node could claim."""
    if "where" not in arbiter:
        return []
    record, proven = part(arbiter, "record"), arbiter.get("proven_s")
    owner = word(record, "owner") or "both nodes"
    held = f"{owner}, counter {word(record, 'counter')}" if record else "not read yet"
    read = duration_text(arbiter.get("read_s"))
    way = f"proven {duration_text(proven)} ago" if proven is not None else "not proven yet"
    trouble = word(arbiter, "trouble")
    return [
        ("record", _joined(held, f"read {read} ago" if read else "")),
        ("way to it", f"NOT WELL: {trouble}" if trouble else way),
    ]


# --- why ------------------------------------------------------------------------------------------


def explanation(facts: Facts) -> Facts:
    """What explains the role, as an object whose keys stay."""
    engine, peer = part(facts, "engine"), part(facts, "peer")
    texts = [
        *(word(facts, key) for key in ("reason", "remedy", "engine_reason")),
        *(word(engine, key) for key in ("refusal", "promote_refusal", "frozen_reason", "failed")),
        *words(facts, "explain"),
    ]
    rules = sorted({int(number) for text in texts for number in _RULE.findall(text)})
    return {
        **{key: word(facts, key) for key in ("role", "readiness", "reason", "row", "step")},
        "explain": words(facts, "explain"),
        "order": word(facts, "order"),
        "service_reason": word(part(facts, "service"), "reason"),
        "engine_reason": word(facts, "engine_reason"),
        **{
            key: word(engine, key)
            for key in ("refusal", "promote_refusal", "frozen_reason", "failed", "held")
        },
        # Of a peer that is not heard there are only old words.
        "peer_reason": word(peer, "reason") if peer.get("heard") else "",
        "arbiter_reason": word(part(facts, "arbiter"), "reason"),
        "remedy": word(facts, "remedy"),
        "rules": rules,
        "promise": words(facts, "promise"),
    }


def explanation_view(facts: Facts) -> RenderableType:
    """The same for people."""
    why = explanation(facts)
    step = why["step"] if why["step"] not in {"", "nothing"} else "nothing more to be done now"
    rules = ", ".join(map(str, why["rules"]))
    asked = part(facts, "engine").get("frozen") is True
    question = word(part(facts, "engine"), "question") if asked else ""
    rows: list[Row] = [
        ("role", _role_text(facts)),
        *_texts(
            ("because", why["reason"]),
            ("decided by", f'row "{why["row"] or "?"}" of the table of decisions: {step}'),
            ("order", why["order"]),
            *(("why", line) for line in _not_said_elsewhere(why)),
            ("service", why["service_reason"]),
            ("engine", why["engine_reason"]),
            ("frozen", why["frozen_reason"]),
            ("waits for", QUESTIONS.get(question, question)),
            ("disk", why["failed"]),
            ("refused", why["refusal"]),
            ("not promoted", why["promote_refusal"]),
            ("peer", why["peer_reason"]),
            ("arbiter", why["arbiter_reason"]),
            ("to do", why["remedy"] or "nothing"),
            ("rules", f"{rules}: see docs/safety.md" if rules else ""),
            *(("promise", line) for line in why["promise"]),
        ),
    ]
    return grid(f"{word(facts, 'node') or 'this node'}: why", rows)


def _not_said_elsewhere(why: Facts) -> list[str]:
    """The lines of the explanation whose sentence has no row of its own."""
    keys = ("reason", "service_reason", "engine_reason", "failed", "refusal", "promote_refusal")
    said = tuple(why[key] for key in keys if why[key])
    return [
        line
        for line in why["explain"]
        if line not in said and not line.endswith(tuple(f": {each}" for each in said))
    ]


# --- plan and events ------------------------------------------------------------------------------


def plan_view(plan: Sequence[Facts]) -> RenderableType:
    """What a change of the configuration means, key by key."""
    table = Table("key", "now", "then", "how")
    for column in table.columns:
        column.overflow = "fold"
    for each in plan:
        how = word(each, "how") or "?"
        style = {"online": "green"}.get(how, "yellow" if how.startswith("restart") else "red")
        cells = (word(each, key) or "-" for key in ("key", "old", "new"))
        table.add_row(*map(Text, cells), Text(how, style=style))
    return table


def event_line(event: Facts) -> str:
    """Like `5  1.500 s  role: PRIM ready, reason`; the reason last, it is the longest."""
    at_ms = event.get("at_ms")
    at = f"{at_ms / 1000:.3f} s" if isinstance(at_ms, int) else "?"
    known = {"event", "number", "at_ms", "reason"}
    told = ", ".join(f"{printable(key)} {word(event, key)}" for key in event if key not in known)
    said = _joined(told, word(event, "reason"), by=": ")
    line = f"{word(event, 'number') or '?'}  {at}  {word(event, 'event') or '?'}"
    return f"{line}: {said}" if said else line
