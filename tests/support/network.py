"""Two hosts on one machine: a network namespace each, a cable between them, and faults on it.

Owns the namespaces, each held by a process that reads from this one: when this process ends, by
whatever way, they end, and cable and rules with them. They have no name, so nothing can be left
behind. A fault is a rule at the receiver (nftables), so the sender never hears of it. Must never:
touch a namespace that it did not make, or enter one but with a thread that ends there.

`Switched` has a third host, the router, and a second network that only the nodes are on.
"""

import ctypes
import itertools
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

ADDRESSES = {"alpha": "192.0.2.1", "beta": "192.0.2.2"}  # RFC 5737; seen in no other namespace
OTHER = {"alpha": "beta", "beta": "alpha"}
HOLD = ("unshare", "--net", "sh", "-c", "echo ready; exec cat")
ROUTER = "router"
# The second network is of RFC 5737, too.
WIRES = {
    "cable": {**ADDRESSES, ROUTER: "192.0.2.254"},
    "second": {"alpha": "203.0.113.1", "beta": "203.0.113.2"},
}
END_S = 10.0
CLONE_NEWNET = 0x4000_0000  # setns(2); Python has it from 3.12 on
SWITCH_RULES = """
table bridge faults
delete table bridge faults
table bridge faults {{
  chain forward {{
    type filter hook forward priority 0; policy accept;
    {rules}
  }}
}}
"""
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

    HELD: tuple[str, ...] = tuple(ADDRESSES)

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in self.HELD:
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

    @contextmanager
    def inside(self, name: str) -> Iterator[Executor]:
        """One thread on host `name`: sockets that it makes, and threads that it starts, are there.

        Whoever ends the `with` waits for it.
        """
        path = Path(f"/proc/{self._holders[name].pid}/ns/net")
        with ThreadPoolExecutor(1, f"on {name}", _enter, (path,)) as executor:
            yield executor

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

    def cut_streams(self) -> None:
        """From now on the hosts hear each other's datagrams, and no TCP."""
        for receiver, sender in OTHER.items():
            self._rule(receiver, f"ip saddr {ADDRESSES[sender]} meta l4proto tcp counter drop")

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


class Switched(Network):
    """`alpha`, `beta` and `router` on one switch; the nodes on a second one, too.

    On each host the first network is `cable`, the second is `second`. What the switches drop is
    dropped whatever it is: questions for a neighbour, echoes, virtual addresses.
    """

    HELD = ("switch", *ADDRESSES, ROUTER)

    def _connect(self) -> None:
        for wire, places in WIRES.items():
            self.run("switch", "ip", "link", "add", "name", wire, "type", "bridge")
            self.run("switch", "ip", "link", "set", wire, "up")
            for name, address in places.items():
                port = f"{name}-{wire}"
                self.run("switch", "ip", "link", "add", "name", port, "type", "veth", "peer",
                         "name", wire, "netns", str(self._holders[name].pid))  # fmt: skip
                self.run("switch", "ip", "link", "set", port, "master", wire, "up")
                self.run(name, "ip", "address", "add", f"{address}/24", "dev", wire)
                for each in (wire, "lo"):
                    self.run(name, "ip", "link", "set", each, "up")

    def mac(self, name: str) -> str:
        """The MAC of a host on the first network."""
        return self._seen(r"link/ether (\S+)", name, "link", "show", "dev", "cable")

    def neighbour(self, name: str, address: str) -> str:
        """The MAC that a host takes for that of an address; "" if it knows none."""
        return self._seen(r"lladdr (\S+)", name, "neigh", "show", address)

    def holds(self, name: str, address: str) -> bool:
        """Whether a host has an address."""
        return bool(self._seen(r"inet (\S+)", name, "address", "show", "to", f"{address}/32"))

    def _seen(self, pattern: str, name: str, *words: str) -> str:
        return "".join(re.findall(pattern, self.run(name, "ip", "-o", *words)))

    def block(self, *ways: tuple[str, str], wires: tuple[str, ...] = tuple(WIRES)) -> None:
        """From now on nothing gets from the first to the second of each pair; all else does."""
        rules = [
            f'iifname "{sender}-{wire}" oifname "{receiver}-{wire}" drop;'
            for sender, receiver in ways
            for wire in wires
        ]
        self.run("switch", "nft", "-f", "-", given=SWITCH_RULES.format(rules="\n    ".join(rules)))

    def part(self, one: str, other: str, *, wires: tuple[str, ...] = tuple(WIRES)) -> None:
        """From now on these two hosts do not hear each other; each hears the third."""
        self.block((one, other), (other, one), wires=wires)

    def isolate(self, *names: str) -> None:
        """From now on each of these hosts hears nobody, and nobody hears it."""
        pairs = itertools.permutations((*ADDRESSES, ROUTER), 2)
        self.block(*(pair for pair in pairs if set(pair) & set(names)))

    def heal(self) -> None:
        """Every packet arrives again."""
        self.block()
        super().heal()


def _enter(path: Path) -> None:
    """Move this thread into a network namespace; there is no way back, and it ends there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns", str(path))


def hold() -> "subprocess.Popen[bytes]":
    """A process in a new network namespace, there when this returns."""
    holder = subprocess.Popen(HOLD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n", "no network namespace"
    return holder
