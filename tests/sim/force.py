"""What an operator's force means for the checks: which copy counts from which moment on.

Owns that judgement where commands are typed at production's controllers: it falls when the force is
stored, not when the command is answered, for whoever typed it may never hear of it.
"""

from typing import TYPE_CHECKING

from nbdmirror.core.durable import NO_GENERATION
from nbdmirror.core.node import Role
from nbdmirror.core.superblock import DataState, Superblock
from tests.sim.world import ViolationError

if TYPE_CHECKING:
    from tests.sim.checks import Checker
    from tests.sim.host import Host

GIVEN_UP = frozenset({DataState.BLANK, DataState.INCONSISTENT})


def stored(checker: "Checker", host: "Host", before: Superblock, after: Superblock) -> None:
    """A superblock is durable: perhaps the one that carries out what an operator typed."""
    other = checker.other(host)
    forced = after.forced_over not in (before.forced_over, NO_GENERATION)
    if checker.force_is_stored and forced:
        checker.operator_decided(host)
        lives = other.node is not None and other.node.role is Role.PRIMARY
        # Against a record, or beside one that lives: which of them counts is known later.
        checker.split = checker.open_force = checker.memory or lives
    if checker.gives_up == host.index and after.data_state in GIVEN_UP:
        checker.gives_up = None
        if other.sb.data_state in GIVEN_UP:
            raise ViolationError("both copies are given up")
        checker.operator_decided(other)


def ends(checker: "Checker") -> None:
    """Both are in sync: what both hold is what counts; what is on its way is not demanded yet."""
    if not checker.open_force:
        return
    first, second = checker.hosts
    history = checker.history
    checker.operator_decided(first)
    for sector, _ in history.missing(second.data.cache, history.bound):
        del history.bound[sector]
    history.limit_flushed()
