"""Directed crash sequences: scripted event by event, with one result that must come out."""

import pytest

from tests.sim import (
    sequences_conducted,
    sequences_crashes,
    sequences_disk,
    sequences_hangs,
    sequences_holes,
    sequences_joint,
    sequences_kept,
    sequences_machines,
    sequences_mutants,
    sequences_reads,
    sequences_words,
)
from tests.sim.sequences import SEQUENCES, play

HELPERS = {
    "begin_resync", "no_time", "until_target_took", "both_kept", "is_told", "returns", "hands_over",
    "spawns", "fell_back", "images", "put", "replaced", "old_one_is_back",
    "set_back_when_copied", "speak", "word",
    "split", "give_up", "holds_image", "by_chance", "after", "by_chances",
    "takes_over", "no_second_line", "reads_for", "took_ms", "loses_peer",
}  # fmt: skip
MODULES = (
    sequences_conducted,
    sequences_crashes,
    sequences_disk,
    sequences_hangs,
    sequences_holes,
    sequences_joint,
    sequences_kept,
    sequences_machines,
    sequences_mutants,
    sequences_reads,
    sequences_words,
)


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence(name: str) -> None:
    """If it fails, a known sequence of crashes, cuts and commands ends with a loss, two primaries
    or a pair that does not come together again; the sequence's own docstring says which.
    """
    problem = play(SEQUENCES[name])
    assert not problem, problem


def test_every_sequence_is_played() -> None:
    """If it fails, a sequence was written that no test plays, so what it guards is not guarded."""
    written = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    }
    assert written - HELPERS == {each.script.__name__ for each in SEQUENCES.values()}
