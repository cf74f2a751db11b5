"""PostgreSQL on a mirror with an etcd, through repeated failovers: is every commit still there?

    python -m tests.cluster.postgres --failovers 20 [--seed 1]

Two controllers, ext4 on the mirror, a PostgreSQL server as the application, `pgbench` with four
clients, and one writer that commits numbered rows and remembers which commits were acknowledged. In
turn, in random order: the primary's host is lost, its engine is killed, the roles are swapped, the
secondary is lost. After each: the other one serves by itself, every acknowledged row is there, and
the sums of pgbench agree. At the end both nodes stop, and the images are equal. Ends with an error
at the first thing that does not hold. Needs root and Debian's package `postgresql`; not part of CI.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from time import monotonic

from nbdmirror import admin
from tests.cluster.app.parts import Stack
from tests.support.cluster import ClusterNode
from tests.support.stores import Etcd

HERE = Path(__file__).resolve().parent
PROGRAMS = Path("/usr/lib/postgresql")
WAYS = ("lose primary", "kill engine", "swap", "lose secondary")
BOUND_S = 120.0
CLIENTS = 4
SIZE = 256 << 20
SUMS = """
select (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from
pgbench_history) and (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from
pgbench_branches) and (select sum(bbalance) from pgbench_branches) = (select coalesce(sum(delta), 0)
from pgbench_history)
"""


def programs() -> Path:
    """The directory of the newest server's programs."""
    found = sorted(PROGRAMS.glob("*/bin/pg_ctl"))
    if not found:
        raise SystemExit("no PostgreSQL server is installed: apt-get install postgresql")
    return found[-1].parent


def configuration(server: Etcd, bin_dir: Path) -> str:
    """What the mirror needs beside the mount."""
    command = f'["{HERE / "server.sh"}", "{bin_dir}", "{{root}}/sql"]'
    timings = "start_timeout_s = 90\nstop_timeout_s = 40\n"
    return (
        f'[etcd]\nendpoints = ["{server.url}"]\n'
        f"[application]\nstart = {command}\nstop = {command}\n{timings}"
    )


class Database(Stack):
    """The cluster, and how its database is talked to. `primary`: who serves, as far as is known."""

    def __init__(self, server: Etcd) -> None:
        self.bin_dir = programs()
        super().__init__(more=configuration(server, self.bin_dir))
        self.size, self.arbiter = SIZE, "etcd"
        self.primary = self.alpha
        self.root.chmod(0o755)
        for node in self.both:
            text = node.config_path.read_text()
            node.config_path.write_text(text.replace('arbiter = "none"', 'arbiter = "etcd"'))
            (self.root / "sql" / node.name).mkdir(parents=True)
            shutil.chown(self.root / "sql" / node.name, "postgres", "postgres")

    def create(self, *, sparse: bool = False) -> "Database":
        """A file system with an empty database on alpha's file, which beta gets."""
        self._part_mounts()
        image, place = self.alpha.data, self.root / "first"
        image.parent.mkdir(mode=0o700, parents=True)
        with image.open("wb") as file:
            image.chmod(0o600)
            os.posix_fallocate(file.fileno(), 0, self.size)
        place.mkdir()
        as_server = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--")
        steps: tuple[tuple[str, ...], ...] = (
            ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image)),
            ("mount", "-o", "loop", str(image), str(place)),
            ("install", "-d", "-o", "postgres", "-m", "700", f"{place}/pg"),
            (*as_server, f"{self.bin_dir}/initdb", "-D", f"{place}/pg", "-A", "trust"),
            ("umount", str(place)),
        )
        for words in steps:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        admin.create(self.alpha.config, self.size, join=False, adopt=True, sparse=sparse)
        admin.create(self.beta.config, self.size, join=True, adopt=False, sparse=sparse)
        return self

    def other(self) -> ClusterNode:
        """The node that does not serve."""
        return self.beta if self.primary is self.alpha else self.alpha

    def address(self) -> list[str]:
        """Where clients find the server."""
        return ["-h", str(self.root / "sql" / self.primary.name), "-U", "postgres"]

    def sql(self, text: str) -> str:
        """One statement; raises CalledProcessError where nobody serves."""
        done = subprocess.run(
            [*self.psql(), "-c", text], capture_output=True, text=True, check=True, timeout=BOUND_S
        )
        return done.stdout.strip()

    def psql(self) -> list[str]:
        """The client, one value a line."""
        return [f"{self.bin_dir}/psql", "-X", "-A", "-t", "-q", *self.address(), "-d", "postgres"]

    def bench(self, *words: str) -> "subprocess.Popen[bytes]":
        """pgbench; it ends when the server goes away."""
        command = [f"{self.bin_dir}/pgbench", *self.address(), *words, "postgres"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Writer:
    """Commits numbered rows, and remembers those whose commit was acknowledged."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._number = 0
        self.acknowledged: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, ValueError):
                self._session()
            self._stop.wait(0.1)

    def _session(self) -> None:
        """One connection, until it breaks."""
        client = subprocess.Popen(
            self._database.psql(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            while not self._stop.is_set():
                self._number += 1
                # The number comes back after the commit, or not at all.
                line = f"insert into rows values ({self._number}) returning number;\n"
                client.stdin.write(line.encode())
                client.stdin.flush()
                answer = client.stdout.readline()
                if int(answer) != self._number:
                    return
                self.acknowledged.append(self._number)
        finally:
            client.kill()
            client.wait()

    def wait(self, more: int) -> None:
        """Until so many more commits were acknowledged."""
        wanted, until = len(self.acknowledged) + more, monotonic() + BOUND_S
        while len(self.acknowledged) < wanted:
            if monotonic() > until:
                raise TimeoutError(f"only {len(self.acknowledged)} commits, {wanted} wanted")
            self._stop.wait(0.05)

    def stop(self) -> None:
        """No more."""
        self._stop.set()
        self._thread.join(BOUND_S)


class Campaign:
    """The database, and the dice."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database = database
        self.counts: Counter[str] = Counter()
        self._dice = random.Random(seed)
        self._deck: list[str] = []

    def begin(self) -> None:
        """The mirror in sync, the server up, pgbench's tables made."""
        self.database.start()
        self.database.sql("create table rows (number bigint primary key)")
        assert self.database.bench("-i", "-q", "-s", "2").wait(BOUND_S) == 0

    def round(self, writer: Writer) -> str:
        """One accident; returns what it was."""
        if not self._deck:
            self._deck = self._dice.sample(WAYS, len(WAYS))
        way = self._deck.pop()
        load = self.database.bench("-c", str(CLIENTS), "-j", "2", "-T", "600", "-n")
        try:
            writer.wait(self._dice.randrange(20, 200))
            self._accident(way)
            writer.wait(20)
        finally:
            load.kill()
            load.wait()
        self._check(writer)
        self.counts[way] += 1
        return way

    def _accident(self, way: str) -> None:
        d, old, other = self.database, self.database.primary, self.database.other()
        lost = {"lose primary": old, "lose secondary": other}.get(way)
        if way == "swap":
            old.order("swap")
        elif way == "kill engine":
            old.kill_engine()
        elif lost is not None:
            lost.lose()
        if way == "lose primary":
            end_servers(d.root)  # a lost host takes its processes with it
        if way != "lose secondary":
            d.primary = other
        d.primary.is_now("ALONE", "PRIM", bound_s=BOUND_S)
        if lost is not None:
            lost.up()
        d.primary.is_now("PRIM", bound_s=BOUND_S)

    def _check(self, writer: Writer) -> None:
        known = writer.acknowledged[:]
        there = {int(line) for line in self.database.sql("select number from rows").split()}
        lost = [number for number in known if number not in there]
        assert not lost, f"{len(lost)} of {len(known)} acknowledged commits are gone: {lost[:9]}"
        assert self.database.sql(SUMS) == "t", "the sums of pgbench differ"


def end_servers(root: Path) -> None:
    """SIGKILL for every server whose data lie on the mount."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{root}/mnt/pg".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def main() -> int:
    """Run it; 0 when everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.postgres", description=__doc__)
    parser.add_argument("--failovers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with Etcd() as server, Database(server) as database:
        campaign = Campaign(database, asked.seed)
        campaign.begin()
        writer = Writer(database)
        for number in range(1, asked.failovers + 1):
            way = campaign.round(writer)
            count = len(writer.acknowledged)
            sys.stdout.write(f"{number:4} {way:<16} {count:8} commits acknowledged, none lost\n")
            sys.stdout.flush()
        writer.stop()
        database.primary.order("stop", both=True)
        for node in database.both:
            node.rests("STOP", "stopped")
        database.assert_equal()
    sys.stdout.write(f"{dict(campaign.counts)}: images equal\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
