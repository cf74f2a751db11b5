"""What all tests share: markers, hypothesis profiles, and what happens without root.

Nothing is skipped silently. Run by root, every collected test runs. Run by anyone else, the tests
that cannot work are taken out before the run and listed at its end. Holds no fixture with logic of
the product: fakes live beside the tests of the port that they implement.
"""

import os
import shutil
from collections.abc import Collection

import pytest
from hypothesis import HealthCheck, settings

MARKERS = (
    "sim: runs whole nodes in the deterministic simulator",
    "nbdkit: starts a real nbdkit with the plugin",
    "net: makes network namespaces (root only)",
    "slow: takes longer than 0.25 s; deselect while editing with -m 'not slow'",
)

NOT_RUN: pytest.StashKey[list[str]] = pytest.StashKey()

# No deadline: two cores shared with other runs make single examples arbitrarily slow.
_QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("dev", parent=_QUIET, max_examples=50)
settings.register_profile("ci", parent=_QUIET, max_examples=200, database=None)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and choose the hypothesis profile (NBDMIRROR_HYPOTHESIS, else dev)."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    settings.load_profile(os.environ.get("NBDMIRROR_HYPOTHESIS", "dev"))
    config.stash[NOT_RUN] = []


def _lacks(fixtures: Collection[str], markers: Collection[str]) -> str | None:
    """What an unprivileged run lacks for a test, or None."""
    if "require_root" in fixtures or "net" in markers:
        return "root"
    if "nbdkit" in markers and shutil.which("nbdkit") is None:
        return "nbdkit"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without root: take out what cannot work, and remember it for the summary."""
    if os.geteuid() == 0:
        return
    keep, drop = [], []
    for item in items:
        lack = _lacks(getattr(item, "fixturenames", ()), [m.name for m in item.iter_markers()])
        if lack is None:
            keep.append(item)
        else:
            drop.append(item)
            config.stash[NOT_RUN].append(f"{item.nodeid} (needs {lack})")
    items[:] = keep
    if drop:
        config.hook.pytest_deselected(items=drop)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not run: a short list of passes must not look like the whole."""
    not_run = terminalreporter.config.stash[NOT_RUN]
    if not_run:
        terminalreporter.section("not run")
        for line in not_run:
            terminalreporter.write_line(line)


@pytest.fixture
def require_root() -> None:
    """Ask for root: mounts, namespaces, loop devices."""
    if os.geteuid() != 0:
        raise RuntimeError("this test needs root; run packaging/test.sh as root")
