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

from nbdmirror.core.cluster import policy
from tests.sim.abstract import STEPS
from tests.sim.run import ALL_ARBITERS, ARBITERS, PRODUCTION, SIMPLE, Result, run_seed

pytestmark = [pytest.mark.sim, pytest.mark.slow]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLUSTER = ROOT / "nbdmirror" / "core" / "cluster"
# Together 755 runs: 500 with simple controllers, 255 with production's. More do not fit into the
# time of all tests together; docs/simulator.md has the command for more.
SEEDS_COUNT = 250
CONDUCTED_COUNT = 85
JOBS_COUNT = 2
REGRESSIONS: list[dict[str, Any]] = tomllib.loads((HERE / "regressions.toml").read_text())["seed"]

# Rows that are met in fewer than one of a hundred runs, or by a moment that seldom comes.
RARE_ROWS = {
    "before", "frozen, too long", "given up", "left over", "ordered, claim", "ordered, held back",
    "ordered, no", "ordered, unread", "right, no", "start failed", "stop, the peer first",
    "unsettled",
}  # fmt: skip

DIGESTS = """
from tests.sim.run import KNOWN, run_seed
for controllers, arbiters in KNOWN.items():
    for arbiter in arbiters:
        for seed in (1, 5):
            print(controllers, arbiter, seed, run_seed(seed, arbiter, controllers).digest)
"""
CORE_MODULES = """
import json, sys, {name}
print(json.dumps([name for name in sys.modules if name.startswith("nbdmirror.core.")]))
"""


def replay(result: Result) -> str:
    """A violation with the command that shows it again."""
    return (
        f"{result.violation}\n  python -m tests.sim --start {result.seed} --seeds 1"
        f" --arbiter {result.arbiter} --controllers {result.controllers} --trace"
    )


def python(script: str, **environment: str) -> str:
    """What a script prints in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ).stdout  # fmt: skip


def run_all(jobs: list[tuple[int, str, str]]) -> tuple[list[str], Counter[str]]:
    """What broke, and how often what happened."""
    totals: Counter[str] = Counter()
    broken: list[str] = []
    with multiprocessing.get_context("spawn").Pool(JOBS_COUNT, maxtasksperchild=10) as pool:
        for result in pool.starmap(run_seed, jobs, chunksize=5):
            totals.update(result.counts)
            totals["faults"] += result.faults
            if result.violation:
                broken.append(replay(result))
    return broken, totals


@pytest.mark.timeout(900)
def test_no_seed_breaks_a_promise() -> None:
    """If it fails, some order of faults loses, reorders or invents data, or leaves nobody serving.

    The totals show that the seeds met what they are for: a run in which nothing happens is green.
    """
    broken, totals = run_all(
        [(seed, arbiter, SIMPLE) for seed in range(SEEDS_COUNT) for arbiter in ARBITERS]
    )
    assert broken == []
    least = {
        "acked": 50_000, "alone": 5_000, "flushes": 10_000, "reads": 10_000, "faults": 2_000,
        "syncs": 700, "joints": 700, "resumed": 50, "leaves": 30, "lowered": 50, "splits": 1,
        "disk_errors": 500, "ENOSPC": 4, "EIO": 500, "ESHUTDOWN": 100, "EINVAL": 200,
        "spoken": 10, "told": 20, "deposed_reads": 300,
        "evicted_alone": 500, "evicted_in_sync": 5_000, "evicted_by_replica": 5_000,
    }  # fmt: skip
    assert {name: totals[name] for name in least if totals[name] < least[name]} == {}
    # The model's steps are those of the engine, and none of them lets pass what another forbids.
    assert {rule.__name__ for rule in STEPS if not totals[rule.__name__]} == set()


@pytest.mark.timeout(900)
def test_no_seed_of_productions_controllers_breaks_a_promise() -> None:
    """If it fails, some order of faults makes the controllers let two nodes serve, none, or the
    wrong one, or an application runs where no engine serves.

    The totals show that the table was walked through: each row that is named was decided.
    """
    broken, totals = run_all(
        [(seed, arbiter, PRODUCTION) for seed in range(CONDUCTED_COUNT) for arbiter in ALL_ARBITERS]
    )
    assert broken == []
    least = {
        "acked": 20_000, "alone": 2_000, "syncs": 400, "faults": 1_200, "decisions": 8_000,
        "entered": 400, "orders": 120, "remedies": 80, "promoted": 400, "probed": 12_000,
        "spoken": 10, "told": 10, "splits": 2, "forced": 8,
    }  # fmt: skip
    assert {name: totals[name] for name in least if totals[name] < least[name]} == {}
    rows = {row.name for row in policy.TABLE}
    assert rows - {name.removeprefix("row ") for name in totals} <= RARE_ROWS


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "known", REGRESSIONS, ids=[f"{known['arbiter']}-{known['number']}" for known in REGRESSIONS]
)
def test_a_seed_that_failed_once_stays_good(known: dict[str, Any]) -> None:
    """If it fails, a defect that was found and mended before is back; `showed` says which."""
    result = run_seed(known["number"], known["arbiter"], known.get("controllers", SIMPLE))
    assert result.violation == "", f"{known['showed']}: {replay(result)}"


@pytest.mark.timeout(300)
def test_a_seed_is_one_course_of_events() -> None:
    """If it fails, a violation that was found cannot be replayed, so it cannot be understood."""
    first = python(DIGESTS, PYTHONHASHSEED="1")
    digests = [line.split()[-1] for line in first.splitlines()]
    assert len(digests) == 2 * (len(ARBITERS) + len(ALL_ARBITERS))
    # Where nobody has to ask, `ping` is `none`; all the rest are courses of their own.
    assert len(set(digests)) >= len(digests) - 2
    assert python(DIGESTS, PYTHONHASHSEED="2") == first


def test_the_simulator_runs_what_production_runs() -> None:
    """If it fails, the engine has core modules in the field that no seed has ever executed."""
    simulated, engine = (
        set(json.loads(python(CORE_MODULES.format(name=name))))
        for name in ("tests.sim.run", "nbdmirror.engine")
    )
    assert engine - simulated == set()
    # Of the controller, all that decides; the words of its promise are for people.
    cluster = {f"nbdmirror.core.cluster.{path.stem}" for path in CLUSTER.glob("[a-z]*.py")}
    assert simulated - engine == (cluster | {"nbdmirror.core.cluster"}) - {
        "nbdmirror.core.cluster.promise"
    }
