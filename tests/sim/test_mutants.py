"""Each rule, taken out of the production code once, is noticed by the simulator.

The quick mutants are tried here; `python -m tests.sim.mutants` tries all of them.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim.mutants.__main__ import MUTANTS
from tests.sim.mutants.mutant import Edit, Mutant, OutOfDateError, apply
from tests.sim.mutants.runner import copy_sources, try_mutant
from tests.sim.sequences import SEQUENCES

QUICK_SEEDS_COUNT = 12
QUICK = [mutant for mutant in MUTANTS if mutant.quick]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_mutant_is_noticed(mutant: Mutant) -> None:
    """If it fails, that rule could be lost from the code and every simulation would stay green."""
    outcome = try_mutant(mutant, QUICK_SEEDS_COUNT)
    assert outcome.witness, f"rule {mutant.rule} taken away and nothing noticed: {mutant.why}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_fits_the_sources(mutant: Mutant, tmp_path: Path) -> None:
    """If it fails, the code moved away from under a mutant, which then proves nothing."""
    copy_sources(tmp_path)
    apply(mutant, tmp_path)
    for edit in (*mutant.edits, *mutant.defence):
        compile((tmp_path / edit.file).read_text(), edit.file, "exec")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.defence], ids=lambda mutant: mutant.name
)
def test_defence_in_depth_alone_changes_nothing(mutant: Mutant) -> None:
    """If it fails, what a mutant shows is the loss of its defence, and its own rule is unguarded.

    And with the defence in place the mutant itself changes nothing: else it needs none taken out.
    """
    for left in (replace(mutant, edits=()), replace(mutant, defence=())):
        assert not try_mutant(left, 0).witness


def test_mutants_are_well_formed() -> None:
    """If it fails, two mutants share a name or one waits for a sequence that does not exist."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert {name for mutant in MUTANTS for name in mutant.sequences} <= set(SEQUENCES)


def test_edit_that_does_not_match_is_refused(tmp_path: Path) -> None:
    """If it fails, a mutant that changes nothing counts as tried."""
    (tmp_path / "code.py").write_text("one\ntwo\ntwo\n")
    for old in ("three", "two"):
        mutant = Mutant("m", 1, "", (Edit("code.py", old, "four"),))
        with pytest.raises(OutOfDateError, match="out of date"):
            apply(mutant, tmp_path)


def test_every_rule_has_a_mutant() -> None:
    """If it fails, a rule of the engine is not known to be guarded at all."""
    assert {mutant.rule for mutant in MUTANTS} >= {*range(1, 15), 16, 17, 19}
