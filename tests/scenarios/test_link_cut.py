"""The connection between the nodes breaks: at any byte, silently, again and again."""

import random
import select
import socket
import threading

import pytest

from tests.support.load import Load
from tests.support.pair import Pair
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def take(end: socket.socket, count: int) -> None:
    """Receive `count` bytes."""
    while count:
        piece = end.recv(min(count, 1 << 20))
        assert piece, "the connection ended"
        count -= len(piece)


def test_the_relay_passes_on_when_both_directions_are_full() -> None:
    """Breaks in the field: nothing. But a relay that dies of two full directions, as a resync under
    load makes them, is a cut for ever that no test has asked for.
    """
    data = bytes(64 << 20)  # more than the sockets on the way can hold
    proxy = Proxy()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.target = listener.getsockname()[:2]
        one = socket.create_connection(proxy.address)
        other, _ = listener.accept()
    with one, other:
        senders = [
            threading.Thread(target=end.sendall, args=(data,), daemon=True) for end in (one, other)
        ]
        for end in (one, other):
            end.settimeout(60)
        senders[0].start()
        while select.select([], [one], [], 0.5)[1]:
            pass  # until nothing more fits into this direction
        senders[1].start()
        for end in (one, other):
            take(end, len(data))
    proxy.close()


def test_cut_at_random_bytes_resumes(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a broken connection loses, doubles or reorders writes in flight."""
    pair, proxy = proxied
    alpha, beta = pair.both
    dice = random.Random(7)
    load = Load(alpha.uri, depth=16).start()
    generation = alpha.state()["generation"]
    for _ in range(12):
        load.wait(60)
        seen, cuts = alpha.last_event(), proxy.cuts
        proxy.cut_after(dice.randrange(1, 120_000))
        lost = alpha.wait_event("session-lost", after=seen)
        alpha.wait_event("resumed", after=lost["number"])
        assert proxy.cuts > cuts
    load.wait(100)
    load.stop()
    assert not load.error
    assert alpha.state()["generation"] == generation, "nothing was decided, so nothing changes"
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_cut_while_idle_resumes(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a switch that restarts at night costs a resync of nothing."""
    pair, proxy = proxied
    alpha = pair.alpha
    for _ in range(3):
        seen = alpha.last_event()
        proxy.cut_after(0)
        alpha.wait_event("resumed", after=seen)
    pair.synced()
    assert not [e for e in alpha.events if e["event"] == "resync-started"][1:]
    pair.stop()
    pair.assert_equal()


def test_black_hole_freezes_and_resumes(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a firewall that swallows packets stops the mirror for minutes."""
    pair, proxy = proxied
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=8).start()
    load.wait(100)
    seen = alpha.last_event()
    proxy.swallow(True)
    lost = alpha.wait_event("session-lost", after=seen)
    proxy.swallow(False)
    alpha.wait_event("resumed", after=lost["number"])
    load.wait(100)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_cut_during_the_resync(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a resync that breaks off leaves differences that no map knows."""
    pair, proxy = proxied
    alpha, beta = pair.both
    load = Load(alpha.uri, slots=3500, depth=16).start()
    proxy.refuse(True)
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(2500)
    dice = random.Random(11)
    for _ in range(8):
        seen = alpha.last_event()
        proxy.cut_after(dice.randrange(500, 1_500_000))
        proxy.refuse(False)
        alpha.wait_event("session-lost", after=seen)
        assert beta.state()["role"] != "primary"
        if alpha.state()["frozen"]:
            # It broke off after step (a) of the joint step: the right is given up.
            alpha.command("alone")
    pair.synced()
    load.wait(100)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
