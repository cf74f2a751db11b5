"""Heartbeats between the simulated controllers: production's datagrams over bad networks.

Owns the air between the two (several networks, each direction of each of its own: cut, lossy, late,
doubled) and what stands for the sockets and the timer of `nbdmirror/controller/heart.py`. What a
datagram proves is decided by core/cluster/heartbeat.py. Network 0 is the cable of the engines'
link, as in production's default; a second one is another cable.
"""

from collections import deque
from collections.abc import Callable

from nbdmirror.core.cluster.heartbeat import (
    EXTRA_LINK,
    NONCE_BYTES,
    Ends,
    Link,
    Newest,
    derive_mac_key,
)
from nbdmirror.limits import HEARTBEAT_MS, SILENCE_MS
from tests.sim.host import MIRROR_ID
from tests.sim.net import KEY, Network
from tests.sim.world import Life, World

MAC_KEY = derive_mac_key(KEY)
SOCKET_MAX = 64
# With more than that lost, a silence is bad luck.
LOSSY = 0.15


class Air:
    """All networks that heartbeats travel on."""

    def __init__(self, world: World, net: Network) -> None:
        self.world = world
        self.net = net
        self.rng = world.rng["beats"]
        self.networks_count = self.rng.choice((1, 2))
        self.loss = self.rng.choice((0.0, 0.0, 0.02, 0.2))
        self.late = self.rng.choice((0.0, 0.02, 0.1))
        self.twice = self.rng.choice((0.0, 0.0, 0.05))
        self.delay_ms = (1, 6)
        # Per network: what each of the two hosts sends is lost.
        self.cut = [[False, False] for _ in range(self.networks_count)]
        self.hearts: list[Heart | None] = [None, None]

    def heal(self) -> None:
        """All cables are there again; the air stays as good or bad as it is."""
        self.cut = [[False, False] for _ in range(self.networks_count)]

    def calm(self) -> None:
        """Nothing is lost any more."""
        self.heal()
        self.loss = self.late = self.twice = 0.0

    def is_cut(self, network: int, sender: int) -> bool:
        """Whether a datagram of this host gets nowhere."""
        return self.cut[network][sender] or (network == 0 and self.net.is_cut(sender))

    def carries(self, sender: int) -> bool:
        """Whether what this host says is heard, as good as surely, within a silence."""
        good = self.loss < LOSSY and self.late < LOSSY
        return good and not all(self.is_cut(n, sender) for n in range(self.networks_count))

    def send(self, network: int, sender: int, datagram: bytes) -> None:
        """Perhaps it arrives."""
        rng = self.rng
        for _ in range(2 if rng.random() < self.twice else 1):
            if self.is_cut(network, sender) or rng.random() < self.loss:
                continue
            delay_ms = rng.randrange(*self.delay_ms)
            if rng.random() < self.late:
                delay_ms = rng.randrange(20, 2500)
            self.world.at(delay_ms, self.world.life, self._arrives, network, sender, datagram)

    def _arrives(self, network: int, sender: int, datagram: bytes) -> None:
        heart = self.hearts[1 - sender]
        if heart is not None:
            heart.arrives(network, datagram)


class Heart:
    """One life of a controller's heartbeats; the methods are those of production's `Heart`."""

    def __init__(
        self, air: Air, life: Life, index: int, nonce: bytes, on_body: Callable[[bytes], None]
    ) -> None:
        assert len(nonce) == NONCE_BYTES
        self._air = air
        self._world = air.world
        self._life = life
        self._index = index
        ends = Ends(MAC_KEY, MIRROR_ID, index + 1, 2 - index, nonce)
        self._links = [Link(ends, place, SILENCE_MS) for place in range(air.networks_count)]
        self._extra = Link(ends, EXTRA_LINK, SILENCE_MS)
        self._sockets: list[deque[bytes]] = [deque(maxlen=SOCKET_MAX) for _ in self._links]
        self._on_body = on_body
        self._body = b""
        self._seq = 0
        self._newest = Newest()
        self._bodies: deque[bytes] = deque()

    def start(self) -> None:
        """Begin to listen and speak."""
        self._air.hearts[self._index] = self
        self._beat()

    # --- speaking ---------------------------------------------------------------------------------

    def say(self, body: bytes) -> None:
        """What every heartbeat carries from here on; the first one leaves now."""
        self._body = body
        self._send()

    def extra_packet(self) -> bytes:
        """The next datagram for the engines' link."""
        return self._packet(self._extra)

    def _packet(self, link: Link) -> bytes:
        self._seq += 1
        return link.packet(self._seq, self._body, self._world.now_ms)

    def _send(self) -> None:
        for place, link in enumerate(self._links):
            self._air.send(place, self._index, self._packet(link))

    def _beat(self) -> None:
        self._world.at(HEARTBEAT_MS, self._life, self._beat)
        self._round()
        self._send()
        self._hand_on()

    # --- listening --------------------------------------------------------------------------------

    def arrives(self, network: int, datagram: bytes) -> None:
        """The kernel has it; the controller reads it when it runs."""
        self._sockets[network].append(datagram)
        self._world.at(0, self._life, self._readable, network)

    def take_extra(self, datagram: bytes) -> None:
        """A datagram of the peer's that came over the engines' link."""
        self._round()
        self._take(self._extra, datagram)
        self._hand_on()

    def _readable(self, network: int) -> None:
        self._round()
        self._drain(network)
        self._hand_on()

    def _round(self) -> None:
        """One round of the loop; after a pause first hear what was said meanwhile (rule 18)."""
        paused = [link.tick(self._world.now_ms) for link in (*self._links, self._extra)]
        if any(paused):
            for network in range(len(self._links)):
                self._drain(network)

    def _drain(self, network: int) -> None:
        while self._sockets[network]:
            self._take(self._links[network], self._sockets[network].popleft())

    def _take(self, link: Link, datagram: bytes) -> None:
        body = link.take(datagram, self._world.now_ms)
        if body is None:
            return
        assert link.newest is not None
        if self._newest.take(link.newest) and body:
            self._bodies.append(body)

    def _hand_on(self) -> None:
        while self._bodies:
            self._on_body(self._bodies.popleft())

    # --- what is known ----------------------------------------------------------------------------

    def silent_ms(self) -> int:
        """Since the last fresh datagram on any network or the link, or since the start."""
        self._round()
        now_ms = self._world.now_ms
        return min(link.silent_ms(now_ms) for link in (*self._links, self._extra))

    def ever_heard(self) -> bool:
        """Whether anything fresh came since the start."""
        return any(link.heard_ms is not None for link in (*self._links, self._extra))
