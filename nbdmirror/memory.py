"""Keeping the engine in memory: a device that is mounted on its own host must not wait for itself.

If the kernel has to write dirty pages of our own device to get memory for us, both wait for ever.
So the engine locks what it touches, and asks not to be chosen by the OOM killer.
"""

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import Any, Final

MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
OOM_SCORE_ADJ: Final = -1000
OOM_SCORE_ADJ_FILE: Final = Path("/proc/self/oom_score_adj")
PR_SET_DUMPABLE: Final = 4
PR_SET_IO_FLUSHER: Final = 57
# What PR_SET_IO_FLUSHER sets, as the ninth field of /proc/thread-self/stat shows it.
THREAD_STAT: Final = Path("/proc/thread-self/stat")
PF_IO_FLUSHER: Final = 0x0018_0000
FLAGS_AFTER_NAME: Final = 6

_libc: Any = ctypes.CDLL(None, use_errno=True)


def lock_memory(*, flusher: bool = True) -> list[str]:
    """Lock present and future pages as they are touched; returns what the system refused.

    What is so already needs no right any more: see `prepare`.

    `flusher`: declare this process one that writes other processes' pages. Every process it starts
    inherits that, so whoever starts applications must not.
    """
    refused = _lock_pages()
    if flusher and not _is_flusher() and _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        refused.append(f"declaring an I/O flusher: {os.strerror(ctypes.get_errno())}")
    try:
        if int(OOM_SCORE_ADJ_FILE.read_text(encoding="ascii")) > OOM_SCORE_ADJ:
            OOM_SCORE_ADJ_FILE.write_text(f"{OOM_SCORE_ADJ}\n", encoding="ascii")
    except OSError as error:
        refused.append(f"lowering oom_score_adj: {error.strerror}; let the service manager do it")
    return refused


def _lock_pages() -> list[str]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and limit != resource.RLIM_INFINITY:
        # Under a limit that the present pages fit into, a later page would find no memory at all.
        return [f"locking memory: this user may lock {limit} bytes; set LimitMEMLOCK=infinity"]
    if _libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        return [f"locking memory: {os.strerror(ctypes.get_errno())}; raise LimitMEMLOCK"]
    return []


def _is_flusher() -> bool:
    try:
        stat = THREAD_STAT.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = int(stat.rpartition(")")[2].split()[FLAGS_AFTER_NAME])
    return flags & PF_IO_FLUSHER == PF_IO_FLUSHER


def prepare() -> None:
    """What `lock_memory` needs a right for, where the process gives its rights up before it.

    All of it stays over a change of the user and over exec. What is refused here is refused there
    again, and told then.
    """
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, infinite)
    _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        OOM_SCORE_ADJ_FILE.write_text(f"{OOM_SCORE_ADJ}\n", encoding="ascii")


def hide() -> None:
    """Keep this process's memory from others of its user, and from files: no trace, no core."""
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
