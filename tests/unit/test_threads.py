"""The thread states that are kept for threads which Python did not start."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from nbdmirror import threads

_NATIVE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_libc = ctypes.CDLL(None)
_head = ctypes.pythonapi.PyInterpreterState_ThreadHead
_next = ctypes.pythonapi.PyThreadState_Next
_interpreter = ctypes.pythonapi.PyInterpreterState_Get
_WALK: tuple[tuple[Any, list[Any]], ...] = (
    (_head, [ctypes.c_void_p]),
    (_next, [ctypes.c_void_p]),
    (_interpreter, []),
)
for _function, _arguments in _WALK:
    _function.argtypes = _arguments
    _function.restype = ctypes.c_void_p


def states() -> list[int]:
    """Every thread state of this interpreter."""
    found = []
    state = _head(_interpreter())
    while state:
        found.append(state)
        state = _next(state)
    return found


def on_native_thread(function: Callable[[], None]) -> None:
    """Run `function` on a thread that Python knows nothing of, as nbdkit's are, to its end."""
    task: list[Path] = []

    def run(_: object) -> None:
        task.append(Path("/proc/self/task", str(threading.get_native_id())))
        function()

    entry = _NATIVE(run)
    thread = ctypes.c_ulong()
    assert _libc.pthread_create(ctypes.byref(thread), None, entry, None) == 0
    assert _libc.pthread_join(thread, None) == 0
    deadline = monotonic() + 10
    while task[0].exists():  # the kernel lists a thread for some microseconds after the join
        assert monotonic() < deadline


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert threads.sweep() == 0


def test_a_state_is_kept_once_and_deleted_after_its_thread() -> None:
    """Breaks in the field: clients that come and go fill the engine's locked memory."""
    before = len(states())

    def visit() -> None:
        threads.keep()
        threads.keep()

    for _ in range(50):
        on_native_thread(visit)
    assert len(states()) == before + 50
    assert threads.sweep() == 0
    assert len(states()) == before


def test_the_state_of_a_living_thread_stays() -> None:
    """Breaks in the field: a client disconnects and the engine dies under the others."""
    kept: list[int] = []

    def visit() -> None:
        threads.keep()
        kept.append(threads.sweep())
        threads.keep()

    on_native_thread(visit)
    assert kept == [1]
