"""The simulated controllers: what answers an engine's questions and gives it roles.

Deliberately simple, sometimes unwise, never against the rules for controllers: a secondary goes
for the role only after silence and never while it hears a primary that serves; with an arbiter
that has a memory the right comes from a claim, settled by a read; a node whose disk failed is
taken out. One script per engine life, one shared operator who resolves what only an operator may.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from nbdmirror.core import giveup, roles
from nbdmirror.core.cluster.claiming import Claimant, Steps
from nbdmirror.core.decide import DecisionKind, decide
from nbdmirror.core.describe import describe
from nbdmirror.core.negotiate import claim_unsettled
from nbdmirror.core.node import Role
from nbdmirror.core.ports import Path
from nbdmirror.core.promotable import promotable
from nbdmirror.core.session import Phase
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.core.view import node_view, state_message
from nbdmirror.errors import NbdMirrorError
from nbdmirror.limits import MIB, SILENCE_MS
from tests.sim.arbiter import Arbiter, Held, at_arbiter, command_of, node_id
from tests.sim.checks import Checker
from tests.sim.host import EngineLife, Host
from tests.sim.net import Network
from tests.sim.words import Words
from tests.sim.world import World, sleep


class Commander:
    """The controllers of both nodes and the operator."""

    def __init__(
        self,
        world: World,
        hosts: tuple[Host, Host],
        net: Network,
        checker: Checker,
        arbiter: Arbiter | None,
    ) -> None:
        self.world = world
        self.hosts = hosts
        self.net = net
        self.checker = checker
        self.arbiter = arbiter
        self.rng = world.rng["command"]
        self.allow_split = self.rng.random() < 0.3
        self.sane = False
        self.enabled = True
        # Whether a secondary goes for the role without waiting for silence.
        self.hasty = False
        # Nobody commands this node for a while.
        self.cut_off: Host | None = None
        self._refused_since_ms = 0
        self._claimants: dict[EngineLife, Claimant] = {}
        self.words: Words

    # --- one engine ------------------------------------------------------------------------------

    def attach(self, life: EngineLife) -> None:
        """Begin to command a new engine."""
        self.world.spawn(life, "controller", self._script(life))

    def _script(self, life: EngineLife) -> Path:
        while True:
            yield (sleep, self.rng.randrange(60, 300))
            if not self.enabled or life.retiring or life.node.changing:
                continue
            if life.host is self.cut_off:
                continue
            yield from self._once(life)

    def _once(self, life: EngineLife) -> Path:
        node = life.node
        if node.failed:
            yield from self._retire(life)
        elif node.question == "record-joint":
            yield from self._record_joint(life)
        elif self.arbiter is not None and claim_unsettled(node):
            yield from self._claim(life)
        elif node.frozen:
            yield from self._frozen(life)
        elif node.role is Role.PRIMARY:
            yield from self._primary(life)
        else:
            yield from self._idle(life)

    def _try(self, name: str, path: Path) -> Path:
        """A command; returns (its result, whether it was carried out)."""
        try:
            result = yield from path
        except NbdMirrorError as error:
            self.world.note(f"command {name}: refused: {error}")
            return None, False
        self.world.note(f"command {name}: done")
        return result, True

    def _retire(self, life: EngineLife) -> Path:
        """A disk failed: let the engine hand over if it can, then replace the process."""
        life.retiring = True
        yield (sleep, self.rng.randrange(300, 1500))
        if life.node.role is Role.PRIMARY:
            yield from self._bounded(life, "demote", roles.demote(life.node))
        self.world.at(50, self.world.life, self.restart, life, self.rng.randrange(200, 2000))

    def _bounded(self, life: EngineLife, name: str, path: Path) -> Path:
        """A command that is given up when it takes too long; the engine is killed then."""
        ended: list[bool] = []
        life.command(name, path, lambda _value, _error: ended.append(True))
        for _ in range(150):
            yield (sleep, 100)
            if ended:
                return

    def restart(self, life: EngineLife, after_ms: int) -> None:
        """Kill an engine and start the next one."""
        if life.alive:
            life.host.crash(power=False)
            self.world.at(after_ms, self.world.life, life.host.start)

    def _peer_serves(self, life: EngineLife) -> bool:
        """Whether the heartbeats would tell of a primary that serves."""
        peer = life.host.peer.life
        return (
            self.net.whole
            and peer is not None
            and peer.paused_until_ms <= self.world.now_ms
            and peer.node.role is Role.PRIMARY
            and not peer.node.frozen
        )

    def _frozen(self, life: EngineLife) -> Path:
        node = life.node
        yield (sleep, self.rng.randrange(50, 1500))
        if not node.frozen:
            return
        if self._must_stop(life) or (not self.sane and self.rng.random() < 0.08):
            yield from self._try(f"{life.name} demote", roles.demote(node))
        elif self.arbiter is not None:
            yield from self._claim(life)
        elif self._may_split(life):
            yield from self._try(f"{life.name} alone", roles.alone(node))

    def _may_split(self, life: EngineLife) -> bool:
        """Without an arbiter: whether this node goes on although the other one might, too."""
        peer = life.host.peer.life
        serving = peer is not None and peer.node.role is Role.PRIMARY and peer.node.right
        return not serving or self.allow_split

    def _primary(self, life: EngineLife) -> Path:
        node = life.node
        if self.arbiter is not None and node.right:
            yield (sleep, self.rng.randrange(100, 900))
            held = yield from self.arbiter.read()
            if held is not None and life.node.right and self._deposed(life, held):
                yield from self._try(f"{life.name} demote", roles.demote(node))
        elif self._must_stop(life):
            yield from self._try(f"{life.name} demote", roles.demote(node))

    def _must_stop(self, life: EngineLife) -> bool:
        """A primary at contact with the side that it will be the target of is stopped first."""
        peer = life.host.peer.life
        if peer is None or not peer.ready:
            return False
        decision = self.decision() if self.net.whole else None
        return decision is not None and decision[life.host.index].stop_first

    def _deposed(self, life: EngineLife, held: Held) -> bool:
        return held.owner == life.host.peer.index

    def _idle(self, life: EngineLife) -> Path:
        """Not primary: elect when connected, take over after silence."""
        node = life.node
        session = node.session
        if session is None:
            yield from self._after_silence(life)
            return
        yield (sleep, self.rng.randrange(0, 400))
        if node.session is not session or session.peer_primary or node.role is Role.PRIMARY:
            return
        if session.phase is not Phase.SYNCED and not session.sending:
            return
        if self._elected(life) or (not self.sane and self.rng.random() < 0.1):
            yield from self._try(f"{life.name} promote", roles.promote(node))

    def _elected(self, life: EngineLife) -> bool:
        mine, theirs = life.node, life.host.peer.node
        if theirs is None:
            return False
        was = Flags.WAS_PRIMARY
        if bool(mine.sb.flags & was) != bool(theirs.sb.flags & was):
            return bool(mine.sb.flags & was)
        return life.host.index == 0

    def _after_silence(self, life: EngineLife) -> Path:
        node = life.node
        if self._is_asked_to_leave(life):
            yield from self.words.leave(life)
            return
        silent_ms = self.world.now_ms - life.silent_since_ms
        silence_ms = self.rng.randrange(800) + (0 if self.hasty and not self.sane else SILENCE_MS)
        if silent_ms < silence_ms or self._peer_serves(life):
            return
        if self.sane and self._will_meet(life) and silent_ms < 20_000:
            return
        view = node_view(state_message(node), node.sb.mirror_id, node.sb.node_id)
        if promotable(view, False, self.arbiter is not None) is not None:
            return
        if self.arbiter is not None:
            yield from self._take_over(life)
        elif self._may_split(life):
            yield from self._try(f"{life.name} promote", roles.promote(node))

    def _is_asked_to_leave(self, life: EngineLife) -> bool:
        """The peer is frozen and wants to go on; sometimes it asks without a reason."""
        peer = life.host.peer.node
        wants = peer is not None and peer.frozen
        return self.rng.random() < self.words.chance * (0.5 if wants else 0.02)

    def _will_meet(self, life: EngineLife) -> bool:
        peer = life.host.peer.life
        return self.net.whole and peer is not None and peer.ready

    # --- the arbiter's record ---------------------------------------------------------------------

    def _take_over(self, life: EngineLife) -> Path:
        node = life.node
        if not node.right:
            yield from self._claim(life)
        elif not (yield from self._makes_good(life)):
            return
        if node.right and node.session is None and not self._peer_serves(life):
            yield from self._try(f"{life.name} promote", roles.promote(node))

    def _makes_good(self, life: EngineLife) -> Path:
        """Whether the record names this node, which has the right already."""
        outcome = yield from self._at_arbiter(life, "make good", Claimant.make_good)
        return outcome is not None and outcome.won

    def _claim(self, life: EngineLife) -> Path:
        """Rule 11, by the path of production; a clear no ends a freeze."""
        if not self.sane and claim_unsettled(life.node) and self.rng.random() < 0.2:
            yield from self._at_arbiter(life, "settle", Claimant.settle)
            return
        outcome = yield from self._at_arbiter(life, "claim", Claimant.claim)
        if outcome is None and self.sane and claim_unsettled(life.node):
            # Its engine refuses to pursue it, perhaps for good: its disk failed since.
            yield from self._at_arbiter(life, "settle", Claimant.settle)
        if outcome is not None and not outcome.won and life.node.frozen:
            yield from self._try(f"{life.name} demote", roles.demote(life.node))

    def _record_joint(self, life: EngineLife) -> Path:
        """Part (b) of the joint step."""
        yield from self._at_arbiter(life, "record joint", Claimant.record_joint)

    def _at_arbiter(self, life: EngineLife, name: str, path: Callable[..., Steps]) -> Path:
        """Drive one of production's paths; returns its Outcome, or None when it has none yet."""
        assert self.arbiter is not None
        claimant = self._claimants.setdefault(life, Claimant(life.node.sb.mirror_id, node_id(life)))
        try:
            outcome = yield from at_arbiter(
                self.arbiter,
                path(claimant, describe(life.node)),
                self._slowly,
                partial(command_of, life.node),
            )
        except NbdMirrorError as error:
            self.world.note(f"{life.name} {name}: {error}")
            return None
        self.world.note(f"{life.name} {name}: {outcome.won}, {outcome.reason}")
        return outcome

    def _slowly(self) -> Path:
        """The way to the arbiter takes its time, and the other node may be first."""
        if not self.sane and self.rng.random() < 0.15:
            yield (sleep, self.rng.randrange(200, 3000))

    # --- the operator -----------------------------------------------------------------------------

    def decision(self) -> Any:
        """What the two nodes would decide at contact, each; None while one is down."""
        nodes = [host.node for host in self.hosts]
        if any(node is None for node in nodes):
            return None
        views = [
            node_view(state_message(node), node.sb.mirror_id, node.sb.node_id)
            for node in nodes
            if node is not None
        ]
        return decide(views[0], views[1]), decide(views[1], views[0])

    def operator(self) -> Path:
        """Resolve what the nodes leave to an operator, after a while."""
        while True:
            yield (sleep, 500)
            lives = [host.life for host in self.hosts]
            for life in lives:
                if life is not None and life.ready and life.node.keep.hold:
                    yield from self._make_room(life)
            both = all(life is not None and life.ready for life in lives)
            decided = self.decision() if both and self.net.whole else None
            kind = decided[0].kind if decided is not None else None
            if kind not in (DecisionKind.SPLIT_BRAIN, DecisionKind.ASK, DecisionKind.UNRELATED):
                self._refused_since_ms = self.world.now_ms
                continue
            if self.world.now_ms - self._refused_since_ms < 4000:
                continue
            yield from self._resolve(decided)
            self._refused_since_ms = self.world.now_ms

    def _resolve(self, decided: Any) -> Path:
        """Keep one copy, discard the other."""
        if decided[0].kind is DecisionKind.SPLIT_BRAIN:
            loser = 0 if decided[0].stop_first else 1
        else:
            worth = [self._worth(host) for host in self.hosts]
            loser = 1 if worth[0] >= worth[1] else 0
        host, keeper = self.hosts[loser], self.hosts[1 - loser]
        life, kept = host.life, keeper.life
        if life is None or kept is None:
            return
        self.world.note(f"operator: keep {keeper.name} ({decided[0].row})")
        self.checker.forced = True
        for _ in range(5):
            yield from self._bounded(life, "demote", roles.demote(life.node))
            if not life.alive:
                return
            if (yield from self._give_up(life, split=decided[0].kind is DecisionKind.SPLIT_BRAIN)):
                break
            yield (sleep, 300)
        else:
            return
        if not self._usable(keeper):
            yield from self._bounded(kept, "demote", roles.demote(kept.node))
            if not kept.alive:
                # Nobody gives commands to an engine that is gone.
                return
            yield from self._try(f"{keeper.name} force", roles.promote(kept.node, force=True))
            yield from self._name_in_record(keeper)
        self.checker.operator_decided(keeper)

    def _give_up(self, life: EngineLife, *, split: bool) -> Path:
        """The loser's copy: after a split brain it is mostly kept; returns whether it is done."""
        node, name = life.node, life.name
        state = node.sb.data_state
        if state is DataState.BLANK or (split and state is DataState.INCONSISTENT):
            return True
        if not split:
            return (yield from self._try(f"{name} discard", roles.discard(node)))[1]
        keep = self.rng.random() < 0.8
        _, done = yield from self._try(f"{name} give up", giveup.give_up(node, keep=keep))
        if not done and node.keep.kept is not None:
            yield from self._try(f"{name} kept discard", giveup.discard_kept(node))
        return done

    def _make_room(self, life: EngineLife) -> Path:
        """A resync waits because what it overwrites cannot be kept."""
        yield (sleep, self.rng.randrange(100, 3000))
        node, name = life.node, life.name
        if self.rng.random() < 0.5:
            yield from self._try(f"{name} kept limit", giveup.give_space(node, 64 * MIB))
        else:
            yield from self._try(f"{name} kept discard", giveup.discard_kept(node))

    def _name_in_record(self, keeper: Host) -> Path:
        """Rule 14: a force replaces the record, whatever it holds."""
        forced = partial(Claimant.make_good, forced_now=True)
        while self.arbiter is not None:
            life = keeper.life
            if life is None or not life.node.right:
                return
            outcome = yield from self._at_arbiter(life, "force", forced)
            if outcome is not None and outcome.won:
                return
            yield (sleep, 50)

    def _worth(self, host: Host) -> tuple[bool, ...]:
        """How much an operator would want to keep a copy."""
        node = host.node
        if node is None:
            return (False,)
        return (
            node.sb.data_state is not DataState.BLANK,
            node.sb.data_state is not DataState.INCONSISTENT,
            self.checker.holders[host.index],
            self._usable(host),
        )

    def _usable(self, host: Host) -> bool:
        """Whether a copy may be a source without an operator's force."""
        node = host.node
        return (
            node is not None
            and node.sb.data_state is DataState.UPTODATE
            and Flags.FAILED not in node.sb.flags
            and not node.fell_back
            and not node.failed
        )
