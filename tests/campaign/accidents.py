"""What happens to a pair of engines: one function for each name of the catalogue.

Each strikes at a random moment of the load, does what the plan says the operator does about it, and
may leave damage behind: `World.heal` mends all there can be. Must never: promote, or let anybody go
on alone, but by the world's own rules.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Final

import nbd

from nbdmirror import admin
from nbdmirror.errors import NbdMirrorError
from tests.campaign.plan import Accident
from tests.campaign.world import REACT_S, World
from tests.prove.faults import Tracer, path_of
from tests.prove.rig import DEVICE_BYTES
from tests.scenarios.frame_faults import WAYS
from tests.support.frame_proxy import FAULTS, Armed, Fault
from tests.support.frames import SENDERS
from tests.support.frozen import frozen
from tests.support.pair import Engine

HAPPENS_S: Final = 3.0
HELD_S: Final = 2.0
SHORT_MS: Final = (200, 1200)
FAILS_S: Final = 5.0
HANGS_S: Final = 20.0
Strike = Callable[[World, Accident, Random], None]


def strike(world: World, accident: Accident) -> None:
    """Let it happen.

    Raises:
        AssertionError, TimeoutError, RuntimeError, NbdMirrorError: something did not hold.
    """
    world.answers(accident.after)
    ACCIDENTS[accident.name](world, accident, Random(accident.seed))


def lost(world: World, accident: Accident, engine: Engine) -> None:
    """One is gone: what the operator does about it."""
    if accident.answer == "decide":
        world.answer(engine)


def signalled(world: World, engine: Engine, number: int) -> None:
    """To an engine that may have ended; whoever is paused is asked nothing."""
    if number == signal.SIGSTOP:
        world.paused.add(engine.name)
    if engine.pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine.pid, number)


def for_a_moment(world: World, dice: Random) -> None:
    """Shorter or longer than the deadlines of a session."""
    world.until(lambda: False, dice.randint(*SHORT_MS) / 1000)


# --- processes ------------------------------------------------------------------------------------


def kill(world: World, accident: Accident, dice: Random) -> None:
    """SIGKILL at a random moment."""
    engine = world.of_role(accident.role)
    world.lose(engine, power=False)
    lost(world, accident, engine)


def at_a_frame(world: World, accident: Accident, dice: Random, number: int) -> Engine:
    """A signal when a frame is on its way: before the other end has it."""
    engine = world.of_role(accident.role)
    kind, sender = dice.choice(WAYS["work"]), dice.choice(SENDERS)
    # A client of a primary that is struck here has its reason.
    world.may_fail = world.may_fail or engine is world.primary
    call = partial(signalled, world, engine, number)
    happen(world, Fault("call", kind, sender, dice.randint(1, 20), call=call))
    return engine


def happen(world: World, fault: Fault, bound_s: float = HAPPENS_S) -> Armed:
    """Arm it and keep clients going until it has happened, or does not."""
    armed = world.proxy.arm(fault)
    world.until(armed.happened.is_set, bound_s)
    return armed


def kill_at_a_frame(world: World, accident: Accident, dice: Random) -> None:
    """SIGKILL when a frame of some type is on its way."""
    engine = at_a_frame(world, accident, dice, signal.SIGKILL)
    world.proxy.disarm()
    world.lose(engine, power=False)
    lost(world, accident, engine)


def pause(world: World, accident: Accident, dice: Random) -> None:
    """SIGSTOP, and SIGCONT soon, or when the other one has gone on."""
    engine = world.of_role(accident.role)
    world.pause(engine)
    paused(world, accident, dice, engine)


def pause_at_a_frame(world: World, accident: Accident, dice: Random) -> None:
    """The same when a frame of some type is on its way."""
    engine = at_a_frame(world, accident, dice, signal.SIGSTOP)
    world.proxy.disarm()
    if not world.is_dead(engine):
        world.pause(engine)
        paused(world, accident, dice, engine)


def paused(world: World, accident: Accident, dice: Random, engine: Engine) -> None:
    """What follows."""
    if accident.answer == "decide":
        world.answer(engine)
    else:
        for_a_moment(world, dice)
    signalled(world, engine, signal.SIGCONT)
    world.paused.discard(engine.name)


def restart(world: World, accident: Accident, dice: Random) -> None:
    """Both end, in order or not, in either order, and start in either order."""
    order = list(world.pair.both)
    dice.shuffle(order)
    in_order = dice.random() < 0.5
    world.may_fail = True
    for engine in order:
        if world.is_dead(engine):
            continue
        if in_order and not world.state(engine).get("failed"):
            leaves_alone(world, engine)
            engine.stop()
        else:
            world.lose(engine, power=False)
    dice.shuffle(order)
    for engine in order:
        if engine.launcher is None:
            world.bring_back(engine)


def leaves_alone(world: World, engine: Engine) -> None:
    """Whoever stays when one stops in order may acknowledge alone from then on."""
    if not world.is_dead(world.pair.other(engine)) and world.alone_since is None:
        world.alone_since = world.history.now()


# --- the link -------------------------------------------------------------------------------------


def cut(world: World, accident: Accident, dice: Random) -> None:
    """Both directions; each end is told."""
    world.proxy.refuse(True)
    parted(world, accident, dice)
    world.proxy.refuse(False)


def one_way_cut(world: World, accident: Accident, dice: Random) -> None:
    """What one of them says is lost."""
    world.proxy.silence(dice.choice(SENDERS))
    parted(world, accident, dice)
    world.proxy.silence()


def parted(world: World, accident: Accident, dice: Random) -> None:
    """The two do not hear each other: wait, go on alone, or let the other one serve."""
    if accident.answer == "wait":
        for_a_moment(world, dice)
    elif accident.role == "secondary":
        world.go_alone()
    else:
        # Nobody is promoted beside a primary: it is demoted first.
        world.until(lambda: bool(world.state(world.primary).get("frozen")), HAPPENS_S)
        world.may_fail = True
        if not world.apart and not world.is_dead(world.primary):
            world.primary.command("demote")
            world.fail_over()


def reset(world: World, accident: Accident, dice: Random) -> None:
    """A few times in a row, at any byte."""
    for _ in range(dice.randint(1, 4)):
        before = world.proxy.cuts
        world.proxy.cut_after(dice.randrange(1, 60_000))
        world.until(lambda before=before: world.proxy.cuts > before, HAPPENS_S)  # type: ignore[misc]
        world.answers(dice.randrange(20), 1.0)


def frame(world: World, accident: Accident, dice: Random) -> None:
    """One frame is harmed, of those that a pair at work sends."""
    kind, sender = dice.choice(WAYS["work"]), dice.choice(SENDERS)
    what = dice.choice(FAULTS[:-1])
    armed = happen(world, Fault(what, kind, sender, dice.randint(1, 10), dice.randrange(1 << 12)))
    if what == "hold-long" and armed.happened.is_set():
        world.until(lambda: False, HELD_S)
    world.answers(10, HAPPENS_S)


# --- disks ----------------------------------------------------------------------------------------


def failing(world: World, accident: Accident, dice: Random, error: str) -> None:
    """Every write, or every flush, of one data file fails from some call on."""
    world.heal()
    engine = world.of_role(accident.role)
    call = dice.choice(("pwrite64", "fdatasync") if error == "EIO" else ("pwrite64",))
    told = world.root / "strace"
    told.unlink(missing_ok=True)
    arguments = [
        "strace", "-f", "-o", str(told), *path_of(engine, "data"),
        "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={dice.randint(1, 20)}+",
    ]  # fmt: skip
    world.may_fail = world.may_fail or engine is world.primary
    world.damage.callback(Tracer(engine, arguments).end)
    world.until(lambda: bool(world.state(engine).get("failed")), FAILS_S)
    if world.state(engine).get("failed"):
        gone = engine is world.secondary
        world.until(lambda: gone or world.state(engine)["role"] != "primary", FAILS_S)
        lost(world, accident, engine)


def hang(world: World, accident: Accident, dice: Random) -> None:
    """The file system of one node answers nothing."""
    world.heal()
    engine = world.of_role(accident.role)
    world.may_fail = world.may_fail or engine is world.primary
    world.damage.enter_context(frozen(world.disks[engine.name].mountpoint))
    if engine is world.secondary:
        world.paused.add(engine.name)  # it applies on the thread that would answer
        lost(world, accident, engine)
    elif accident.answer == "decide":
        world.until(lambda: world.state(engine).get("role") != "primary", HANGS_S)
        if world.state(engine).get("role") != "primary":
            world.fail_over()
    else:
        for_a_moment(world, dice)
    world.damage.close()
    world.paused.discard(engine.name)


def power(world: World, accident: Accident, dice: Random) -> None:
    """What was not flushed is gone: of one node, or of both."""
    engine = world.of_role(accident.role)
    both = dice.random() < 0.3
    for each in world.pair.both if both else (engine,):
        world.lose(each, power=True)
    if not both:
        lost(world, accident, engine)


# --- in the middle of something -------------------------------------------------------------------


def crash_in_a_swap(world: World, accident: Accident, dice: Random) -> None:
    """One of them dies when a frame of the swap is on its way."""
    kind = dice.choice(("Role", "State", "Verdict", "SourceBegin", "Stable", "ECHO_REQUEST"))
    world.heal()
    old, new = world.primary, world.secondary
    victim = dice.choice((old, new))
    call = partial(signalled, world, victim, signal.SIGKILL)
    world.may_fail = True
    armed = world.proxy.arm(Fault("call", kind, dice.choice(SENDERS), call=call))
    with contextlib.suppress(NbdMirrorError, OSError):
        old.command("demote")
    if world.state(old).get("role") != "primary" and not world.is_dead(new):
        with contextlib.suppress(NbdMirrorError, OSError, RuntimeError):
            if world.promoted(new):
                world.primary = new
                # Without its peer it may acknowledge alone at once.
                world.alone_since = world.history.now()
    world.until(armed.happened.is_set, HAPPENS_S / 2)
    world.proxy.disarm()
    if armed.happened.is_set():
        world.lose(victim, power=False)
        lost(world, accident, victim)


def crash_in_a_resync(world: World, accident: Accident, dice: Random) -> None:
    """One of them dies when a frame of the resync or of the joint step is on its way, or both."""
    world.heal()
    world.proxy.refuse(True)
    world.go_alone()
    with contextlib.suppress(nbd.Error):
        client = world.primary.connect()
        client.pwrite(b"\xa5" * (256 << 10), 6 << 20)
        client.zero(64 << 10, 6 << 20)
        client.shutdown()
    kind = dice.choice(WAYS["copy"])
    victims = dice.choice(((world.primary,), (world.secondary,), world.pair.both))
    world.may_fail = world.may_fail or world.primary in victims

    def call() -> None:
        for victim in victims:
            signalled(world, victim, signal.SIGKILL)

    fault = Fault("call", kind, dice.choice(SENDERS), dice.randint(1, 2), call=call)
    armed = world.proxy.arm(fault)
    world.proxy.refuse(False)
    world.until(armed.happened.is_set, HAPPENS_S)
    world.proxy.disarm()
    if armed.happened.is_set():
        for victim in victims:
            world.lose(victim, power=False)
        if victims == (world.secondary,):
            lost(world, accident, world.secondary)


# --- another disk ---------------------------------------------------------------------------------


def other_disk(world: World, accident: Accident, dice: Random, size: int) -> None:
    """A node comes back with a disk that knows nothing; one of another size is refused first."""
    engine = taken_out(world, accident)
    if engine is None:
        return
    serving = world.pair.other(engine)
    renewed(engine, size)
    serving.wait_state(lambda s: "accept-peer" in s["refusal"], "another identity is refused")
    serving.command("accept-peer")
    if size != DEVICE_BYTES:
        serving.wait_state(lambda s: "size" in s["refusal"].lower(), "another size is refused")
        assert engine.state()["data_state"] == "blank", "nothing is copied to it"
        world.lose(engine, power=False)
        renewed(engine, DEVICE_BYTES)  # nobody is known as the peer yet
    world.until(lambda: bool(world.state(engine).get("session")), REACT_S)


def taken_out(world: World, accident: Accident) -> Engine | None:
    """A node that is down while the other one serves alone; None if that cannot be had."""
    world.heal()
    engine = world.of_role(accident.role)
    world.lose(engine, power=False)
    world.answer(engine)
    serves = world.state(world.primary)
    if engine is world.primary or not serves.get("right_alone"):
        return None
    return engine


def renewed(engine: Engine, size: int) -> None:
    """It starts, and nothing of its old files is left."""
    for path in engine.config.me.data_dir.iterdir():
        path.unlink()
    admin.create(engine.config, size, join=True, adopt=False, sparse=True)
    engine.start()


def old_copy(world: World, accident: Accident, dice: Random) -> None:
    """A node comes back with its disk as it was a while ago: a snapshot, a backup."""
    world.heal()
    kept = world.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    copied = world.secondary
    leaves_alone(world, copied)
    copied.stop()
    shutil.copytree(copied.config.me.data_dir, kept)
    copied.start()
    # A while ago: both were in sync since then, with other data.
    world.heal()
    world.answers(40)
    world.lose(copied, power=False)
    world.answer(copied)
    for path in kept.iterdir():
        shutil.copyfile(path, copied.config.me.data_dir / path.name)


ACCIDENTS: Final[Mapping[str, Strike]] = {
    "kill": kill,
    "kill at a frame": kill_at_a_frame,
    "pause": pause,
    "pause at a frame": pause_at_a_frame,
    "cut": cut,
    "one-way cut": one_way_cut,
    "reset": reset,
    "frame": frame,
    "EIO": partial(failing, error="EIO"),
    "ENOSPC": partial(failing, error="ENOSPC"),
    "hang": hang,
    "power": power,
    "restart": restart,
    "crash in a swap": crash_in_a_swap,
    "crash in a resync": crash_in_a_resync,
    "blank disk": partial(other_disk, size=DEVICE_BYTES),
    "larger disk": partial(other_disk, size=2 * DEVICE_BYTES),
    "smaller disk": partial(other_disk, size=DEVICE_BYTES // 2),
    "old copy": old_copy,
}
