"""What a peer that holds the key, and is mad, can do with checked frames: dispatch, and behind it.

Owns a world of the simulator for each input: two nodes in sync under load, no faults. An input is a
script of frames, each sealed with the keys of the running session and put into what one node
receives. Whatever it says, that node may end the session, and nothing else may end.
"""

import gc
import struct
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Final

from nbdmirror.core.messages import encode
from nbdmirror.core.node import Role
from nbdmirror.core.session import Session
from nbdmirror.core.wire import FrameType
from nbdmirror.errors import PeerProtocolError
from tests.fuzz.channel import MESSAGES
from tests.fuzz.mutate import changed_bytes
from tests.fuzz.parser import Parser
from tests.sim.net import End
from tests.sim.run import Simulation
from tests.sim.world import ViolationError

STEP: Final = struct.Struct(">BBbIIH")
"""Frame type, flags, number after the last one, place and span in sectors, bytes that follow."""
WORLDS_COUNT: Final = 4
SYNCED_MS: Final = 20_000
AFTER_MS: Final = 300
SECTOR: Final = 512
STEPS_MAX: Final = 16


def step(kind: int, payload: bytes = b"", *, seq: int = 1, at: int = 0, span: int = 0) -> bytes:
    """One frame of a script."""
    return STEP.pack(kind, 0, seq, at, span, len(payload)) + payload


def scripts() -> Sequence[bytes]:
    """Every message and every frame, to the primary and to the secondary."""
    types = FrameType
    steps = [step(types.CONTROL, encode(message)) for message in MESSAGES]
    steps += [
        step(types.WRITE, b"x" * SECTOR, at=8), step(types.ZERO, at=8, span=8),
        step(types.TRIM, span=1), step(types.FLUSH), step(types.RESYNC_DATA, b"y" * SECTOR),
        step(types.RESYNC_ZERO, span=64), step(types.HASH, bytes(16), span=8),
        step(types.ACK, seq=0), step(types.ACK, seq=100), step(types.FLUSHED, seq=0),
        step(types.NACK, span=5), step(types.HASH_REPLY, b"\0"), step(types.ECHO_REQUEST),
        step(types.ECHO_REPLY, seq=0),
    ]  # fmt: skip
    return [bytes((n % (2 * WORLDS_COUNT),)) + each for n, each in enumerate(steps)]


def changed_script(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """Another world, a step more, or another byte."""
    what = rng.random()
    if what < 0.2:
        return bytes((rng.randrange(2 * WORLDS_COUNT),)) + data[1:]
    if what < 0.6:
        return data + rng.choice(pool)[1:]
    return changed_bytes(rng, data, pool)


def simulation(number: int) -> Simulation:
    """Two nodes in sync, clients at work."""
    made = Simulation(number, "none")
    made.commander.sane = True
    made.start()
    world = made.world
    while world.now_ms < SYNCED_MS and not (made.checker.both_synced() and serves(made)):
        world.run(world.now_ms + 200)
    return made


def serves(made: Simulation) -> bool:
    """Whether one of the two is primary."""
    nodes = [host.node for host in made.hosts]
    return any(node is not None and node.role is Role.PRIMARY for node in nodes)


def frames(session: Session, sender: End, data: bytes) -> bytes:
    """The bytes of a script, as the peer of this session would send them."""
    makes = sender.channel._sender
    out, at, steps = b"", 0, 0
    seq = session.applied_seq
    while at + STEP.size <= len(data) and steps < STEPS_MAX:
        kind, flags, more, place, span, count = STEP.unpack_from(data, at)
        payload = data[at + STEP.size :][:count]
        at += STEP.size + count
        steps += 1
        assert makes is not None, "a session is there"
        if kind == FrameType.CONTROL:
            out += makes.control_of(payload)
            continue
        seq = max(0, seq + more)
        # Also of a type that there is none of.
        header = makes.encode(kind, flags, seq, place * SECTOR, span * SECTOR, payload)
        out += header + payload
    return out


def feed_script(data: bytes) -> bool:
    """The session ends or goes on; the node does, whatever it was told."""
    which = data[0] if data else 0
    made = simulation(which % WORLDS_COUNT)
    host = made.hosts[which // WORLDS_COUNT % 2]
    life = host.life
    if life is None or life.node.session is None:
        return False
    session = life.node.session
    end = session.link
    assert isinstance(end, End)
    # The checks take both nodes for honest; one of them is not.
    with suppress(ViolationError):
        end.receive(frames(session, end.other, data[1:]))
        made.world.run(made.world.now_ms + AFTER_MS)
    assert host.life is life, "the engine ended"
    live = session.live
    del made, host, life, session, end
    gc.collect()  # a world refers to itself all over
    return live


PARSERS: Final = (
    Parser(
        "dispatch",
        scripts,
        feed_script,
        (PeerProtocolError,),
        mutate=changed_script,
        weight=3,
        batch=20,
    ),
)
