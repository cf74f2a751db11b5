"""The words of leaving that the two simulated controllers carry for their engines (rule 16).

Owns the order that production has in nbdmirror/controller/dialogs.py: ask the other engine whether
it stays, be durably behind, say so. For an engine that was killed its controller does the second
under the metadata's lock, which keeps the next engine from starting; a living one does it itself.
Words travel beside the engines' link, late, and can be lost. Must never decide who stays: the
engines do.
"""

from collections.abc import Callable
from dataclasses import replace

from nbdmirror.core import roles
from nbdmirror.core.leave import Word, left, reason_not_to_speak
from nbdmirror.core.ports import Path
from nbdmirror.core.superblock import choose
from nbdmirror.errors import NbdMirrorError
from tests.sim.disk import SimMeta
from tests.sim.host import GEOMETRY, EngineLife, Host
from tests.sim.world import Life, SimWaiter, World, sleep

LOST = 0.05
STORED_S = 3.0


class Words:
    """Both controllers' side of every dialog."""

    def __init__(self, world: World, on_stay: Callable[[int], None]) -> None:
        self.world = world
        self.on_stay = on_stay
        self.rng = world.rng["command"]
        # How often the controllers speak at all: some seeds know no words.
        self.chance = self.rng.choice((0.0, 0.7, 1.0))
        # Whether the controllers do not hear each other at all.
        self.cut_off = False
        self.counts = {"spoken": 0, "told": 0}

    # --- the parts of a dialog ------------------------------------------------------------------

    def _way(self) -> Path:
        """One heartbeat; returns whether it arrived."""
        if self.cut_off:
            return False
        slow = self.rng.random() < 0.1
        yield (sleep, self.rng.randrange(200, 2500) if slow else self.rng.randrange(1, 60))
        return self.rng.random() >= LOST

    def ask(self, asker: Host, generation: bytes) -> Path:
        """Ask the other node's engine whether it stays; the word that it gave, or None."""
        if not (yield from self._way()):
            return None
        life = asker.peer.life
        if life is None or not life.ready or life.paused_until_ms > self.world.now_ms:
            return None
        said = roles.stay_word(life.node, generation)
        self.world.note(f"{asker.name} asks {life.name}: {said['reason']}")
        if not said["stay"]:
            return None
        self.on_stay(asker.index)
        if not (yield from self._way()):
            return None
        return Word(generation, int(str(said["session"]), 16))

    def tell(self, leaver: Host, word: Word) -> Path:
        """Tell the other node's engine that this one is durably behind; until it has stored it."""
        if not (yield from self._way()):
            return
        life = leaver.peer.life
        if life is None or not life.ready:
            return
        waiter = SimWaiter()

        def heard(_value: object, error: Exception | None) -> None:
            self.counts["told"] += error is None
            waiter.wake()

        life.command("peer left", roles.peer_has_left(life.node, word), heard)
        yield (waiter.wait, STORED_S)

    # --- for a dead engine ----------------------------------------------------------------------

    def engine_killed(self, host: Host) -> None:
        """Its controller sees the end, and takes the lock, if the next engine is not first."""
        if self.rng.random() < self.chance:
            self.world.at(self.rng.randrange(60), self.world.life, self.begin, host)

    def begin(self, host: Host) -> None:
        """Speak, if the lock can be had."""
        if not host.is_silent:
            return
        host.speaker = speaker = Life(f"{host.name} controller")

        def ended(_value: object, _error: Exception | None) -> None:
            host.speaker = None

        self.world.spawn(speaker, "speak", self.speak(host), ended)

    def speak(self, host: Host) -> Path:
        """Ask, mark the dead engine's copy as behind, say so."""
        meta = SimMeta(host.meta, GEOMETRY.metadata_bytes)
        meta.on_begin, meta.on_store = host.store_begins, host.stored
        try:
            chosen = choose(*meta.read_slots())
            sb = chosen.superblock
            reason = reason_not_to_speak(sb, fell_back=chosen.fell_back)
            if reason:
                self.world.note(f"{host.name} says nothing for its dead engine: {reason}")
                return
            word = yield from self.ask(host, sb.generation)
            if word is None:
                return
            yield (meta.write_superblock, replace(left(sb), sequence=sb.sequence + 1))
        except NbdMirrorError as error:
            self.world.note(f"{host.name} says nothing for its dead engine: {error}")
            return
        self.world.note(f"{host.name} is marked as behind")
        self.counts["spoken"] += 1
        yield from self.tell(host, word)

    # --- for a living engine --------------------------------------------------------------------

    def leave(self, life: EngineLife) -> Path:
        """Let a living engine without a channel leave, for a peer that wants to go on."""
        word = yield from self.ask(life.host, life.node.sb.generation)
        if word is None or not life.alive:
            return
        try:
            yield from roles.leave_for_peer(life.node, word)
        except NbdMirrorError as error:
            self.world.note(f"{life.name} does not leave: {error}")
            return
        yield from self.tell(life.host, word)
