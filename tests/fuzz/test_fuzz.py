"""A little of the fuzzing with every run of the tests; and whether the driver sees anything."""

import signal
import sys
from pathlib import Path

import pytest

from nbdmirror.config import load
from nbdmirror.errors import ConfigError, PeerProtocolError
from tests.fuzz import corpus, drive
from tests.fuzz.drive import PARSERS, feed, inputs, pool_of, run_batch
from tests.fuzz.jobs import replay_corpus, run
from tests.fuzz.parser import Parser

SEED = 20
SECONDS = 6.0
WANTED = {
    *("messages", "frames", "handshake", "superblock", "intent-log", "dirty-map", "kept", "record"),
    *(
        "dispatch",
        "heartbeat",
        "heartbeat-body",
        "control",
        "token",
        "token-exchange",
        "configuration",
    ),
}
TWO_NODES = """
[node.alpha]
id = 1
address = "10.1.0.1:7789"
[node.beta]
id = 2
address = "10.1.0.2:7789"
"""


@pytest.mark.slow
def test_the_corpus_is_refused_or_taken() -> None:
    """Breaks in the field: bytes that ended a node once, or nearly, end it again."""
    assert not replay_corpus(sorted(PARSERS))


@pytest.mark.slow
def test_a_few_thousand_new_inputs() -> None:
    """Breaks in the field: a port scanner, a bad disk or a typing error ends the controller."""
    report = run(sorted(PARSERS), SEED, SECONDS, 1)
    assert report.finding is None, str(report.finding)
    assert all(report.tallies[name].inputs for name in PARSERS)
    accepted = [n for n, each in report.tallies.items() if each.refused == each.inputs]
    assert not accepted, f"nothing gets past the first check of {accepted}"


def test_every_parser_of_outside_bytes_has_its_inputs() -> None:
    """Breaks in the field: a parser that is forgotten here is fuzzed by strangers only."""
    assert set(PARSERS) == WANTED
    kept = {path.stem for path in corpus.CORPUS.glob("*.json")}
    assert kept <= WANTED


def test_inputs_come_again() -> None:
    """Breaks in the field: a finding that nobody can show twice is not mended."""
    parser = PARSERS["record"]
    pool = pool_of(parser)
    first, again, other = (list(inputs(parser, pool, 1, n)) for n in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize(
    ("error", "refusal"),
    [(KeyError("x"), ""), (AssertionError("promise"), ""), (PeerProtocolError("no"), "refused")],
)
def test_what_a_parser_lets_out_is_a_finding(error: Exception, refusal: str) -> None:
    """Breaks in the field: a fuzzer that takes every exception for a refusal finds nothing."""

    def raising(data: bytes) -> bool:
        if data == b"bad":
            raise error
        return True

    parser = Parser("made-up", lambda: [b"bad"], raising, (PeerProtocolError,))
    refused, problem = feed(parser, b"bad")
    assert (refused, bool(problem)) == (bool(refusal), not refusal)
    assert feed(parser, b"good") == (False, "")


def test_an_input_without_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: a few bytes from outside keep a thread busy for ever."""

    def endless(_data: bytes) -> bool:
        while True:
            pass

    monkeypatch.setattr(drive, "BATCH_CPU_S", 0.2)
    before = signal.signal(signal.SIGVTALRM, drive._too_slow)
    try:
        _, finding = run_batch(Parser("endless", lambda: [b""], endless, ()), [b""], 1, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before)
    assert finding is not None
    assert "took more than" in finding.problem


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('mirror = "\\u0000"', "mirror"),
        ("mirror = 0x" + "f" * 5000, "very long number"),
        ("mirror = " + "[" * (20 * sys.getrecursionlimit()), "nested too deep"),
        ('mirror = "demo"\nkey_file = "/var/lib/nbdmirror/demo/data\\u001b[2J/x"', "arbiter"),
    ],
)
def test_odd_values_are_mistakes_like_others(tmp_path: Path, line: str, told: str) -> None:
    """Breaks in the field: `nbdmirror config check` answers a typing error with a traceback."""
    path = tmp_path / "demo.toml"
    path.write_text(line + TWO_NODES)
    with pytest.raises(ConfigError, match=told) as caught:
        load(path, "alpha", with_key=False)
    assert str(caught.value).replace("\n", "").isprintable()
