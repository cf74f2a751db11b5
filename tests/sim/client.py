"""The clients: several requests at once, small, overlapping, unaligned, to whoever is primary.

Owns the load and nothing else: outcomes go to the checks. A request that ends with an error, or
whose engine dies, has an unknown outcome. The buffer is overwritten as soon as the request has
ended, as nbdkit does: a frame that still shows it is a defect.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from nbdmirror.core import io
from nbdmirror.core.node import Role
from nbdmirror.core.ports import Path
from nbdmirror.core.wire import FrameFlag
from nbdmirror.limits import MIB
from tests.sim import answers
from tests.sim.checks import Checker
from tests.sim.disk import SECTOR_BYTES
from tests.sim.history import Record, payload
from tests.sim.host import DEVICE_BYTES, EngineLife, Host
from tests.sim.world import SimWaiter, World, sleep

Judge: TypeAlias = Callable[[str], None]
SCRIBBLE = 0xEE
RETRY_MS = 40
READ_GAP_MS = 100
READS_MAX = 60


class Client:
    """Everything that the clients of one run do."""

    def __init__(self, world: World, hosts: tuple[Host, Host], checker: Checker) -> None:
        self.world = world
        self.hosts = hosts
        self.checker = checker
        self.rng = world.rng["client"]
        self.stopped = False
        self.busy_count = 0
        self.think_ms = self.rng.choice((25, 60, 150))
        spots = self.rng.choice((3, 12, 30))
        extents = DEVICE_BYTES // 4096
        # Hot spots all over the device, some at borders of regions and of the device.
        self.spots = [self.rng.randrange(extents - 64) * 8 for _ in range(spots)]
        self.spots += [(MIB // SECTOR_BYTES) * self.rng.randrange(1, 8) - 8, extents * 8 - 64]
        self._count = 0

    def start(self, slots: int) -> None:
        """Begin with that many requests at once."""
        for slot in range(slots):
            self.world.spawn(self.world.life, f"client-{slot}", self._slot())

    def stay_with(self, host: Host) -> None:
        """Some that know one node only, and go on asking it when it is deposed."""
        world = self.world
        world.spawn(world.life, f"client-{host.name}", self._slot(host))
        world.spawn(world.life, f"reader-{host.name}", self._readers(host))

    def _readers(self, host: Host) -> Path:
        """One read after another, whether the ones before were answered or not."""
        waiting: list[int] = []

        def read(life: EngineLife) -> Path:
            self.busy_count += 1
            yield from self.read(life)
            self.busy_count -= 1
            waiting.pop()

        while not self.stopped:
            yield (sleep, self.rng.randrange(2 * READ_GAP_MS))
            life = host.life
            if life is None or not life.ready or life.node.role is not Role.PRIMARY:
                continue
            if len(waiting) < READS_MAX:
                waiting.append(0)
                self.world.spawn(self.world.life, f"read-{host.name}", read(life))

    def _slot(self, only: Host | None = None) -> Path:
        while not self.stopped:
            yield (sleep, self.rng.randrange(self.think_ms))
            host = self._target()
            if only is not None:
                life = only.life
                serves = life is not None and life.ready and life.node.role is Role.PRIMARY
                host = only if serves else None
            if host is None:
                yield (sleep, RETRY_MS)
                continue
            self.busy_count += 1
            yield from self._request(host)
            self.busy_count -= 1

    def _target(self) -> Host | None:
        alive = [h for h in self.hosts if h.life is not None and h.life.ready]
        serving = [h for h in alive if h.life and h.life.node.role is Role.PRIMARY]
        if not serving:
            return None
        return self.rng.choice(serving)

    def sectors(self) -> range:
        """Where the next request goes."""
        spot = self.rng.choice(self.spots)
        first = spot + self.rng.randrange(12)
        roll = self.rng.random()
        if roll < 0.75:
            count = self.rng.randrange(1, 13)
        elif roll < 0.997:
            count = self.rng.randrange(8, 65)
        else:
            count = self.rng.randrange(2049, 2600)
        last = min(first + count, DEVICE_BYTES // SECTOR_BYTES)
        return range(min(first, last - 1), last)

    def _request(self, host: Host) -> Path:
        life = host.life
        assert life is not None
        roll = self.rng.random()
        if roll < 0.62:
            yield from self.write(life)
        elif roll < 0.70:
            yield from self.zero(life)
        elif roll < 0.82:
            yield from self.flush(life)
        else:
            yield from self.read(life)

    # --- the kinds of requests ------------------------------------------------------------------

    def write(self, life: EngineLife, sectors: range | None = None, *, fua: bool = False) -> Path:
        """One write; returns whether it was acknowledged."""
        fua = fua or self.rng.random() < 0.1
        sectors = sectors or self.sectors()
        record = self.checker.issue(sectors, zero=False)
        buffer = payload(record.number, sectors)
        flags = int(FrameFlag.FUA) if fua else 0
        path = io.write(life.node, buffer, sectors.start * SECTOR_BYTES, flags)
        told = f"write {record.number} [{sectors.start}, {sectors.stop}){' FUA' if fua else ''}"
        return (yield from self._change(life, record, path, told, fua=fua, buffer=buffer))

    def zero(self, life: EngineLife) -> Path:
        """One zero or trim."""
        sectors = self.sectors()
        if self.rng.random() < 0.03:
            sectors = range(sectors.start, min(sectors.start + 8192, DEVICE_BYTES // SECTOR_BYTES))
        record = self.checker.issue(sectors, zero=True)
        offset, length = sectors.start * SECTOR_BYTES, len(sectors) * SECTOR_BYTES
        fua = self.rng.random() < 0.1
        flags = int(FrameFlag.FUA) if fua else 0
        trim = self.rng.random() < 0.5
        if not trim and self.rng.random() < 0.5:
            flags |= int(FrameFlag.MAY_TRIM)
        path = (io.trim if trim else io.zero)(life.node, offset, length, flags)
        told = f"{'trim' if trim else 'zero'} {record.number} [{sectors.start}, {sectors.stop})"
        return (yield from self._change(life, record, path, told, fua=fua, buffer=bytearray()))

    def _change(
        self,
        life: EngineLife,
        record: Record,
        path: Path,
        told: str,
        *,
        fua: bool,
        buffer: bytearray,
    ) -> Path:
        self.world.note(f"{life.name} {told}")

        def judge(problem: str) -> None:
            buffer[:] = bytes([SCRIBBLE]) * len(buffer)
            if problem:
                self.world.note(f"{life.name} fails {record.number}: {problem}")
                self.checker.unknown(record)
                return
            self.world.note(f"{life.name} acknowledges {record.number}")
            self.checker.acked(life.host, record, fua=fua)

        return (yield from self._drive(life, path, told.split(maxsplit=1)[0], judge))

    def flush(self, life: EngineLife) -> Path:
        """One flush; returns whether it was acknowledged."""
        issued = self.checker.now

        def judge(problem: str) -> None:
            if not problem:
                self.world.note(f"{life.name} acknowledges a flush")
                self.checker.flush_acked(life.host, issued)

        return (yield from self._drive(life, io.flush(life.node), "flush", judge))

    def read(self, life: EngineLife, sectors: range | None = None) -> Path:
        """One read; returns whether it was answered."""
        sectors = sectors or self.sectors()
        if len(sectors) > 256:
            sectors = sectors[:256]
        buffer = bytearray(len(sectors) * SECTOR_BYTES)
        path = io.read(life.node, buffer, sectors.start * SECTOR_BYTES)
        began = self.checker.read_begins(life.host, sectors)

        def judge(problem: str) -> None:
            if not problem:
                self.checker.read_done(life.host, sectors, bytes(buffer), began)

        return (yield from self._drive(life, path, "read", judge))

    def _drive(self, life: EngineLife, path: Path, name: str, judge: Judge) -> Path:
        """Run a path of the core; `judge` gets "", what went wrong, or "dead", at that instant.

        What a client is told is judged by the state it was told in. Returns whether it was good.
        """
        waiter = SimWaiter()
        began = self.world.steps
        self._count += 1
        number = self._count

        def done(_value: Any, error: Exception | None) -> None:
            life.clients.pop(number, None)
            if error is not None:
                answers.failed(self.checker, life.host, name, error, began)
            problem = "" if error is None else f"{type(error).__name__}: {error}"
            judge(problem)
            waiter.wake(not problem)

        def gone() -> None:
            judge("dead")
            waiter.wake(False)

        if not life.alive:
            judge("dead")
            return False
        life.clients[number] = gone
        self.world.spawn(life, name, path, done)
        yield (waiter.wait,)
        return waiter.result
