"""A pair of real engines on disks whose power can be cut, and everything that has to hold after.

Owns the course of one point: a run of operations, an engine that is hit in the midst of it, the
operator who decides (arbiter none), the return, the resync, the judgement. A rig serves many points
in turn, so what an earlier one left behind meets the next one: images, logs, open descriptors.
"""

import contextlib
import os
import select
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, Self

import nbd

from nbdmirror.errors import NbdMirrorError, RefusedError
from tests.prove.faults import Point, Tracer, busiest, command, path_of
from tests.prove.history import OPERATIONS_COUNT, History, course
from tests.support.pair import Engine, Pair, State, child_of
from tests.support.powercut import PowerDisk

DEVICE_BYTES: Final = 16 << 20
DISK_BYTES: Final = 40 << 20
BOUND_S: Final = 60.0
LOOK_S: Final = 0.02
SOON_S: Final = 0.001
# A few courses in turn, so that each meets the images that another one left.
COURSES_COUNT: Final = 7
REFUSED_FOR_S: Final = 2.0
AFTER_COUNT: Final = 16
# What may differ between two idle looks at one engine: a worker or a dial under way.
DESCRIPTORS_SPARE: Final = 8


class Rig:
    """One pair, and its history."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nm"))
        self.disks: dict[str, PowerDisk] = {}
        try:
            for name in ("alpha", "beta"):
                (self.root / name).mkdir()
                self.disks[name] = PowerDisk(self.root / name, DISK_BYTES)
            self.pair = self.make_pair(
                {name: disk.mountpoint / "node" for name, disk in self.disks.items()}
            )
            self.pair.up(sparse=True)
        except BaseException:
            self._give_back()
            raise
        self.history = History()
        self.primary = self.pair.alpha
        # What each had a part in when its power went: up to this answer; the rest it may lack.
        self.cut: dict[str, int] = {}
        self.alone_since: int | None = None
        self.power_cuts = 0
        self.only_durable = False
        self.in_sync_before = True
        self._descriptors: dict[int, int] = {}
        self._seed = 0

    def make_pair(self, data_dirs: dict[str, Path]) -> Pair:
        """The two engines, not started yet."""
        return Pair(size=DEVICE_BYTES, data_dirs=data_dirs)

    # --- one point ------------------------------------------------------------------------------

    def point(self, point: Point) -> bool:
        """Carry it out. Returns whether it happened: a run may make fewer calls than the last one.

        Raises:
            AssertionError, TimeoutError, RuntimeError, NbdMirrorError: something did not hold.
        """
        for engine in self.pair.both:
            engine.allowed = {point.fault, "EIO"} if point.fault != "kill" else set()
        self.alone_since, self.in_sync_before = None, point.moment == "work"
        secondary = self.pair.other(self.primary)
        victim = self.primary if point.role == "primary" else secondary
        if point.moment == "return":
            self.lose(secondary, power=False)
            self.operate(self.primary, AFTER_COUNT)
        hit = self.hit(victim, secondary, point)
        # A copy that acknowledged alone is one copy: its power takes what was not flushed.
        alone = (point.role, point.moment, point.fault) == ("primary", "return", "power")
        only_durable = hit and (alone or point.fault == "power-both")
        self.recover(victim, only_durable=only_durable, fail_over=point.moment == "work")
        self.judge()
        return hit

    def power_cut(self, who: str, after: int) -> None:
        """Cut the power of the primary, the secondary or both after so many answers.

        Raises:
            As `point`.
        """
        for engine in self.pair.both:
            engine.allowed = {"EIO"}
        self.alone_since, self.in_sync_before = None, True
        secondary = self.pair.other(self.primary)
        victim = secondary if who == "secondary" else self.primary
        self.begin(self.primary, OPERATIONS_COUNT)
        while self.history.answered < after and not self.history.wait(SOON_S):
            self.decide(self.primary, secondary)
        for engine in self.pair.both if who == "both" else (victim,):
            self.lose(engine, power=True)
        self.finish(self.primary, secondary)
        self.recover(victim, only_durable=who == "both")
        self.judge()

    def hit(self, victim: Engine, secondary: Engine, point: Point) -> bool:
        """Let it happen to the victim while clients write, or while the other one returns."""
        told = self.root / "strace"
        told.unlink(missing_ok=True)
        arguments = command(victim, point, told)
        tracer = None
        if point.moment == "return" and victim is secondary:
            self.launch_under(victim, arguments)
        else:
            tracer = Tracer(victim, arguments)
            if point.moment == "return":
                secondary.start()
        try:
            self.operate(
                self.primary, OPERATIONS_COUNT if point.moment == "work" else AFTER_COUNT, secondary
            )
            if point.moment == "return":
                self.watch(secondary)
        finally:
            if tracer is not None:
                tracer.end()
        dead = self.is_dead(victim)
        if dead and point.fault != "kill":
            lost = self.pair.both if point.fault == "power-both" else (victim,)
            for engine in lost:
                self.lose(engine, power=True)
        if not dead and not victim.pid:
            self.lose(victim, power=False)  # started under strace, which must not stay
        return dead if point.ends_it else "(INJECTED)" in told.read_text(errors="replace")

    def launch_under(self, engine: Engine, strace: Sequence[str]) -> None:
        """Start it with strace around it: its calls count from the first one on."""
        engine.enter = (*strace, "--seccomp-bpf")
        engine.launch()
        engine.enter = ()

    def counted_start(self, engine: Engine, calls: Sequence[str], file: str) -> Counter[str]:
        """Start it and count, until both are in sync: the calls of the busiest thread."""
        told = self.root / "strace"
        told.unlink(missing_ok=True)
        words = ["strace", "-f", "-o", str(told), *path_of(engine, file), "-e"]
        self.launch_under(engine, [*words, f"trace={','.join(calls)}"])
        self.watch(engine)
        self.lose(engine, power=False)
        return busiest(told)

    def watch(self, returning: Engine) -> None:
        """Until both are in sync, or one of them is dead or has failed."""
        until = monotonic() + BOUND_S
        states: list[State] = []
        while monotonic() < until:
            states = [self.state(each) for each in self.pair.both]
            if any(not state or state["failed"] for state in states) and any(
                self.is_dead(each) or self.state(each).get("failed") for each in self.pair.both
            ):
                return
            sessions = [state.get("session") or {} for state in states]
            if all(session.get("phase") == "synced" for session in sessions):
                return
            self.decide(self.primary, returning)
            self.look(returning)
        raise TimeoutError(f"neither in sync nor dead: {states}")

    def look(self, engine: Engine) -> None:
        """A moment, or until an engine ends."""
        if engine.launcher is not None:
            with contextlib.suppress(Exception):
                engine.launcher.wait(LOOK_S)

    # --- parts ----------------------------------------------------------------------------------

    def state(self, engine: Engine) -> State:
        """What it says; nothing if it does not answer."""
        try:
            return engine.state()
        except NbdMirrorError:
            return {}

    def is_dead(self, engine: Engine) -> bool:
        """Whether its process has ended; its launcher follows it."""
        if engine.launcher is None or engine.launcher.poll() is not None:
            return True
        return engine.pid != 0 and has_ended(engine.pid)

    def lose(self, engine: Engine, *, power: bool) -> None:
        """End it, if it still lives, and cut its power."""
        if power:
            self.disks[engine.name].cut()
            apart = engine is not self.primary and self.alone_since is not None
            self.cut[engine.name] = self.alone_since or 0 if apart else self.history.now()
            self.power_cuts += 1
        if engine.launcher is not None:
            if not self.is_dead(engine):
                # Under strace before it answers: the launcher, which takes its engine along.
                pid = engine.pid or self.state(engine).get("pid") or child_of(engine.launcher.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            engine.ended()

    def operate(self, primary: Engine, count: int, other: Engine | None = None) -> None:
        """Run a course to its end; an operator answers what the primary asks."""
        self.begin(primary, count)
        self.finish(primary, other or self.pair.other(primary))

    def begin(self, primary: Engine, count: int) -> None:
        """Let clients start with the next course; whom it hit before they came serves nobody."""
        self._seed += 1
        try:
            self.history.start(primary.uri, course(self._seed % COURSES_COUNT, count))
        except nbd.Error:
            self.look(primary)
            if not self.is_dead(primary) and self.state(primary).get("role") == "primary":
                raise

    def finish(self, primary: Engine, other: Engine) -> None:
        """Wait for their end; an operator answers what the primary asks."""
        until = monotonic() + BOUND_S
        while not self.history.wait(LOOK_S):
            self.decide(primary, other)
            if monotonic() > until:
                raise TimeoutError(f"clients wait for ever: {self.state(primary)}")

    def decide(self, primary: Engine, other: Engine) -> None:
        """`alone`, where the other one is gone or cannot go on."""
        state = self.state(primary)
        if not state or not state["frozen"] or state["question"] != "frozen":
            return
        if self.is_dead(other) or self.state(other).get("role") != "primary":
            if self.alone_since is None:
                self.alone_since = self.history.now()
            with contextlib.suppress(NbdMirrorError):
                primary.command("alone")

    def recover(
        self, victim: Engine, *, only_durable: bool = False, fail_over: bool = True
    ) -> None:
        """Fail over if need be, bring everybody back, and wait until both are in sync.

        `only_durable`: what was not flushed may be gone. `fail_over`: not to a copy that has just
        come back; without an arbiter only the operator knows what was written without it.
        """
        survivor = self.pair.other(victim)
        self.history.wait(BOUND_S)
        serves = self.state(self.primary).get("role") == "primary"
        if fail_over and not serves and self.primary is victim and self.promoted(survivor):
            self.primary = survivor
            self.require_kept(survivor, only_durable=only_durable)
            self.operate(survivor, AFTER_COUNT, victim)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.bring_back, self.pair.both))
        self.pair.synced()
        if self.state(self.primary).get("role") != "primary":
            self.primary.command("promote")
            self.pair.synced()
        self.only_durable = only_durable

    def bring_back(self, engine: Engine) -> None:
        """Start it if it is dead; end and start it if its disk failed."""
        if not self.is_dead(engine) and not self.state(engine).get("failed"):
            return
        self.lose(engine, power=False)
        if engine.name in self.cut:
            self.disks[engine.name].restore()
            last = self.cut.pop(engine.name)
            if self.in_sync_before:  # the platter, before anybody makes it good
                self.require_kept(engine, only_durable=True, until=last)
        engine.start()

    def promoted(self, engine: Engine) -> bool:
        """Whether it takes over; a copy that may not is no failure."""
        if self.is_dead(engine):
            return False
        until = monotonic() + REFUSED_FOR_S
        while True:
            try:
                engine.command("promote")
            except RefusedError:
                if monotonic() > until:
                    return False
                self.look(engine)
            else:
                return True

    # --- judgement ------------------------------------------------------------------------------

    def require_kept(
        self, *engines: Engine, only_durable: bool = False, until: int | None = None
    ) -> None:
        """Nothing acknowledged is missing."""
        for engine in engines:
            losses = self.history.losses(engine.data, only_durable=only_durable, until=until)
            assert not losses, f"{engine.name} lost {len(losses)}:\n" + "\n".join(losses[:10])

    def judge(self) -> None:
        """Equal, kept, nothing in a log that must not be, no descriptor more than before."""
        self.primary.command("drain")
        self.pair.synced()
        self.require_kept(*self.pair.both, only_durable=self.only_durable)
        self.pair.assert_equal()
        self.history.settle(self.primary.data)
        complaints = [line for engine in self.pair.both for line in engine.complaints()]
        assert not complaints, "\n".join(complaints)
        for engine in self.pair.both:
            engine.wait_state(lambda state: not state["clients"], "no client is left")
            count = sum(1 for _ in Path(f"/proc/{engine.pid}/fd").iterdir())
            least = self._descriptors.setdefault(engine.pid, count)
            told = f"{engine.name}: {least} descriptors before, now {count}"
            assert count <= least + DESCRIPTORS_SPARE, told

    # --- end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop what runs; fails on what was left behind."""
        try:
            self.pair.close()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for disk in self.disks.values():
            with contextlib.suppress(RuntimeError, OSError):
                disk.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.pair.story())
            with contextlib.suppress(Exception):
                self.close()
            return
        self.close()


def has_ended(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    finally:
        os.close(descriptor)
