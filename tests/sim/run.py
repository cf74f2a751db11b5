"""One seed, from the creation of the mirror to two equal copies.

Owns the course of a run: chaos, then quiet, then the demand that the pair comes together again (the
liveness mode), then the last comparison. `python -m tests.sim` runs many of them.
"""

import traceback
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from nbdmirror.core.node import Settings, is_write
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.limits import MIB
from tests.sim.abstract import Abstract
from tests.sim.arbiter import LOST, Arbiter
from tests.sim.checks import Checker
from tests.sim.client import Client
from tests.sim.commander import Commander
from tests.sim.conducted import Pair
from tests.sim.faults import Faults
from tests.sim.faults_conducted import ConductedFaults
from tests.sim.host import Host
from tests.sim.net import Network
from tests.sim.operator import Operator
from tests.sim.watch import Watch
from tests.sim.words import Words
from tests.sim.world import ViolationError, World

ARBITERS = ("none", "memory")
ALL_ARBITERS = ("none", "ping", "memory")
KINDS = {"none": ArbiterKind.NONE, "ping": ArbiterKind.PING, "memory": ArbiterKind.ETCD}
# Who commands the engines: the simulator's own simple controllers, or production's. The first know
# no router, so with them `ping` would be `none`.
SIMPLE, PRODUCTION = "simple", "production"
KNOWN = {SIMPLE: ARBITERS, PRODUCTION: ALL_ARBITERS}
STEPS_MAX = 2_000_000
# Seed, arbiter, controllers, whether to keep the whole trace.
Job: TypeAlias = tuple[int, str, str, bool]


@dataclass
class Result:
    """What one seed did."""

    seed: int
    arbiter: str
    controllers: str = SIMPLE
    digest: str = ""
    steps: int = 0
    virtual_ms: int = 0
    faults: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    violation: str = ""
    trace: list[str] = field(default_factory=list)


class Simulation:
    """The parts of one run, put together, with simple controllers."""

    controllers = SIMPLE
    rest_ms = 2_500
    calm_ms = 90_000

    def __init__(self, seed: int, arbiter: str, *, keep_trace: bool = False) -> None:
        self.world = world = World(seed, keep_trace=keep_trace)
        memory = arbiter == "memory"
        self.checker = checker = Checker(world, memory=memory)
        self.net = net = Network(world)
        self.hosts = hosts = (Host(world, 0, net, checker), Host(world, 1, net, checker))
        hosts[0].peer, hosts[1].peer = hosts[1], hosts[0]
        checker.hosts = hosts
        rng = world.rng["setup"]
        kind = KINDS[arbiter]
        self.kind = arbiter
        zeroed = rng.random() < 0.6
        settings = Settings(
            flush_bytes=rng.choice((64 * 1024, MIB, 64 * MIB)),
            flush_interval_ms=rng.choice((200, 500, 3000)),
            keep_bytes=rng.choice((0, 16 * 1024, 256 * 1024, 64 * MIB)),
        )
        hot_regions_max = rng.choice((0, 6, 12))
        leases = world.rng["lease"]
        for host in hosts:
            host.can_trim, host.can_fast_zero = rng.random() < 0.9, rng.random() < 0.8
            # Of two leases the longer counts; the longest here outlasts every silence.
            host.settings = replace(
                settings,
                read_lease_ms=leases.choice((300, 1000, 1000, 4000)),
                confirm_reads=leases.random() < 0.2,
            )
            host.hot_regions_max = hot_regions_max
            host.create(creator=host.index == 0, arbiter=kind, zeroed=zeroed)
        self.arbiter = Arbiter(world, hosts[0].sb.generation, 0) if memory else None
        checker.record = self.arbiter
        self.abstract = Abstract(hosts, self.arbiter, checker)
        self.slots = 0
        self.client = Client(world, hosts, checker)
        self._command()
        world.after_step = self.after_step

    def _command(self) -> None:
        """Whoever commands the engines, and what goes wrong."""
        world, hosts, net, checker = self.world, self.hosts, self.net, self.checker
        rng = world.rng["setup"]
        self.commander = Commander(world, hosts, net, checker, self.arbiter)
        self.words = self.commander.words = Words(world, self.abstract.answered)
        for host in hosts:
            host.on_start = self.commander.attach
            host.on_kill = self.words.engine_killed
        self.faults = Faults(world, hosts, net, checker, self.commander)
        self.chaos_ms = rng.choice((3_000, 6_000, 10_000))
        if self.faults.deposes:
            # A take-over takes seconds.
            self.chaos_ms *= 4
        self.slots = rng.choice((1, 3, 5))

    def after_step(self) -> None:
        """Every event is followed by the checks."""
        self.abstract.step()
        self.checker.step()

    def start(self) -> None:
        """Both engines, the operator, the clients."""
        world = self.world
        for host in self.hosts:
            world.at(world.rng["setup"].randrange(500), world.life, host.start)
        world.spawn(world.life, "operator", self.commander.operator())
        self.client.start(self.slots)
        if self.faults.deposes:
            for host in self.hosts:
                self.client.stay_with(host)

    def chaos(self) -> None:
        """Faults for a while."""
        world = self.world
        world.run(world.rng["setup"].choice((300, 2500)))
        world.spawn(world.life, "faults", self.faults.script())
        world.run(world.now_ms + self.chaos_ms)

    def calm(self) -> None:
        """No more faults; everything that is broken is repaired."""
        world = self.world
        world.note("calm")
        self.faults.stopped = True
        self.commander.sane = True
        world.run(world.now_ms + 4_000)
        self.commander.enabled = True
        self.net.slow = False
        self.net.heal()
        if self.arbiter is not None:
            self.arbiter.down = self.arbiter.unreliable = False
        for host in self.hosts:
            host.data.slow_factor = host.meta.slow_factor = 1
            host.data.heal()
            host.meta.heal()
            host.start()
        world.run(world.now_ms + 1_500)
        self.client.stopped = True

    def settle(self) -> None:
        """Run until both are in sync and idle, or complain (E1)."""
        world, checker = self.world, self.checker
        limit_ms = world.now_ms + self.calm_ms
        while world.now_ms < limit_ms:
            world.run(world.now_ms + 400)
            if world.steps > STEPS_MAX:
                checker.fail(f"E: {world.steps} events and no end")
            if checker.both_synced() and self.is_idle() and not self.unrest():
                break
        else:
            checker.fail(
                f"E1: not in sync {self.calm_ms} ms after the last fault: {self.describe()}"
            )
        world.run(world.now_ms + self.rest_ms)
        # The last flush of the background may be under way at this moment.
        world.run(world.now_ms + 2_000, self.is_idle)
        # A failback that became due after the calm began ends by itself.
        world.run(world.now_ms + 20_000, lambda: not self.unrest() and checker.both_synced())
        world.run(world.now_ms + 2_000, self.is_idle)
        checker.check_cover()
        if not checker.both_synced() or not self.is_idle() or self.unrest():
            checker.fail(f"E1: did not stay in sync: {self.describe()}")
        if checker.different():
            checker.fail(f"C10: blocks {checker.different()[:8]} differ at the end")
        for host in self.hosts:
            checker.check_kept(host, "at the end")
            missing = checker.history.missing(host.data.cache, checker.history.bound)
            if missing:
                checker.fail(f"A1: {host.name} lacks {missing[:3]} at the end")

    def unrest(self) -> str:
        """What else is not as it has to be in the end."""
        return ""

    def is_idle(self) -> bool:
        """Nothing in flight, nothing dirty, no client waiting; no sync that hangs, nor one that did
        too long.
        """
        for host in self.hosts:
            node = host.node
            if node is None or any(is_write(op) for op in node.inflight) or node.dirty.any():
                return False
            if node.syncing or node.failed:
                return False
        return self.client.busy_count == 0

    def describe(self) -> str:
        """Both nodes, for whoever has to find out why."""
        told: list[str] = []
        for host in self.hosts:
            node = host.node
            if node is None:
                told.append(f"{host.name}: down")
                continue
            phase = node.session.phase.value if node.session is not None else "no session"
            told.append(
                f"{host.name}: {node.role.value} {node.sb.data_state.name} {phase}"
                f" right={node.right} frozen={node.frozen} question={node.question!r}"
                f" failed={node.failed!r} changing={node.changing!r} dirty={node.dirty.count}"
                f" inflight={len(node.inflight)} flags={node.sb.flags!r} refusal={node.refusal!r}"
                f" pending={node.sb.pending_kind.name} cache={node.cache_survived}"
            )
        return f"clients waiting: {self.client.busy_count}; " + "; ".join(told)

    def counts(self) -> dict[str, int]:
        """What happened how often."""
        return self.checker.counts | self.words.counts | self.abstract.counts()

    def result(self) -> Result:
        """What was done so far."""
        world = self.world
        return Result(
            seed=world.seed,
            arbiter=self.kind,
            controllers=self.controllers,
            digest=world.digest(),
            steps=world.steps,
            virtual_ms=world.now_ms,
            faults=self.faults.count,
            counts=self.counts() | {"power_cuts": sum(host.power_count for host in self.hosts)},
        )


class Conducted(Simulation):
    """The same engines, clients and disks, with production's controllers."""

    controllers = PRODUCTION
    rest_ms = 4_000
    calm_ms = 60_000

    def _command(self) -> None:
        world, hosts, checker = self.world, self.hosts, self.checker
        rng = world.rng["setup"]
        self.pair = Pair(world, hosts, self.arbiter, self.kind)
        self.pair.on_stay = self.abstract.answered
        self.pair.on_force = self._forces
        checker.force_is_stored = True
        self.operator = Operator(world, self.pair, checker)
        self.watch = Watch(world, self.pair, checker)
        self.faults = ConductedFaults(
            world, hosts, self.net, checker, pair=self.pair, operator=self.operator
        )
        self.chaos_ms = rng.choice((5_000, 8_000, 14_000))
        self.slots = rng.choice((1, 1, 2))

    def _forces(self) -> None:
        self.checker.forced = True

    def start(self) -> None:
        """Both controllers, the operator, the clients."""
        world = self.world
        for host in self.hosts:
            world.at(world.rng["setup"].randrange(500), world.life, self.pair.boot, host)
        world.spawn(world.life, "operator", self.operator.run())
        self.watch.tick()
        self.client.start(self.slots)

    def calm(self) -> None:
        """No more faults; everything that is broken is repaired."""
        world, pair = self.world, self.pair
        world.note("calm")
        self.faults.stopped = True
        pair.sane = self.operator.sane = True
        world.run(world.now_ms + 2_000)
        self.net.slow = False
        self.net.heal()
        pair.air.calm()
        pair.cut_off = [False, False]
        pair.slow = 0.0
        if self.arbiter is not None:
            self.arbiter.down = self.arbiter.unreliable = False
        for host, node in zip(self.hosts, pair.nodes, strict=True):
            host.data.slow_factor = host.meta.slow_factor = 1
            host.data.heal()
            host.meta.heal()
            node.router_cut = node.checker_down = False
            node.application.fails = node.application.hangs = node.application.sticks = 0.0
            node.boot()
        world.run(world.now_ms + 1_500)
        self.watch.promotions_after_calm = 0
        self.client.stopped = True

    def unrest(self) -> str:
        """Why this is not exactly one node that serves, with a ready second."""
        lost = self.arbiter is not None and self.arbiter.held is LOST
        # The operator has it made anew, by a resync.
        return "the store has lost the record" if lost else self.watch.unrest()

    def describe(self) -> str:
        """Both nodes, with what their controllers say."""
        told = [f"unrest: {self.unrest()}"]
        for node in self.pair.nodes:
            c = node.controller
            said = f"[{c.decision.row}] {c.decision.reason}" if c is not None else "none"
            told.append(f"controller {node.host.name}: {said}")
        return "; ".join((*told, super().describe()))

    def counts(self) -> dict[str, int]:
        """What happened how often."""
        rows = {f"row {name}": count for name, count in self.pair.rows.items()}
        mine = self.pair.counts | self.operator.counts | self.watch.counts
        return self.checker.counts | self.abstract.counts() | mine | rows


def run_seed(
    seed: int, arbiter: str, controllers: str = SIMPLE, *, keep_trace: bool = False
) -> Result:
    """Run one seed; a violation, or any exception of the core, is in the result."""
    made = Simulation if controllers == SIMPLE else Conducted
    simulation = made(seed, arbiter, keep_trace=keep_trace)
    violation = ""
    try:
        simulation.start()
        simulation.chaos()
        simulation.calm()
        simulation.settle()
    except ViolationError as error:
        violation = str(error)
    except Exception as error:  # noqa: BLE001 - whatever the core raises is a finding
        violation = f"crash: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
    result = simulation.result()
    result.violation = violation
    if violation or keep_trace:
        result.trace = list(simulation.world.tail)
    return result


def run_job(job: Job) -> Result:
    """The same for another process."""
    return run_seed(job[0], job[1], job[2], keep_trace=job[3])
