"""Keeping the engine in memory: a device that is mounted on its own host must not wait for itself.

If the kernel has to write dirty pages of our own device to get memory for us, both wait for ever.
So the engine locks what it touches, and asks not to be chosen by the OOM killer.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
OOM_SCORE_ADJ: Final = -1000
PR_SET_IO_FLUSHER: Final = 57


def lock_memory(*, flusher: bool = True) -> list[str]:
    """Lock present and future pages as they are touched; returns what the system refused.

    `flusher`: declare this process one that writes other processes' pages. Every process it starts
    inherits that, so whoever starts applications must not.
    """
    refused: list[str] = []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        refused.append(f"locking memory: {os.strerror(ctypes.get_errno())}; raise LimitMEMLOCK")
    if flusher and libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        refused.append(f"declaring an I/O flusher: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{OOM_SCORE_ADJ}\n", encoding="ascii")
    except OSError as error:
        refused.append(f"lowering oom_score_adj: {error.strerror}; let the service manager do it")
    return refused
