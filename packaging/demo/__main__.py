"""The demo: a mirror that keeps an application alive through three faults, without a command.

Called by packaging/demo.sh as first process of namespaces of its own, with its directory.
Exit code 0: all of it held; 1: something did not, or a step could not be done; 130: interrupted.
"""

# ruff: noqa: INP001 - a directory that is run

import filecmp
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from hosts import NETWORK, ROUTER, Hosts, command
from load import Commit, Copied, Process, choose_files, count_there, read_commits, read_copied
from nodes import Node, write_config
from progress import DemoError, Report, megabytes, wait_until

from nbdmirror.errors import NbdMirrorError

SIZE_BYTES: Final = 1 << 30
STEPS_COUNT: Final = 15
INTERRUPTED: Final = 130
READY_S: Final = 60.0
COPY_S: Final = 150.0
COMMITS_S: Final = 120.0
TAKEOVER_S: Final = 60.0
COMMITS_COUNT: Final = 10_000
BETWEEN_COUNT: Final = (300, 900)  # commits from being well again to the next fault
ALONE_COUNT: Final = 200
# What is promised of each outage, and by how much one may take longer here.
PROMISED_S: Final = {"engine": 1.0, "node": 5.0, "cut": 5.0}
TIMES: Final = 3.0


class Interrupted(BaseException):
    """SIGINT or SIGTERM."""


class Demo:
    """The state that the steps hand on."""

    def __init__(self, directory: Path, report: Report) -> None:
        self.report = report
        self.directory = directory
        self.hosts = Hosts()
        self.nodes: list[Node] = []
        self.running: list[Process] = []
        self.files_ledger = directory / "files"
        self.commits_ledger = directory / "commits"
        self.timeline = directory / "timeline"
        self._random = random.Random()  # noqa: S311 - moments, not secrets
        self._device_bytes = SIZE_BYTES
        self.one: Node
        self.two: Node
        self._copier: Process
        self._prober: Process

    # --- 1 to 4: a mirror with an application on it -------------------------------------------

    def make_hosts(self) -> None:
        """Step 1."""
        self.report.step("three hosts in namespaces: two nodes, and a router between them")
        # What mount and ip leave in /run belongs to this demo only.
        command("mount", "-t", "tmpfs", "tmpfs", "/run")
        self.hosts.make()
        config_path = write_config(self.directory)
        self.one, self.two = (Node(config_path, name, self.hosts) for name in ("one", "two"))
        self.nodes = [self.one, self.two]

    def create(self) -> None:
        """Step 2."""
        self.report.step("a mirror of 1 GiB with ext4, arbiter ping: nbdmirror metadata create")
        image = self.one.config.data_file
        image.parent.mkdir(parents=True, mode=0o700)
        with image.open("wb") as file:
            image.chmod(0o600)
            os.posix_fallocate(file.fileno(), 0, SIZE_BYTES)
        options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        command("mkfs.ext4", "-q", "-E", options, str(image))
        self.one.cli("metadata", "create", "--adopt")
        self.two.cli("metadata", "create", "--size", str(SIZE_BYTES), "--join")

    def start(self) -> None:
        """Step 3."""
        self.report.step("nbdmirrord and `nbdmirror start` on both")
        for node in self.nodes:
            node.up()
            node.cli("start", "--no-wait")
        self.well(self.one, self.two)
        service = self.one.status()["service"]
        self.report.note(f"node one PRIM, node two SECOND; {service['attach']}: "
                         f"{service['device']} on {service['mount_point']}")  # fmt: skip
        addresses = [f"{NETWORK}.1", f"{NETWORK}.2"]
        self._prober = self.begin(ROUTER, "prober", self.timeline, *addresses)

    def load(self) -> None:
        """Step 4."""
        files, more = choose_files()
        (self.directory / "list").write_text("\n".join(files) + "\n")
        (self.directory / "list-more").write_text("\n".join(more) + "\n")
        self.report.step("copy real files, each fsynced, while SQLite commits numbered rows")
        self._copier = self.begin(
            "one", "copier", self.directory / "list", self.one.mount_point, self.files_ledger
        )
        for part in (0.25, 0.5, 0.75, 1.0):
            done = wait_until(partial(self.copied_part, part), "the files are copied", COPY_S)
            self.report.note(
                f"{len(done.files):,} files, {megabytes(done.bytes_count)}, "
                f"{len(self.commits()):,} commits acknowledged"
            )

    def copied_part(self, part: float) -> Copied | None:
        """What was copied, when it is `part` of enough."""
        done = read_copied(self.files_ledger)
        if not self._copier.running() and not done.reached(part):
            raise DemoError(f"copier ended: {self._copier.ended()[1] or 'too early'}")
        return done if done.reached(part) else None

    # --- 5 to 7: the engine is killed -----------------------------------------------------------

    def engine_killed(self) -> None:
        """Step 5."""
        self.report.step("SIGKILL the engine of node one, under load; nobody types anything")
        self.fault("engine", "engine killed", self.one, self.two, self.one.kill_engine)
        code, said = self._copier.ended()
        self.running.remove(self._copier)
        self.report.note(f"copier ended with {code}: {said or 'nothing said'}")

    def counted(self) -> None:
        """Step 6."""
        done = read_copied(self.files_ledger)
        self.report.step("count and checksum everything on node two, while it serves")
        self.report.figure("files durable before the first fault", f"{len(done.files):,}")
        self.report.figure("their bytes", megabytes(done.bytes_count))
        self.verify(self.two)

    def returned(self) -> None:
        """Step 7."""
        self.report.step("node one returns by itself; only what changed is copied")
        self.well(self.two, self.one)
        events = {str(event.get("event")): event for event in self.two.events()}
        if "resync-finished" not in events:
            raise DemoError("node two says nothing about the resync")
        copied = int(events["resync-finished"]["copied_bytes"])
        share = 100 * copied / self._device_bytes
        self.report.figure("resync: bytes copied", f"{copied:,} ({share:.2f} % of the device)")
        self.report.figure("device size", f"{self._device_bytes:,}")
        self.report.note(f"{copied:,} of {self._device_bytes:,} bytes copied")
        self.report.check(
            "only what changed was copied (less than a tenth of the device)",
            held=0 < copied < self._device_bytes / 10,
        )

    # --- 8 to 11: a whole node, and the network -------------------------------------------------

    def node_lost(self) -> None:
        """Step 8."""
        self.report.step("SIGKILL engine and controller of node two at a random moment")
        self.fault("node", "both processes killed", self.two, self.one, self.two.kill_both)
        self.verify(self.one)
        self.copy_more(self.one)

    def node_returned(self) -> None:
        """Step 9."""
        self.report.step("nbdmirrord on node two again, as a service manager would start it")
        self.two.up()
        self.well(self.one, self.two)

    def cut(self) -> None:
        """Step 10."""
        self.report.step("cut node one off from its peer and from the router")
        self.fault("cut", "network cut", self.one, self.two, lambda: self.hosts.cut("one"))
        self.verify(self.two)
        wait_until(lambda: not self.one.has_role("PRIM", "ALONE"), "node one stepped back", READY_S)
        self.report.note(f"node one: {self.one.status()['reason']}")

    def healed(self) -> None:
        """Step 11."""
        self.report.step("the network is back")
        self.hosts.heal("one")
        self.well(self.two, self.one)

    # --- 12 to 15: enough, swap, end ------------------------------------------------------------

    def enough(self) -> None:
        """Step 12."""
        self.report.step(f"on to {COMMITS_COUNT:,} acknowledged commits")
        self.wait_commits(max(0, COMMITS_COUNT - len(self.commits())))

    def swap(self) -> None:
        """Step 13."""
        self.report.step("nbdmirror swap: node one is primary again")
        before = self.commits()[-1]
        self.two.cli("swap")
        self.well(self.one, self.two)
        after = self.first_after(before)
        self.report.figure("outage of the swap", f"{(after.at_ns - before.at_ns) / 1e9:.2f} s")
        self.verify(self.one)

    def stop(self) -> None:
        """Step 14."""
        self.report.step("nbdmirror stop --both")
        self._prober.stop()
        self.running.remove(self._prober)
        self.one.cli("stop", "--both")
        for node in (self.two, self.one):
            code = node.end_controller()
            self.report.check(f"node {node.name} stopped in order", held=code == 0)
            node.cli("metadata", "check")
        self.check_timeline()

    def compare(self) -> None:
        """Step 15."""
        self.report.step("e2fsck both images, and compare them byte by byte")
        first, second = self.one.config.data_file, self.two.config.data_file
        equal = filecmp.cmp(first, second, shallow=False)
        for image in (first, second):
            self.check_file_system(image)
        commits = self.commits()
        self.report.figure("commits acknowledged in all", f"{len(commits):,}")
        self.report.figure("images, byte by byte", "equal" if equal else "DIFFERENT")
        self.report.check(
            f"both images are equal in all {self._device_bytes:,} bytes",
            held=equal and first.stat().st_size == self._device_bytes,
        )

    # --- what several steps need ----------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """Everything that was acknowledged so far."""
        return read_commits(self.commits_ledger)

    def begin(self, host: str, name: str, *arguments: object) -> Process:
        """Start a load on a host."""
        process = Process(self.hosts.enter(host), name, *arguments)
        self.running.append(process)
        return process

    def well(self, primary: Node, secondary: Node) -> None:
        """Wait until `primary` is PRIM and `secondary` SECOND, both ready."""
        wait_until(
            lambda: primary.has_role("PRIM") and secondary.has_role("SECOND"),
            f"node {primary.name} PRIM and node {secondary.name} SECOND",
            READY_S,
        )

    def fault(
        self, promise: str, what: str, victim: Node, other: Node, do: Callable[[], None]
    ) -> None:
        """One fault at a random moment; the other node has to go on by itself, in time."""
        self.well(victim, other)
        self.wait_commits(self._random.randint(*BETWEEN_COUNT))
        do()
        begun_ns = time.monotonic_ns()
        wait_until(lambda: other.has_role("ALONE", "PRIM"), f"{what}: takeover", TAKEOVER_S)
        before = [c for c in self.commits() if c.at_ns <= begun_ns][-1]
        after = self.first_after(before, other)
        outage_s = (after.at_ns - before.at_ns) / 1e9
        limit_s = TIMES * PROMISED_S[promise]
        self.report.figure(f"outage, {what}", f"{outage_s:.2f} s, commit to commit")
        self.report.check(
            f"node {other.name} took over: no commit for {outage_s:.2f} s "
            f"(promised {PROMISED_S[promise]:g} s, accepted here {limit_s:g} s)",
            held=outage_s <= limit_s,
        )

    def first_after(self, before: Commit, node: Node | None = None) -> Commit:
        """The first commit acknowledged after `before`."""
        what = f"a commit on node {node.name}" if node is not None else "a commit"
        found = wait_until(
            lambda: [c for c in self.commits() if c.at_ns > before.at_ns], what, COMMITS_S
        )
        gaps = [(b.at_ns - a.at_ns, b) for a, b in zip([before, *found], found, strict=False)]
        return max(gaps, key=lambda gap: gap[0])[1]

    def wait_commits(self, more_count: int) -> None:
        """Wait until that many commits more are acknowledged."""
        wanted = len(self.commits()) + more_count
        wait_until(lambda: len(self.commits()) >= wanted, f"{wanted:,} commits", COMMITS_S)

    def copy_more(self, node: Node) -> None:
        """A node that serves alone gets more files, which the other one does not have."""
        copier = self.begin(
            node.name, "copier", self.directory / "list-more", node.mount_point, self.files_ledger
        )
        code, said = copier.ended()
        self.running.remove(copier)
        if code != 0:
            raise DemoError(f"copier: {said}")
        self.wait_commits(ALONE_COUNT)

    def verify(self, node: Node) -> None:
        """Compare what a node's mount shows with the ledgers."""
        commits, copied = self.commits(), read_copied(self.files_ledger)
        enter = self.hosts.enter(node.name)
        found = count_there(enter, node.mount_point, copied, commits)
        say = self.report.check
        say(
            f"node {node.name}: {sum(found.files):,} of {len(found.files):,} files good",
            held=all(found.files),
        )
        say(
            f"node {node.name}: {sum(found.commits):,} of {len(found.commits):,} "
            f"acknowledged commits good; {found.rows_count:,} rows",
            held=all(found.commits),
        )
        say(f"node {node.name}: integrity_check: {found.integrity}", held=found.integrity == "ok")

    def check_file_system(self, image: Path) -> None:
        """e2fsck -fn."""
        try:
            said = command("e2fsck", "-fn", str(image)).strip().splitlines()[-1]
            self.report.check(f"e2fsck: {said}", held=True)
        except DemoError as error:
            self.report.check(str(error), held=False)

    def check_timeline(self) -> None:
        """The router never saw two nodes that were ready at once, and saw each of them ready."""
        rows = [line.split()[1:] for line in self.timeline.read_text().splitlines()]
        both = sum(row == ["200", "200"] for row in rows)
        self.report.check(f"the probe never called both nodes ready ({len(rows)} changes seen)",
                          held=both == 0)  # fmt: skip
        seen = all(any(row[index] == "200" for row in rows) for index in (0, 1))
        self.report.check("the probe called each node ready while it served", held=seen)

    def tidy_up(self) -> None:
        """End everything, in an order in which nothing waits for something that is gone."""
        for process in self.running:
            process.end_now()
        for node in self.nodes:
            node.end_now()
        self.hosts.end()


def interrupt(_number: int, _frame: Any) -> None:
    """Once; what follows must be able to tidy up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted


def main(directory: Path) -> int:
    """Run the steps."""
    # Ignored by inheritance in a background process of a shell, and by the first of a tree.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, interrupt)
    report = Report(STEPS_COUNT)
    demo = Demo(directory, report)
    steps = (
        demo.make_hosts, demo.create, demo.start, demo.load, demo.engine_killed, demo.counted,
        demo.returned, demo.node_lost, demo.node_returned, demo.cut, demo.healed, demo.enough,
        demo.swap, demo.stop, demo.compare,
    )  # fmt: skip
    try:
        for step in steps:
            step()
        report.table()
    except (DemoError, NbdMirrorError, OSError, sqlite3.Error) as error:
        report.line(f"stopped: {error}")
        for node in demo.nodes:
            sys.stderr.write(f"{node.log_tail()}\n")
        return 1
    except Interrupted:
        report.line("interrupted; tidying up")
        return INTERRUPTED
    finally:
        demo.tidy_up()
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
