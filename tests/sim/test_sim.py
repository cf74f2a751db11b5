"""Some hundred seeds of the simulator, and what makes a seed worth something: it can be replayed.

`python -m tests.sim` runs as many as one likes; docs/simulator.md says what is checked.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.sim.abstract import STEPS
from tests.sim.run import ARBITERS, Result, run_seed

pytestmark = [pytest.mark.sim, pytest.mark.slow]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SEEDS_COUNT = 260
JOBS_COUNT = 2
REGRESSIONS: list[dict[str, Any]] = tomllib.loads((HERE / "regressions.toml").read_text())["seed"]

DIGESTS = """
from tests.sim.run import ARBITERS, run_seed
for arbiter in ARBITERS:
    for seed in (1, 5):
        print(arbiter, seed, run_seed(seed, arbiter).digest)
"""
CORE_MODULES = """
import json, sys, {name}
print(json.dumps([name for name in sys.modules if name.startswith("nbdmirror.core.")]))
"""


def replay(result: Result) -> str:
    """A violation with the command that shows it again."""
    return (
        f"{result.violation}\n  python -m tests.sim --start {result.seed} --seeds 1"
        f" --arbiter {result.arbiter} --trace"
    )


def python(script: str, **environment: str) -> str:
    """What a script prints in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ).stdout  # fmt: skip


@pytest.mark.timeout(900)
def test_no_seed_breaks_a_promise() -> None:
    """If it fails, some order of faults loses, reorders or invents data, or leaves nobody serving.

    The totals show that the seeds met what they are for: a run in which nothing happens is green.
    """
    jobs = [(seed, arbiter) for seed in range(SEEDS_COUNT) for arbiter in ARBITERS]
    totals: Counter[str] = Counter()
    broken: list[str] = []
    with multiprocessing.get_context("spawn").Pool(JOBS_COUNT, maxtasksperchild=10) as pool:
        for result in pool.starmap(run_seed, jobs, chunksize=5):
            totals.update(result.counts)
            totals["faults"] += result.faults
            if result.violation:
                broken.append(replay(result))
    assert broken == []
    least = {
        "acked": 50_000, "alone": 5_000, "flushes": 10_000, "reads": 10_000, "faults": 2_000,
        "syncs": 700, "joints": 700, "resumed": 50, "leaves": 30, "lowered": 50, "splits": 1,
        "disk_errors": 500, "ENOSPC": 100, "EIO": 500, "ESHUTDOWN": 100, "EINVAL": 200,
        "spoken": 10, "told": 20, "deposed_reads": 300,
        "evicted_alone": 500, "evicted_in_sync": 5_000, "evicted_by_replica": 5_000,
    }  # fmt: skip
    assert {name: totals[name] for name in least if totals[name] < least[name]} == {}
    # The model's steps are those of the engine, and none of them lets pass what another forbids.
    assert {rule.__name__ for rule in STEPS if not totals[rule.__name__]} == set()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "known", REGRESSIONS, ids=[f"{known['arbiter']}-{known['number']}" for known in REGRESSIONS]
)
def test_a_seed_that_failed_once_stays_good(known: dict[str, Any]) -> None:
    """If it fails, a defect that was found and mended before is back; `showed` says which."""
    result = run_seed(known["number"], known["arbiter"])
    assert result.violation == "", f"{known['showed']}: {replay(result)}"


@pytest.mark.timeout(300)
def test_a_seed_is_one_course_of_events() -> None:
    """If it fails, a violation that was found cannot be replayed, so it cannot be understood."""
    first = python(DIGESTS, PYTHONHASHSEED="1")
    assert len(set(first.split())) == len(ARBITERS) + 2 + 4
    assert python(DIGESTS, PYTHONHASHSEED="2") == first


def test_the_simulator_runs_what_production_runs() -> None:
    """If it fails, the engine has core modules in the field that no seed has ever executed."""
    simulated, engine = (
        set(json.loads(python(CORE_MODULES.format(name=name))))
        for name in ("tests.sim.run", "nbdmirror.engine")
    )
    assert engine - simulated == set()
    # Of the controller, what is shared with it.
    assert simulated - engine == {"nbdmirror.core.cluster", "nbdmirror.core.cluster.claiming"}
