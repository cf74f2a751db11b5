"""What goes wrong: one fault after another at seeded times, each undone after a while.

Owns the mix. Every seed draws its own weights, so that some seeds are all power cuts and others all
flapping links. Must never do what the promise does not cover without telling the checks.
"""

import errno
from collections.abc import Callable

from nbdmirror.core import roles
from nbdmirror.core.node import Role
from nbdmirror.core.ports import Path
from tests.sim.arbiter import Arbiter
from tests.sim.checks import Checker
from tests.sim.commander import Commander
from tests.sim.disk import CHANGES, OPERATIONS, SimFile
from tests.sim.host import EngineLife, Host
from tests.sim.net import Network
from tests.sim.world import World, sleep


class Faults:
    """The faults of one run."""

    arbiter: Arbiter | None
    kinds: list[Callable[[], Path | None]]

    def __init__(
        self,
        world: World,
        hosts: tuple[Host, Host],
        net: Network,
        checker: Checker,
        commander: Commander,
    ) -> None:
        self._begin(world, hosts, net, checker)
        self.commander = commander
        self.arbiter = commander.arbiter
        self._draw()
        # Some seeds with a memory are about primaries that do not know that they are deposed.
        self.deposes = commander.arbiter is not None and world.rng["lease"].random() < 0.25
        # The record decides who goes on, and no engine relies on its peer's patience.
        commander.hasty = self.deposes
        if self.deposes:
            self.kinds = [
                self.stop_primary, self.stop_primary, self.isolate_primary, self.isolate_primary,
                self.pause, self.reset, self.cut_one_way, self.swap, self.kill, self.slow_disk,
            ]  # fmt: skip
            self.weights = [4, 4, 4, 4, 1, 1, 1, 1, 1, 1]

    def _begin(
        self, world: World, hosts: tuple[Host, Host], net: Network, checker: Checker
    ) -> None:
        self.world = world
        self.hosts = hosts
        self.net = net
        self.checker = checker
        self.rng = world.rng["faults"]
        self.count = 0
        self.stopped = False
        self.deposes = False
        self.start: Callable[[Host], None] = Host.start
        self.kinds = [
            self.kill, self.kill, self.power, self.power, self.power_both, self.cut, self.cut,
            self.cut_one_way, self.flap, self.reset, self.reset, self.pause, self.pause,
            self.slow_net, self.slow_disk, self.held_write, self.held_call, self.sync_error,
            self.write_error, self.no_space, self.not_offered, self.read_error, self.full_disk,
            self.bad_disk, self.meta_error,
            self.swap, self.swap, self.demote, self.stop, self.stop,
            self.drain, self.compare_all, self.arbiter_down, self.slow_disk_power,
        ]  # fmt: skip

    def _draw(self) -> None:
        """How often each kind comes, and how soon the next one."""
        weights = [self.rng.choice((0, 1, 1, 3)) for _ in self.kinds]
        self.weights = weights if sum(weights) else [1] * len(weights)
        self.gap_ms = self.rng.choice((150, 600, 2000))

    def script(self) -> Path:
        """One fault after another."""
        while True:
            yield (sleep, self.rng.randrange(50, self.gap_ms * 2))
            if self.stopped:
                return
            kind = self.rng.choices(self.kinds, self.weights)[0]
            self.count += 1
            self.world.note(f"fault: {kind.__name__}")
            path = kind()
            if path is not None:
                yield from path

    def _host(self) -> Host:
        return self.rng.choice(self.hosts)

    def _start_later(self, host: Host, low_ms: int = 20, high_ms: int = 4000) -> None:
        self.world.at(self.rng.randrange(low_ms, high_ms), self.world.life, self.start, host)

    def _primary(self) -> Host | None:
        serving = [h for h in self.hosts if h.node is not None and h.node.role is Role.PRIMARY]
        return self.rng.choice(serving) if serving else None

    # --- processes and power

    def kill(self) -> None:
        """An engine is killed and started again."""
        host = self._host()
        host.crash(power=False)
        self._start_later(host)

    def power(self) -> None:
        """A host loses power and boots."""
        host = self._host()
        host.crash(power=True)
        self._start_later(host)

    def power_both(self) -> Path:
        """Both hosts lose power, at once or shortly after each other."""
        first = self._host()
        first.crash(power=True)
        self._start_later(first, 500)
        yield (sleep, self.rng.choice((0, 1, 30, 600)))
        first.peer.crash(power=True)
        self._start_later(first.peer, 500)

    def slow_disk_power(self) -> Path:
        """A disk becomes slow, and its host loses power in the middle."""
        host = self._host()
        host.data.slow_factor = host.meta.slow_factor = 20
        yield (sleep, self.rng.randrange(50, 1200))
        host.data.slow_factor = host.meta.slow_factor = 1
        host.crash(power=self.rng.random() < 0.6)
        self._start_later(host)

    def pause(self) -> None:
        """A host runs nothing for a while."""
        self._host().pause(self.rng.choice((100, 700, 1800, 4000, 9000)))

    def stop_primary(self) -> Path | None:
        """A primary stands still, from some moment of what it does, until another one may serve."""
        host = self._primary()
        if host is None:
            return None
        return self._stopped(host, self.rng.choice((1500, 3500, 4500, 6000, 14_000)))

    def _stopped(self, host: Host, duration_ms: int) -> Path:
        host.pause(duration_ms)
        yield (sleep, duration_ms)

    def isolate_primary(self) -> Path | None:
        """A primary runs on, and neither peer nor arbiter nor controller can tell it anything."""
        host = self._primary()
        return self._isolated(host) if host is not None else None

    def _isolated(self, host: Host) -> Path:
        self.commander.cut_off = host
        self.commander.words.cut_off = True
        self.net.cut(0)
        self.net.cut(1)
        peer = host.peer.node
        if peer is not None and peer.session is not None and self.rng.random() < 0.7:
            # Its connection is gone at once, the primary's is half open.
            peer.lose_session(peer.session, "connection reset")
        yield (sleep, self.rng.choice((3000, 6000, 9000)))
        self.net.heal()
        self.world.note("the link heals")
        self.commander.cut_off = None
        self.commander.words.cut_off = False

    # --- network

    def _heal_later(self) -> Path:
        yield (sleep, self.rng.choice((30, 300, 1200, 3000, 7000)))
        self.net.heal()
        self.world.note("the link heals")

    def cut(self) -> Path:
        """Both directions, for a while."""
        self.net.cut(0)
        self.net.cut(1)
        yield from self._heal_later()

    def cut_one_way(self) -> Path:
        """One direction, for a while."""
        self.net.cut(self.rng.randrange(2))
        yield from self._heal_later()

    def flap(self) -> Path:
        """The link comes and goes."""
        for _ in range(self.rng.randrange(2, 6)):
            self.net.cut(0)
            self.net.cut(1)
            yield (sleep, self.rng.randrange(5, 400))
            self.net.heal()
            yield (sleep, self.rng.randrange(5, 700))

    def reset(self) -> None:
        """Every connection breaks."""
        self.net.reset_all()

    def slow_net(self) -> Path:
        """A slow link."""
        self.net.slow = True
        yield (sleep, self.rng.randrange(300, 3000))
        self.net.slow = False

    # --- disks

    def slow_disk(self) -> Path:
        """A slow disk."""
        host = self._host()
        host.data.slow_factor = host.meta.slow_factor = self.rng.choice((5, 30))
        yield (sleep, self.rng.randrange(300, 3000))
        host.data.slow_factor = host.meta.slow_factor = 1

    def held_write(self) -> None:
        """The next write of one host takes longer than some deadlines, or than all of them."""
        self._hold("write")

    def held_call(self) -> None:
        """The same for the next change, sync or read."""
        self._hold(self.rng.choice(("write", "sync", "read")))

    def _hold(self, operation: str) -> None:
        self._host().data.hold_ms[operation] = self.rng.choice((700, 3000, 8000, 25_000))

    def _fail_once(self, file: str, number: int, *operations: str) -> None:
        """The next of these operations on one running host fails."""
        host = self._host()
        if host.life is not None:
            chosen: SimFile = getattr(host, file)
            chosen.fail(number, *operations)

    def sync_error(self) -> None:
        """The next fdatasync of the data fails, with an error or because there is no space."""
        self._fail_once("data", self.rng.choice((errno.EIO, errno.EIO, errno.ENOSPC)), "sync")

    def write_error(self) -> None:
        """The next change of the data fails, of one kind or of any."""
        self._fail_once("data", errno.EIO, *self.rng.choice((CHANGES, ("zero",), ("trim",))))

    def no_space(self) -> None:
        """The next change of the data finds no space; zeros can then only be written."""
        self._fail_once("data", errno.ENOSPC, *self.rng.choice((("write",), CHANGES)))

    def read_error(self) -> None:
        """The next read of the data fails."""
        self._fail_once("data", errno.EIO, "read")

    def meta_error(self) -> None:
        """The next write or sync of the metadata fails."""
        self._fail_once("meta", errno.EIO, self.rng.choice(("sync", "sync", "write")))

    def not_offered(self) -> Path:
        """The file system no longer has what it offered: ranges are zeroed and trimmed by hand."""
        return self._failing(errno.EOPNOTSUPP, self.rng.choice((("trim",), ("trim", "zero"))))

    def full_disk(self) -> Path:
        """A file system is full for a while, over restarts, too."""
        return self._failing(errno.ENOSPC, CHANGES)

    def bad_disk(self) -> Path:
        """Some or all operations on the data of one host fail for a while, over restarts, too."""
        some = self.rng.sample(OPERATIONS, self.rng.randrange(1, len(OPERATIONS) + 1))
        return self._failing(errno.EIO, tuple(some))

    def _failing(self, number: int, operations: tuple[str, ...]) -> Path:
        file = self._host().data
        file.failing.update(dict.fromkeys(operations, number))
        yield (sleep, self.rng.choice((50, 400, 1500, 4000)))
        file.failing.clear()

    # --- commands and the arbiter

    def swap(self) -> Path | None:
        """Demote the primary, promote the other one."""
        host = self._primary()
        if host is None or host.life is None or not host.life.ready:
            return None
        return self._swap(host)

    def _swap(self, host: Host) -> Path:
        self.commander.enabled = False
        try:
            life, peer = host.life, host.peer.life
            if life is None or peer is None or not peer.ready:
                return
            life.command("demote", roles.demote(life.node))
            yield (sleep, self.rng.choice((30, 200, 1000)))
            if peer.alive:
                peer.command("promote", roles.promote(peer.node))
            yield (sleep, self.rng.choice((50, 1000)))
        finally:
            self.commander.enabled = True

    def demote(self) -> None:
        """Demote whoever is primary."""
        host = self._primary()
        if host is not None and host.life is not None and host.life.ready:
            host.life.command("demote", roles.demote(host.life.node))

    def stop(self) -> None:
        """Stop an engine in order, sometimes both at once; start it again later."""
        hosts = self.hosts if self.rng.random() < 0.2 else (self._host(),)
        for host in hosts:
            life = host.life
            if life is None or not life.ready or life.node.changing:
                continue
            life.retiring = True

            def gone(_value: object, _error: Exception | None, life: EngineLife = life) -> None:
                self.world.at(self.rng.randrange(1, 300), self.world.life, self._end, life)

            life.command("stop", roles.stop(life.node), gone)

    def _end(self, life: EngineLife) -> None:
        """The process ends, whatever became of the stop."""
        if life.alive:
            life.host.crash(power=self.rng.random() < 0.3)
        self._start_later(life.host, 20, 6000)

    def drain(self) -> None:
        """Flush everything."""
        host = self._primary()
        if host is not None and host.life is not None and host.life.ready:
            host.life.command("drain", roles.drain(host.life.node))

    def compare_all(self) -> None:
        """Ask for a full comparison."""
        host = self._primary()
        if host is not None and host.life is not None and host.life.ready:
            host.life.command("resync", roles.resync_full(host.life.node))

    def arbiter_down(self) -> Path | None:
        """The arbiter does not answer for a while."""
        if self.arbiter is None:
            return None
        return self._arbiter_down()

    def _arbiter_down(self) -> Path:
        arbiter = self.arbiter
        assert arbiter is not None
        arbiter.down = True
        yield (sleep, self.rng.randrange(100, 8000))
        arbiter.down = False
