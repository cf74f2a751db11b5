"""What the tests of applications and checkers share: configuration, the application's files, hosts.

Owns the text of `[application]` and `[[checker]]`, and the two mount namespaces of `Stack`, each
held by a process that ends with this one. Must never decide what a test expects.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbdmirror import admin
from tests.controller.doing import alive
from tests.support.cluster import Cluster, ClusterNode, Status
from tests.support.pair import ROOT

HERE: Final = Path(__file__).resolve().parent
SIZE: Final = 32 << 20
END_S: Final = 10.0
HOLD: Final = ("unshare", "--mount", "sh", "-c", "echo ready; exec cat")
IDLE: Final = ("idle",)


def application(*words: str, keys: str = "") -> str:
    """`[application]` with the tests' program, in the way that `words` name."""
    script, program = HERE / "app.sh", HERE / "program.py"
    more = "".join(f', "{word}"' for word in words or IDLE)
    return f"""
[application]
start = ["{script}", "{{root}}", "{sys.executable}", "{program}", "{{root}}"{more}]
stop = ["{script}", "{{root}}"]
{keys}
"""


def checker(name: str, keys: str) -> str:
    """`[[checker]]`, quick; `keys` say the rest."""
    return f'[[checker]]\nname = "{name}"\ninterval_ms = 100\nfall = 1\n{keys}\n'


def process_checker(action: str, name: str = "program", keys: str = "") -> str:
    """A checker that finds the tests' program by its command line."""
    pattern = "program.py {root} "
    return checker(name, f'kind = "process"\npattern = "{pattern}"\naction = "{action}"\n{keys}')


class App:
    """The application as its files show it."""

    def __init__(self, cluster: Cluster) -> None:
        self.root = cluster.root

    def how(self, node: str, action: str, text: str) -> None:
        """From now on the script does this first, when this node asks it for that."""
        (self.root / f"{node}-{action}").write_text(text + "\n")

    def as_usual(self) -> None:
        """Forget what `how` was told."""
        for node in ("alpha", "beta"):
            for action in ("start", "stop", "force"):
                (self.root / f"{node}-{action}").unlink(missing_ok=True)

    def did(self) -> list[str]:
        """What the scripts were asked for, in order: "alpha start"."""
        path = self.root / "did"
        return path.read_text().splitlines() if path.exists() else []

    def pid(self, node: str) -> int:
        """Of the program that this node started last; 0 if it was stopped."""
        try:
            return int((self.root / f"{node}.pid").read_text())
        except (OSError, ValueError):
            return 0

    def runs(self, node: str) -> bool:
        """Whether it runs there."""
        pid = self.pid(node)
        return pid != 0 and alive(pid)

    def ledger(self) -> list[tuple[int, str]]:
        """Every record that was acknowledged: number and node."""
        path = self.root / "ledger"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(line.split()[0]), line.split()[1]) for line in lines]


def told(node: ClusterNode, text: str) -> bool:
    """Whether the controller told this sentence, or one that holds it."""
    return any(text in str(event.get("reason")) for event in node.told("note"))


def row(name: str) -> Callable[[Status], bool]:
    """A status that was decided by that row."""
    return lambda status: bool(status["row"] == name)


class Stack(Cluster):
    """A cluster with everything: ext4 on the device, mounted, each node with mounts of its own."""

    def __init__(self, *, more: str = "", top: str = "") -> None:
        mount = '[mount]\npoint = "{root}/mnt"\nattach = "fuse"\n'
        self._holders: list[subprocess.Popen[bytes]] = []
        super().__init__(size=SIZE, more=mount + more, top=top)
        (self.root / "mnt").mkdir()

    def _part_mounts(self) -> None:
        """From now on each node has mounts of its own, and what is mounted until now."""
        for node in self.both:
            holder = subprocess.Popen(HOLD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._holders.append(holder)
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n", "no mount namespace"
            node.enter = ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt")

    def create(self, *, sparse: bool = False) -> "Stack":
        """A file system on alpha's file, which beta gets."""
        self._part_mounts()
        image = self.alpha.data
        image.parent.mkdir(mode=0o700, parents=True)
        with image.open("wb") as file:
            image.chmod(0o600)
            os.posix_fallocate(file.fileno(), 0, self.size)
        options = "lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-E", options, str(image)], check=True)
        admin.create(self.alpha.config, self.size, join=False, adopt=True, sparse=sparse)
        admin.create(self.beta.config, self.size, join=True, adopt=False, sparse=sparse)
        return self

    def run(self, node: ClusterNode, *words: str) -> str:
        """A command among the mounts of a node; what it said."""
        done = subprocess.run(
            [*node.enter, *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, f"{node.name}: {words}: {done.stderr}"
        return done.stdout

    def records(self, node: ClusterNode) -> set[int]:
        """The numbers in the file on the node's mount."""
        return {int(line) for line in self.run(node, "cat", f"{self.root}/mnt/records").split()}

    def mounted(self, node: ClusterNode) -> bool:
        """Whether the file system is mounted there."""
        return f" {self.root}/mnt " in self.run(node, "cat", "/proc/self/mountinfo")

    def close(self) -> None:
        """As a cluster, then the holders."""
        try:
            super().close()
        finally:
            for holder in self._holders:
                assert holder.stdin is not None
                assert holder.stdout is not None
                holder.stdin.close()
                holder.stdout.close()
                holder.wait(END_S)
            self._holders.clear()
