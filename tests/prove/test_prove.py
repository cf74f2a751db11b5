"""A sample of the campaigns with every run of the tests; and whether they would see anything."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.prove import __main__ as prove
from tests.prove.campaign import Outcome
from tests.prove.faults import Point, busiest
from tests.prove.history import SECTOR, WINDOWS, History, Operation, course, sectors_of_windows
from tests.prove.mutants import Mutants
from tests.prove.powercuts import PowerCuts
from tests.prove.syscalls import Runner, faults, places, replay
from tests.sim.mutants.__main__ import MUTANTS
from tests.sim.mutants.runner import Outcome as Tried

# Spread over calls, places in a run, roles, moments and what happens there.
SAMPLE = (
    *("primary:work:pwrite64:data:1:kill", "primary:work:pwrite64:data:17:EIO"),
    *("secondary:work:pwrite64:data:33:power", "secondary:work:fdatasync:data:4:EIO"),
    *("primary:work:pwritev2:data:2:ENOSPC", "primary:work:fdatasync:data:5:power-both"),
    *("secondary:work:fallocate:data:3:EIO", "primary:work:sendmsg:any:30:EPIPE"),
    *("secondary:return:pwrite64:meta:3:kill", "secondary:work:pwrite64:data:12:kill"),
    *("primary:work:pwrite64:data:25:kill", "secondary:work:recvfrom:any:9:kill"),
)


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.usefixtures("require_root")
def test_a_sample_of_system_calls() -> None:
    """Breaks in the field: an engine that dies, or whose disk fails, at the wrong call takes what
    was acknowledged along.
    """
    outcome = Runner().run(iter(Point.of(text) for text in SAMPLE))
    assert not outcome.violation, f"{outcome.violation}\nreplay: {outcome.replay}"
    assert outcome.figures["points"] == len(SAMPLE)
    assert outcome.figures["points hit"] >= len(SAMPLE) // 2, outcome.figures


@pytest.mark.nbdkit
@pytest.mark.slow
@pytest.mark.usefixtures("require_root")
def test_a_few_power_cuts() -> None:
    """Breaks in the field: the power of one server, or of both, takes what was promised to stay."""
    outcome = PowerCuts(seed=5, rounds=3).run(120)
    assert not outcome.violation, f"{outcome.violation}\nreplay: {outcome.replay}"
    assert outcome.figures["power cuts"] >= 3


@pytest.mark.parametrize("text", SAMPLE)
def test_a_point_is_replayed_by_its_name(text: str) -> None:
    """Breaks in the field: a violation that cannot be replayed is not mended."""
    point = Point.of(text)
    assert str(point) == text
    assert text in replay([point])


@pytest.mark.parametrize(
    "text", ["x:work:pwrite64:data:1:kill", "primary:work:pwrite64:data:0:EIO"]
)
def test_a_point_that_is_none_is_refused(text: str) -> None:
    """Breaks in the field: a typing error in a replay hits nothing, and everything seems well."""
    with pytest.raises(ValueError, match="no such point"):
        Point.of(text)


def test_every_call_of_a_disk_can_end_and_fail() -> None:
    """Breaks in the field: a call that is never made to fail is handled by hope."""
    for call in ("pwrite64", "pwritev2", "fdatasync", "fallocate"):
        assert set(faults(call, "data")) == {"kill", "power", "power-both", "EIO", "ENOSPC"}
    assert list(places("pwrite64", 40)) == list(range(1, 41))
    assert len(places("sendmsg", 400)) <= 25


def test_calls_are_counted_for_each_thread(tmp_path: Path) -> None:
    """Breaks in the field: points beyond the last call of any thread hit nothing."""
    told = tmp_path / "strace"
    told.write_text(
        '7 pwrite64(3, "", 1, 0) = 1\n8  pwrite64(3 <unfinished ...>\n'
        "7 fdatasync(3) = 0\n7 pwrite64(3) = 1\n7 <... pwrite64 resumed>) = 1\n"
    )
    assert busiest(told) == {"pwrite64": 2, "fdatasync": 1}


# --- the judgement ------------------------------------------------------------------------------


def image(path: Path, *operations: Operation) -> Path:
    """An image to which exactly these came, one after the other."""
    with path.open("wb") as file:
        file.truncate((sectors_of_windows()[-1] + 1) * SECTOR)
        for each in operations:
            file.seek(each.first * SECTOR)
            file.write(each.buffer())
    return path


def history(*operations: Operation) -> History:
    """One in which this was asked and answered."""
    made = History()
    made.operations += operations
    return made


FIRST = WINDOWS[1][0]
OLD = Operation("write", FIRST, 8, number=1, began=1, ended=2)
NEW = Operation("write", FIRST + 4, 8, number=2, began=3, ended=4)


def test_what_was_acknowledged_has_to_be_there(tmp_path: Path) -> None:
    """Breaks in the field: a campaign whose judge is blind says that everything held."""
    assert not history(OLD, NEW).losses(image(tmp_path / "a", OLD, NEW))
    assert len(history(OLD, NEW).losses(image(tmp_path / "b", OLD))) == 8
    assert len(history(OLD, NEW).losses(image(tmp_path / "c", NEW, OLD))) == 4
    assert len(history(OLD).losses(image(tmp_path / "d", OLD, NEW))) == 8


def test_what_was_answered_after_a_cut_may_be_missing(tmp_path: Path) -> None:
    """Breaks in the field: what the survivor wrote alone is missed on the platter of the other."""
    assert not history(OLD, NEW).losses(image(tmp_path / "a", OLD), until=OLD.ended)
    assert len(history(OLD, NEW).losses(image(tmp_path / "b"), until=OLD.ended)) == 8


def test_without_an_answer_both_are_right(tmp_path: Path) -> None:
    """Breaks in the field: a judge that is too strict cries wolf until nobody listens."""
    unknown = Operation("write", FIRST + 4, 8, number=2, began=3)
    overlapping = Operation("write", FIRST + 4, 8, number=3, began=1, ended=4)
    for number, done in enumerate(((OLD,), (OLD, unknown))):
        assert not history(OLD, unknown).losses(image(tmp_path / str(number), *done))
    for number, done in enumerate(((OLD, overlapping), (overlapping, OLD)), 5):
        assert not history(OLD, overlapping).losses(image(tmp_path / str(number), *done))


@pytest.mark.parametrize("kind", ["flush", "fua"])
def test_a_power_cut_takes_only_what_was_not_flushed(tmp_path: Path, kind: str) -> None:
    """Breaks in the field: promise (b) is broken and the judge takes it for bad luck."""
    old = Operation("fua" if kind == "fua" else "write", FIRST, 8, number=1, began=1, ended=2)
    flush = Operation("flush", 0, 1, number=9, began=3, ended=4)
    late = Operation("write", FIRST, 8, number=3, began=5, ended=6)
    what = (old, late) if kind == "fua" else (old, flush, late)
    assert not history(*what).losses(image(tmp_path / "a", old), only_durable=True)
    assert len(history(*what).losses(image(tmp_path / "b"), only_durable=True)) == 8
    assert not history(late).losses(image(tmp_path / "c"), only_durable=True)


def test_no_later_flush_brings_back_what_a_power_cut_took(tmp_path: Path) -> None:
    """Breaks in the field: a judge that counts flushes of another day cries wolf after each cut."""
    old = Operation("write", FIRST, 8, number=1, began=1, ended=2)
    kept = Operation("fua", FIRST + 8, 8, number=2, began=3, ended=4)
    flush = Operation("flush", 0, 1, number=3, began=5, ended=6)
    told = history(replace(old), kept)
    told.power_was_lost()
    told.operations.append(flush)
    assert not told.losses(image(tmp_path / "a", kept))
    assert not told.losses(image(tmp_path / "b", old, kept))
    assert len(told.losses(image(tmp_path / "c", old))) == 8
    told = history(replace(old), kept, flush)
    told.power_was_lost()
    assert len(told.losses(image(tmp_path / "d", kept))) == 8


def test_the_course_overlaps_and_comes_again() -> None:
    """Breaks in the field: a run without overlapping requests shows no wrong order."""
    assert course(3) == course(3) != course(4)
    kinds = {each.kind for each in course(3)}
    assert kinds == {"write", "fua", "flush", "zero", "trim"}
    inside = set(sectors_of_windows())
    for each in course(3):
        assert {*range(each.first, each.first + each.count)} <= inside


# --- the whole ----------------------------------------------------------------------------------


class Stub:
    """A campaign that ends as it is told to."""

    share = 50

    def __init__(self, name: str, outcome: Outcome) -> None:
        self.name, self.outcome, self.runs = name, outcome, 0

    def run(self, seconds: float) -> Outcome:
        """Count it."""
        self.runs += 1
        assert seconds > 0
        return self.outcome


def proven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *campaigns: Stub
) -> tuple[int, dict[str, object]]:
    """Exit code and figures of a whole run."""
    told = tmp_path / "figures.json"
    monkeypatch.setattr(prove, "CAMPAIGNS", campaigns)
    monkeypatch.setattr(sys, "argv", ["prove", "--minutes", "1", "--json", str(told)])
    code = prove.main()
    figures: dict[str, object] = json.loads(told.read_text())
    return code, figures


def test_the_first_violation_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: a violation is one line among many, and the exit code is 0."""
    good, bad = Outcome(), Outcome(violation="lost", replay="python -m it")
    good.figures["power cuts"] = bad.figures["power cuts"] = 2
    never = Stub("never", Outcome())
    code, figures = proven(monkeypatch, tmp_path, Stub("a", good), Stub("b", bad), never)
    assert code == 1
    assert not never.runs
    assert figures["power cuts"] == 4
    assert figures["replay"] == "python -m it"
    assert capsys.readouterr().out.endswith("VIOLATION lost\nreplay: python -m it\n")
    code, figures = proven(monkeypatch, tmp_path, Stub("a", good))
    assert (code, figures["violation"]) == (0, "")


def test_a_mutant_that_lives_is_a_violation() -> None:
    """Breaks in the field: a rule that nothing guards any more is lost at the next change."""
    outcome = Outcome()
    mutant = MUTANTS[0]
    Mutants().judge(outcome, Tried(mutant, "a sequence", 0, "A1", 1.0))
    assert not outcome.violation
    Mutants().judge(outcome, Tried(mutant, "", 60, "", 1.0))
    assert mutant.name in outcome.replay
    assert outcome.figures == {"mutants tried": 2, "mutants killed": 1}
