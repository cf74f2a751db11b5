"""The engine: one process, one mirror, one node. Puts core, files, threads and sockets together.

Owns the composition and nothing else: the paths are the core's, the socket is link.py's, the
commands are control.py's. It starts in no role, always. nbdkit's threads call the client
operations; one uvloop thread owns the peer channel, the control socket and the clock.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from functools import partial
from typing import Any, Final

import uvloop

from nbdmirror import memory
from nbdmirror.clients import disconnect_clients, listening_addresses
from nbdmirror.config import Config
from nbdmirror.control import ControlServer, Guard
from nbdmirror.core import io, negotiate, roles
from nbdmirror.core.checks import crcmod_is_compiled
from nbdmirror.core.durable import Opened
from nbdmirror.core.handshake import Identity
from nbdmirror.core.messages import printable
from nbdmirror.core.node import Node, Role, Settings
from nbdmirror.core.opening import open_metadata, settle
from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.session import Session
from nbdmirror.core.superblock import Flags, choose
from nbdmirror.core.upkeep import Upkeep
from nbdmirror.core.wire import FrameFlag
from nbdmirror.driver import (
    STACK_BYTES,
    Driver,
    Pool,
    ReplicaDriver,
    ThreadWaiter,
    report_to_stderr,
)
from nbdmirror.errors import (
    ConfigError,
    MetadataError,
    NbdMirrorError,
    StoreError,
)
from nbdmirror.events import EventLog
from nbdmirror.kept import FileKept, path_beside
from nbdmirror.limits import REASON_BYTES_MAX
from nbdmirror.link import TcpLink
from nbdmirror.metastore import FileMetaStore
from nbdmirror.peering import Credentials, Peering
from nbdmirror.receiver import Receiver, Source
from nbdmirror.store import FileStore
from nbdmirror.tls import TlsSetup, prepare
from nbdmirror.tls_link import SPENT, TlsLink
from nbdmirror.unproven import Proven
from nbdmirror.witness import boot_id_override, read_boot_identity

TICK_S: Final = 0.1
INLINE: Final = frozenset({FileStore.pwrite, TcpLink.kick})
FUA: Final = int(FrameFlag.FUA)
MAY_TRIM: Final = int(FrameFlag.MAY_TRIM)
REPLIES_LEAVE_S: Final = 2.0
CLIENTS_GONE_S: Final = 5.0
EVENTS_LEAVE_S: Final = 0.5


class Engine:
    """One engine. `open` before the fork, `start` after it.

    `control`: the bound control socket, where this process could not make one itself.
    """

    def __init__(self, config: Config, control: socket.socket | None = None) -> None:
        self.config = config
        self._control = control
        self.instance = secrets.token_bytes(16)
        self.events = EventLog()
        self.driver = Driver()
        self.pool = Pool(self.background_error)
        self.handles = 0
        self.handles_gone = threading.Condition()
        self.loop: uvloop.Loop
        self.node: Node
        self.store: FileStore
        self.meta: FileMetaStore
        self.peering: Peering
        self.receiver: Receiver
        self._pace_next_s = 0.0
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._stands_in = False
        self._clients_at: list[Any] = []
        self._looks = 0
        self._unproven = ""
        self._main_task: asyncio.Task[None]
        self._tls: TlsSetup | None = None

    # --- start and stop -----------------------------------------------------------------------

    def start(self) -> None:
        """After the fork: open and lock the files, settle the metadata, start the loop's thread.

        Raises:
            RefusedError: another engine has the metadata. MetadataError: it cannot be trusted.
            StoreError: it cannot be written. ConfigError: the control socket cannot be made.
        """
        if not crcmod_is_compiled():
            raise ConfigError("crcmod has no C extension; install it where a compiler is")
        threading.stack_size(STACK_BYTES)
        if self.config.engine.lock_memory:
            for refusal in memory.lock_memory():
                self.events.emit("memory", refused=refusal)
        opened = self._open_files()
        self._prepare_tls()
        self._build(opened)
        self.driver.drive(settle(self.node, opened))
        self._look_for_writeback_error()
        self._clients_at = listening_addresses()
        thread = threading.Thread(target=self._run_loop, name="nbdmirror-loop", daemon=True)
        thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error
        journal = self.events.write_for_ever
        threading.Thread(target=journal, name="nbdmirror-journal", daemon=True).start()
        self.begin_stand_in()

    def begin_stand_in(self) -> None:
        """With an arbiter that has a memory reads hang on the echoes: see receiver.py. Once."""
        if self.node.arbiter_has_memory and not self._stands_in:
            self._stands_in = True
            echoes = self.receiver.stand_in_for_ever
            threading.Thread(target=echoes, name="nbdmirror-echoes", daemon=True).start()

    def _open_files(self) -> Opened:
        meta = FileMetaStore.open(self.config.metadata_file)
        os.set_inheritable(meta.fileno(), False)
        self.meta = meta
        slots = meta.read_slots()
        sb = choose(*slots).superblock
        if sb.mirror_name != self.config.mirror or sb.node_id != self.config.me.id:
            raise MetadataError(
                f"{self.config.metadata_file} belongs to node {sb.node_id} of {sb.mirror_name}, "
                f"the configuration says node {self.config.me.id} of {self.config.mirror}"
            )
        sparse = bool(sb.flags & Flags.SPARSE)
        self.store = FileStore.open(self.config.data_file, sb.device_bytes, sparse=sparse)
        if overridden := boot_id_override():
            self.events.emit("witness", reason=overridden)
        identity = read_boot_identity(self.store.fileno())
        opened = open_metadata(
            slots, meta.read_ring(), meta.read_map(), identity.boot_id, identity.mount_id
        )
        for note in (*opened.notes, *filter(None, [identity.doubt])):
            self.events.emit("metadata", note=note)
        return opened

    def _prepare_tls(self) -> None:
        """Under the metadata's lock: no other engine makes the certificate, too."""
        prepared = prepare(self.config)
        if prepared is not None:
            self._tls = prepared.setup
            for note in prepared.notes:
                self.events.emit("tls", note=note)

    def _look_for_writeback_error(self) -> None:
        """Rule 12: a page cache that lost a write has not survived; the kernel tells it once."""
        try:
            self.store.fdatasync()
        except StoreError as error:
            with self.driver.lock:
                self.node.note_failure(f"found when the file was opened: {error}")
            self.driver.drive(self.node.record_failure())

    def _build(self, opened: Opened) -> None:
        settings = self.config.engine
        self.node = Node(
            self,
            self.store,
            self.meta,
            opened,
            Settings(
                ack_timeout_ms=settings.ack_timeout_ms,
                flush_interval_ms=settings.flush_interval_ms,
                flush_bytes=settings.flush_bytes,
                freeze_limit_ms=settings.freeze_limit_ms,
                read_lease_ms=settings.read_lease_ms,
                confirm_reads=settings.reads == "confirm",
                hand_over=self.config.takeover == "automatic",
                keep_bytes=settings.keep_bytes,
            ),
            self.instance,
        )
        self.node.keep.file = FileKept(path_beside(self.config.data_file))
        self.receiver = Receiver(self.node, self.driver)
        self.node.own_trim_ok = self.node.trim_ok = self.store.can_trim
        self.node.own_fast_zero_ok = self.node.fast_zero_ok = self.store.can_fast_zero

    def _run_loop(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.receiver.begin(self.loop)
        asyncio.set_event_loop(self.loop)
        self._main_task = self.loop.create_task(self._main())
        self._main_task.add_done_callback(self._main_ended)
        self.loop.run_forever()

    def _main_ended(self, task: "asyncio.Task[None]") -> None:
        """The clock never ends by itself, and nothing is left to an engine without one.

        It would go on to serve without deadlines and echoes; its peer can take over from a dead one
        only. Before the start is done, whoever starts it is told instead.
        """
        error = None if task.cancelled() else task.exception()
        error = error or NbdMirrorError("it was cancelled")
        if not self._started.is_set():
            self._start_error = error
            self._started.set()
            return
        report_to_stderr("fatal: the clock ended, and so does the engine", error)
        os._exit(NbdMirrorError.exit_code)

    async def _main(self) -> None:
        sb = self.node.sb
        me, peer = self.config.me, self.config.peer
        identity = Identity(
            mirror_id=sb.mirror_id,
            node_id=sb.node_id,
            node_uuid=sb.node_uuid,
            instance=self.instance,
        )
        self.peering = Peering(
            Credentials(
                identity, self.config.key, self.config.engine.integrity == "mac", self._tls
            ),
            (me.address.host, me.address.port),
            (peer.address.host, peer.address.port, peer.id),
            self._contact,
            self._note_peer,
        )
        control = ControlServer(self)
        await control.start(self.config.control_socket, self._control)
        peering = self.loop.create_task(self.peering.run())
        peering.add_done_callback(self._peering_ended)
        self.events.emit("started", instance=self.instance.hex(), pid=os.getpid())
        self._started.set()
        upkeep = Upkeep(self.node)
        while True:
            with self.driver.lock:
                upkeep.tick(self.now_ms())
                session = self.node.session
            if session is not None and session.outgoing:
                # The echo that is due, from here: a worker for it may be long in coming.
                session.link.kick()
            self.receiver.carry_out()
            self._shut_out()
            self.pool.hurry()
            await asyncio.sleep(TICK_S)

    def _shut_out(self) -> None:
        """Rule 22: whatever ended this node's term, its clients do not outlive it.

        From the second look on, so that the answers that are due are on their way; cut off only
        when they had REPLIES_LEAVE_S to arrive, as at a demotion.
        """
        due = self.handles > 0 and not self.is_primary() and not self.node.inflight
        self._looks = self._looks + 1 if due else 0
        if self._looks > 1:
            leaving = self._looks * TICK_S < REPLIES_LEAVE_S
            disconnect_clients(self._clients_at, socket.SHUT_RD if leaving else socket.SHUT_RDWR)

    def _peering_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            reason = f"peer port: {task.exception()}"
            self.events.emit("fatal", reason=reason)
            with contextlib.suppress(OSError):
                sys.stderr.write(f"nbdmirror: {reason}\n")

    def exit(self) -> None:
        """End the process now. The metadata is what `roles.stop` left; nothing else needs a
        goodbye.
        """
        self.events.wait_written(EVENTS_LEAVE_S)
        os._exit(0)

    # --- the peer -----------------------------------------------------------------------------

    def _note_peer(self, reason: str) -> None:
        reason = printable(reason)[:REASON_BYTES_MAX]
        node = self.node
        # Whoever connects and proves nothing is somebody else where the peer is here, and must not
        # cover what a peer that has proven itself was told. Whom this node dials is the peer.
        covers = self.peering.dials or node.refusal in ("", self._unproven)
        if node.session is None and covers:
            node.refusal = self._unproven = reason
        self.events.emit("no-peer", reason=reason)

    async def _contact(self, proven: Proven) -> None:
        """One authenticated connection, until its session has ended."""
        connection, channel, tls = proven.connection, proven.channel, proven.tls
        ended = self.loop.create_future()

        def closed() -> None:
            if not ended.done():
                ended.set_result(None)

        def lost(reason: str) -> None:
            self._lost(session, reason)

        with self.driver.lock:
            old = self.node.session
            known = self.node.sb.peer_uuid
            if old is not None and known in (bytes(16), channel.established_peer_uuid):
                # The peer has proven itself anew, so it has lost the old connection.
                self.node.lose_session(old, "the peer connected again")
            source: Source = connection
            if tls is None:
                link = TcpLink(self.loop, connection, lost, closed)
            else:
                source = link = TlsLink(self.loop, connection, lost, closed, tls)
            session = Session(self, channel, link, tls=tls.describe() if tls is not None else "")
            link.attach(session.outgoing)
        self.loop.add_reader(connection.fileno(), self.receiver.readable, source, session)
        self.spawn("negotiate", negotiate.negotiate(self.node, session))
        self.receiver.take_frames(session)
        if isinstance(link, TlsLink):
            link.begin(
                partial(self.receiver.readable, link, session), partial(self._renew, session)
            )
        await ended

    def _renew(self, session: Session) -> None:
        """Other keys are due: who sends data begins the session anew. Nobody is asked; where the
        peer does not come back at once, somebody is after all.
        """
        with self.driver.lock:
            if session.sending:
                self.node.lose_session(session, SPENT, ask=False)
        self.receiver.carry_out()

    def _lost(self, session: Session, reason: str) -> None:
        with self.driver.lock:
            self.node.lose_session(session, reason)
        self.receiver.carry_out()

    # --- what the core asks for (core/ports.py, Shell) -------------------------------------------

    def waiter(self) -> ThreadWaiter:
        """A fresh waiter."""
        return ThreadWaiter()

    def spawn(self, name: str, path: Path) -> None:
        """Drive a path on a worker thread."""
        self.pool.submit(name, lambda: self.driver.drive(path))

    def spawn_replica(self, path: Path) -> None:
        """Drive the replica path on the loop's thread where nothing blocks."""
        ReplicaDriver(self.driver, self.pool, path, INLINE, self.receiver.schedule).start()

    def pace(self, count: int) -> None:
        """Hold the resync back to the configured rate."""
        rate = self.config.engine.resync_rate
        if not rate:
            return
        with self.driver.lock:
            now_s = time.monotonic()
            begins_s = max(now_s, self._pace_next_s)
            self._pace_next_s = begins_s + count / rate
        threading.Event().wait(begins_s - now_s)

    def now_ms(self) -> int:
        """Goes on while the machine is suspended, which a lease has to notice."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def random_bytes(self, count: int) -> bytes:
        """From the system."""
        return secrets.token_bytes(count)

    def emit(self, kind: str, **facts: object) -> None:
        """To whoever follows the events."""
        self.events.emit(kind, **facts)

    def background_error(self, name: str, error: BaseException) -> None:
        """A path that runs beside the clients ended with an error nobody waits for."""
        self.events.emit("background-error", path=name, reason=f"{type(error).__name__}: {error}")
        report_to_stderr(name, error)

    # --- client operations, called by nbdkit's threads ----------

    def is_primary(self) -> bool:
        """Whether an export may be opened."""
        return self.node.role is Role.PRIMARY

    def pread(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill the buffer."""
        self.driver.drive(io.read(self.node, buffer, offset))

    def pwrite(self, buffer: ReadBuffer, offset: int, flags: int) -> None:
        """Write; `flags` are those of the wire."""
        self.driver.drive(io.write(self.node, buffer, offset, flags))

    def zero(self, offset: int, count: int, flags: int) -> None:
        """Make a range zero."""
        self.driver.drive(io.zero(self.node, offset, count, flags))

    def trim(self, offset: int, count: int, flags: int) -> None:
        """Give a range back."""
        self.driver.drive(io.trim(self.node, offset, count, flags))

    def flush(self) -> None:
        """Durable on every node that has it."""
        self.driver.drive(io.flush(self.node))

    def extents(self, offset: int, count: int) -> Any:
        """(start, end) of data."""
        return self.driver.drive(io.extents(self.node, offset, count))

    def cache(self, offset: int, count: int) -> None:
        """Read ahead; a hint."""
        os.posix_fadvise(self.store.fileno(), offset, count, os.POSIX_FADV_WILLNEED)

    def opened(self) -> None:
        """A client connected."""
        with self.handles_gone:
            self.handles += 1

    def closed(self) -> None:
        """A client is gone."""
        with self.handles_gone:
            self.handles -= 1
            self.handles_gone.notify_all()

    # --- commands ---------------------------------------------------------------------------

    def hurry(self) -> None:
        """Try to reach the peer now instead of after the pause."""
        self.loop.call_soon_threadsafe(self.peering.hurry)

    def demote(self, guard: Guard) -> None:
        """Stop serving, then disconnect every client and wait until they are gone.

        If some do not go, an event says so: they hear ESHUTDOWN to whatever they ask, and the clock
        goes on shutting them out.
        """
        self.driver.drive(guard(roles.demote(self.node)))
        if not self.disconnect():
            self.events.emit("clients-stay", clients=self.handles)

    def disconnect(self) -> bool:
        """Shut every client's socket down; True when all handles are closed in time.

        First so that replies on their way arrive: a client is to hear ESHUTDOWN, not silence. Then
        for good, because a client need not read them.
        """
        for how, bound_s in (
            (socket.SHUT_RD, REPLIES_LEAVE_S),
            (socket.SHUT_RDWR, CLIENTS_GONE_S),
        ):
            until_s = time.monotonic() + bound_s
            while (left_s := until_s - time.monotonic()) > 0:
                # Again and again: one that was just being opened is not in the first look.
                disconnect_clients(self._clients_at, how)
                with self.handles_gone:
                    if self.handles_gone.wait_for(lambda: self.handles == 0, min(TICK_S, left_s)):
                        return True
        return False

    def stop(self, guard: Guard) -> None:
        """Leave in order; the caller ends the process."""
        self.driver.drive(guard(roles.stop(self.node)))
        self.disconnect()
