"""A simulated server: its disk, its boots, and the life of one engine on it.

Owns what `nbdmirror.engine` owns in production: it puts the core together with the ports, drives
its paths, ticks its upkeep and dials. It implements the shell port. It decides nothing.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdmirror.core.durable import Opened
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.handshake import Identity
from nbdmirror.core.node import Node, Settings
from nbdmirror.core.opening import open_metadata, settle
from nbdmirror.core.ports import Path
from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, Superblock
from nbdmirror.core.upkeep import Upkeep
from nbdmirror.limits import MIB
from tests.sim.answers import DiskError, is_only_copy
from tests.sim.disk import Blocks, SimFile, SimMeta, SimStore, format_meta
from tests.sim.kept import SimKept
from tests.sim.world import Life, SimWaiter, Task, World

if TYPE_CHECKING:
    from tests.sim.checks import Checker
    from tests.sim.net import Network

DEVICE_BYTES = 160 * MIB
GEOMETRY = Geometry(DEVICE_BYTES, 4096, MIB)
MIRROR_ID = bytes([7]) * 16
TICK_MS = 100
DIAL_MS = (50, 400)
LOCKED_MS = 50


class Host:
    """One server."""

    def __init__(self, world: World, index: int, net: "Network", checker: "Checker") -> None:
        self.world = world
        self.index = index
        self.name = "AB"[index]
        self.net = net
        self.checker = checker
        self.data = SimFile(world, f"{self.name}/data")
        self.meta = SimFile(world, f"{self.name}/meta")
        # What is kept of a copy that was given up, and what it has to be: (image, blocks).
        self.kept = SimFile(world, f"{self.name}/kept")
        self.kept_exists = False
        self.kept_truth: tuple[str, Blocks] | None = None
        self.geometry = GEOMETRY
        self.life: EngineLife | None = None
        self.on_start: Callable[[EngineLife], None] | None = None
        self.on_begin: Callable[[int, Superblock], None] | None = None
        self.settings = Settings()
        self.hot_regions_max = 0
        self.can_trim = self.can_fast_zero = True
        self.errors: list[DiskError] = []
        self.data.on_error = self.meta.on_error = self._on_error
        self.power_count = 0
        self.boot_id = self._random(16)
        self.sb: Superblock
        self.peer: Host
        # Whoever speaks for the dead engine, and holds the lock of its metadata meanwhile.
        self.speaker: Life | None = None
        self.on_kill: Callable[[Host], None] | None = None
        # Of a controller that watches the engine's process and follows its events.
        self.on_end: Callable[[], None] = lambda: None
        self.on_power: Callable[[], None] = lambda: None
        self.on_event: Callable[[], None] = lambda: None

    def _random(self, count: int) -> bytes:
        return self.world.rng["shell"].randbytes(count)

    def _on_error(self, operation: str, number: int) -> None:
        self.errors.append(DiskError(self.world.steps, is_only_copy(self)))
        self.checker.counts["disk_errors"] += 1
        self.world.note(f"{self.name} disk: {operation} fails: {errno.errorcode[number]}")

    @property
    def is_silent(self) -> bool:
        """Whether nobody writes here: no engine, and nobody who speaks for a dead one."""
        return self.life is None and self.speaker is None

    # --- creation -------------------------------------------------------------------------------

    def create(self, *, creator: bool, arbiter: ArbiterKind, zeroed: bool) -> None:
        """Make the metadata, as `metadata create` does, durable."""
        state = DataState.UPTODATE if creator else DataState.BLANK
        flags = Flags.SPARSE | (Flags.ALONE if creator else Flags(0))
        self.sb = Superblock(
            mirror_id=MIRROR_ID,
            mirror_name="sim",
            node_id=self.index + 1,
            node_uuid=self._random(16),
            device_bytes=DEVICE_BYTES,
            extent_bytes=GEOMETRY.extent_bytes,
            region_bytes=GEOMETRY.region_bytes,
            map_id=self._random(16),
            arbiter=arbiter,
            generation=self._random(16) if creator else bytes(16),
            data_state=state,
            flags=flags | (Flags.ZEROED if zeroed else Flags(0)),
        )
        format_meta(self.meta, self.sb, GEOMETRY)

    # --- life and death -------------------------------------------------------------------------

    @property
    def node(self) -> Node | None:
        """The core of the running engine."""
        return self.life.node if self.life is not None else None

    def judge(self) -> Opened:
        """What an engine would find that started now. Raises MetadataError."""
        meta = SimMeta(self.meta, GEOMETRY.metadata_bytes)
        mount_id = bytes(reversed(self.boot_id))
        return open_metadata(
            meta.read_slots(), meta.read_ring(), meta.read_map(), self.boot_id, mount_id
        )

    def start(self) -> None:
        """Start an engine, if none runs; as soon as the lock of its metadata can be had."""
        if self.life is not None:
            return
        if self.speaker is not None:
            self.world.at(LOCKED_MS, self.world.life, self.start)
            return
        self.world.note(f"{self.name} starts")
        self.life = EngineLife(self)
        self.life.begin()

    def end(self, *, power: bool) -> None:
        """Kill the engine, or cut the power of the host."""
        life, self.life = self.life, None
        self.world.note(f"{self.name} {'loses power' if power else 'is killed'}")
        if life is not None:
            life.alive = False
            life.end_clients()
            self.net.kill(life, power=power)
        if self.speaker is not None:
            self.speaker.alive = False
            self.speaker = None
        rng = self.world.rng["disk"]
        self.data.end_life(rng, power=power)
        self.meta.end_life(rng, power=power)
        self.kept.end_life(rng, power=power)
        if power:
            self.power_count += 1
            self.boot_id = self._random(16)
        before, self.sb = self.sb, self.judge().superblock
        if self.sb.sequence > before.sequence:
            # A store that had begun, or whose sync had failed, is there all the same.
            self.checker.superblock_stored(self, before, self.sb)
        self.checker.ended_life(self, power=power)
        if life is not None and not power and self.on_kill is not None:
            self.on_kill(self)
        if life is not None:
            self.on_end()
        if power:
            self.on_power()

    def crash(self, *, power: bool) -> None:
        """A fault ends the engine, with its page cache or without.

        Not covered, so not tried: a kill within the milliseconds between a failed sync and its
        mark leaves a cache that shows what the disk lost.
        """
        unmarked = self.data.failed and Flags.FAILED not in self.sb.flags
        self.end(power=power or unmarked)

    def store_begins(self, superblock: Superblock) -> None:
        """A superblock is about to be stored, by the engine or by whoever speaks for it."""
        if self.on_begin is not None:
            self.on_begin(self.index, superblock)

    def stored(self, superblock: Superblock) -> None:
        """A superblock is durable in both slots."""
        before, self.sb = self.sb, superblock
        self.checker.superblock_stored(self, before, superblock)

    def pause(self, duration_ms: int) -> None:
        """Run nothing of the engine for a while."""
        if self.life is not None:
            self.world.note(f"{self.name} pauses for {duration_ms} ms")
            self.life.paused_until_ms = self.world.now_ms + duration_ms


class EngineLife(Life):
    """One engine, from its start to its death; the shell port of its core."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.name)
        self.host = host
        self.world = host.world
        self.ready = False
        self.retiring = False
        self.clients: dict[int, Callable[[], None]] = {}
        self.silent_since_ms = self.world.now_ms
        opened = host.judge()
        instance = self.random_bytes(16)
        host.errors.clear()
        self.store = SimStore(
            host.data, DEVICE_BYTES, can_trim=host.can_trim, can_fast_zero=host.can_fast_zero
        )
        self.store.on_write = self._on_write
        meta = SimMeta(host.meta, GEOMETRY.metadata_bytes)
        meta.on_begin, meta.on_store = host.store_begins, host.stored
        self.opened = opened
        self.node = Node(self, self.store, meta, opened, host.settings, instance)
        node = self.node
        node.own_trim_ok = node.trim_ok = self.store.can_trim
        node.own_fast_zero_ok = node.fast_zero_ok = self.store.can_fast_zero
        node.keep.file = SimKept(host)
        if host.hot_regions_max:
            node.log.capacity = host.hot_regions_max
        self._drop = node.log.drop
        node.log.drop = self._on_drop  # type: ignore[method-assign] # the one way out of the log
        self.upkeep = Upkeep(self.node)
        sb = opened.superblock
        self.identity = Identity(sb.mirror_id, sb.node_id, sb.node_uuid, instance)

    def begin(self) -> None:
        """Make the judgement of the opening durable, then serve."""
        self.world.spawn(self, "settle", settle(self.node, self.opened), self._settled)

    def _settled(self, _value: Any, error: Exception | None) -> None:
        if error is not None:
            self.world.note(f"{self.name} does not start: {error}")
            self.world.at(1, self.world.life, self._give_up)
            return
        self.ready = True
        self.tick()
        if self.host.index == 0:
            self._dial()
        if self.host.on_start is not None:
            self.host.on_start(self)

    def _give_up(self) -> None:
        if self.alive:
            self.host.end(power=False)

    def tick(self) -> None:
        """The clock of the engine."""
        self.upkeep.tick(self.now_ms())
        if self.node.session is not None:
            self.silent_since_ms = self.world.now_ms
        self.world.at(TICK_MS, self, self.tick)

    def _dial(self) -> None:
        peer = self.host.peer.life
        if peer is not None and peer.ready and not self.host.net.has_open(self):
            self.host.net.dial(self, peer)
        delay_ms = self.world.rng["net"].randrange(*DIAL_MS)
        self.world.at(delay_ms, self, self._dial)

    def end_clients(self) -> None:
        """The engine is dead: nobody answers its clients."""
        waiting, self.clients = self.clients, {}
        for gone in waiting.values():
            gone()

    # --- hooks of the checks --------------------------------------------------------------------

    def _on_write(self, offset: int, end: int) -> None:
        assert self.world.running is not None
        self.host.checker.write_starts(self.host, self.world.running.name, offset, end)

    def _on_drop(self, regions: list[int]) -> None:
        self.host.checker.evicted(self.host, len(regions))
        self._drop(regions)

    # --- the shell port -------------------------------------------------------------------------

    def waiter(self) -> SimWaiter:
        """A fresh waiter."""
        return SimWaiter()

    def spawn(self, name: str, path: Path) -> None:
        """Drive a path beside the caller."""
        self.world.spawn(self, name, path)

    def spawn_replica(self, path: Path) -> None:
        """The same here: the scheduler decides when it runs."""
        self.world.spawn(self, "replica", path)

    def pace(self, count: int) -> None:
        """The simulated resync is not held back."""

    def now_ms(self) -> int:
        """The world's."""
        return self.world.now_ms

    def random_bytes(self, count: int) -> bytes:
        """Seeded."""
        return self.world.rng["shell"].randbytes(count)

    def emit(self, kind: str, **facts: object) -> None:
        """Into the trace, and to the checks."""
        told = " ".join(f"{name}={value}" for name, value in facts.items())
        self.world.note(f"{self.name} {kind} {told}")
        self.host.checker.emitted(self.host, kind, facts)
        self.host.on_event()

    def command(
        self, name: str, path: Path, done: Callable[[Any, Exception | None], None] | None = None
    ) -> Task:
        """Drive a command beside everything else; its result goes to the trace."""

        def ended(value: Any, error: Exception | None) -> None:
            told = f"refused: {error}" if error is not None else "done"
            self.world.note(f"{self.name} command {name}: {told}")
            if done is not None:
                done(value, error)

        return self.world.spawn(self, name, path, ended)
