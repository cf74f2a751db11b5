"""Two real engines whose frames go through a relay, clients, and an operator who keeps the rules.

Owns the damage that is done to them, what is healed, and what the operator knows: who serves, and
whether anybody acknowledged anything alone since both were last in sync. No engine can know that
without an arbiter, so the operator must never promote a copy that was left behind.
"""

import contextlib
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Final

import nbd

from nbdmirror.errors import NbdMirrorError
from tests.prove.history import Operation, course
from tests.prove.rig import COURSES_COUNT, DEVICE_BYTES, Rig
from tests.support.frame_proxy import FrameProxy
from tests.support.pair import PEER_PORT, Engine, Pair, State, is_synced

COURSE_COUNT: Final = 60
BOUND_S: Final = 120.0
REACT_S: Final = 20.0
LOOK_S: Final = 0.01
SOON_S: Final = 3.0


class World(Rig):
    """A rig whose accidents may come one on top of the other."""

    def __init__(self, integrity: str) -> None:
        self.proxy = FrameProxy()
        self.keys: dict[str, object] = {"integrity": integrity, "ack_timeout_ms": 1500}
        self.paused: set[str] = set()
        self.damage = ExitStack()
        self._starter = threading.Thread(target=int)
        # Clients may see an error only where the primary was lost, failed or stepped back.
        self.may_fail = False
        try:
            super().__init__()
        except BaseException:
            self.proxy.close()
            raise
        for engine in self.pair.both:
            engine.allowed = {"EIO", "ENOSPC"}  # words of errors that are no accident of ours

    def make_pair(self, data_dirs: dict[str, Path]) -> Pair:
        """See Rig."""
        pair = Pair(
            size=DEVICE_BYTES, data_dirs=data_dirs, dial=self.proxy.address, engine=self.keys
        )
        self.proxy.target = (pair.hosts["beta"], PEER_PORT)
        return pair

    @property
    def secondary(self) -> Engine:
        """Who does not serve."""
        return self.pair.other(self.primary)

    @property
    def apart(self) -> bool:
        """Whether somebody may have acknowledged what the other one lacks."""
        return self.alone_since is not None

    def of_role(self, role: str) -> Engine:
        """Who has it now."""
        return self.primary if role == "primary" else self.secondary

    def state(self, engine: Engine) -> State:
        """What it says; nothing if it does not answer, or is paused."""
        return {} if engine.name in self.paused or not engine.pid else super().state(engine)

    # --- clients --------------------------------------------------------------------------------

    def pump(self) -> None:
        """Let clients begin again whose course has ended.

        In a thread: whoever connects to an engine that is paused waits until it goes on.
        """
        if not self.idle or self.primary.name in self.paused:
            return
        self.require_no_error()
        self._seed += 1
        operations = course(self._seed % COURSES_COUNT, COURSE_COUNT)
        self._starter = threading.Thread(
            target=self._start, args=(self.primary.uri, operations), daemon=True
        )
        self._starter.start()

    def _start(self, uri: str, operations: list[Operation]) -> None:
        with contextlib.suppress(nbd.Error):
            self.history.start(uri, operations)

    @property
    def idle(self) -> bool:
        """Whether no client waits for anything."""
        return not self._starter.is_alive() and self.history.wait(0)

    def moment(self) -> None:
        """Until clients have ended, or an engine has, or it is over."""
        if self._starter.is_alive():
            self._starter.join(LOOK_S)
            return
        if not self.history.wait(LOOK_S):
            return
        for engine in self.pair.both:
            if engine.launcher is not None and engine.launcher.poll() is None:
                self.look(engine)
                return

    def ended(self) -> None:
        """Everything that was asked has an answer."""
        until = monotonic() + BOUND_S
        while not self.idle:
            assert monotonic() < until, f"clients wait for ever: {self.state(self.primary)}"
            self.moment()

    def require_no_error(self) -> None:
        """No client was told of what is none of its business."""
        assert self.may_fail or not self.history.error, f"a client saw {self.history.error}"

    def until(self, wanted: Callable[[], bool], bound_s: float = REACT_S) -> bool:
        """Keep clients going until something is so; whether it became so in time."""
        until = monotonic() + bound_s
        while not wanted():
            if monotonic() > until:
                return False
            self.pump()
            self.moment()
        return True

    def answers(self, count: int, bound_s: float = SOON_S) -> None:
        """Until clients had so many answers, or get none."""
        wanted = self.history.answered + count
        self.until(lambda: self.history.answered >= wanted, bound_s)

    # --- the operator ---------------------------------------------------------------------------

    def go_alone(self) -> None:
        """Answer the freeze of the primary; nothing if the two have met again before."""

        def settled() -> bool:
            self.decide(self.primary, self.secondary)
            state = self.state(self.primary)
            return bool(state.get("right_alone")) or self.is_dead(self.primary)

        self.until(settled, SOON_S)
        self.answers(30, 1.0)

    def fail_over(self) -> None:
        """Promote the other one, unless it was left behind; it has to hold everything."""
        old, new = self.primary, self.secondary
        self.may_fail = True
        if self.apart or self.is_dead(new) or new.name in self.paused:
            return
        self.until(lambda: not self.state(new).get("session"), REACT_S)
        if self.promoted(new):
            self.alone_since = self.history.now()
            self.primary = new
            self.require_kept(new)
            if old.name not in self.paused:
                self.answers(30, 1.0)

    def answer(self, lost: Engine) -> None:
        """What the design says about one that is lost."""
        if lost is self.primary:
            self.fail_over()
        else:
            self.go_alone()

    def pause(self, engine: Engine) -> None:
        """SIGSTOP."""
        if not self.is_dead(engine):
            self.paused.add(engine.name)
            engine.freeze()

    def lose(self, engine: Engine, *, power: bool) -> None:
        """See Rig; whoever is paused is ended all the same."""
        self.may_fail = self.may_fail or engine is self.primary
        self.paused.discard(engine.name)
        if power and engine.name in self.cut:
            power = False  # it is off already
        last = power and (
            self.is_dead(self.pair.other(engine)) or (engine is self.primary and self.apart)
        )
        self.in_sync_before = not self.apart
        super().lose(engine, power=power)
        if last:
            self.ended()
            self.history.power_was_lost()

    # --- healing --------------------------------------------------------------------------------

    def repair(self) -> None:
        """Link, disks, processes: nothing is wrong from outside any more."""
        for engine in self.pair.both:
            if engine.name in self.paused:
                self.paused.discard(engine.name)
                if not self.is_dead(engine):
                    engine.signal(signal.SIGCONT)
        self.damage.close()
        self.proxy.disarm()
        self.proxy.silence()
        self.proxy.refuse(False)

    def heal(self) -> None:
        """Bring everybody back, and wait until both are in sync and one serves.

        Raises:
            TimeoutError: they do not come together.
        """
        self.repair()
        until = monotonic() + BOUND_S
        while True:
            for engine in self.pair.both:
                self.bring_back(engine)
            one, other = (self.state(each) for each in (self.primary, self.secondary))
            if other.get("role") == "primary":
                self.may_fail = True
                with contextlib.suppress(NbdMirrorError):
                    self.secondary.command("demote")
            elif together(one, other):
                self.alone_since = None
                if one["role"] == "primary":
                    break
                if self.promoted(self.primary):
                    continue
                self.primary = self.secondary
            if monotonic() > until:
                raise TimeoutError(f"not together within {BOUND_S} s: {one}\n{other}")
            self.pump()
            self.moment()
        self.finish_clients()

    def finish_clients(self) -> None:
        """What is in flight is answered; from here on no client sees an error."""
        self.ended()
        self.require_no_error()
        self.may_fail = False
        self.pump()
        self.ended()
        self.require_no_error()

    def close(self) -> None:
        """See Rig."""
        try:
            self.repair()
            super().close()
        finally:
            self.proxy.close()


def together(one: State, other: State) -> bool:
    """Whether both are in sync in one session."""
    synced = bool(one) and bool(other) and is_synced(one) and is_synced(other)
    return synced and bool(one["session"]["number"] == other["session"]["number"])
