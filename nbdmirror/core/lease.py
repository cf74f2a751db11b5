"""The read lease (rule 17): until when a primary may answer reads, and what its peer lent it.

Owns both sides of one promise. A primary that shares its generation with its peer cannot know at
every moment whether the peer was promoted; so it answers a read only within a length of time after
it *sent* the last echo request that the peer's engine answered. The peer, told to promote, closes
the session and waits that length out, with a margin for clocks that run apart, after its last
*answer*. It answered after the request was sent, so the lease is over when it begins to serve.

    primary   sends 7 ......................... until: sent + length
    peer              answers 7 ........................... serves: answered + length + 1/16

What makes it hold:

- The clock is looked at *after* the local read: however long this process stood still before or
  during it, what is answered was current at that look. A pause behind it changes nothing: the
  answer was right at a moment within the request.
- Only echoes sent in this session count, and only after the peer was told that this node is primary
  (STATE, ROLE): the frames of a session arrive in order, so the peer knows whom it lends to.
- The peer's own word that it does not serve (STATE, ROLE, LEFT, the word that controllers carry)
  takes back what it was lent: nothing has to be waited for then.
- An engine that starts cannot know what the one before it has answered: it counts from its start.

Must never: decide about a write (rule 18), or read a clock itself (the shell's port does).
"""

from collections import deque
from typing import TYPE_CHECKING

from nbdmirror.core.ports import Path, Waiter
from nbdmirror.core.wire import FrameType
from nbdmirror.limits import READ_LEASE_DRIFT_SHARE

if TYPE_CHECKING:
    from nbdmirror.core.node import Node
    from nbdmirror.core.session import Session

# A session without an answer ends long before so many are under way.
ASKED_MAX = 64
CONFIRMING_MAX = 2


class Lease:
    """Both sides' facts, in memory only. All methods return at once."""

    def __init__(self, length_ms: int, now_ms: int, *, confirms: bool) -> None:
        self.length_ms = length_ms
        self.confirms = confirms
        # The primary's side. Reads are answered while the clock is below `until_ms`.
        self.until_ms = 0
        self.number = 0
        self.answered_number = 0
        self._asked: deque[tuple[int, int]] = deque(maxlen=ASKED_MAX)
        self._waiters: list[Waiter] = []
        # The peer's side: when this node last answered a primary, None where nobody relies on it.
        self._lent_ms: int | None = now_ms

    # --- the primary's side ---------------------------------------------------------------------

    def ask(self, session: "Session", now_ms: int, txn: int) -> None:
        """Queue an echo request, with this node's last durable intent transaction."""
        self.number += 1
        self._asked.append((self.number, now_ms))
        session.queue(FrameType.ECHO_REQUEST, 0, self.number, 0, txn, b"")

    def answered(self, number: int) -> None:
        """The peer's engine answered; one that was forgotten is none of this session."""
        asked = self._asked
        while asked and asked[0][0] <= number:
            found, sent_ms = asked.popleft()
            if found == number:
                self.answered_number = number
                if not self.confirms:
                    self.until_ms = sent_ms + self.length_ms
                self.wake()

    def forget(self) -> None:
        """No echo that was sent until now counts any more."""
        self._asked.clear()
        self.until_ms = 0

    def lacks_question(self, mark: int) -> bool:
        """Whether a read that began after echo `mark` has to ask for one itself.

        Two are under way at most: reads that begin behind both share the next one.
        """
        if self.confirms:
            return self.number <= mark and len(self._asked) < CONFIRMING_MAX
        return not self._asked

    def wake(self) -> None:
        """Let every waiting read look again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.wake()

    def wait(self, waiter: Waiter, bound_s: float | None = None) -> Path:
        """Wait for the next echo that is answered, or the next change of this node's standing.

        Returns whether there was one within the bound.
        """
        self._waiters.append(waiter)
        return bool((yield (waiter.wait, bound_s)))

    # --- the peer's side ------------------------------------------------------------------------

    def lend(self, now_ms: int) -> None:
        """This node answers an echo of a primary, which relies on it for a while."""
        self._lent_ms = now_ms

    def returned(self) -> None:
        """The peer said that it does not serve, or is known to be dead."""
        self._lent_ms = None

    def left_ms(self, now_ms: int) -> int:
        """For how long somebody may still answer reads under an echo that this node answered."""
        if self._lent_ms is None:
            return 0
        # Both clocks are rounded down, and so is the share.
        margin_ms = self.length_ms // READ_LEASE_DRIFT_SHARE + 2
        return max(0, self._lent_ms + self.length_ms + margin_ms - now_ms)


def is_needed(node: "Node") -> bool:
    """Whether this node shares its generation with a peer that may get the right without it.

    Without an arbiter that has a memory no lease helps: the peer may be told to go on at any time.
    """
    return node.arbiter_has_memory and not node.right


def may_answer(node: "Node", mark: int) -> bool:
    """Whether a read that was carried out may be answered now; it began after echo `mark`."""
    if not is_needed(node):
        return True
    if node.sending_session() is None:
        return False
    lease = node.lease
    return lease.answered_number > mark if lease.confirms else node.shell.now_ms() < lease.until_ms


def permission(node: "Node", epoch: int, mark: int) -> Path:
    """Hold a read that was carried out until it may be answered, as a write is held in a freeze.

    It ends by an echo, or with the freeze: the peer is back, or this node goes on alone or steps
    back.

    Raises:
        NotPrimaryError: this node stepped back.
    """
    lease = node.lease
    while not may_answer(node, mark):
        session = node.sending_session()
        if session is not None and lease.lacks_question(mark):
            lease.ask(session, node.shell.now_ms(), node.log.txn)
            yield (session.link.kick,)
        else:
            yield from lease.wait(node.shell.waiter())
        node.require_term(epoch)


def begin_lease(node: "Node", session: "Session") -> None:
    """From here on the peer knows this node's role, so its echoes count; the first is asked for."""
    node.lease.forget()
    if node.arbiter_has_memory:
        node.lease.ask(session, node.shell.now_ms(), node.log.txn)


def wait_out(node: "Node") -> Path:
    """Wait until nobody answers reads any more under an echo that this node answered."""
    while node.arbiter_has_memory and (left_ms := node.lease.left_ms(node.shell.now_ms())):
        yield (node.shell.waiter().wait, left_ms / 1000)
