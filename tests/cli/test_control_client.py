"""The client of the control socket: what it sends, and what it makes of any answer."""

from pathlib import Path
from typing import Any

import pytest

from nbdmirror.control_client import LINE_BYTES_MAX, ControlClient
from nbdmirror.errors import (
    MetadataError,
    NotPrimaryError,
    RefusedError,
    StaleCommandError,
    UnreachableError,
)
from tests.cli.conftest import STATE, FakeEngine

TIMEOUT_S = 5.0


def client_of(engine: FakeEngine, timeout_s: float = TIMEOUT_S) -> ControlClient:
    """A client that talks to the stand-in."""
    return ControlClient(engine.path, timeout_s)


def test_a_command_names_what_it_was_decided_under(engine: FakeEngine) -> None:
    """If this fails, a command meant for an engine that is gone is carried out by the next one."""
    with client_of(engine) as client:
        assert client.call("state") == STATE
        client.call("promote", instance="ab", epoch=3, force=True)
    assert engine.requests == [
        {"id": 1, "command": "state", "instance": None, "epoch": None, "args": {}},
        {"id": 2, "command": "promote", "instance": "ab", "epoch": 3, "args": {"force": True}},
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("RefusedError", RefusedError),
        ("StaleCommandError", StaleCommandError),
        ("MetadataError", MetadataError),
        ("NotPrimaryError", NotPrimaryError),
        ("StoreError", RefusedError),
        ("SystemExit", RefusedError),
        (None, RefusedError),
    ],
)
def test_a_refusal_keeps_its_kind(
    engine: FakeEngine, kind: str | None, expected: type[Exception]
) -> None:
    """If this fails, a script cannot tell "look again" from "forbidden"."""
    body = {"kind": kind, "reason": "the peer is primary", "remedy": "demote it"}
    engine.script = lambda request: [{"id": request["id"], "error": body}]
    with client_of(engine) as client, pytest.raises(Exception, match="peer is") as caught:
        client.call("promote")
    assert type(caught.value) is expected
    assert str(caught.value) == "promote: the peer is primary; demote it"


def test_a_refusal_cannot_steer_the_terminal(engine: FakeEngine) -> None:
    """If this fails, text from the peer clears the operator's screen or fakes an answer."""
    body = {"kind": "RefusedError", "reason": "\x1b[2Jgone\r" + "x" * 100_000}
    engine.script = lambda request: [{"id": request["id"], "error": body}]
    with client_of(engine) as client, pytest.raises(RefusedError) as caught:
        client.call("promote")
    assert "\x1b" not in str(caught.value)
    assert "\r" not in str(caught.value)
    assert len(str(caught.value)) < 10_000


def _answers() -> dict[str, Any]:
    return {
        "nothing": [None],
        "half a line": [b'{"id": 1, "ok"', None],
        "no JSON": [b"hello\n"],
        "no object": [b"[1, 2]\n"],
        "empty object": [b"{}\n"],
        "another request": [b'{"id": 7, "ok": {}}\n'],
        "neither": [b'{"id": 1}\n'],
        "deep": [b"[" * 100_000 + b"\n"],
        "binary": [b"\xff\xfe\n"],
        "endless": [b"x" * (LINE_BYTES_MAX + 65_537)],
    }


@pytest.mark.parametrize("name", _answers())
def test_an_answer_that_is_none_is_unreachable(engine: FakeEngine, name: str) -> None:
    """If this fails, whatever listens there crashes or fools the operator's command."""
    engine.script = lambda _: _answers()[name]
    client = client_of(engine)
    with pytest.raises(UnreachableError, match=str(engine.path)):
        client.call("state")
    engine.script = engine.answer
    assert client.call("state") == STATE
    client.close()


def test_a_line_without_end_is_cut_off(engine: FakeEngine) -> None:
    """If this fails, what listens there fills the memory of the operator's host."""
    engine.script = lambda _: _answers()["endless"]
    with client_of(engine) as client, pytest.raises(UnreachableError, match="a line of more than"):
        client.call("state")


def test_no_answer_ends_in_time(engine: FakeEngine) -> None:
    """If this fails, a hung engine hangs every script that asks it."""
    engine.script = lambda _: []
    with client_of(engine, 0.05) as client, pytest.raises(UnreachableError, match="is unknown"):
        client.call("promote")


def test_a_late_answer_is_not_taken_for_another(engine: FakeEngine) -> None:
    """If this fails, after a time-out every answer belongs to the command before."""
    engine.script = lambda _: []
    client = client_of(engine, 0.05)
    with pytest.raises(UnreachableError):
        client.call("promote")
    client.timeout_s = TIMEOUT_S
    engine.script = engine.answer
    assert client.call("state") == STATE
    client.close()


def test_no_engine_says_how_to_start_one(tmp_path: Path, engine: FakeEngine) -> None:
    """If this fails, the commonest mistake of all is an errno."""
    with pytest.raises(UnreachableError, match="engine run"):
        ControlClient(tmp_path / "none.sock", TIMEOUT_S).call("state")


def test_events_are_followed_until_the_end(engine: FakeEngine) -> None:
    """If this fails, whoever follows an engine misses its question, or never learns of its end."""
    engine.script = lambda request: [
        {"id": request["id"], "event": {"number": 1, "event": "started"}},
        {"id": request["id"], "event": {"number": 2, "event": "question"}},
        None,
    ]
    with client_of(engine) as client:
        assert [event["number"] for event in client.events(since=0)] == [1, 2]
    assert engine.requests[0]["args"] == {"since": 0}


def test_refused_events_raise(engine: FakeEngine) -> None:
    """If this fails, a refusal looks like an engine in which nothing happens."""
    body = {"kind": "RefusedError", "reason": "too many readers"}
    engine.script = lambda request: [{"id": request["id"], "error": body}]
    with client_of(engine) as client, pytest.raises(RefusedError, match="too many"):
        next(client.events())


def test_a_request_that_is_too_long_is_not_sent(engine: FakeEngine) -> None:
    """If this fails, the engine cuts the connection and the reason is lost."""
    with client_of(engine) as client, pytest.raises(RefusedError, match="longer"):
        client.call("promote", text="x" * LINE_BYTES_MAX)
    assert engine.requests == []
