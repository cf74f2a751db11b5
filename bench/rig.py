"""A node without files and sockets, for the micro benches: the core's code, ports that do nothing.

Owns the ports that cost nothing, so that what is measured is the price of safety: locks, intent,
frame, checks, window, verdict. It must not hold a copy of a path of the product: it drives the real
ones.
"""

import time
from pathlib import Path as FilePath
from typing import Any, Final

from nbdmirror import certificate, tls
from nbdmirror.core import dispatch, io
from nbdmirror.core.channel import Channel
from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.durable import Opened
from nbdmirror.core.handshake import Handshake, Identity, offers
from nbdmirror.core.intentlog import IntentLog
from nbdmirror.core.node import Node, Role, Settings
from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.replica import replica
from nbdmirror.core.session import Phase, Session
from nbdmirror.core.superblock import ArbiterKind, DataState, Superblock
from nbdmirror.core.wire import FrameType
from nbdmirror.driver import Driver, Pool, ReplicaDriver, ThreadWaiter
from nbdmirror.limits import FLUSH_BYTES, GIB, MIB
from nbdmirror.tls import TlsStream

DEVICE_BYTES: Final = 1 * GIB
FLUSH_EVERY_COUNT: Final = 1000


def superblock(
    node_id: int = 1,
    device_bytes: int = DEVICE_BYTES,
    arbiter: ArbiterKind = ArbiterKind.NONE,
) -> Superblock:
    """A node at birth."""
    return Superblock(
        mirror_id=b"m" * 16,
        mirror_name="bench",
        node_id=node_id,
        node_uuid=bytes([node_id]) * 16,
        device_bytes=device_bytes,
        extent_bytes=4096,
        region_bytes=4 * MIB,
        map_id=b"p" * 16,
        arbiter=arbiter,
        generation=b"g" * 16,
        data_state=DataState.UPTODATE,
        sequence=1,
    )


def tls_streams(directory: FilePath) -> tuple[TlsStream, TlsStream]:
    """Both ends of one connection inside TLS, shaken; the certificate is made in the directory."""
    path = directory / "tls.pem"
    certificate.make(path, "bench", "bench", replace=True)
    setup = tls.load(path, path, None)
    one, two = TlsStream(setup, dialer=True), TlsStream(setup, dialer=False)
    while not (one.shake() & two.shake()):
        for mine, other in ((one, two), (two, one)):
            if piece := mine.outgoing.read():
                other.feed(piece)
    return one, two


def channels(*, macs: bool = False) -> tuple[Channel, Channel]:
    """Both ends of one authenticated connection: of the sender, of the receiver."""
    features, required = offers(macs=macs)
    made = [
        Channel(
            Handshake(
                number == 1,
                b"k" * 32,
                identity(number),
                bytes([number]) * 32,
                features=features,
                required=required,
            )
        )
        for number in (1, 2)
    ]
    dialer, listener = made
    feed(listener, dialer.start())
    feed(dialer, listener.take_outgoing())
    feed(listener, dialer.take_outgoing())
    return dialer, listener


def identity(number: int) -> Identity:
    """Who node `number` is."""
    return Identity(b"m" * 16, number, bytes([number]) * 16, bytes([number + 9]) * 16)


def feed(channel: Channel, data: bytes) -> None:
    """Hand received bytes to a channel."""
    channel.buffer_for_read()[: len(data)] = data
    channel.received(len(data))


class NullStore:
    """A disk that takes everything at once and keeps nothing."""

    def pread(self, buffer: Any, offset: int) -> None:
        """Leave the buffer as it is."""

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Nothing."""

    pwrite_durable = pwrite

    def zero(self, offset: int, length: int, may_trim: bool) -> None:  # noqa: FBT001 - the port
        """Nothing."""

    def trim(self, offset: int, length: int) -> None:
        """Nothing."""

    def fdatasync(self) -> None:
        """Nothing."""

    def data_runs(self, offset: int, length: int) -> list[tuple[int, int]]:
        """All of it."""
        return [(offset, offset + length)]


class NullMeta:
    """A metadata file that is durable at once."""

    def write_superblock(self, superblock: Superblock) -> None:
        """Nothing."""

    def write_blocks(self, blocks: Any) -> None:
        """Nothing."""


class Shell:
    """The port Shell with the real waiters; what would run beside the path is not run."""

    def waiter(self) -> ThreadWaiter:
        """A real one."""
        return ThreadWaiter()

    def spawn(self, name: str, path: Path) -> None:  # noqa: ARG002 - the port
        """Not now: the rig flushes by itself."""
        path.close()

    def spawn_replica(self, path: Path) -> None:
        """Not by itself: the rig has a driver of its own."""
        path.close()

    def pace(self, count: int) -> None:
        """No limit."""

    def now_ms(self) -> int:
        """The real one: its price is a part of each read."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def random_bytes(self, count: int) -> bytes:
        """All alike."""
        return bytes(count)

    def emit(self, kind: str, **facts: object) -> None:
        """Nobody listens."""


class SinkLink:
    """A link whose far end is nobody: what is queued counts as sent."""

    session: Session

    def kick(self) -> None:
        """Sent."""
        self.session.outgoing.clear()

    def drain(self) -> bool:
        """Everything has left."""
        self.kick()
        return True

    def close(self, reason: str) -> None:
        """Nothing."""


class PeerLink(SinkLink):
    """A link whose far end applied and acknowledged everything as soon as it was sent."""

    def __init__(self, node: Node, driver: Driver) -> None:
        self._node = node
        self._driver = driver

    def kick(self) -> None:
        """Sent, acknowledged, and now and then flushed on both nodes."""
        super().kick()
        seq = self._node.seq
        with self._driver.lock:
            self.session.acknowledged(seq)
            if seq % FLUSH_EVERY_COUNT == 0 or self._node.unflushed_bytes >= FLUSH_BYTES // 2:
                self._node.advance_stable(seq)


def make_node(node_id: int = 1, arbiter: ArbiterKind = ArbiterKind.NONE) -> Node:
    """A node over nothing, in no role."""
    sb = superblock(node_id, arbiter=arbiter)
    geometry = sb.geometry()
    opened = Opened(
        superblock=sb,
        dirty=DirtyMap(geometry, sb.map_id),
        log=IntentLog(geometry, sb.map_id),
        fell_back=False,
        cache_survived=True,
        boot_id=b"b" * 16,
        mount_id=b"t" * 16,
    )
    return Node(Shell(), NullStore(), NullMeta(), opened, Settings(), bytes([node_id]) * 16)


class Primary:
    """The whole write path of a primary, peer and disk being free: `write` is one client write."""

    def __init__(self, arbiter: ArbiterKind = ArbiterKind.NONE, *, macs: bool = False) -> None:
        self.node = make_node(arbiter=arbiter)
        self.driver = Driver()
        link = PeerLink(self.node, self.driver)
        self.session = Session(self.node.shell, channels(macs=macs)[0], link)
        link.session = self.session
        self.session.sending = True
        self.session.phase = Phase.SYNCED
        self.node.session = self.session
        self.node.role = Role.PRIMARY

    def write(self, buffer: ReadBuffer, offset: int) -> None:
        """What the plugin calls, without nbdkit."""
        self.driver.drive(io.write(self.node, buffer, offset, 0))

    def read(self, buffer: WriteBuffer, offset: int) -> None:
        """The same for a read."""
        self.driver.drive(io.read(self.node, buffer, offset))


class Secondary:
    """The whole path of a replica, disk being free: `receive` is one read from the socket."""

    def __init__(self, *, macs: bool = False) -> None:
        self.node = make_node(2)
        self.driver = Driver()
        self.sender, receiver = channels(macs=macs)
        link = SinkLink()
        self.session = Session(self.node.shell, receiver, link)
        link.session = self.session
        self.session.receiving = self.session.may_receive = True
        self.session.phase = Phase.SYNCED
        self.node.session = self.session
        self.node.role = Role.SECONDARY
        receiver.open_data(DEVICE_BYTES, 1)
        self.seq = 0
        self._ready: list[Any] = []
        inline = frozenset({NullStore.pwrite, NullMeta.write_blocks, SinkLink.kick})
        path = replica(self.node, self.session)
        pool = Pool(self._unexpected)
        ReplicaDriver(self.driver, pool, path, inline, self._ready.append).start()
        self._run_ready()

    def frame(self, payload: bytes, offset: int) -> bytes:
        """The next write as it arrives; to be received once, in this order."""
        self.seq += 1
        head = self.sender.encode(FrameType.WRITE, 0, self.seq, offset, 0, payload)
        return head + payload

    def receive(self, data: bytes) -> None:
        """What the loop does when the socket is readable."""
        feed(self.session.channel, data)
        with self.driver.lock:
            dispatch.receive(self.node, self.session)
        self._run_ready()
        if self.session.applied_seq % FLUSH_EVERY_COUNT == 0:
            self.node.advance_stable(self.session.applied_seq)

    def _run_ready(self) -> None:
        while self._ready:
            self._ready.pop(0)()

    @staticmethod
    def _unexpected(name: str, error: BaseException) -> None:
        raise RuntimeError(f"{name}: {error}")
