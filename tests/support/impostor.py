"""Somebody at the peer port who is not the peer: with or without the key, polite or not.

Owns one plain socket. With the key it can prove itself as the other node and send frames that no
engine of ours would send.
"""

import contextlib
import os
import socket
from dataclasses import dataclass

from nbdmirror.admin import derive_mirror_id
from nbdmirror.core.channel import Channel
from nbdmirror.core.handshake import PROTOCOL_VERSION, Handshake, Identity
from tests.support.pair import PEER_PORT, Engine, Pair

TIMEOUT_S = 10.0


def dial(pair: Pair, engine: Engine) -> socket.socket:
    """A connection to the peer port of an engine that listens."""
    return socket.create_connection((pair.hosts[engine.name], PEER_PORT), TIMEOUT_S)


def ended_by_the_other(connection: socket.socket) -> bytes:
    """Read until the other end closes; returns what it said.

    Raises:
        TimeoutError: it keeps the connection open.
    """
    said = b""
    try:
        while piece := connection.recv(65536):
            said += piece
    except ConnectionResetError:
        pass
    return said


@dataclass
class Proven:
    """A connection whose handshake is done."""

    connection: socket.socket
    channel: Channel


def prove(
    pair: Pair,
    engine: Engine,
    *,
    key: bytes = b"",
    versions: tuple[int, int] = (PROTOCOL_VERSION, PROTOCOL_VERSION),
    node_id: int = 1,
) -> Proven:
    """Shake hands as node `node_id`, by default with the mirror's own key.

    Raises:
        PeerProtocolError: refused; the text is the reason that was given.
    """
    config = engine.config
    me = Identity(
        mirror_id=derive_mirror_id(config.key, config.mirror),
        node_id=node_id,
        node_uuid=os.urandom(16),
        instance=os.urandom(16),
    )
    connection = dial(pair, engine)
    channel = Channel(Handshake(True, key or config.key, me, os.urandom(32), versions))
    try:
        connection.sendall(channel.start())
        while channel.established is None:
            count = connection.recv_into(channel.buffer_for_read())
            assert count, "closed in the handshake, without a word"
            channel.received(count)
            connection.sendall(channel.take_outgoing())
    except BaseException:
        with contextlib.suppress(OSError):
            connection.sendall(channel.refusal)
        connection.close()
        raise
    return Proven(connection, channel)
