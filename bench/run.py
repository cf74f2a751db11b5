"""The bench of whole systems: the mirror beside its peers, interleaved, in one go.

Owns the loads, the order of the runs and the command line (`bash bench/run.sh`, which sets up and
clears away). The machine is never quiet: in each round every system runs each load next to the
others, in an order that turns with the round, and only ratios within a round are believed. It
leaves no process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.figures import Figures, Run
from bench.systems import SYSTEMS, BenchError, System, cpu_seconds

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
DEVICE_BYTES: Final = 16 * GIB
HOT_BYTES: Final = 256 * MIB
FREE_BYTES_MIN: Final = 8 * GIB
FIO_GRACE_S: Final = 60
EXIT_BELOW_FLOOR: Final = 1
EXIT_BROKEN: Final = 2


@dataclass(frozen=True, slots=True)
class Load:
    """What fio does: `jobs` connections of `depth` each. `span_bytes`: over how much of the device,
    from its start.
    """

    name: str
    pattern: str
    block: str
    depth: int
    span_bytes: int
    jobs: int = 1


QUICK: Final = (
    Load("4k QD1", "randwrite", "4k", 1, HOT_BYTES),
    Load("4k QD16", "randwrite", "4k", 16, HOT_BYTES),
    Load("4k 4*QD4", "randwrite", "4k", 4, HOT_BYTES, jobs=4),
    Load("1M QD4", "write", "1M", 4, HOT_BYTES),
    Load("4k QD16 cold", "randwrite", "4k", 16, DEVICE_BYTES),
)
FULL: Final = (
    *QUICK,
    Load("4k QD1 cold", "randwrite", "4k", 1, DEVICE_BYTES),
    Load("64k QD4", "randwrite", "64k", 4, HOT_BYTES),
)
WARM_UP: Final = Load("warm-up", "write", "1M", 4, HOT_BYTES)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    loads: Sequence[Load]
    rounds: int
    run_ms: int
    media: Sequence[str]


def fio(system: System, load: Load, run_ms: int | None) -> dict[str, Any]:
    """One run of fio's nbd engine; its report on writes. `run_ms` None: over the span once.

    Raises:
        BenchError: fio failed; the system's logs are in the text.
    """
    output = system.run / "fio.json"
    arguments = [
        *("fio", "--name=bench", "--ioengine=nbd", f"--uri={system.uri}", "--thread"),
        *(f"--numjobs={load.jobs}", "--group_reporting"),
        *(f"--rw={load.pattern}", f"--bs={load.block}", f"--iodepth={load.depth}"),
        *(f"--size={load.span_bytes}", "--output-format=json", f"--output={output}"),
    ]
    if run_ms is not None:
        arguments += ["--time_based", f"--runtime={run_ms}ms"]
    limit_s = (run_ms or 0) / 1000 + FIO_GRACE_S
    try:
        done = subprocess.run(
            arguments, check=False, capture_output=True, timeout=limit_s, cwd=system.run
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{system.name}: fio did not end\n{system.logs()}") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise BenchError(f"{system.name}: fio failed on {load.name}\n{said}\n{system.logs()}")
    text = output.read_text(encoding="utf-8")
    report: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]["write"]
    return report


def measure(system: System, load: Load, medium: str, number: int, run_ms: int) -> Run:
    """One run, with the CPU time that each process of the system took for it."""
    before = {part: cpu_seconds(pid) for part, pid in system.processes.items()}
    report = fio(system, load, run_ms)
    after = {part: cpu_seconds(pid) for part, pid in system.processes.items()}
    system.check()
    writes = max(report["total_ios"], 1)
    percentiles = report["clat_ns"].get("percentile", {})
    return Run(
        medium=medium,
        load=load.name,
        system=system.name,
        round=number,
        writes_per_s=report["iops"],
        bytes_per_s=report["bw_bytes"],
        latency_mean_us=report["lat_ns"]["mean"] / 1000,
        latency_p50_us=percentiles.get("50.000000", 0) / 1000,
        latency_p99_us=percentiles.get("99.000000", 0) / 1000,
        cpu_us_per_write={part: (after[part] - before[part]) * 1e6 / writes for part in after},
    )


def rounds(systems: Sequence[System], medium: str, plan: Plan) -> Iterator[Run]:
    """Every load on every system, round by round; who begins changes each time."""
    for number in range(plan.rounds):
        for index, load in enumerate(plan.loads):
            turn = (number + index) % len(systems)
            for system in (*systems[turn:], *systems[:turn]):
                run = measure(system, load, medium, number, plan.run_ms)
                system.settle()
                say(
                    f"{medium}, round {number + 1} of {plan.rounds}, {load.name}: "
                    f"{system.name} {run.writes_per_s / 1000:.2f} k/s"
                )
                yield run


def bench(directories: dict[str, Path], sockets: Path, plan: Plan) -> Figures:
    """All media in turn.

    Raises:
        BenchError: a system does not start or breaks, or a file system is too full.
    """
    runs: list[Run] = []
    for medium in plan.media:
        directory = directories[medium]
        free = os.statvfs(directory)
        if free.f_bavail * free.f_frsize < FREE_BYTES_MIN:
            raise BenchError(f"{medium}: less than {FREE_BYTES_MIN // GIB} GiB free")
        with ExitStack() as stack:
            systems = [
                stack.enter_context(kind(directory, sockets, DEVICE_BYTES)) for kind in SYSTEMS
            ]
            for system in systems:
                fio(system, WARM_UP, None)
                system.settle()
            runs += rounds(systems, medium, plan)
    return Figures(runs)


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of bench/run.sh."""
    parser = argparse.ArgumentParser(prog="bench/run.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the rows with a floor: under 3 min")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run and ratio there")
    parser.add_argument("--rounds", type=int, help="instead of 3 (quick) or 5")
    parser.add_argument("--run-ms", type=int, help="of each run, instead of 900 (quick) or 3000")
    parser.add_argument("--medium", choices=("tmpfs", "disk"), help="only this one")
    parser.add_argument("--tmpfs", type=Path, required=True, help="(run.sh) directory on tmpfs")
    parser.add_argument("--disk", type=Path, required=True, help="(run.sh) directory on the disk")
    parser.add_argument("--sockets", type=Path, required=True, help="(run.sh) short path")
    return parser.parse_args(argv)


def facts(plan: Plan, began: float) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "seconds": round(time.monotonic() - began),
        "device_bytes": DEVICE_BYTES,
        "hot_bytes": HOT_BYTES,
        "plan": asdict(plan),
        "systems": {kind.name: kind.what for kind in SYSTEMS},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code: 0, 1 below a floor, 2 broken."""
    asked = arguments(argv)
    began = time.monotonic()
    plan = Plan(
        loads=QUICK if asked.quick else FULL,
        rounds=asked.rounds or (3 if asked.quick else 5),
        run_ms=asked.run_ms or (900 if asked.quick else 3000),
        media=(asked.medium,) if asked.medium else ("tmpfs", "disk"),
    )
    try:
        figures = bench({"tmpfs": asked.tmpfs, "disk": asked.disk}, asked.sockets, plan)
    except BenchError as error:
        say(str(error))
        return EXIT_BROKEN
    print(figures.table())
    if asked.json is not None:
        report = {**facts(plan, began), **figures.as_dict()}
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"{time.monotonic() - began:.0f} s")
    return EXIT_BELOW_FLOOR if figures.below_floor() else 0


if __name__ == "__main__":
    sys.exit(main())
