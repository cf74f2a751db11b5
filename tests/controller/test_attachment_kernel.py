"""The attachment with the kernel's NBD client: in a guest with a kernel of its own."""

import json
import sys
from typing import Any

import pytest

from nbdmirror.controller.traces import KERNEL
from tests.guest.guest import Outcome, run

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.timeout(240)]

MEMORY_MIB = 276
DISK_MIB = 16
BOUND_S = 220
CLEAN_S = 60
# include/linux/sched.h of Linux 5.9 to 6.6: what PR_SET_IO_FLUSHER sets.
PF_MEMALLOC_NOIO = 0x0008_0000
PF_LOCAL_THROTTLE = 0x0010_0000


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the programs did."""
    return run(
        [sys.executable, "-m", "tests.controller.inside_kernel"],
        tmp_path_factory.mktemp("guest"),
        memory_mib=MEMORY_MIB,
        disk_mib=DISK_MIB,
        bound_s=BOUND_S,
    )


def told(outcome: Outcome, what: str) -> Any:
    """What a program told; fails with all it said if it did not get there."""
    for line in outcome.output.splitlines():
        if line.startswith(f'{{"{what}":'):
            return json.loads(line)[what]
    raise AssertionError(f"nothing about {what}\n{outcome.output}\n{outcome.kernel}")


def test_in_order(guest: Outcome) -> None:
    """Breaks in the field: with the kernel's client nothing is mounted, or not given up again."""
    seen = told(guest, "in_order")
    assert seen["facts"]["kind"] == KERNEL
    assert seen["facts"]["device"] == "/dev/nbd0"
    assert (seen["said"], seen["between"], seen["left"]) == ([], [], [])
    assert seen["kept"] == "kept"


def test_protection(guest: Outcome) -> None:
    """Breaks in the field: the OOM killer takes the helper and with it the file system, or cannot
    take an application that has inherited what protects the controller.
    """
    seen = told(guest, "in_order")
    assert not [each for each in seen["told"] if "protected" in each]
    wanted = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE
    assert seen["flags"] & wanted == wanted
    assert told(guest, "taken_over")["helper_adjusted"] == "-1000"
    assert seen["of_script"] == "0"


def test_taken_over(guest: Outcome) -> None:
    """Breaks in the field: a controller that dies takes the application with it."""
    seen = told(guest, "taken_over")
    assert len(seen["leftovers"]) >= 3
    assert seen["adopted"]
    assert seen["still"]
    assert seen["device"] == "/dev/nbd0"
    assert (seen["said"], seen["left"]) == ([], [])


@pytest.mark.parametrize("how", ["dead", "frozen"])
def test_clean_leaves_nothing(guest: Outcome, how: str) -> None:
    """Breaks in the field: mount, device and processes of a dead engine stay until the reset."""
    seen = told(guest, how)
    assert seen["took_s"] < CLEAN_S
    assert not seen["user"]
    assert seen["left"] == []
    assert not [each for each in seen["said"] if "still" in each]


def test_refused(guest: Outcome) -> None:
    """Breaks in the field: an engine that is not there costs a device of the kernel."""
    seen = told(guest, "refused")
    assert seen["kind"] == "RefusedError"
    assert "nbd-client ended before the device was there; it said: " in seen["text"]
    assert seen["left"] == []
    assert guest.code == 0, guest.output
