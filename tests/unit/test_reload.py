"""What `nbdmirror apply` says of the changes that it made."""

import pytest

from nbdmirror.controller.reload import told


@pytest.mark.parametrize(
    ("online", "later", "sentence"),
    [
        (1, 0, "1 change is in force"),
        (0, 0, "0 changes are in force"),
        (2, 1, "2 changes are in force, 1 waits for a restart"),
        (1, 3, "1 change is in force, 3 wait for a restart"),
    ],
)
def test_changes_are_counted_in_words(online: int, later: int, sentence: str) -> None:
    """Breaks in the field: "1 changes are in force" makes a reader look for the others."""
    assert told(online, later) == sentence
