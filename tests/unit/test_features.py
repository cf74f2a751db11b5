"""What two ends agree on: nobody talks a node that asks for keyed codes into less."""

from typing import Any

import pytest

from nbdmirror.core.handshake import Established, Handshake, Identity, RefusalCode, offers
from nbdmirror.errors import PeerProtocolError, PeerRefusedError

ONE = Identity(b"m" * 16, 1, b"1" * 16, b"i" * 16)
TWO = Identity(b"m" * 16, 2, b"2" * 16, b"j" * 16)
# Where REPLY has its features: before the proof, the last byte.
FEATURES_END = 33


def dialer(**more: Any) -> Handshake:
    return Handshake(dialer=True, psk=b"k" * 32, me=ONE, nonce=b"n" * 32, **more)


def listener(**more: Any) -> Handshake:
    return Handshake(dialer=False, psk=b"k" * 32, me=TWO, nonce=b"o" * 32, **more)


def meet(one: Handshake, two: Handshake) -> None:
    assert two.receive(one.receive(two.receive(one.start()))) == b""


def done(handshake: Handshake) -> Established:
    assert handshake.done is not None
    return handshake.done


def offering(asks: bool) -> dict[str, Any]:
    features, required = offers(macs=asks)
    return {"features": features, "required": required}


@pytest.mark.parametrize(
    ("mine", "theirs"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_of_two_wishes_for_integrity_the_stronger_one_counts(mine: bool, theirs: bool) -> None:
    """Breaks in the field: one node is set to "mac", and its data travels without a keyed code."""
    one, two = dialer(**offering(mine)), listener(**offering(theirs))
    meet(one, two)
    assert done(one).frame_macs == done(two).frame_macs == (mine or theirs)


@pytest.mark.parametrize("features", [0, 2, 0xFF00])
def test_a_node_that_asks_for_macs_goes_on_with_nothing_less(features: int) -> None:
    """Breaks in the field: a peer with an older program turns the keyed code off for both."""
    two = listener(**offering(True))
    with pytest.raises(PeerRefusedError, match=r'engine\.integrity = "mac" requires'):
        two.receive(dialer(features=features).start())
    assert two.refusal[3] == RefusalCode.FEATURES
    one = dialer(**offering(True))
    reply = listener(features=features).receive(one.start())
    with pytest.raises(PeerRefusedError, match="update the program of the peer"):
        one.receive(reply)
    assert one.done is None


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_wish_for_macs_cannot_be_taken_out_on_the_way(bits: int) -> None:
    """Breaks in the field: who sits between the nodes switches the keyed code off by two bits."""
    one, two = dialer(**offering(True)), listener(**offering(False))
    hello = one.start()
    with pytest.raises(PeerProtocolError):
        one.receive(two.receive(hello[:-1] + bytes((hello[-1] & ~bits,))))
    one, two = dialer(**offering(False)), listener(**offering(True))
    reply = two.receive(one.start())
    at = len(reply) - FEATURES_END
    with pytest.raises(PeerProtocolError):
        one.receive(reply[:at] + bytes((reply[at] & ~bits,)) + reply[at + 1 :])
    assert one.done is None
