"""The demo: fourteen steps from an empty mirror to two equal images, with a failover in between.

Called by packaging/demo.sh as first process of namespaces of its own, with its directory.
Exit code 0: all of it held; 1: something did not, or a step could not be done; 130: interrupted.
"""

# ruff: noqa: INP001 - a directory that is run

import filecmp
import os
import signal
import sqlite3
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from attach import Attachment
from load import (
    Copied,
    Count,
    Process,
    choose_files,
    count,
    read_commits,
    read_copied,
)
from nodes import Node, command, in_sync, make_hosts, write_config
from progress import DemoError, Report, megabytes, wait_until

from nbdmirror.errors import NbdMirrorError

SIZE: Final = "1GiB"
STEPS_COUNT: Final = 14
INTERRUPTED: Final = 130
SYNC_TIMEOUT_S: Final = 60.0
COPY_TIMEOUT_S: Final = 150.0
LOSS_TIMEOUT_S: Final = 10.0
COMMITS_TIMEOUT_S: Final = 30.0
COMMITS_ALONE_COUNT: Final = 200
COMMITS_SYNCING_COUNT: Final = 50


class Interrupted(BaseException):
    """SIGINT or SIGTERM."""


class Demo:
    """The state that the steps hand on."""

    def __init__(self, directory: Path, report: Report) -> None:
        self.report = report
        self.files_ledger = directory / "files"
        self.commits_ledger = directory / "commits"
        self.files_list, self.more_list = directory / "list", directory / "list-more"
        self.running: list[Process] = []
        self.attachments: list[Attachment] = []
        self.nodes: list[Node] = []
        self._directory = directory
        self._device_bytes = 0
        self._killed_ns = 0
        self._acknowledged_before = 0
        self._writer: Process
        self.one: Node
        self.two: Node
        self.at_one: Attachment
        self.at_two: Attachment

    # --- 1 to 4: a mirror with a file system on it ------------------------------------------------

    def make_hosts(self) -> None:
        """Steps 1 and 2."""
        self.report.step("two hosts: network namespaces, joined by a cable")
        # What mount and ip leave in /run belongs to this demo only.
        command("mount", "-t", "tmpfs", "tmpfs", "/run")
        run = os.urandom(3).hex()
        names = (f"nm-{run}-1", f"nm-{run}-2")
        make_hosts(names)
        config_path = write_config(self._directory)
        self.one, self.two = Node(config_path, "one", names[0]), Node(config_path, "two", names[1])
        self.nodes = [self.one, self.two]
        self.report.step(f"nbdmirror metadata create: a mirror of {SIZE}, arbiter none")
        self.one.cli("metadata", "create", "--size", SIZE)
        self.two.cli("metadata", "create", "--size", SIZE, "--join")

    def start_engines(self) -> None:
        """Step 3."""
        self.report.step("nbdmirror engine run on both; promote node one")
        self.one.start()
        self.two.start()
        self.wait_for_session(self.one)
        self.one.engine("promote")
        self.wait_in_sync(self.one, self.two)
        self._device_bytes = int(self.one.state()["device_bytes"])
        self.report.note("in sync: node one primary, node two secondary")

    def make_file_system(self) -> None:
        """Step 4."""
        self.at_one = self.attachment(self.one)
        self.report.step(f"attach by {self.at_one.kind}; mkfs.ext4; mount on node one")
        self.at_one.attach()
        self.at_one.make_file_system()
        self.at_one.mount()
        self.report.note(f"{self.at_one.device} on node one")

    # --- 5 to 9: load, death, takeover ------------------------------------------------------------

    def load(self) -> None:
        """Step 5."""
        files, more = choose_files()
        self.report.step("copy real files, each fsynced, while SQLite commits numbered rows")
        self.files_list.write_text("\n".join(files) + "\n")
        self.more_list.write_text("\n".join(more) + "\n")
        self.start_writer(self.at_one)
        self.start("copier", self.files_list, self.at_one.mount_point, self.files_ledger)
        for part in (0.25, 0.5, 0.75, 1.0):
            done = wait_until(
                partial(self.copied_part, part), "the files are copied", COPY_TIMEOUT_S
            )
            self.report.note(
                f"{len(done.files):,} files, {megabytes(done.bytes_count)}, "
                f"{len(read_commits(self.commits_ledger)):,} commits acknowledged"
            )

    def copied_part(self, part: float) -> Copied | None:
        """What was copied, when it is `part` of enough; both processes have to be at work."""
        done = read_copied(self.files_ledger)
        for process in self.running:
            if not process.running():
                raise DemoError(f"{process.name} ended: {process.ended()[1] or 'too early'}")
        return done if done.reached(part) else None

    def kill_primary(self) -> None:
        """Step 6."""
        if not in_sync(self.one, self.two):
            raise DemoError("the two nodes are not in sync before the kill")
        self.report.step("SIGKILL the engine of node one, under load")
        self.one.kill()
        self._killed_ns = time.monotonic_ns()
        self.one.ended()
        for process in self.running:
            code, said = process.ended()
            self.report.note(f"{process.name} ended with {code}: {said or 'nothing said'}")
        self.running.clear()
        done, commits = read_copied(self.files_ledger), read_commits(self.commits_ledger)
        self._acknowledged_before = len(commits)
        self.report.figure("files durable before the kill", f"{len(done.files):,}")
        self.report.figure("their bytes", megabytes(done.bytes_count))
        self.report.figure("commits acknowledged before the kill", f"{len(commits):,}")

    def clean_away(self) -> None:
        """Step 7."""
        self.report.step("clean away the dead device of node one")
        self.at_one.clean_away()

    def take_over(self) -> None:
        """Step 8."""
        self.report.step("promote node two; attach, mount; the application goes on there")
        wait_until(lambda: self.two.state()["session"] is None, "node two noticed", LOSS_TIMEOUT_S)
        self.two.engine("promote")
        promoted_ns = time.monotonic_ns()
        self.at_two = self.attachment(self.two)
        self.at_two.attach()
        self.at_two.mount()
        mounted_ns = time.monotonic_ns()
        before = read_commits(self.commits_ledger)
        self.start_writer(self.at_two)
        commits = self.wait_commits(1)
        outage_s = (commits[len(before)].at_ns - before[-1].at_ns) / 1e9
        self.report.figure("kill to promoted", f"{(promoted_ns - self._killed_ns) / 1e9:.2f} s")
        self.report.figure("kill to mounted", f"{(mounted_ns - self._killed_ns) / 1e9:.2f} s")
        self.report.figure("outage, commit to commit", f"{outage_s:.2f} s")
        self.report.note(f"first commit on node two {outage_s:.2f} s after the last on node one")

    def verify_takeover(self) -> None:
        """Step 9."""
        self.report.step("count and checksum everything on node two; e2fsck -fn")
        found = self.verify("two", self.at_two)
        good = sum(found.commits[: self._acknowledged_before])
        self.report.figure("files found good after the takeover", f"{sum(found.files):,}")
        self.report.figure("of those commits, found good", f"{good:,}")
        self.stop_writer()
        self.at_two.unmount()
        self.check_file_system("two", self.at_two)
        self.at_two.mount()

    # --- 10 to 14: return, swap, end --------------------------------------------------------------

    def work_alone(self) -> None:
        """Step 10."""
        self.report.step("node two works alone: more commits, more files")
        self.start_writer(self.at_two)
        copier = self.start("copier", self.more_list, self.at_two.mount_point, self.files_ledger)
        code, said = copier.ended()
        self.running.remove(copier)
        if code != 0:
            raise DemoError(f"copier: {said}")
        self.wait_commits(COMMITS_ALONE_COUNT)
        dirty = megabytes(float(self.two.state()["dirty_bytes"]))
        self.report.figure("changed while node two was alone", dirty)
        self.report.note(f"{dirty} changed that node one does not have")

    def resync(self) -> None:
        """Step 11."""
        self.report.step("the engine of node one returns; only what changed is copied")
        self.report.note("the application goes on writing meanwhile, and that is copied, too")
        began_s = time.monotonic()
        self.one.start()
        self.wait_in_sync(self.two, self.one)
        took_s = time.monotonic() - began_s
        self.wait_commits(COMMITS_SYNCING_COUNT)
        events = {str(event.get("event")): event for event in self.two.events()}
        if "resync-finished" not in events or "decided" not in events:
            raise DemoError("node two says nothing about the resync")
        self.report.note(f"decided: {events['decided'].get('reason')}")
        self.show_resync(events["resync-finished"], took_s)

    def show_resync(self, event: dict[str, Any], took_s: float) -> None:
        """What was copied, against what there is."""
        copied, examined = int(event["copied_bytes"]), int(event["examined_bytes"])
        share = 100 * copied / self._device_bytes
        self.report.figure("resync: bytes copied", f"{copied:,} ({share:.2f} % of the device)")
        self.report.figure("resync: bytes examined", f"{examined:,}")
        self.report.figure("device size", f"{self._device_bytes:,}")
        self.report.figure("engine started to in sync", f"{took_s:.2f} s")
        self.report.note(f"{copied:,} of {self._device_bytes:,} bytes copied in {took_s:.2f} s")
        self.report.note(
            "in it: what had changed before, what the application wrote meanwhile, and what"
            " differed in the regions that were hot at the kill"
        )
        self.report.check(
            "only what changed was copied (less than a tenth of the device)",
            held=0 < copied < self._device_bytes / 10,
        )

    def swap(self) -> None:
        """Step 12."""
        self.report.step("swap: stop the application, demote node two, promote node one")
        began_s = time.monotonic()
        self.stop_writer()
        self.at_two.unmount()
        self.at_two.detach()
        self.two.engine("demote")
        self.one.engine("promote")
        self.wait_in_sync(self.one, self.two)
        self.at_one = self.attachment(self.one)
        self.at_one.attach()
        self.at_one.mount()
        self.report.figure("swap, unmount to mounted", f"{time.monotonic() - began_s:.2f} s")

    def verify_swap(self) -> None:
        """Step 13."""
        self.report.step("count and checksum everything on node one; e2fsck -fn")
        found = self.verify("one", self.at_one)
        self.report.figure("files in all", f"{len(found.files):,}, good {sum(found.files):,}")
        self.report.figure(
            "commits acknowledged in all", f"{len(found.commits):,}, good {sum(found.commits):,}"
        )
        self.at_one.unmount()
        self.check_file_system("one", self.at_one)
        self.at_one.detach()

    def end(self) -> None:
        """Step 14."""
        self.report.step("stop in order; compare the images byte by byte")
        self.one.engine("demote")
        for node in (self.two, self.one):
            node.engine("stop")
            code = node.ended()
            self.report.check(f"engine of node {node.name} stopped in order", held=code == 0)
            node.cli("metadata", "check")
        first, second = self.one.config.data_file, self.two.config.data_file
        equal = filecmp.cmp(first, second, shallow=False)
        size = first.stat().st_size
        self.report.figure("images, byte by byte", "equal" if equal else "DIFFERENT")
        self.report.check(
            f"both images are equal in all {size:,} bytes",
            held=equal and size == self._device_bytes,
        )

    # --- what several steps need ------------------------------------------------------------------

    def attachment(self, node: Node) -> Attachment:
        """A device on a node, remembered so that it is removed at the end."""
        made = Attachment(node.directory, node.config.export_unix, self._directory / "loops")
        self.attachments.append(made)
        return made

    def start(self, name: str, *arguments: Path) -> Process:
        """Start a load."""
        process = Process(name, *arguments)
        self.running.append(process)
        return process

    def start_writer(self, attachment: Attachment) -> None:
        """Start the application."""
        database = attachment.mount_point / "rows.db"
        self._writer = self.start("writer", database, self.commits_ledger)

    def stop_writer(self) -> None:
        """Stop the application in order."""
        self.running.remove(self._writer)
        self._writer.stop()

    def wait_commits(self, more_count: int) -> list[Any]:
        """Wait until that many commits more are acknowledged."""
        wanted = len(read_commits(self.commits_ledger)) + more_count
        return wait_until(lambda: self.commits_from(wanted), f"{wanted} commits", COMMITS_TIMEOUT_S)

    def commits_from(self, wanted: int) -> list[Any] | None:
        """All commits, when there are enough."""
        if not self._writer.running():
            raise DemoError(f"writer ended: {self._writer.ended()[1]}")
        found = read_commits(self.commits_ledger)
        return found if len(found) >= wanted else None

    def wait_for_session(self, node: Node) -> None:
        """Wait until the peer was met and agreed with."""
        wait_until(
            lambda: (node.state()["session"] or {}).get("phase") == "synced",
            "the two engines meet",
            SYNC_TIMEOUT_S,
        )

    def wait_in_sync(self, primary: Node, secondary: Node) -> None:
        """Wait until both are in sync."""
        wait_until(
            lambda: in_sync(primary, secondary),
            f"in sync with node {primary.name} as primary",
            SYNC_TIMEOUT_S,
        )

    def verify(self, name: str, attachment: Attachment) -> Count:
        """Compare the mirror with the ledgers."""
        commits = read_commits(self.commits_ledger)
        copied = read_copied(self.files_ledger)
        database = attachment.mount_point / "rows.db"
        found = count(attachment.mount_point, database, copied, commits)
        say = self.report.check
        say(
            f"node {name}: {sum(found.files):,} of {len(found.files):,} files good",
            held=all(found.files),
        )
        say(
            f"node {name}: {sum(found.commits):,} of {len(found.commits):,} "
            f"acknowledged commits good; {found.rows_count:,} rows",
            held=all(found.commits),
        )
        say(f"node {name}: integrity_check: {found.integrity}", held=found.integrity == "ok")
        return found

    def check_file_system(self, name: str, attachment: Attachment) -> None:
        """e2fsck -fn."""
        try:
            self.report.check(f"node {name}: e2fsck: {attachment.check()}", held=True)
        except DemoError as error:
            self.report.check(f"node {name}: {error}", held=False)

    def tidy_up(self) -> None:
        """End everything, in an order in which nothing waits for something that is gone."""
        for process in self.running:
            process.end_now()
        for attachment in self.attachments:
            attachment.clean_away()
        for node in self.nodes:
            node.end_now()


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
        demo.make_hosts, demo.start_engines, demo.make_file_system, demo.load, demo.kill_primary,
        demo.clean_away, demo.take_over, demo.verify_takeover, demo.work_alone, demo.resync,
        demo.swap, demo.verify_swap, demo.end,
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
