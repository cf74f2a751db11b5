"""Where a node stands, in the words that users know: the whole mapping, one line for each case."""

from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given

from nbdmirror.core.cluster import standing
from nbdmirror.core.cluster.view import Engine, Readiness, Role, Service, View
from tests.unit.test_policy import engine, frozen, primary, view
from tests.unit.test_policy_rules import VIEWS

READY: Final = Readiness.READY
MOVES: Final = Readiness.TRANSIENT
NOT: Final = Readiness.NOT_READY
TARGET: Final = engine(phase="resync", peer_primary=True, data_state="inconsistent")
SECOND: Final = engine(phase="synced", peer_primary=True)
ALONE: Final = primary(phase="", right_alone=True)

# (role, readiness, engine, the rest of the view)
CASES: Final[tuple[tuple[Role, Readiness, Engine | None, View], ...]] = (
    # No engine.
    (Role.STOP, NOT, None, view(wanted=False)),
    (Role.WAIT, MOVES, None, view(wanted=False, service=Service.LEAVING)),
    (Role.WAIT, NOT, None, view(wanted=False, service=Service.FAILED)),
    (Role.WAIT, MOVES, None, view()),
    (Role.WAIT, NOT, None, view(engine_given_up="it ended 4 times")),
    # An engine in no role.
    (Role.WAIT, NOT, engine(), view()),
    (Role.WAIT, NOT, engine(), view(wanted=False)),
    (Role.WAIT, MOVES, engine(), view(service=Service.LEAVING)),
    (Role.WAIT, NOT, engine(phase="synced"), view()),
    (Role.WAIT, NOT, engine(phase="resync"), view()),
    (Role.WAIT, NOT, engine(peer_primary=True), view()),
    # A secondary.
    (Role.SECOND, MOVES, TARGET, view()),
    (Role.SECOND, MOVES, engine(phase="joint", peer_primary=True), view()),
    (Role.SECOND, READY, SECOND, view()),
    (Role.SECOND, NOT, SECOND, view(held_back="a mount is left over")),
    (Role.SECOND, MOVES, engine(phase="synced", peer_primary=True, data_state="outdated"), view()),
    # A primary, and what runs on it.
    (Role.PRIM, READY, primary(), view(service=Service.UP)),
    (Role.PRIM, MOVES, primary(), view(service=Service.ENTERING)),
    (Role.PRIM, MOVES, primary(), view(service=Service.LEAVING)),
    (Role.PRIM, MOVES, primary(), view()),
    (Role.PRIM, NOT, primary(), view(service=Service.FAILED)),
    (Role.PRIM, NOT, primary(), view(held_back="a mount is left over")),
    (Role.PRIM, READY, primary(), view(service=Service.UP, held_back="a checker is down")),
    (Role.PRIM, NOT, primary(failed="EIO"), view(service=Service.UP)),
    (Role.PRIM, MOVES, primary(), view(service=Service.UP, wanted=False)),
    # A primary without a peer that is up to date.
    (Role.ALONE, READY, ALONE, view(service=Service.UP)),
    (Role.ALONE, READY, replace(ALONE, phase="resync"), view(service=Service.UP)),
    (Role.ALONE, READY, replace(ALONE, phase="joint"), view(service=Service.UP)),
    (Role.ALONE, MOVES, frozen(), view(service=Service.UP)),
    (Role.ALONE, NOT, ALONE, view(service=Service.FAILED)),
    (Role.ALONE, NOT, replace(ALONE, failed="EIO"), view(service=Service.UP)),
    (Role.ALONE, MOVES, ALONE, view(service=Service.UP, wanted=False)),
)


@pytest.mark.parametrize(("role", "readiness", "seen"), [
    (role, readiness, replace(rest, engine=one)) for role, readiness, one, rest in CASES
])  # fmt: skip
def test_a_view_has_its_role_and_readiness(role: Role, readiness: Readiness, seen: View) -> None:
    """Breaks in the field: `status` and console show another role than the one a node has, and the
    load balancer sends requests where nothing answers them.
    """
    assert standing.role_of(seen) is role
    assert standing.readiness_of(seen) is readiness
    serves = readiness is READY and role in (Role.PRIM, Role.ALONE)
    assert standing.serves(seen) is serves


def test_every_role_and_readiness_is_reached() -> None:
    """Breaks in the field: a word of the documentation never shows."""
    assert {(role, readiness) for role, readiness, _, _ in CASES} == {
        (Role.STOP, NOT), (Role.WAIT, MOVES), (Role.WAIT, NOT), (Role.SECOND, MOVES),
        (Role.SECOND, READY), (Role.SECOND, NOT),
        (Role.PRIM, READY), (Role.PRIM, MOVES), (Role.PRIM, NOT),
        (Role.ALONE, READY), (Role.ALONE, MOVES), (Role.ALONE, NOT),
    }  # fmt: skip


def test_exit_codes_are_those_of_the_documentation() -> None:
    """Breaks in the field: scripts that ask `nbdmirror status --quiet` act on the wrong role."""
    assert {role.value: code for role, code in standing.EXIT_CODES.items()} == {
        "STOP": 0,
        "WAIT": 1,
        "ALONE": 2,
        "PRIM": 3,
        "SECOND": 4,
    }


@given(VIEWS)
def test_only_a_primary_with_its_application_serves(seen: View) -> None:
    """Breaks in the field: the probe says OK on a node that has no application, is frozen, failed
    or about to stop.
    """
    one = seen.engine
    assert standing.role_of(seen) in standing.EXIT_CODES
    if standing.serves(seen):
        assert one is not None
        assert one.primary
        assert not one.frozen
        assert not one.failed
        assert seen.wanted
        assert seen.service is Service.UP
