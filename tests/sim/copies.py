"""The two copies side by side: what differs, and whether anybody knows.

Owns the comparison of the two page caches and the check that what differs is covered (C3): by a
dirty bit, by what is not flushed, or by what is in flight, in memory of a node that runs and on the
disk of one that is down. It knows nothing of what clients were told.
"""

from typing import Any

from nbdmirror.core.decide import DecisionKind, decide
from nbdmirror.core.node import Node, Settings
from nbdmirror.core.superblock import DataState
from nbdmirror.core.view import node_view, state_message
from tests.sim.disk import BLOCK_BYTES, ZERO_BLOCK
from tests.sim.host import Host
from tests.sim.world import SimWaiter, ViolationError

NO_MAP_NEEDED = frozenset(
    {
        DecisionKind.COPY_FULL,
        DecisionKind.SPLIT_BRAIN,
        DecisionKind.UNRELATED,
        DecisionKind.ASK,
    }
)


class NullShell:
    """A shell for a node that is only looked at."""

    def waiter(self) -> SimWaiter:
        """Never waited for."""
        return SimWaiter()

    def now_ms(self) -> int:
        """Never compared with anything."""
        return 0

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a node that is only looked at called {name}")


class Copies:
    """The copies of both nodes."""

    def __init__(self) -> None:
        self.hosts: tuple[Host, Host]
        self.split = False
        self.counts: dict[str, int] = {}
        self._different: set[int] = set()
        self._dead_covers: dict[int, tuple[int, Node]] = {}

    def fail(self, text: str) -> None:
        """An invariant does not hold."""
        raise ViolationError(text)

    def different(self) -> list[int]:
        """Blocks that differ between the two page caches, ascending."""
        first, second = (host.data for host in self.hosts)
        a, b = first.cache, second.cache
        if first.touched is None or second.touched is None:
            looked_at = a.keys() | b.keys()
            self._different.clear()
        else:
            looked_at = first.touched | second.touched
        for index in looked_at:
            if a.get(index, ZERO_BLOCK) == b.get(index, ZERO_BLOCK):
                self._different.discard(index)
            else:
                self._different.add(index)
        first.touched, second.touched = set(), set()
        return sorted(self._different)

    def check_cover(self) -> None:
        """C3: what differs is covered by what the next contact will know."""
        if self.split or any(h.life is not None and not h.life.ready for h in self.hosts):
            return
        different = self.different()
        if not different:
            return
        self.counts["covers"] += 1
        nodes = [self._looked_at(host) for host in self.hosts]
        bare = [b for b in different if not any(covers(node, b) for node in nodes)]
        if not bare:
            return
        views = [
            node_view(state_message(node), node.sb.mirror_id, node.sb.node_id) for node in nodes
        ]
        decision = decide(*views)
        if decision.kind in NO_MAP_NEEDED or self._being_resynced():
            return
        if strangers(*nodes) or strangers(*reversed(nodes)):
            return
        if decision.row == "target is primary":
            return
        self.fail(f"C3: blocks {bare[:8]} differ, nobody knows; contact would be {decision.row}")

    def _being_resynced(self) -> bool:
        """A blank or foreign copy on the way of a full sync: the map holds all of it."""
        return any(host.sb.data_state is DataState.BLANK for host in self.hosts)

    def _looked_at(self, host: Host) -> Node:
        """The node, or what its disk says when it is down."""
        if host.node is not None:
            return host.node
        known = self._dead_covers.get(host.index)
        if known is None or known[0] != host.meta.version:
            shell: Any = NullShell()
            node = Node(shell, shell, shell, host.judge(), Settings(), bytes(16))
            known = self._dead_covers[host.index] = (host.meta.version, node)
        return known[1]


def strangers(mine: Node, theirs: Node) -> bool:
    """Whether one refuses the other (rule 20): nothing is compared until an operator accepts it."""
    return mine.sb.peer_uuid not in (bytes(16), theirs.sb.node_uuid)


def is_quiet(host: Host) -> bool:
    """Whether nothing is on its way through this node; one that failed is never quiet."""
    node = host.node
    if node is None or node.session is None or node.failed:
        return False
    session = node.session
    if session.outgoing or host.data.started:
        return False
    if session.receiving:
        return not session.inbox
    return not node.inflight and not session.window and not session.resync_window


def covers(node: Node, block: int) -> bool:
    """Whether a node knows that a block may differ. Blocks are as long as extents here."""
    if node.dirty._bits[block]:
        return True
    start, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
    return any(start < stop and at < end for _, at, stop in node.unflushed) or any(
        op.offset < end and start < op.end for op in node.inflight
    )
