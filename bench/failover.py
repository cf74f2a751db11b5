"""How long until the other node acknowledges: the time budget of a failover, measured.

`python -m bench.failover [--runs N] [--json FILE]`, or `bash bench/failover.sh`. Two real nodes
with their controllers on two hosts in namespaces; a client writes to whichever node takes it. An
outage is the time from the fault to the first write that the other node acknowledged; the same
client sees both. Each kind of fault is repeated; median and maximum are printed, and the exit code
is 1 when a maximum is above what is promised.

Owns the faults and the clock. What is measured is detection, decision and promotion: file system
and application come on top of it and are the demo's.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nbd

from tests.support.cluster import Cluster, ClusterNode
from tests.support.network import Network, Switched
from tests.support.third_host import Parted, ThirdHost, section

RUNS: Final = 30
BLOCK: Final = b"w" * 4096
WRITE_LIMIT_S: Final = 30.0
RETRY_S: Final = 0.002
SOFT_RUNS_MAX: Final = 10


@dataclass(frozen=True)
class Fault:
    """One kind of fault, and what is promised of it."""

    name: str
    promised_s: float
    do: Callable[[Network, ClusterNode], None]
    mend: Callable[[Network, ClusterNode], None]


def first_write(node: ClusterNode) -> float:
    """When the node acknowledged a write for the first time, by the monotonic clock."""
    pause = threading.Event()
    until = time.monotonic() + WRITE_LIMIT_S
    while time.monotonic() < until:
        try:
            client = node.connect()
            client.pwrite(BLOCK, 0)
        except nbd.Error:
            pause.wait(RETRY_S)
            continue
        done = time.monotonic()
        client.shutdown()
        return done
    raise TimeoutError(f"{node.name} took no write within {WRITE_LIMIT_S:g} s")


def kill_engine(_network: Network, node: ClusterNode) -> None:
    """The engine dies."""
    node.kill_engine()


def lose_host(network: Network, node: ClusterNode) -> None:
    """The host is gone: no process says goodbye, and no packet arrives any more."""
    network.cut("alpha", "beta")
    node.lose()


def return_host(network: Network, node: ClusterNode) -> None:
    """The host is back."""
    network.heal()
    node.up()


def stop_node(_network: Network, node: ClusterNode) -> None:
    """An operator stops the node."""
    node.order("stop")


def start_node(_network: Network, node: ClusterNode) -> None:
    """And starts it again."""
    node.wait(lambda s: s["role"] == "STOP", "stopped")
    node.order("start")


def order_start(_network: Network, node: ClusterNode) -> None:
    """An engine that ends again and again is given up until somebody orders a start."""
    node.order("start")


FAULTS: Final = (
    Fault("death of the engine", 1.0, kill_engine, order_start),
    Fault("clean stop", 1.0, stop_node, start_node),
    Fault("loss of the host", 5.0, lose_host, return_host),
)


def measure(fault: Fault, runs: int, cluster: Cluster, network: Network) -> list[float]:
    """The outages, s. The roles change sides with each run."""
    outages = []
    for _ in range(runs):
        victim, other = cluster.both
        if victim.status()["role"] not in ("PRIM", "ALONE"):
            victim, other = other, victim
        cluster.in_sync(victim)
        first_write(victim)
        begun = time.monotonic()
        fault.do(network, victim)
        outages.append(first_write(other) - begun)
        fault.mend(network, victim)
        cluster.in_sync(other)
    return outages


def false_takeovers(cluster: Cluster, seconds: int) -> int:
    """Changes of role while every core is busy and both controllers are paused for 1.2 s each."""
    before = [node.status()["engine"]["epoch"] for node in cluster.both]
    stress = subprocess.Popen(
        ["stress-ng", "--cpu", "0", "--timeout", str(seconds)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pause = threading.Event()
    try:
        while stress.poll() is None:
            for node in cluster.both:
                node.signal(signal.SIGSTOP)
                pause.wait(1.2)
                node.signal(signal.SIGCONT)
                pause.wait(0.5)
    finally:
        stress.wait()
    after = [node.status()["engine"]["epoch"] for node in cluster.both]
    return sum(now != then for now, then in zip(after, before, strict=True))


def isolate_host(network: Network, node: ClusterNode) -> None:
    """The host is gone, with an etcd on a third one that only the other node still sees."""
    assert isinstance(network, Switched)
    network.isolate(node.name)
    node.lose()


def told(fault: Fault, outages: list[float]) -> dict[str, Any]:
    """One line, and the same as facts."""
    median, worst = statistics.median(outages), max(outages)
    sys.stdout.write(
        f"{fault.name:<26} {len(outages):3} runs   median {median:6.3f} s   "
        f"max {worst:6.3f} s   promised {fault.promised_s:g} s\n"
    )
    sys.stdout.flush()
    return {
        "fault": fault.name, "runs": len(outages), "median_s": round(median, 3),
        "max_s": round(worst, 3), "promised_s": fault.promised_s,
    }  # fmt: skip


def without_memory(runs: int, stress_s: int) -> list[dict[str, Any]]:
    """Every fault, and what must not be taken for one."""
    with Network() as network, Cluster(network=network) as cluster:
        cluster.start()
        rows = [told(fault, measure(fault, runs, cluster, network)) for fault in FAULTS]
        if stress_s:
            count = false_takeovers(cluster, stress_s)
            rows.append({"fault": "false takeovers under load", "count": count})
            sys.stdout.write(f"false takeovers in {stress_s} s of load and pauses: {count}\n")
    return rows


def with_etcd(runs: int) -> list[dict[str, Any]]:
    """The loss of a host where the right comes from a record: a claim is on the way."""
    with (
        Switched() as network,
        ThirdHost(network) as server,
        Parted(arbiter="etcd", more=section(server), network=network) as cluster,
    ):
        cluster.start()
        return [told(WITH_ETCD, measure(WITH_ETCD, runs, cluster, network))]


WITH_ETCD: Final = Fault("loss of the host, with etcd", 5.0, isolate_host, return_host)


def main() -> int:
    """Measure, print, and say by the exit code whether it was within what is promised."""
    parser = argparse.ArgumentParser(prog="bench/failover.sh", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help="of each fault")
    parser.add_argument("--stress", type=int, default=60, metavar="S", help="0: leave that out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    asked = parser.parse_args()
    rows = without_memory(asked.runs, asked.stress) + with_etcd(asked.runs)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    slow = any(row.get("max_s", 0.0) > row.get("promised_s", 0.0) for row in rows)
    return 1 if slow or any(row.get("count") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
