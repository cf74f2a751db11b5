"""What a mutant is: a rule of docs/safety.md taken out of the production code by a textual edit.

Owns the shape and the edit, not the list. An edit has to match exactly once: a mutant that does
not is out of date and says so, because one that silently changed nothing would prove nothing.
"""

from dataclasses import dataclass
from pathlib import Path

SEEDS_BUDGET_COUNT = 60


class OutOfDateError(Exception):
    """The text that a mutant replaces is not there exactly once: bring the mutant up to date."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace `old` by `new` in `file`, a path below the repository."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """One rule taken away.

    `rule` is its number in docs/safety.md, `why` says what breaks in the field. `sequences` names
    directed sequences that show it, tried before the seeds of `arbiters`, whose engines are
    commanded by `controllers`. `quick` mutants are tried by every run of the tests. `defence` takes
    out what else guards the same: with it in place nothing can show, and without it alone the
    sequences have to end well.
    """

    name: str
    rule: int
    why: str
    edits: tuple[Edit, ...]
    arbiters: tuple[str, ...] = ("none", "memory")
    sequences: tuple[str, ...] = ()
    defence: tuple[Edit, ...] = ()
    controllers: str = "simple"
    quick: bool = False
    budget_count: int = SEEDS_BUDGET_COUNT


def apply(mutant: Mutant, root: Path) -> None:
    """Change the copy of the sources below `root`.

    Raises:
        OutOfDateError: a text to replace is missing, or there more than once.
    """
    for edit in (*mutant.edits, *mutant.defence):
        path = root / edit.file
        text = path.read_text()
        count = text.count(edit.old)
        if count != 1:
            raise OutOfDateError(
                f"mutant {mutant.name} is out of date: {edit.file} holds its text {count} times"
            )
        path.write_text(text.replace(edit.old, edit.new))


def core(module: str, old: str, new: str) -> tuple[Edit, ...]:
    """One edit of a module of the core."""
    return (Edit(f"nbdmirror/core/{module}.py", old, new),)
