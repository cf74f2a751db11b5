"""An engine's state as the controller sees it."""

from nbdmirror.core.cluster.view import BY_HAND, BY_ORDER, engine_of
from nbdmirror.core.decide import FORCE_COMMAND


def test_a_remedy_names_the_order_and_not_the_engine() -> None:
    """Breaks in the field: an operator types what `explain` says, and the controller undoes it."""
    assert FORCE_COMMAND == BY_HAND
    text = f"it lacks writes; to do it all the same, type `{FORCE_COMMAND}`"
    seen = engine_of({"promote_refusal": text, "refusal": text})
    wanted = f"it lacks writes; to do it all the same, type `{BY_ORDER}`"
    assert (seen.promote_refusal, seen.refusal) == (wanted, wanted)


def test_a_state_without_facts_is_an_engine_that_does_nothing() -> None:
    """Breaks in the field: an engine of another version ends the controller."""
    seen = engine_of({})
    assert not any((seen.primary, seen.synced, seen.right_alone, seen.met, seen.frozen))
