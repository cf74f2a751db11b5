"""Three hosts on one switch: two nodes that pass an address on, and a client that uses it.

Owns the namespaces (held as in `network`, so nothing is left behind), the bridge, and the programs
that run in them. Must never: touch a namespace that it did not make, or enter one itself.
"""

import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from tests.support.network import END_S, hold

ROOT = Path(__file__).resolve().parents[2]
# RFC 5737 and RFC 3849; no other namespace sees them.
HOSTS = {"alpha": 1, "beta": 2, "client": 3}
NET4, NET6 = "198.51.100", "2001:db8:0:7:"
CABLE = "eth0"
WAIT_S = 90.0  # an announcement comes every minute; nothing else here takes a second


def mac(name: str) -> str:
    """The MAC of a host."""
    return f"02:00:00:00:07:{HOSTS[name]:02x}"


class Lan:
    """The hosts `alpha`, `beta` and `client`, each with one interface `eth0` on the same switch."""

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in ("switch", *HOSTS):
                self._holders[name] = hold()
                self.run(name, "ip", "link", "set", "lo", "up")
            self.run("switch", "ip", "link", "add", "bridge", "type", "bridge")
            self.run("switch", "ip", "link", "set", "bridge", "up")
            for name, number in HOSTS.items():
                self.plug(name, CABLE, mac(name))
                for address in (f"{NET4}.{number}/24", f"{NET6}:{number}/64"):
                    self.give(name, address, CABLE)
        except BaseException:
            self.close()
            raise

    def plug(self, name: str, interface: str, address: str) -> None:
        """Connect a host with the switch, by an interface with this MAC."""
        port = name if interface == CABLE else f"{name}-{interface}"
        self.run("switch", "ip", "link", "add", port, "type", "veth", "peer", "name", interface,
                 "address", address, "netns", str(self._holders[name].pid))  # fmt: skip
        self.run("switch", "ip", "link", "set", port, "master", "bridge", "up")
        self.run(name, "ip", "link", "set", interface, "up")

    def give(self, name: str, address: str, interface: str) -> None:
        """A host has an address, usable at once."""
        at_once = ["nodad"] if ":" in address else []
        self.run(name, "ip", "address", "add", address, "dev", interface, *at_once)

    def enter(self, name: str) -> tuple[str, ...]:
        """What stands before a command that runs on host `name`."""
        return ("nsenter", f"--net=/proc/{self._holders[name].pid}/ns/net")

    def run(self, name: str, *command: str) -> str:
        """One command on a host, to its end; returns what it said."""
        done = subprocess.run(
            [*self.enter(name), *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, f"{name}: {command}: {done.stdout} {done.stderr}"
        return done.stdout

    def spare(self, name: str, interface: str) -> None:
        """One more Ethernet interface on a host, up; the far end of its cable is there, too."""
        self.run(name, "ip", "link", "add", interface, "type", "veth", "peer", "name", "far-end")
        for each in (interface, "far-end"):
            self.run(name, "ip", "link", "set", each, "up")

    def addresses(self, name: str) -> set[str]:
        """What `ip` shows on a host, but its loopback and link-local addresses."""
        shown = self.run(name, "ip", "-o", "address", "show")
        found = set(re.findall(r"inet6? (\S+)", shown))
        return {each for each in found if not each.startswith(("127.", "::1", "fe80"))}

    def neighbour(self, address: str) -> str:
        """Where the client thinks that this address is; "" if it does not know."""
        shown = self.run("client", "ip", "neigh", "show", address)
        return "".join(re.findall(r"lladdr (\S+)", shown))

    def mislead(self, address: str) -> None:
        """The client has a wrong MAC for this address."""
        self.run("client", "ip", "neigh", "replace", address, "lladdr", "02:00:00:00:07:99",
                 "dev", CABLE, "nud", "reachable")  # fmt: skip

    def ping(self, address: str) -> None:
        """The client gets an echo from this address."""
        self.run("client", "ping", "-n", "-c", "1", "-w", "30", address)

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


class Program:
    """`tests/support/lan_program.py` on one host: does what it is told, says what it sees."""

    def __init__(self, lan: Lan, host: str, *words: str, before: tuple[str, ...] = ()) -> None:
        """`words` are the program's; `before` stands before its own command."""
        self.told: list[str] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open while the program runs
        self._process = subprocess.Popen(
            [*lan.enter(host), *before, sys.executable, "-W", "error",
             "-m", "tests.support.lan_program", *words],
            cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.next() == {"ready": True}

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def next(self) -> dict[str, Any]:
        """The next thing that it says, within a bound."""
        line = self._lines.get(timeout=WAIT_S)
        assert line, "the program has ended"
        said: dict[str, Any] = json.loads(line)
        if "told" in said:
            self.told.append(said["told"])
        return said

    def ask(self, what: str) -> Any:
        """Have it do something; returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        while True:
            said = self.next()
            if "answer" in said:
                return said["answer"]

    def wait_told(self, pattern: str) -> str:
        """A sentence that it has told, or tells now."""
        at = 0
        while True:
            for sentence in self.told[at:]:
                if re.search(pattern, sentence):
                    return sentence
            at = len(self.told)
            self.next()

    def kill(self) -> None:
        """It ends without a word."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """It ends with its input, in order, and leaves nothing open (warnings are errors)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(WAIT_S)
        self._reader.join()
        self._process.stdout.close()
        if not self._errors.closed:
            self._errors.seek(0)
            errors = self._errors.read()
            self._errors.close()
            assert not errors, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
