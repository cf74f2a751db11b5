"""Two hosts on one machine: a network namespace each, a cable between them, and faults on it.

Owns the namespaces, each held by a process that reads from this one: when this process ends, by
whatever way, they end, and cable and rules with them. They have no name, so nothing can be left
behind. A fault is a rule at the receiver (nftables), so the sender never hears of it. Must never:
touch a namespace that it did not make.
"""

import re
import subprocess
from typing import Self

ADDRESSES = {"alpha": "192.0.2.1", "beta": "192.0.2.2"}  # RFC 5737; seen in no other namespace
OTHER = {"alpha": "beta", "beta": "alpha"}
HOLD = ("unshare", "--net", "sh", "-c", "echo ready; exec cat")
END_S = 10.0
RULES = """
table inet faults
delete table inet faults
table inet faults {{
  chain input {{
    type filter hook input priority 0; policy accept;
    {rule}
  }}
}}
"""


class Network:
    """The hosts `alpha` and `beta`, and what happens to the packets between them."""

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in ADDRESSES:
                self._holders[name] = hold()
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        beta = str(self._holders["beta"].pid)
        self.run("alpha", "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable",
                 "netns", beta)  # fmt: skip
        for name, address in ADDRESSES.items():
            self.run(name, "ip", "address", "add", f"{address}/24", "dev", "cable")
            self.run(name, "ip", "link", "set", "cable", "up")
            self.run(name, "ip", "link", "set", "lo", "up")

    def enter(self, name: str) -> tuple[str, ...]:
        """What stands before a command that runs on host `name`.

        The network namespace alone: in another mount namespace the files of an engine would lie on
        another mount, and it would not trust its page cache.
        """
        return ("nsenter", f"--net=/proc/{self._holders[name].pid}/ns/net")

    def run(self, name: str, *command: str, given: str = "") -> str:
        """One command on a host, to its end; returns what it said."""
        done = subprocess.run(
            [*self.enter(name), *command], input=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {command}: {done.stderr}"
        return done.stdout

    # --- faults -----------------------------------------------------------------------------

    def cut(self, *senders: str) -> None:
        """From now on nothing that these hosts send arrives, and no end says so."""
        for sender in senders:
            self._rule(OTHER[sender], f"ip saddr {ADDRESSES[sender]} counter drop")

    def lose(self, percent: int) -> None:
        """From now on so many packets of a hundred are lost, in both directions."""
        for receiver, sender in OTHER.items():
            self._rule(
                receiver,
                f"ip saddr {ADDRESSES[sender]} numgen random mod 100 < {percent} counter drop",
            )

    def lost(self, receiver: str) -> int:
        """How many packets to this host the present fault has taken."""
        (count,) = re.findall(
            r"counter packets (\d+)", self.run(receiver, "nft", "list", "ruleset")
        )
        return int(count)

    def heal(self) -> None:
        """Every packet arrives again."""
        for name in ADDRESSES:
            self._rule(name, "")

    def _rule(self, receiver: str, rule: str) -> None:
        self.run(receiver, "nft", "-f", "-", given=RULES.format(rule=rule))

    # --- end --------------------------------------------------------------------------------

    def close(self) -> None:
        """End the holders; with their last process the namespaces end."""
        for holder in self._holders.values():
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.close()
            holder.stdout.close()
            holder.wait(END_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold() -> "subprocess.Popen[bytes]":
    """A process in a new network namespace, there when this returns."""
    holder = subprocess.Popen(HOLD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n", "no network namespace"
    return holder
