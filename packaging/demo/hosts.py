"""Three hosts on one machine: two nodes and a router, each with network and mounts of its own.

Owns the namespaces, each held by a process that reads from this one: they end with it, whatever
happens, and with them cables, mounts and rules. Must never touch a namespace that it did not make.
"""

# ruff: noqa: INP001, S603 - a directory that is run; commands of ours, found on PATH

import subprocess
from typing import Final

from progress import DemoError

NETWORK: Final = "192.0.2"  # RFC 5737; it exists in namespaces of ours only
ROUTER: Final = "router"
LAST: Final = {"one": 1, "two": 2, ROUTER: 254}
COMMAND_TIMEOUT_S: Final = 70.0
END_S: Final = 10.0
HOLD: Final = ("unshare", "--net", "--mount", "sh", "-c", "echo ready; exec cat")
CUT: Final = """
table inet demo {
  chain input { type filter hook input priority 0; policy drop; iifname "lo" accept; }
  chain output { type filter hook output priority 0; policy drop; oifname "lo" accept; }
}
"""


def command(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S, given: str = "") -> str:
    """Run a command to its end; returns what it printed.

    Raises:
        DemoError: it failed; the text holds what it said.
    """
    try:
        done = subprocess.run(
            arguments, input=given, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise DemoError(f"{' '.join(arguments)}: not done in {timeout_s:g} s") from None
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        raise DemoError(f"{' '.join(arguments)}: exit code {done.returncode}: {said}")
    return done.stdout


class Hosts:
    """The hosts `one`, `two` and `router`, on one switch."""

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def make(self) -> None:
        """Make and connect them."""
        for name in LAST:
            holder = subprocess.Popen(HOLD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._holders[name] = holder
            assert holder.stdout is not None
            if holder.stdout.readline() != b"ready\n":
                raise DemoError(f"no namespaces for host {name}")
        # The switch is part of the router: whoever is cut off sees neither router nor peer.
        self.run(ROUTER, "ip", "link", "add", "switch", "type", "bridge")
        for name in ("one", "two"):
            pid = str(self._holders[name].pid)
            self.run(ROUTER, "ip", "link", "add", f"to-{name}", "type", "veth",
                     "peer", "name", "net0", "netns", pid)  # fmt: skip
            self.run(ROUTER, "ip", "link", "set", f"to-{name}", "master", "switch", "up")
        for name, number in LAST.items():
            device = "switch" if name == ROUTER else "net0"
            self.run(name, "ip", "address", "add", f"{NETWORK}.{number}/24", "dev", device)
            self.run(name, "ip", "link", "set", device, "up")
            self.run(name, "ip", "link", "set", "lo", "up")

    def enter(self, name: str) -> tuple[str, ...]:
        """What stands before a command that runs on a host."""
        where = f"/proc/{self._holders[name].pid}/ns"
        return ("nsenter", f"--net={where}/net", f"--mount={where}/mnt")

    def run(self, name: str, *arguments: str, given: str = "") -> str:
        """One command on a host, to its end. Raises DemoError."""
        return command(*self.enter(name), *arguments, given=given)

    def cut(self, name: str) -> None:
        """From now on nothing enters or leaves a host, and nobody is told."""
        self.run(name, "nft", "-f", "-", given=CUT)

    def heal(self, name: str) -> None:
        """Every packet passes again."""
        self.run(name, "nft", "delete", "table", "inet", "demo")

    def end(self) -> None:
        """The holders end; with the last process of a host it is gone."""
        for holder in self._holders.values():
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.close()
            holder.stdout.close()
            holder.wait(END_S)
