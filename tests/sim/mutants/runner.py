"""Applies one mutant to a copy of the sources and finds out whether the simulator notices.

Owns the copy and the subprocess. It never changes the sources themselves. A seed that complains
about the unchanged sources, too, is no witness against a mutant and is left out.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sim.mutants.mutant import Mutant, apply
from tests.sim.run import run_seed

ROOT = Path(__file__).parents[3]
COPIED = ("nbdmirror", "tests/sim")
SEED_BOUND_S = 60
# An edit that does not even run takes no rule away.
BROKEN = re.compile(r"(crash: )?(Attribute|Import|Name|Syntax|Type|UnboundLocal)Error")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant. `witness` is a sequence or arbiter/seed, "" if nothing noticed."""

    mutant: Mutant
    witness: str
    seeds_count: int
    violation: str
    took_s: float


def copy_sources(root: Path) -> None:
    """What a run needs, below `root`."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)


def ask(root: Path, asked: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run the witness in the copy; a run that does not end is a violation, too.

    Raises:
        RuntimeError: the witness itself failed, which proves nothing about the mutant.
    """
    command = [sys.executable, "-m", "tests.sim.mutants.witness", json.dumps(asked)]
    try:
        done = subprocess.run(
            command, cwd=root, env={"PYTHONPATH": str(root)}, timeout=timeout_s,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"by": "no end", "violation": f"no end within {timeout_s:.0f} s"}
    if done.returncode != 0:
        raise RuntimeError(f"witness: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@functools.lru_cache(maxsize=4096)
def is_clean(seed: int, arbiter: str, controllers: str) -> bool:
    """Whether the unchanged sources pass this seed."""
    return not run_seed(seed, arbiter, controllers).violation


def try_mutant(
    mutant: Mutant, count: int, *, start: int = 0, sequences: tuple[str, ...] | None = None
) -> Outcome:
    """Look for a witness among the sequences and `count` seeds.

    Raises:
        OutOfDateError: the mutant no longer fits the sources.
        RuntimeError: it could not be tried.
    """
    began_s = time.monotonic()
    names = mutant.sequences if sequences is None else sequences
    with tempfile.TemporaryDirectory(prefix="nbdmirror-mutant-") as place:
        root = Path(place)
        copy_sources(root)
        apply(mutant, root)
        skip: list[tuple[int, str]] = []
        asked = {
            "sequences": names,
            "arbiters": mutant.arbiters,
            "controllers": mutant.controllers,
            "start": start,
            "count": count,
        }
        while True:
            timeout_s = SEED_BOUND_S * (1 + count)
            found = ask(root, {**asked, "skip": skip}, timeout_s)
            seed = found.get("seed")
            if seed is None or is_clean(seed, found["arbiter"], mutant.controllers):
                break
            skip.append((seed, found["arbiter"]))
            asked = {**asked, "sequences": (), "start": seed, "count": start + count - seed}
    witness = found.get("by", "")
    tried = count
    if seed is not None:
        witness, tried = f"{found['arbiter']}/{seed}", seed - start + 1
    elif witness:
        tried = 0
    violation = found.get("violation", "")
    if BROKEN.match(violation):
        raise RuntimeError(f"mutant {mutant.name} is broken: {violation.splitlines()[0]}")
    return Outcome(mutant, witness, tried, violation, time.monotonic() - began_s)
