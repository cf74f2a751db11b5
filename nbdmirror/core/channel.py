"""One connection to the peer, as bytes: first the handshake, then frames.

Owns the order of the two, and the choice, once for each session, of how its frames are made and
checked. Pure: whoever owns the socket moves the bytes. Must never read a frame before the handshake
is done, or a data frame before `open_data`.

Use: send `start()`; then for ever: read into `buffer_for_read()`, tell `received(count)`, send
`take_outgoing()`, take `frames()`. After an error send `refusal` (it may be empty) and close.
"""

from collections.abc import Callable
from typing import TypeAlias

from nbdmirror.core.handshake import Established, Handshake
from nbdmirror.core.messages import Message
from nbdmirror.core.ports import ReadBuffer
from nbdmirror.core.sealed import FrameSender, SealedReader, SealedSender
from nbdmirror.core.wire import Frame, FrameReader, FrameType
from nbdmirror.limits import HANDSHAKE_BYTES_MAX

Encoder: TypeAlias = Callable[[FrameType, int, int, int, int, ReadBuffer], bytes]


class Channel:
    """Handshake and frames of one connection. Not safe for threads: the engine's lock is."""

    def __init__(self, handshake: Handshake) -> None:
        self._handshake = handshake
        self._reader: FrameReader | None = None
        self._hello_buffer = bytearray(HANDSHAKE_BYTES_MAX)
        self._outgoing = b""
        self._sender: FrameSender | None = None
        # What stands before the payload of a frame (type, flags, seq, offset, aux, payload) that is
        # no CONTROL frame. A value, so that no write asks which integrity its session has.
        self.encode: Encoder = _no_session

    @property
    def established(self) -> Established | None:
        """What the handshake agreed on, once both ends have proven themselves."""
        return self._handshake.done

    @property
    def established_peer_uuid(self) -> bytes:
        """The identity that the other end has proven, zeros before."""
        done = self._handshake.done
        return done.peer.node_uuid if done is not None else bytes(16)

    @property
    def refusal(self) -> bytes:
        """What to send before closing after a failed handshake."""
        return self._handshake.refusal

    def start(self) -> bytes:
        """The first bytes to send; none on the side that listens."""
        return self._handshake.start()

    # --- receiving --------------------------------------------------------------------------

    def buffer_for_read(self) -> memoryview:
        """Where the next received bytes go; valid until the next call of this channel."""
        if self._reader is None:
            return memoryview(self._hello_buffer)
        return self._reader.buffer_for_read()

    def received(self, count: int) -> None:
        """`count` bytes were put at the start of what `buffer_for_read` returned.

        Raises:
            PeerProtocolError: the handshake failed (see Handshake.receive).
        """
        if self._reader is not None:
            self._reader.received(count)
            return
        assert 0 <= count <= HANDSHAKE_BYTES_MAX, f"{count} bytes were never asked for"
        self._outgoing += self._handshake.receive(bytes(self._hello_buffer[:count]))
        if self._handshake.done is not None:
            self._begin(self._handshake.done)

    def _begin(self, established: Established) -> None:
        if established.frame_macs:
            self._sender = SealedSender(established)
            reader: FrameReader = SealedReader(established)
        else:
            self._sender = FrameSender(established)
            reader = FrameReader(
                established.session, established.receive_seed, None, established.receive_mac_key
            )
        self.encode = self._sender.encode
        leftover = established.leftover
        reader.buffer_for_read()[: len(leftover)] = leftover
        reader.received(len(leftover))
        self._reader = reader

    def take_outgoing(self) -> bytes:
        """The handshake bytes that are due now; each is returned once."""
        outgoing, self._outgoing = self._outgoing, b""
        return outgoing

    def open_data(self, device_bytes: int, first_seq: int) -> None:
        """Accept data frames from now on, the first one with sequence number `first_seq`.

        Before it (and `open_answers`) only CONTROL and ECHO are accepted. Call it again when the
        direction of the data changes. Then call `frames()`: what came right behind the opening
        message was held back.
        """
        assert self._reader is not None, "no session yet"
        self._reader.expect(first_seq, device_bytes)

    def open_answers(self) -> None:
        """Accept ACK, FLUSHED, NACK and HASH_REPLY: this node is about to send data frames.

        Data frames stay refused if they were: a source is written to by nobody.
        """
        assert self._reader is not None, "no session yet"
        self._reader.expect_answers()

    def frames(self) -> list[Frame]:
        """All frames that are complete, checked; `payload` of a CONTROL frame is its Message.

        Raises:
            PeerProtocolError: the first violation; the session is over.
        """
        if self._reader is None:
            return []
        return self._reader.frames()

    # --- sending ----------------------------------------------------------------------------

    def control_frame(self, message: Message) -> bytes:
        """A whole CONTROL frame. Frames leave in the order in which they were made here."""
        assert self._sender is not None, "no session yet"
        return self._sender.control(message)


def _no_session(*_fields: object) -> bytes:
    raise AssertionError("no session yet")
