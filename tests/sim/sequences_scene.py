"""A stage for directed sequences: the simulator's two engines, no faults, load or controllers.

A sequence says what happens, in order, and runs virtual time until something is the case. All
checks of the simulator watch it. Owns no expectation: what must come out is said in the sequences.
"""

import random
import re
from collections.abc import Callable
from typing import Any

from nbdmirror.core import io, roles
from nbdmirror.core.node import Node, Role, Settings
from nbdmirror.core.ports import Path
from nbdmirror.core.session import Session
from nbdmirror.core.superblock import Superblock
from nbdmirror.core.wire import FrameFlag
from nbdmirror.errors import RefusedError
from tests.sim import answers
from tests.sim.arbiter import Arbiter, Held
from tests.sim.history import Record, payload
from tests.sim.host import EngineLife, Host
from tests.sim.run import Simulation
from tests.sim.world import sleep

BLOCK_SECTORS = 8
LIMIT_MS = 20_000
NOBODY = -1
# Two rounds of the engine's tidying.
SETTLE_MS = 12_000
# Nothing is flushed behind a sequence's back.
NEVER_MS = 3_600_000


class Steady(random.Random):
    """Draws the same every time: what chance may do to a network or a disk is not in a script."""

    def __init__(self, drawn: float) -> None:
        super().__init__(0)
        self._drawn = drawn

    def random(self) -> float:
        """The same as ever."""
        return self._drawn

    def choice(self, seq: Any) -> Any:
        """The one at the same share of the list."""
        return seq[int(self._drawn * len(seq))]

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """The number at the same share of the range."""
        numbers = range(start) if stop is None else range(start, stop, step)
        return numbers[int(self._drawn * len(numbers))]


class Request:
    """One request of a client. `problem` is None while it runs, "" when it was acknowledged."""

    def __init__(self, record: Record | None, began: int) -> None:
        self.record = record
        self.began = began
        self.problem: str | None = None

    @property
    def acknowledged(self) -> bool:
        """Whether the client was told that it is done."""
        return self.problem == ""


class Scene:
    """Two hosts, A and B, and hands to move them."""

    def __init__(self, arbiter: str = "none", seed: int = 1) -> None:
        self.sim = Simulation(seed, arbiter, keep_trace=True)
        self.world = self.sim.world
        # A network that delivers, after 1 ms; a disk that takes a write in 1 ms, a sync in 8.
        self.world.rng["net"] = Steady(0.5)
        self.world.rng["disk"] = Steady(0.7)
        self.checker = self.sim.checker
        self.net = self.sim.net
        self.record_joint = True
        self.a, self.b = self.sim.hosts
        for host in self.sim.hosts:
            host.settings = Settings(flush_interval_ms=NEVER_MS)
            host.hot_regions_max = 0
            host.on_start = self._attach
            host.on_kill = None
        # Every word arrives, in its time.
        self.sim.words.rng = Steady(0.5)
        if self.sim.arbiter is not None:
            self.sim.arbiter.unreliable = False

    # --- time -----------------------------------------------------------------------------------

    def run(self, duration_ms: int) -> None:
        """Let time pass."""
        self.world.run(self.world.now_ms + duration_ms)

    def until(self, holds: Callable[[], object], limit_ms: int = LIMIT_MS) -> None:
        """Run until it is so. Raises AssertionError when it does not become so in time."""
        if holds():
            return
        limit_ms += self.world.now_ms
        assert self.world.run(limit_ms, lambda: bool(holds())), f"never: {self.sim.describe()}"

    # --- hosts ----------------------------------------------------------------------------------

    def pair(self) -> None:
        """Both in sync, A primary, and the maps on both disks clean again after the first copy."""
        self.start(self.a)
        self.start(self.b)
        self.synced()
        self.command(self.a, roles.promote(self.node(self.a)))
        self.until(lambda: self.node(self.b).role is Role.SECONDARY)
        # Else a crash would find everything dirty, which hides what was forgotten.
        self.run(SETTLE_MS)
        assert not any(h.node is None or h.node.dirty.stale_pages() for h in self.sim.hosts)

    def node(self, host: Host) -> Node:
        """The core that runs on a host now."""
        assert host.node is not None, f"{host.name} is down"
        return host.node

    def session(self, host: Host) -> Session:
        """The session of a host, which must have one."""
        session = self.node(host).session
        assert session is not None, f"{host.name} has no session"
        return session

    def life(self, host: Host) -> EngineLife:
        """The engine that runs on a host now."""
        assert host.life is not None, f"{host.name} is down"
        return host.life

    def start(self, host: Host) -> None:
        """Start the engine; returns when it serves commands."""
        host.start()
        self.until(lambda: host.life is not None and host.life.ready)

    def kill(self, host: Host) -> None:
        """Kill the engine: the page cache stays. Returns when the other one knows."""
        host.end(power=False)
        self.until(lambda: host.peer.node is None or host.peer.node.session is None)

    def power(self, host: Host) -> None:
        """Cut the power: what was not flushed is lost. Returns when the other one knows."""
        host.data.pending.clear()
        host.data.started.clear()
        host.end(power=True)
        self.until(lambda: host.peer.node is None or host.peer.node.session is None)

    def part(self) -> None:
        """Cut the link; returns when both know."""
        self.cut()
        self.until(lambda: all(h.node is None or h.node.session is None for h in self.sim.hosts))

    def cut(self) -> None:
        """Cut the link, at this instant."""
        self.net.cut(0)
        self.net.cut(1)

    def heal(self) -> None:
        """The link works again."""
        self.net.heal()

    def synced(self) -> None:
        """Run until both are in sync, and compare the two copies."""
        self.until(self.checker.both_synced, 60_000)
        self.run(50)
        assert self.checker.both_synced(), "did not stay in sync"
        assert not self.checker.different(), "in sync, but the copies differ"

    # --- commands -------------------------------------------------------------------------------

    def begin(self, host: Host, path: Path) -> list[Any]:
        """Begin a command; the list holds (value, error) when it has ended."""
        ended: list[Any] = []
        self.life(host).command("asked", path, lambda value, error: ended.append((value, error)))
        return ended

    def command(self, host: Host, path: Path) -> Any:
        """Carry out a command; returns its result, raises its error."""
        ended = self.begin(host, path)
        self.until(lambda: ended)
        value, error = ended[0]
        if error is not None:
            raise error
        return value

    def refused(self, host: Host, path: Path) -> str:
        """A command that must be refused; returns why."""
        ended = self.begin(host, path)
        self.until(lambda: ended)
        error = ended[0][1]
        assert isinstance(error, RefusedError), f"not refused, but {ended[0]}"
        return str(error)

    def promote(self, host: Host, *, force: bool = False) -> None:
        """Make it primary."""
        self.command(host, roles.promote(self.node(host), force=force))

    def alone(self, host: Host) -> None:
        """Let a frozen primary go on alone: by its own decision, or by the arbiter's record."""
        if self.sim.arbiter is None:
            self.command(host, roles.alone(self.node(host)))
        else:
            assert self.claim(host), f"the record does not let {host.name} go on alone"

    def discard(self, host: Host) -> None:
        """An operator declares this copy worthless."""
        self.checker.forced = True
        self.command(host, roles.discard(self.node(host)))

    def stop(self, host: Host) -> None:
        """Stop an engine in order."""
        self.command(host, roles.stop(self.node(host)))
        host.end(power=False)
        self.until(lambda: host.peer.node is None or host.peer.node.session is None)

    # --- the arbiter's record -------------------------------------------------------------------

    @property
    def arbiter(self) -> Arbiter:
        """The arbiter with a memory."""
        assert self.sim.arbiter is not None
        return self.sim.arbiter

    def claim(self, host: Host) -> bool:
        """A whole claim, settled; whether it was won. One that is refused is one that is lost."""
        ended = self.begin(host, self.asking(host))
        self.until(lambda: ended)
        asked, error = ended[0]
        if error is not None:
            assert isinstance(error, RefusedError), error
            self.command(host, roles.demote(self.node(host)))
            return False
        won = self.swap(host, asked)
        self.command(host, roles.claimed(self.node(host), asked["generation"], won=won))
        return won

    def asking(self, host: Host) -> Path:
        """The command that prepares a claim from what the record holds now."""
        return roles.claim(self.node(host), self.arbiter.held.generation)

    def swap(self, host: Host, asked: dict[str, Any]) -> bool:
        """The compare-and-swap of a claim, applied at once; whether the record names it now."""
        held = self.arbiter.held
        wanted = Held(held.counter + 1, asked["generation"], host.index)
        if (held.generation, held.owner) == (wanted.generation, wanted.owner):
            return True
        mine = held.owner == host.index
        if mine or (held.owner == NOBODY and held.generation in asked["record_holds"]):
            self.arbiter.held = wanted
            return True
        return False

    def _attach(self, life: EngineLife) -> None:
        self.world.spawn(life, "recorder", self._recorder(life))

    def _recorder(self, life: EngineLife) -> Path:
        """Part (b) of the joint step, which no sequence is about unless it says so."""
        while True:
            yield (sleep, 20)
            joint = life.node.sb.pending
            if self.record_joint and life.node.question == "record-joint":
                self.arbiter.held = Held(self.arbiter.held.counter + 1, joint, NOBODY)
                roles.recorded(life.node, joint)

    # --- clients --------------------------------------------------------------------------------

    def begin_write(self, host: Host, extent: int, count: int = 1, *, fua: bool = False) -> Request:
        """A client writes `count` extents from number `extent` on."""
        sectors = range(extent * BLOCK_SECTORS, (extent + count) * BLOCK_SECTORS)
        record = self.checker.issue(sectors, zero=False)
        buffer = payload(record.number, sectors)
        flags = int(FrameFlag.FUA) if fua else 0
        life = self.life(host)
        path = io.write(life.node, buffer, sectors.start * 512, flags)
        request = Request(record, self.world.steps)

        self._drive_change(life, path, "write", request, fua=fua)
        return request

    def begin_zero(
        self, host: Host, extent: int, count: int = 1, *, trim: bool = False, fua: bool = False
    ) -> Request:
        """A client zeroes or trims `count` extents."""
        sectors = range(extent * BLOCK_SECTORS, (extent + count) * BLOCK_SECTORS)
        request = Request(self.checker.issue(sectors, zero=True), self.world.steps)
        life = self.life(host)
        flags = int(FrameFlag.FUA) if fua else 0
        operation = io.trim if trim else io.zero
        path = operation(life.node, sectors.start * 512, len(sectors) * 512, flags)
        self._drive_change(life, path, "trim" if trim else "zero", request, fua=fua)
        return request

    def _drive_change(
        self, life: EngineLife, path: Path, name: str, request: Request, *, fua: bool
    ) -> None:
        record = request.record
        assert record is not None

        def done(_value: Any, error: Exception | None) -> None:
            life.clients.pop(-record.number, None)
            self._ended(life, name, request, error)
            if error is None:
                self.checker.acked(life.host, record, fua=fua)
            else:
                self.checker.unknown(record)

        def gone() -> None:
            request.problem = "dead"
            self.checker.unknown(record)

        life.clients[-record.number] = gone
        self.world.spawn(life, name, path, done)

    def _ended(
        self, life: EngineLife, name: str, request: Request, error: Exception | None
    ) -> None:
        request.problem = "" if error is None else f"{type(error).__name__}: {error}"
        if error is not None:
            answers.failed(self.checker, life.host, name, error, request.began)

    def answered(self, request: Request, limit_ms: int = LIMIT_MS) -> None:
        """Run until a request has been answered, well or badly."""
        self.until(lambda: request.problem is not None, limit_ms)

    def write(self, host: Host, extent: int, count: int = 1, *, fua: bool = False) -> Request:
        """A write that must be acknowledged."""
        request = self.begin_write(host, extent, count, fua=fua)
        self.until(lambda: request.problem is not None)
        assert request.acknowledged, request.problem
        return request

    def begin_flush(self, host: Host) -> Request:
        """A client flushes."""
        issued = self.checker.now
        request = Request(None, self.world.steps)

        life = self.life(host)

        def done(_value: Any, error: Exception | None) -> None:
            self._ended(life, "flush", request, error)
            if error is None:
                self.checker.flush_acked(host, issued)

        self.world.spawn(life, "flush", io.flush(life.node), done)
        return request

    def begin_read(self, host: Host, extent: int) -> Request:
        """A client reads one extent."""
        request = Request(None, self.world.steps)
        life = self.life(host)
        sectors = range(extent * BLOCK_SECTORS, (extent + 1) * BLOCK_SECTORS)
        buffer = bytearray(BLOCK_SECTORS * 512)
        began = self.checker.read_begins(host, sectors)

        def done(_value: Any, error: Exception | None) -> None:
            self._ended(life, "read", request, error)
            if error is None:
                self.checker.read_done(host, sectors, bytes(buffer), began)

        path = io.read(life.node, buffer, sectors.start * 512)
        self.world.spawn(life, "read", path, done)
        return request

    def read(self, host: Host, extent: int) -> Request:
        """A read that must be answered."""
        request = self.begin_read(host, extent)
        self.until(lambda: request.problem is not None)
        assert request.acknowledged, request.problem
        return request

    def flush(self, host: Host) -> None:
        """A flush that must be acknowledged."""
        request = self.begin_flush(host)
        self.until(lambda: request.problem is not None)
        assert request.acknowledged, request.problem

    # --- what is where --------------------------------------------------------------------------

    def has(self, host: Host, request: Request, *, durable: bool = False) -> bool:
        """Whether a host's file holds a write, in the page cache or on the disk."""
        assert request.record is not None
        blocks = host.data.durable if durable else host.data.cache
        number = 0 if request.record.zero else request.record.number
        return all(
            self.checker.history.value(blocks, sector) == number
            for sector in request.record.sectors
        )

    def both_have(self, *requests: Request) -> None:
        """Every one of these writes is in both files."""
        for request in requests:
            for host in self.sim.hosts:
                assert self.has(host, request), f"{host.name} lacks {request.record}"

    def told(self, pattern: str) -> list[re.Match[str]]:
        """What the trace says, oldest first."""
        return [m for m in (re.search(pattern, line) for line in self.world.tail) if m]

    def row(self, host: Host) -> str:
        """The row of the table of the last decision on a host that was acted upon."""
        found = self.told(rf"{host.name} decided verdict=(\w+) row=(.*) reason=")
        assert found, f"{host.name} decided nothing"
        return f"{found[-1][2]}: {found[-1][1]}"

    def leads(self, host: Host) -> bool:
        """Whether this side is the source of the session."""
        return self.session(host).sending

    def on_disk(self, host: Host) -> Superblock:
        """The superblock that is durable."""
        return host.sb
