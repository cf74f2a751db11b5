"""Drives the core's paths with real threads: the one lock, the waiters, the pool, the replica's
driver.

Owns the rule that the core relies on: everything between two yields of a path runs under the
engine's lock, every port call runs outside it. Must never hold that lock over a system call that
can block.
"""

import contextlib
import sys
import threading
import traceback
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from typing import Any

from nbdmirror.core.ports import Call, Path
from nbdmirror.errors import NbdMirrorError

THREADS_MAX = 64
STACK_BYTES = 512 * 1024


class ThreadWaiter:
    """A waiter of core/ports.py for threads; the replica's driver may take a call back instead."""

    __slots__ = ("_lock", "callback", "result", "woken")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()
        self.result: Any = None
        self.woken = False
        self.callback: Callable[[], None] | None = None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until woken; False when the time ran out."""
        if timeout_s is None:
            return self._lock.acquire()
        return self._lock.acquire(True, timeout_s)

    def wake(self, result: Any = None) -> None:
        """Under the engine's lock. The first call counts."""
        if self.woken:
            return
        self.woken = True
        self.result = result
        if self.callback is not None:
            self.callback()
        else:
            self._lock.release()


class Driver:
    """Runs paths to their end on the calling thread."""

    def __init__(self) -> None:
        self.lock = allocate_lock()

    def drive(self, path: Path) -> Any:
        """Run `path`; returns what it returns, raises what it raises."""
        lock = self.lock
        lock.acquire()
        try:
            call = next(path)
            while True:
                lock.release()
                try:
                    value = call[0](*call[1:])
                except BaseException as error:  # noqa: BLE001 - the path cleans up, under the lock
                    lock.acquire()
                    call = path.throw(error)
                else:
                    lock.acquire()
                    call = path.send(value)
        except StopIteration as stop:
            return stop.value
        finally:
            lock.release()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a plain function of the core under the lock."""
        with self.lock:
            return function(*arguments)


class Pool:
    """Threads for paths that run beside the clients. Bounded; idle threads are used again."""

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        self._report = report
        self._jobs: deque[tuple[str, Callable[[], Any]]] = deque()
        self._condition = threading.Condition(allocate_lock())
        self._idle_count = 0
        self._thread_count = 0
        self._starved = False

    def submit(self, name: str, job: Callable[[], Any]) -> None:
        """Run `job` on another thread; what it raises is reported, never lost."""
        with self._condition:
            self._jobs.append((name, job))
        self.hurry()

    def hurry(self) -> None:
        """See to it that somebody takes what is queued; the clock asks again and again.

        Where the system has no thread to give, the queue waits for a worker, or for the next call.
        """
        with self._condition:
            if not self._jobs:
                return
            if self._idle_count >= len(self._jobs):
                self._condition.notify()
                return
            if self._thread_count >= THREADS_MAX:
                return
            self._thread_count += 1
        try:
            threading.Thread(target=self._run, name="nbdmirror-worker", daemon=True).start()
        except RuntimeError as error:
            with self._condition:
                self._thread_count -= 1
                is_news = not self._starved
                self._starved = True
            if is_news:
                self._report("workers", NbdMirrorError(f"{error}; jobs wait until it can"))
        else:
            self._starved = False

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._jobs:
                    self._idle_count += 1
                    self._condition.wait()
                    self._idle_count -= 1
                name, job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - the outer edge of every background path
                self._report(name, error)
            del job


class ReplicaDriver:
    """Drives the replica path on the receiving thread, and on a worker as soon as a call may block.

    The path parks at a waiter; waking it (under the lock) schedules the next run. It never runs on
    two threads at once: it is either parked or running.
    """

    def __init__(
        self,
        driver: Driver,
        pool: Pool,
        path: Path,
        inline: frozenset[Any],
        schedule: Callable[[Callable[[], None]], None],
    ) -> None:
        self._driver = driver
        self._pool = pool
        self._path = path
        self._inline = inline
        self._schedule = schedule
        self._call: Call | None = None
        self._value: Any = None

    def start(self) -> None:
        """Under the engine's lock: run as soon as the receiving thread is free."""
        self._schedule(self.run)

    def run(self) -> None:
        """On the receiving thread: go as far as nothing blocks."""
        self._go(may_block=False)

    def _run_blocking(self) -> None:
        self._go(may_block=True)

    def _go(self, *, may_block: bool) -> None:
        lock = self._driver.lock
        path = self._path
        call = self._call
        self._call = None
        lock.acquire()
        try:
            if call is None:
                call = path.send(self._value)
            while True:
                function = call[0]
                waiter = getattr(function, "__self__", None)
                if isinstance(waiter, ThreadWaiter) and len(call) == 1:
                    if not waiter.woken:
                        waiter.callback = self._woken
                        return
                    call = path.send(True)
                    continue
                if not may_block and getattr(function, "__func__", function) not in self._inline:
                    self._call = call
                    self._pool.submit("replica", self._run_blocking)
                    return
                lock.release()
                try:
                    value = function(*call[1:])
                except BaseException as error:  # noqa: BLE001 - the path cleans up, under the lock
                    lock.acquire()
                    call = path.throw(error)
                else:
                    lock.acquire()
                    call = path.send(value)
        except StopIteration:
            pass
        finally:
            lock.release()

    def _woken(self) -> None:
        self._value = True
        self._schedule(self.run)


def report_to_stderr(name: str, error: BaseException) -> None:
    """The last resort for an error that no path handles: one line, and the traceback if it is
    ours.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write(f"nbdmirror: {name}: {type(error).__name__}: {error}\n")
    if not isinstance(error, NbdMirrorError):
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=sys.stderr)
