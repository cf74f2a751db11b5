"""Keeps the Python thread states of nbdkit's threads from one callback to the next.

nbdkit enters Python with PyGILState_Ensure and leaves with PyGILState_Release. On a thread that
Python did not start, the outermost release destroys the thread state and the next callback makes
another, each with a stack chunk to map and to unmap: system calls, page faults and TLB shootdowns
that cost a write more than its own Python code. One Ensure more than there are Releases keeps the
state (C API manual, "Non-Python created threads").

Owns those states. A state outlives its thread until `sweep` deletes it, so that clients that come
and go leave nothing behind. Must never delete the state of a thread that still lives: its next
callback would enter Python through freed memory.
"""

import ctypes
import errno
import os
import threading

_ensure = ctypes.pythonapi.PyGILState_Ensure
_current = ctypes.pythonapi.PyThreadState_Get
_current.restype = ctypes.c_void_p
_clear = ctypes.pythonapi.PyThreadState_Clear
_delete = ctypes.pythonapi.PyThreadState_Delete
for _function in (_clear, _delete):
    _function.argtypes = [ctypes.c_void_p]
    _function.restype = None

_tgkill = ctypes.CDLL(None, use_errno=True).tgkill

# State -> native id of its thread. Each change is one operation on a dict, under the GIL.
_kept: dict[int, int] = {}
_here = threading.local()
_sweeping = threading.Lock()


def keep() -> None:
    """Keep the calling thread's state after its callback; cheap from the second call on."""
    try:
        _here.kept  # noqa: B018 - asks whether it is there
    except AttributeError:
        _here.kept = True
        _ensure()
        _kept[_current()] = threading.get_native_id()


def sweep() -> int:
    """Delete the states of threads that have ended; returns how many are kept still.

    One thread at a time: only then can no address that was found dead be a new thread's meanwhile.
    Each is asked for by itself: a list of threads is old before it is complete. An id that the
    kernel gave to a new thread delays the deletion until that one has ended too.
    """
    if not _sweeping.acquire(blocking=False):
        return len(_kept)
    try:
        for state, thread in list(_kept.items()):
            if _has_ended(thread):
                del _kept[state]
                _clear(state)
                _delete(state)
    finally:
        _sweeping.release()
    return len(_kept)


def _has_ended(thread: int) -> bool:
    """Whether the kernel knows no such thread of this process. Signal 0 asks and sends nothing."""
    return _tgkill(os.getpid(), thread, 0) != 0 and ctypes.get_errno() == errno.ESRCH
