"""Simulated connections: two byte streams each, chopped anywhere, delayed, cut, held, reset.

Owns the link port and what stands for the socket: the handshake's and the frames' real bytes go
through `core/channel.py`. A cut direction holds its bytes and delivers them when it heals, as TCP
does, unless an end has given up meanwhile; an end that closes tells the other one through the same
stream, so that a cut makes it half-open.
"""

from collections import deque
from typing import TYPE_CHECKING

from nbdmirror.core import dispatch
from nbdmirror.core.channel import Channel
from nbdmirror.core.handshake import Handshake, offers
from nbdmirror.core.negotiate import negotiate
from nbdmirror.core.ports import ReadBuffer
from nbdmirror.core.session import Session
from nbdmirror.errors import NbdMirrorError
from nbdmirror.limits import HANDSHAKE_TIMEOUT_MS
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.host import EngineLife

KEY = bytes(range(32))
CHOP_BYTES_MAX = 256 * 1024


class Pipe:
    """One direction of one connection."""

    def __init__(self, net: "Network", sender: int, receiver: "End") -> None:
        self.net = net
        self.sender = sender
        self.receiver = receiver
        self.chunks: deque[bytes] = deque()
        self.finished = False
        self._scheduled = False

    def send(self, data: bytes) -> None:
        """Append bytes to the stream."""
        if data and not self.finished:
            self.chunks.append(data)
            self.schedule()

    def finish(self) -> None:
        """Nothing follows."""
        self.finished = True
        self.schedule()

    def schedule(self) -> None:
        """Deliver something after a while, unless the direction is cut."""
        if self._scheduled or self.net.is_cut(self.sender):
            return
        self._scheduled = True
        world = self.net.world
        world.at(self.net.delay_ms(), world.life, self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        if self.net.is_cut(self.sender):
            return
        rng = self.net.world.rng["net"]
        life = self.receiver.life
        if not life.alive:
            self.receiver.other.reset("the peer's host answers with a reset")
            return
        if life.paused_until_ms > self.net.world.now_ms:
            self._scheduled = True
            delay = life.paused_until_ms - self.net.world.now_ms
            self.net.world.at(delay, self.net.world.life, self._deliver)
            return
        if self.chunks:
            data = b"".join(self.chunks)
            self.chunks.clear()
            count = len(data)
            if rng.random() < 0.15:
                count = rng.randrange(1, min(count, CHOP_BYTES_MAX) + 1)
            if count < len(data):
                self.chunks.append(data[count:])
            self.receiver.receive(data[:count])
        if self.chunks:
            self.schedule()
        elif self.finished:
            self.receiver.reset("the peer closed the connection")


class End:
    """One end of one connection: the socket, and the link port of its session."""

    def __init__(self, net: "Network", life: "EngineLife", *, dialer: bool) -> None:
        self.net = net
        self.life = life
        nonce = net.world.rng["shell"].randbytes(32)
        features, required = offers(macs=net.asks_macs[life.host.index])
        self.channel = Channel(
            Handshake(dialer, KEY, life.identity, nonce, features=features, required=required)
        )
        self.session: Session | None = None
        self.closed = False
        self.out: Pipe
        self.other: End

    def begin(self) -> None:
        """The first bytes, and a bound on the handshake."""
        self.out.send(self.channel.start())
        self.net.world.at(HANDSHAKE_TIMEOUT_MS, self.life, self._expire)

    def _expire(self) -> None:
        if self.session is None and not self.closed:
            self.close("the handshake took too long")

    # --- receiving ------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Bytes arrived; what follows is what the engine's receiving thread does."""
        at = 0
        while at < len(data) and not self.closed:
            try:
                view = self.channel.buffer_for_read()
                count = min(len(view), len(data) - at)
                view[:count] = data[at : at + count]
                self.channel.received(count)
            except NbdMirrorError as error:
                self._refuse(error)
                return
            at += count
            self.out.send(self.channel.take_outgoing())
            self._contact()
            if self.session is not None:
                dispatch.receive(self.life.node, self.session)
        self.pump()

    def _refuse(self, error: NbdMirrorError) -> None:
        self.net.world.note(f"{self.life.name} channel: {error}")
        if self.session is not None:
            self.life.node.lose_session(self.session, str(error))
        self.out.send(self.channel.refusal)
        self.close(str(error))

    def _contact(self) -> None:
        if self.session is not None or self.channel.established is None:
            return
        node = self.life.node
        if node.session is not None:
            node.lose_session(node.session, "the peer connected again")
        self.session = Session(self.life, self.channel, self)
        self.life.spawn("negotiate", negotiate(node, self.session))

    def reset(self, reason: str) -> None:
        """The connection is gone."""
        if self.closed:
            return
        if self.session is not None and self.life.alive:
            self.life.node.lose_session(self.session, reason)
        self.close(reason)

    # --- the link port --------------------------------------------------------------------------

    def kick(self) -> None:
        """Yielded. Hand what is queued to the stream; sometimes the socket takes only a part."""
        self.pump()

    def pump(self) -> None:
        """Move queued bytes, as far as the socket takes them."""
        if self.session is None or self.closed:
            return
        queue: deque[ReadBuffer] = self.session.outgoing
        rng = self.net.world.rng["net"]
        while queue:
            if rng.random() < 0.02:
                self.net.world.at(rng.randrange(1, 6), self.life, self.pump)
                return
            self.out.send(bytes(queue.popleft()))

    def drain(self) -> bool:
        """Yielded. The simulated socket takes everything in the end."""
        self.pump()
        return True

    def close(self, reason: str) -> None:
        """Direct. What was queued last has one chance to leave; nothing more arrives."""
        if self.closed:
            return
        if self.session is not None and self.net.world.rng["net"].random() < 0.8:
            for item in self.session.outgoing:
                self.out.send(bytes(item))
        self.closed = True
        if self.net.world.rng["net"].random() < 0.2:
            self.out.chunks.clear()
        self.out.finish()
        self.net.forget(self)


class Network:
    """The two directions between the nodes, and the connections over them."""

    def __init__(self, world: World) -> None:
        self.world = world
        # Whether host 0 or 1 is set to "mac": then both put a keyed code on every frame.
        self.asks_macs = [world.rng["integrity"].random() < 0.25 for _ in range(2)]
        self._cut = [False, False]
        self.ends: list[End] = []
        self.slow = False

    def is_cut(self, sender: int) -> bool:
        """Whether bytes from host `sender` (0 or 1) are held."""
        return self._cut[sender]

    @property
    def whole(self) -> bool:
        """Whether both directions work."""
        return not any(self._cut)

    def delay_ms(self) -> int:
        """How long the next bytes of a stream take."""
        rng = self.world.rng["net"]
        if self.slow:
            return rng.randrange(5, 120)
        return rng.choice((0, 0, 1, 1, 2, 4)) if rng.random() < 0.99 else rng.randrange(5, 80)

    def cut(self, sender: int) -> None:
        """Hold what `sender` sends."""
        self._cut[sender] = True

    def heal(self) -> None:
        """Both directions work again."""
        self._cut = [False, False]
        for end in self.ends:
            end.out.schedule()
            end.other.out.schedule()

    def reset_all(self) -> None:
        """Every connection is gone at once; what was on its way is lost."""
        for end in list(self.ends):
            end.out.chunks.clear()
            end.reset("connection reset")

    def dial(self, here: "EngineLife", there: "EngineLife") -> None:
        """The lower node id connects."""
        if not self.whole:
            return
        dialer, listener = End(self, here, dialer=True), End(self, there, dialer=False)
        dialer.other, listener.other = listener, dialer
        dialer.out = Pipe(self, here.host.index, listener)
        listener.out = Pipe(self, there.host.index, dialer)
        self.ends += [dialer, listener]
        dialer.begin()
        listener.begin()

    def has_open(self, life: "EngineLife") -> bool:
        """Whether this engine has a connection, proven or not."""
        return any(end.life is life and not end.closed for end in self.ends)

    def forget(self, end: End) -> None:
        """Drop connections that are closed at both ends."""
        if end.other.closed or not end.other.life.alive:
            self.ends = [e for e in self.ends if e is not end and e is not end.other]

    def kill(self, life: "EngineLife", *, power: bool) -> None:
        """The ends of a dead engine: its kernel says goodbye; after a power cut nobody does."""
        for end in list(self.ends):
            if end.life is not life or end.closed:
                continue
            end.closed = True
            if power:
                end.out.chunks.clear()
            else:
                end.out.finish()
            self.forget(end)
