"""One frame between two real engines harmed, for each type of frame, sender and kind of fault.

    python -m tests.scenarios.frame_faults [--minutes 60] [--seed 1] [--json FILE]
    python -m tests.scenarios.frame_faults --cases crc:WRITE:dialer:drop:2:0,mac:...
    python -m tests.scenarios.frame_faults --list

A case is integrity, type, sender, fault, which frame of that type, which byte. What makes the frame
be sent is one of the ways below, under clients that write, flush, zero and trim. Afterwards the
pair comes together again by itself; every acknowledged operation is there; the images are equal; no
log holds what none may hold; nothing is left open. Whether the fault had to be found, and by what,
is checked, too. A violation prints the cases since its pair was made: given again in this order
they are its replay. Ends with an error at the first one. A sample is part of the tests.
"""

import argparse
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final

from nbdmirror.errors import NbdMirrorError, RefusedError
from tests.prove.history import History, course
from tests.support.frame_proxy import FAULTS, Fault, FrameProxy
from tests.support.frames import DIALER, LISTENER, SENDERS, SEQUENCED
from tests.support.pair import PEER_PORT, Engine, Event, Pair

INTEGRITIES: Final = ("crc", "mac")
# How a frame is made to be sent.
WAYS: Final = {
    "work": (
        *("WRITE", "ZERO", "TRIM", "FLUSH", "ACK", "FLUSHED", "Stable"),
        *("ECHO_REQUEST", "ECHO_REPLY"),
    ),
    "copy": (
        *("State", "Verdict", "MapEnd", "UnionStored", "TargetReady", "SourceBegin"),
        *("RESYNC_DATA", "RESYNC_ZERO", "JointTake", "JointTaken"),
    ),
    "come_back": ("MapPage", "HASH", "HASH_REPLY"),
    "leave": ("LeaveAsk", "LeaveAnswer", "Left"),
    "swap": ("Role",),
    "quarrel": ("Bye",),
}
WAY_OF: Final = {kind: way for way, kinds in WAYS.items() for kind in kinds}
# Nobody sends these today; these need a disk that fails, or controllers.
NEVER: Final = frozenset({"NACK", "CaughtUp"})
ELSEWHERE: Final = frozenset({"Failed", "Relay"})
# Who sends it: the secondary, either of them; all others the primary.
OF_SECONDARY: Final = frozenset(
    {"ACK", "FLUSHED", "HASH_REPLY", "MapPage", "MapEnd", "TargetReady", "JointTaken", "LeaveAsk",
     "Left", "Bye"}
)  # fmt: skip
OF_BOTH: Final = frozenset({"ECHO_REQUEST", "ECHO_REPLY", "State", "Verdict"})
# Data frames of a resync: a FLUSH comes behind them at the latest.
COPIED: Final = frozenset({"RESYNC_DATA", "RESYNC_ZERO", "HASH"})
# Nothing has to come behind it in its session.
LAST: Final = frozenset({"LeaveAsk", "LeaveAnswer", "Left", "Bye", "Role"})

BOUND_S: Final = 120.0
CASES_PER_PAIR_COUNT: Final = 40
COURSES_COUNT: Final = 7
COURSE_COUNT: Final = 60
HOT_COUNT: Final = 10
LOOK_S: Final = 0.02
FOUND_S: Final = 30.0
REFUSED_FOR_S: Final = 3.0
DESCRIPTORS_SPARE: Final = 8
ASIDE_BYTES: Final = 6 << 20
ASIDE_COUNT: Final = 64 << 10
BY_CHECKS: Final = r"check|MAC|magic"
BY_ORDER: Final = r"seq \d+, not \d+|MAC as frame \d+|before the data plane was opened"


@dataclass(frozen=True)
class Case:
    """One fault, in a session of that integrity."""

    integrity: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.integrity}:{self.fault}"

    @classmethod
    def of(cls, text: str) -> "Case":
        """From what a replay names. Raises ValueError."""
        integrity, _, fault = text.partition(":")
        if integrity not in INTEGRITIES:
            raise ValueError(f"{text}: no such integrity")
        return cls(integrity, Fault.of(fault))

    @property
    def primary(self) -> str:
        """Who has to be primary, so that the sender sends it. Alpha dials."""
        dialer_serves = self.fault.sender == DIALER or self.fault.kind in OF_BOTH
        if self.fault.kind in OF_SECONDARY:
            dialer_serves = not dialer_serves
        return "alpha" if dialer_serves else "beta"

    @property
    def found_by(self) -> str:
        """What has to find it, as a pattern; "" if it may pass, or only ends the session."""
        what, kind = self.fault.what, self.fault.kind
        if what.startswith("corrupt") or what == "replay-next":
            return BY_CHECKS
        sealed = self.integrity == "mac"
        ordered = kind not in LAST and (sealed or kind in SEQUENCED)
        # What is missing shows by the next one, and a message may be the last for long.
        followed = WAY_OF[kind] == "work" or kind in COPIED
        if what == "duplicate" or (what == "drop" and sealed):
            followed = True
        finds = ordered and followed and what in ("duplicate", "drop", "replay")
        return BY_ORDER if finds else ""


def all_cases(dice: Random) -> list[Case]:
    """The full product, each with a place and a byte of its own."""
    cases = []
    for integrity in INTEGRITIES:
        for kind, way in WAY_OF.items():
            for sender in SENDERS:
                for what in FAULTS[:-1]:
                    k = dice.randrange(1, 4) if way == "work" else 1
                    fault = Fault(what, kind, sender, k, dice.randrange(1 << 12))
                    cases.append(Case(integrity, fault))
    return cases


class Course:
    """One pair whose frames go through a relay, and its history."""

    def __init__(self, integrity: str) -> None:
        self.proxy = FrameProxy()
        # A bound for one that is lost, as short as the configuration takes it.
        keys: dict[str, object] = {"integrity": integrity, "ack_timeout_ms": 1500}
        self.pair = Pair(dial=self.proxy.address, engine=keys)
        self.proxy.target = (self.pair.hosts["beta"], PEER_PORT)
        self.history = History()
        self.primary = self.pair.alpha
        self._seed = 0
        self._descriptors: dict[int, int] = {}
        try:
            self.pair.up(sparse=True)
        except BaseException:
            self.close()
            raise

    # --- one case -------------------------------------------------------------------------------

    def case(self, case: Case) -> None:
        """Carry it out and judge it.

        Raises:
            AssertionError, TimeoutError, RuntimeError, NbdMirrorError: something did not hold.
        """
        self.serve_on(case.primary)
        since = self.marks()
        getattr(self, WAY_OF[case.fault.kind])(case.fault)
        self.require_found(case, since)
        self.together()
        self.proxy.disarm()
        self.judge()

    def serve_on(self, name: str) -> None:
        """A planned swap, if the other one is primary."""
        if self.primary.name != name:
            self.primary.command("demote")
            self.primary = self.pair.other(self.primary)
            self.primary.command("promote")
            self.together()

    def marks(self) -> dict[str, tuple[int, int]]:
        """Where the events of this moment end: the life of each engine, and its last event."""
        return {each.name: (len(each.lives), each.last_event()) for each in self.pair.both}

    def told(self, since: dict[str, tuple[int, int]]) -> Iterator[tuple[str, Event]]:
        """Who told what since then."""
        for engine in self.pair.both:
            lives, last = since[engine.name]
            for number, life in enumerate(engine.lives[lives - 1 :]):
                for event in list(life.events):
                    if number or event["number"] > last:
                        yield engine.name, event

    def wait_lost(self, since: dict[str, tuple[int, int]]) -> None:
        """Until one of them has lost the session."""
        until = monotonic() + BOUND_S
        while not any(event["event"] == "session-lost" for _, event in self.told(since)):
            assert monotonic() < until, "the session outlived it"
            self.look()

    def require_found(self, case: Case, since: dict[str, tuple[int, int]]) -> None:
        """What has to be found is, by the right check, on the side that received it."""
        if not case.found_by:
            return
        receiver = "beta" if case.fault.sender == DIALER else "alpha"
        until = monotonic() + FOUND_S
        while True:
            reasons = [
                (name, event["reason"]) for name, event in self.told(since)
                if event["event"] == "protocol-error"
            ]  # fmt: skip
            if any(name == receiver and re.search(case.found_by, text) for name, text in reasons):
                return
            assert monotonic() < until, f"not found by {case.found_by!r} on {receiver}: {reasons}"
            if self.history.wait(LOOK_S):
                self.operate()  # what is missing shows by what comes behind it

    def look(self) -> None:
        """A moment, or until the primary tells something."""
        follower = self.primary.lives[-1]
        with follower.changed:
            follower.changed.wait(LOOK_S)

    # --- ways to make a frame be sent -----------------------------------------------------------

    def work(self, fault: Fault | None) -> None:
        """Clients write, flush, zero and trim; the background flush and the echoes come along."""
        self.expected(fault, self.operate)
        self.finish()

    def copy(self, fault: Fault | None) -> None:
        """The link is cut, the primary goes on alone, the link is back: a resync, a joint step."""
        self.proxy.refuse(True)
        self.primary.wait_state(lambda s: s["frozen"], "frozen")
        self.primary.command("alone")
        self.operate()
        self.finish()
        client = self.primary.connect()
        client.pwrite(b"\xa5" * ASIDE_COUNT, ASIDE_BYTES)
        client.zero(ASIDE_COUNT, ASIDE_BYTES + 2 * ASIDE_COUNT)
        client.shutdown()
        self.expected(fault, lambda: self.proxy.refuse(False))

    def come_back(self, fault: Fault | None) -> None:
        """The secondary is killed under load, and started: what was hot is compared."""
        secondary = self.pair.other(self.primary)
        before = self.history.answered
        self.operate()
        while self.history.answered < before + HOT_COUNT and not self.history.wait(LOOK_S):
            pass
        secondary.kill()
        self.expected(fault, secondary.start)

    def leave(self, fault: Fault | None) -> None:
        """The secondary stops in order, under load, and starts again."""
        secondary = self.pair.other(self.primary)
        self.operate()
        self.expected(fault, secondary.stop)
        secondary.start()
        self.finish()

    def swap(self, fault: Fault | None) -> None:
        """A planned swap; where it is refused for too long the old primary goes on."""
        self.operate()
        self.finish()
        old, new = self.primary, self.pair.other(self.primary)
        self.expected(fault, lambda: old.command("demote"))
        self.primary = new if promoted(new) else old
        if self.primary is old:
            old.command("promote")

    def quarrel(self, fault: Fault | None) -> None:
        """The secondary finds a frame that is wrong, and says why it goes."""
        writer = DIALER if self.primary.name == "alpha" else LISTENER
        wrong = Fault("corrupt-payload", "WRITE", writer)
        self.expected(fault, lambda: self.work(wrong))

    def expected(self, fault: Fault | None, act: Callable[[], object]) -> None:
        """Do what makes the frame be sent, under load, and wait until it was harmed."""
        if fault is None:
            act()
            return
        since, armed = self.marks(), self.proxy.arm(fault)
        act()
        until = monotonic() + FOUND_S
        while not armed.happened.wait(LOOK_S):
            assert monotonic() < until, f"{fault}: no such frame"
            if self.history.wait(LOOK_S):
                self.operate()
        if fault.what.startswith(("close", "replay-next", "hold-long")):
            self.wait_lost(since)
            self.proxy.release()

    # --- parts ----------------------------------------------------------------------------------

    def operate(self) -> None:
        """Let clients begin with the next course."""
        self._seed += 1
        self.history.start(self.primary.uri, course(self._seed % COURSES_COUNT, COURSE_COUNT))

    def finish(self) -> None:
        """All of it is answered; no answer is an error, because nobody but us changes the roles."""
        assert self.history.wait(BOUND_S), f"clients wait for ever: {self.primary.state()}"
        assert not self.history.error, self.history.error

    def together(self) -> None:
        """In sync again, by itself, with the same primary; and clients are served."""
        self.pair.synced(BOUND_S)
        self.finish()
        assert self.primary.state()["role"] == "primary", self.primary.state()

    def judge(self) -> None:
        """Kept, equal, nothing in a log that must not be, no descriptor more than before."""
        self.operate()
        self.finish()
        self.primary.command("drain")
        self.pair.synced(BOUND_S)
        for engine in self.pair.both:
            losses = self.history.losses(engine.data)
            assert not losses, f"{engine.name} lost {len(losses)}:\n" + "\n".join(losses[:10])
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

    def close(self) -> None:
        """End everything; fails on what was left behind."""
        try:
            self.pair.close()
        finally:
            self.proxy.close()


def promoted(engine: Engine) -> bool:
    """Whether it becomes primary within a moment."""
    until = monotonic() + REFUSED_FOR_S
    while True:
        try:
            engine.command("promote")
        except RefusedError:
            if monotonic() > until:
                return False
            with engine.lives[-1].changed:
                engine.lives[-1].changed.wait(LOOK_S)
        else:
            return True


@contextmanager
def made(integrity: str) -> Iterator[Course]:
    """A course that is taken down; an error tells the story."""
    one = Course(integrity)
    try:
        yield one
    except BaseException as error:
        error.add_note(one.pair.story())
        try:
            one.close()
        except AssertionError as more:
            error.add_note(str(more))
        raise
    one.close()


# --- many cases -----------------------------------------------------------------------------------


class Runner:
    """Cases in turn, on a pair that is made anew now and then."""

    def __init__(self) -> None:
        self.figures: Counter[str] = Counter()
        self.violation = ""
        self.replay = ""

    def run(self, cases: Iterable[Case], until: float) -> None:
        """As many as there is time for, or up to the first violation."""
        left = list(cases)
        while left and monotonic() < until and not self.violation:
            integrity = left[0].integrity
            some = [each for each in left if each.integrity == integrity][:CASES_PER_PAIR_COUNT]
            left = [each for each in left if each not in some]
            trail: list[Case] = []
            try:
                with made(integrity) as one:
                    for case in some:
                        if monotonic() > until:
                            break
                        trail.append(case)
                        self.one(one, case)
            except (AssertionError, TimeoutError, RuntimeError, OSError, NbdMirrorError) as error:
                notes = "\n".join(getattr(error, "__notes__", []))
                last = f"at {trail[-1]}" if trail else "while the pair was made"
                self.violation = f"{last}: {type(error).__name__}: {error}\n{notes}"
                self.replay = replay(trail)

    def one(self, one: Course, case: Case) -> None:
        """One case, and its figures."""
        checked, began = one.history.checked, monotonic()
        one.case(case)
        self.figures["frames harmed"] += 1
        self.figures[f"frames harmed: {case.fault.what}"] += 1
        self.figures["acknowledged operations checked"] += one.history.checked - checked
        say(f"{monotonic() - began:6.1f} s  {case}")


def replay(cases: Sequence[Case]) -> str:
    """The command that takes a fresh pair the same way."""
    return "python -m tests.scenarios.frame_faults --cases " + ",".join(map(str, cases))


def say(text: str) -> None:
    """At once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run what was asked for; 0 when all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios.frame_faults")
    parser.add_argument("--minutes", type=float, default=600.0, help="no longer than this")
    parser.add_argument("--seed", type=int, default=1, help="of the order, the places, the bytes")
    parser.add_argument("--cases", default="", help="these, with commas between them")
    parser.add_argument("--list", action="store_true", help="print the cases and do nothing")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    asked = parser.parse_args()
    dice = Random(asked.seed)
    cases = [Case.of(text) for text in asked.cases.split(",") if text] or all_cases(dice)
    if not asked.cases:
        dice.shuffle(cases)
    if asked.list:
        say("\n".join(map(str, cases)))
        return 0
    # Told to end, it takes down what it made.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    began, runner = monotonic(), Runner()
    runner.run(cases, began + asked.minutes * 60)
    for name, count in sorted(runner.figures.items()):
        say(f"{count:>8}  {name}")
    say(f"{runner.figures['frames harmed']} of {len(cases)} cases, {monotonic() - began:.0f} s")
    if asked.json:
        facts: dict[str, Any] = dict(runner.figures)
        facts |= {"violation": runner.violation, "replay": runner.replay}
        asked.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if runner.violation:
        say(f"VIOLATION {runner.violation}\nreplay: {runner.replay}")
    return 1 if runner.violation else 0


if __name__ == "__main__":
    sys.exit(main())
