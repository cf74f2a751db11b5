"""The rules of the machine that can be switched off, one by one.

Owns their list. What each one does is in the steps of protocol.py, and what breaks without it in
test_model.py.
"""

from enum import Enum


class Rule(Enum):
    """The rules that can be switched off, with their numbers in docs/safety.md."""

    JOINT_STEP = "9: a generation is alone or joint, never both"
    RESEED = "9b: the joint step sets the record from whatever it holds"
    ASKED_SINCE = "9b: the peer answered in the session after the record was read that is replaced"
    PENDING_IS_MINE = "9: a pending generation counts as mine"
    SAME_JOINT = "9a: a broken-off joint step is repeated with the generation that is pending"
    KEEP_JOINT = "11: a claim takes the pending joint generation that the record holds"
    ONLY_RECORDED = "11: a claim forgets a pending joint generation that the record does not hold"
    FLUSH_FIRST = "10: flush before the claim and before 'peer outdated'"
    PENDING_FIRST = "11: the claimed generation is stored before the claim is sent"
    NAMED_HAS_WON = "11: a record that names this node gives it the right, by whichever generation"
    FENCE = "11: a claim is lost only when the record moved, or was touched so that it cannot win"
    RESOLVE_FIRST = "11: a claim is settled before the nodes compare"
    REBOOT = "12: a node without its page cache does not take over"
    SOURCE_FLUSH = "13: the source flushes before the target is written off"
    QUESTION = "16: leaving is a question"
    SINCE = "16: whoever stays has been in sync until now, and nothing was decided since"
    MAKE_GOOD = "16: the stayer's right is made good at the arbiter from its base"


ALL_RULES = frozenset(Rule)


class Violation(Exception):  # noqa: N818 - a finding, not an error of the model
    """A promise is broken by the step that raises it."""
