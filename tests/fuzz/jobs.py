"""The fuzzing in processes of their own: their memory is bounded, and an engine may live in one."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.fuzz.drive import (
    PARSERS,
    Finding,
    Tally,
    batches,
    bound_memory,
    clean_up,
    feed,
    pool_of,
)


@dataclass
class Report:
    """What one process did."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    finding: Finding | None = None


def work(job: tuple[list[str], int, float]) -> Report:
    """Feed these parsers for so long."""
    names, seed, seconds = job
    report = Report()
    bound_memory()
    try:
        for name, tally, finding in batches([PARSERS[each] for each in names], seed, seconds):
            report.tallies.setdefault(name, Tally()).add(tally)
            report.finding = finding
    finally:
        clean_up()
    return report


def run(names: list[str], seed: int, seconds: float, jobs: int) -> Report:
    """The same in several processes; the first finding of any."""
    total = Report()
    work_of = [(names, seed + n, seconds) for n in range(jobs)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for each in pool.map(work, work_of):
            total.finding = total.finding or each.finding
            for name, tally in each.tallies.items():
                total.tallies.setdefault(name, Tally()).add(tally)
    return total


def replay_corpus(names: list[str]) -> list[str]:
    """Feed what is kept; what did not hold. In a process of its own, as the rest."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_replayed, names).result()


def _replayed(names: list[str]) -> list[str]:
    bound_memory()
    problems = []
    try:
        for name in names:
            for data in pool_of(PARSERS[name]):
                _, problem = feed(PARSERS[name], data)
                problems += [f"{name}: {data[:80]!r}: {problem}"] if problem else []
    finally:
        clean_up()
    return problems
