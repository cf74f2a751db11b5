"""What an engine does when its own process cannot go on."""

import subprocess
import sys
from pathlib import Path

import pytest

from nbdmirror.errors import NbdMirrorError
from tests.support.fixtures import MakePair
from tests.support.pair import ROOT, Pair

pytestmark = [pytest.mark.slow]

BOUND_S = 60.0
# An engine in a process of its own whose clock fails at its n-th tick.
CLOCKLESS = """
import signal, sys
from pathlib import Path
from nbdmirror import engine
from nbdmirror.config import load
from nbdmirror.core.upkeep import Upkeep

class Failing(Upkeep):
    ticks = 0
    def tick(self, now_ms):
        Failing.ticks += 1
        if Failing.ticks == int(sys.argv[3]):
            raise ValueError("no tick")
        super().tick(now_ms)

engine.Upkeep = Failing
engine.Engine(load(Path(sys.argv[1]), sys.argv[2])).start()
print("started", flush=True)
signal.pause()
"""
# The address space is too small for one more stack, and then it is not.
STARVED = """
import resource, sys, threading
from pathlib import Path
from nbdmirror.driver import Pool

def limit(count):
    resource.setrlimit(resource.RLIMIT_AS, (count, hard))

_, hard = resource.getrlimit(resource.RLIMIT_AS)
said, done = [], threading.Semaphore(0)
pool = Pool(lambda name, error: said.append(f"{name}: {error}"))
threading.stack_size(512 << 20)
limit((int(Path("/proc/self/statm").read_text().split()[0]) << 12) + (256 << 20))
for _ in range(3):
    pool.submit("job", done.release)
assert len(said) == 1 and "workers" in said[0], said
assert not done.acquire(blocking=False)
limit(hard)
pool.hurry()
assert all(done.acquire(timeout=60) for _ in range(3)), "those that waited are run"
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=BOUND_S,
    )  # fmt: skip


@pytest.fixture
def created(make_pair: MakePair) -> Pair:
    """A pair whose files are made and whose engines do not run."""
    pair = make_pair().create()
    for engine in pair.both:
        Path(engine.config.me.run_dir).mkdir(mode=0o700)
    return pair


def test_an_engine_without_a_clock_ends(created: Pair) -> None:
    """Breaks in the field: an engine without deadlines and echoes serves on, its writes hang for
    ever when the peer dies, and nobody takes over from it.
    """
    done = python(CLOCKLESS, str(created.alpha.config_path), "alpha", "5")
    assert done.returncode == NbdMirrorError.exit_code, done.stderr
    assert "the clock ended" in done.stderr
    assert "ValueError: no tick" in done.stderr


def test_jobs_wait_for_a_thread_that_cannot_be_had() -> None:
    """Breaks in the field: for a moment there is no thread, and the flush that found none is never
    done; with one place of the pool lost for ever.
    """
    done = python(STARVED)
    assert done.returncode == 0, done.stderr
