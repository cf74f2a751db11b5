"""Protection from a full memory, where the kernel grants it: in a guest with a kernel of its own.

The test machine may refuse what an engine asks for at its start (CAP_SYS_RESOURCE); a guest does
not, and its memory can be filled without harm.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.guest.guest import Outcome, run

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

# nbdkit has 192 MiB of zeros that it never touches; a kernel with less memory than that does not
# start it (vm.overcommit_memory).
MEMORY_MIB = 276
DISK_MIB = 1200
BOUND_S = 150
# include/linux/sched.h of Linux 5.9 to 6.6: what PR_SET_IO_FLUSHER sets.
PF_MEMALLOC_NOIO = 0x0008_0000
PF_LOCAL_THROTTLE = 0x0010_0000
RESIDENT_KIB_MAX = 128 << 10
SIGKILLED = -9


def told(outcome: Outcome, what: str) -> Any:
    """What a program told under a name; fails with all it said if it did not get there."""
    for line in outcome.output.splitlines():
        if line.startswith(f'{{"{what}":'):
            return json.loads(line)[what]
    raise AssertionError(f"nothing about {what}\n{outcome.output}\n{outcome.kernel}")


def in_guest(program: str, directory: Path) -> Outcome:
    """One program of inside.py in a guest."""
    return run(
        [sys.executable, "-m", "tests.guest.inside", program],
        directory,
        memory_mib=MEMORY_MIB,
        disk_mib=DISK_MIB,
        bound_s=BOUND_S,
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A guest in which the OOM killer was at work beside a pair."""
    return in_guest("oom", tmp_path_factory.mktemp("oom"))


@pytest.mark.timeout(BOUND_S + 15)
def test_the_engine_is_locked_and_protected(full: Outcome) -> None:
    """Breaks in the field: what the engine asks of the kernel is not what the kernel gave it.

    A thread without the flags of an I/O flusher waits, in an allocation or in the throttle of
    dirty pages, for its own device.
    """
    for name, seen in told(full, "protection").items():
        assert seen["refused"] == [], name
        assert seen["oom_score_adj"] == -1000, name
        assert seen["locked_kib"] > 0.9 * seen["mapped_kib"], name
        # Locked as touched: without MCL_ONFAULT nbdkit's zeros alone take 192 MiB.
        assert seen["resident_kib"] < RESIDENT_KIB_MAX, name
        wanted = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE
        assert [f"{f:#x}" for f in seen["thread_flags"] if f & wanted != wanted] == [], name


@pytest.mark.timeout(BOUND_S + 15)
def test_the_oom_killer_takes_others(full: Outcome) -> None:
    """Breaks in the field: an application fills the memory, and the kernel ends the mirror of
    the host instead of it, or the engine lives and cannot work until there is memory again.

    Each process that fills the memory is smaller than an engine: on size alone it would be the
    engine's turn first.
    """
    seen, before = told(full, "oom"), told(full, "protection")
    assert full.code == 0, full.output
    assert seen["hog_endings"] == [SIGKILLED] * len(seen["hog_endings"]) != []
    assert "Out of memory: Killed process" in full.kernel, full.kernel
    for name, state in seen["states"].items():
        assert state["pid"] == before[name]["pid"]
        assert state["data_state"] == "uptodate"
        assert not state["frozen"]
        # Nothing that it needed had been taken from it.
        read_again = seen["after"][name]["major_faults"] - before[name]["major_faults"]
        assert read_again == 0, name


@pytest.mark.timeout(BOUND_S + 15)
def test_a_mount_on_the_same_host_does_not_deadlock(tmp_path: Path) -> None:
    """Breaks in the field: the file system on the mirror fills the memory with dirty pages, the
    engine that has to write them waits for memory or for the throttle of dirty pages, and the
    host hangs until it is reset.
    """
    outcome = in_guest("pressure", tmp_path)
    seen = told(outcome, "pressure")
    assert outcome.code == 0, outcome.output
    assert seen["written"] == seen["read"]
    assert seen["written_kib"] > seen["total_kib"], "less than memory: nothing was shown"
    assert seen["free_kib_least"] < 0.05 * seen["total_kib"], "memory was never short"
    assert seen["dirty_kib_most"] > 0.08 * seen["total_kib"], "memory was never dirty"
    assert "Out of memory" not in outcome.kernel, outcome.kernel
    for state in seen["states"].values():
        assert state["data_state"] == "uptodate"
        assert not state["frozen"]
