"""A relay between two engines that harms one frame of a chosen type and direction.

Owns the faults that can happen to a frame, the count of frames of each type that it saw, and what
is held back. The handshake passes as it is. A fault happens once, to the k-th frame of its type and
sender from `arm` on, in whatever connection that is. Must never: harm what it was not told to, need
a key, or hold more than HELD_BYTES_MAX back.
"""

import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

from tests.support.frames import DIALER, KINDS, LISTENER, SENDERS, Cutter, Offers, Piece
from tests.support.proxy import PAUSE_S, Proxy

HELD_BYTES_MAX: Final = 64 << 20
# How many frames of its direction come between a frame and its repetition.
REPLAY_AFTER_COUNT: Final = 3
HOLD_S: Final = 0.3
FOR_EVER_S: Final = 1e9
WAIT_S: Final = 60.0
FAULTS: Final = (
    "corrupt-header",  # a byte of header or MAC
    "corrupt-payload",  # a byte behind them; of a frame without a payload as above
    "hold",  # it, and all behind it, for a moment
    "hold-long",  # until `release`, also when its sender has given the connection up
    "drop",
    "duplicate",
    "replay",  # once more, a few frames later
    "replay-next",  # the connection ends with it; once more in the next one
    "close-before",
    "close-middle",
    "close-after",
    "call",  # something happens while it is on its way: `Fault.call`
)


@dataclass(frozen=True)
class Fault:
    """What happens to which frame. `at`: the byte that is changed, counted round."""

    what: str
    kind: str
    sender: str
    k: int = 1
    at: int = 0
    call: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        known = self.what in FAULTS and self.kind in KINDS and self.sender in SENDERS
        if not known or self.k < 1:
            raise ValueError(f"{self}: no such fault")

    def __str__(self) -> str:
        return ":".join((self.kind, self.sender, self.what, str(self.k), str(self.at)))

    @classmethod
    def of(cls, text: str) -> "Fault":
        """From what a replay names. Raises ValueError."""
        kind, sender, what, k, at = text.split(":")
        return cls(what, kind, sender, int(k), int(at))


class Armed:
    """A fault that is to happen, or has."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.left = fault.k
        self.happened = threading.Event()
        self.harmed = b""

    def wait(self, bound_s: float = WAIT_S) -> None:
        """Until it has happened. Raises TimeoutError: no such frame came."""
        if not self.happened.wait(bound_s):
            raise TimeoutError(f"{self.fault}: no such frame within {bound_s} s")


class Lane:
    """One direction of one connection."""

    def __init__(self, cutter: Cutter, target: socket.socket) -> None:
        self.cutter = cutter
        self.target = target
        self.frames_count = 0
        self.held_until: float | None = None
        self.held = bytearray()
        self.ended = False  # its sender said its last word while it was held
        self.deaf = False  # nobody is left to hear its receiver
        self.later: list[tuple[int, bytes]] = []  # frames to be repeated, and behind which one


class FrameProxy(Proxy):
    """A relay that knows where frames begin and end."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self._armed: list[Armed] = []
        self._silent: set[str] = set()
        self._next: dict[str, list[bytes]] = {sender: [] for sender in SENDERS}
        self._lanes: dict[socket.socket, Lane] = {}
        super().__init__()

    # --- what a test does ---------------------------------------------------------------------

    def arm(self, fault: Fault) -> Armed:
        """Let it happen, from now on."""
        armed = Armed(fault)
        with self._lock:
            self._armed.append(armed)
        return armed

    def disarm(self) -> None:
        """What has not happened does not; what is held goes on."""
        with self._lock:
            self._armed.clear()
            self._next = {sender: [] for sender in SENDERS}
        self.release()

    def release(self) -> None:
        """Let what is held go on now."""
        with self._lock:
            for lane in self._lanes.values():
                if lane.held_until is not None:
                    lane.held_until = 0.0
        self._wake()

    def silence(self, *senders: str) -> None:
        """From now on nothing that these say arrives, and no end is told; nobody: all is reset."""
        with self._lock:
            self._silent = set(senders)
            if not senders:
                self._reset_all()

    def reset(self) -> None:
        """Every connection ends now."""
        with self._lock:
            self._reset_all()

    # --- the relay ----------------------------------------------------------------------------

    def _opened(self, inner: socket.socket, outer: socket.socket) -> None:
        offers = Offers()
        self._lanes[inner] = Lane(Cutter(DIALER, offers), outer)
        self._lanes[outer] = Lane(Cutter(LISTENER, offers), inner)

    def _closed(self, one: socket.socket) -> None:
        self._lanes.pop(one, None)

    def _passed(self, source: socket.socket, piece: bytes) -> tuple[bytes, bool]:
        lane = self._lanes[source]
        if lane.deaf or lane.cutter.sender in self._silent:
            return b"", False
        out, closing = bytearray(), False
        for each in lane.cutter.feed(piece):
            data, closing = self._harmed(lane, each) if each.kind else (each.data, False)
            (out if lane.held_until is None else lane.held).extend(data)
            if closing:
                break
        return bytes(out), closing or len(lane.held) > HELD_BYTES_MAX

    def _ended(self, source: socket.socket) -> None:
        """What is held still arrives, and only then does the other end learn of it; after a
        silence it never does.
        """
        lane = self._lanes[source]
        if lane.held_until is None and lane.cutter.sender not in self._silent:
            self._drop(source)
            return
        lane.ended = lane.held_until is not None
        self._lanes[lane.target].deaf = True
        self._selector.unregister(source)

    def _pause_s(self) -> float:
        with self._lock:
            due = [each.held_until for each in self._lanes.values() if each.held_until is not None]
        return max(0.0, min([PAUSE_S, *(each - monotonic() for each in due)]))

    def _due(self) -> None:
        now = monotonic()
        for source, lane in list(self._lanes.items()):
            if source not in self._lanes or lane.held_until is None or lane.held_until > now:
                continue
            lane.held_until, held, lane.held = None, bytes(lane.held), bytearray()
            self._send(lane.target, held)
            if lane.ended and source in self._lanes:
                self._drop(source)

    # --- faults -------------------------------------------------------------------------------

    def _harmed(self, lane: Lane, piece: Piece) -> tuple[bytes, bool]:
        """What goes on instead of a frame, and whether the connection ends after it."""
        sender = lane.cutter.sender
        lane.frames_count += 1
        self.seen[piece.kind, sender] += 1
        data, closing = piece.data, False
        armed = self._meant(piece.kind, sender)
        if armed is not None:
            data, closing = self._happen(armed, lane, piece)
        repeated = [old for number, old in lane.later if number <= lane.frames_count]
        lane.later = [each for each in lane.later if each[0] > lane.frames_count]
        if not closing:
            # In a new connection behind its first frame.
            repeated += self._next[sender]
            self._next[sender] = []
        if armed is not None and armed.fault.what == "replay-next":
            self._next[sender].append(piece.data)
        return data + b"".join(repeated), closing

    def _meant(self, kind: str, sender: str) -> Armed | None:
        """The fault that this frame is the k-th for; the count of each goes on."""
        for armed in self._armed:
            if (armed.fault.kind, armed.fault.sender) == (kind, sender):
                armed.left -= 1
        meant = next((armed for armed in self._armed if armed.left == 0), None)
        if meant is not None:
            self._armed.remove(meant)
        return meant

    def _happen(self, armed: Armed, lane: Lane, piece: Piece) -> tuple[bytes, bool]:
        fault, data = armed.fault, piece.data
        armed.harmed = data
        armed.happened.set()
        what = fault.what
        if what.startswith("close") or what == "replay-next":
            count = {"close-before": 0, "close-middle": len(data) // 2}.get(what, len(data))
            return data[:count], True
        if what.startswith("corrupt"):
            return corrupted(piece, fault), False
        if what.startswith("hold"):
            lane.held_until = monotonic() + (HOLD_S if what == "hold" else FOR_EVER_S)
        elif what == "replay":
            lane.later.append((lane.frames_count + REPLAY_AFTER_COUNT, data))
        elif what == "call":
            assert fault.call is not None
            fault.call()
        return {"drop": b"", "duplicate": data + data}.get(what, data), False


def corrupted(piece: Piece, fault: Fault) -> bytes:
    """One byte is another one."""
    data = bytearray(piece.data)
    if fault.what == "corrupt-payload" and piece.payload_bytes:
        data[piece.head_bytes + fault.at % piece.payload_bytes] ^= 0x20
    else:
        data[fault.at % piece.head_bytes] ^= 0x20
    return bytes(data)
