"""The thread states that are kept for threads which Python did not start."""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
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


def native_threads(count: int, entry: Any) -> None:
    """Some threads at once that Python knows nothing of, to their end."""
    handles = [ctypes.c_ulong() for _ in range(count)]
    for handle in handles:
        assert _libc.pthread_create(ctypes.byref(handle), None, entry, None) == 0
    for handle in handles:
        assert _libc.pthread_join(handle, None) == 0


def on_native_thread(function: Callable[[], None]) -> None:
    """Run `function` on a thread that Python knows nothing of, as nbdkit's are, to its end."""
    native_threads(1, _NATIVE(lambda _: function()))


def until_swept() -> None:
    """The kernel knows a thread for some microseconds after its join."""
    deadline = monotonic() + 10
    while threads.sweep():
        assert monotonic() < deadline


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    until_swept()


def test_a_state_is_kept_once_and_deleted_after_its_thread() -> None:
    """Breaks in the field: clients that come and go fill the engine's locked memory."""
    before = len(states())

    def visit() -> None:
        threads.keep()
        threads.keep()

    for _ in range(50):
        on_native_thread(visit)
    assert len(states()) == before + 50
    until_swept()
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


def test_threads_that_come_while_others_sweep_keep_their_states() -> None:
    """Breaks in the field: two clients come and go for a while, and the engine dies of SIGSEGV.

    So does this test's process, should it fail: a state is deleted under its thread.
    """
    before = len(states())

    def visit(_: object) -> None:
        threads.keep()
        os.sched_yield()  # as in a system call: others run meanwhile
        threads.keep()

    entry = _NATIVE(visit)
    ended = threading.Event()

    def sweep() -> None:
        while not ended.is_set():
            threads.sweep()

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    for _ in range(25):
        native_threads(16, entry)
    ended.set()
    for sweeper in sweepers:
        sweeper.join()
    until_swept()
    assert len(states()) == before
