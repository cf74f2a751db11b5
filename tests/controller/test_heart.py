"""The heartbeats on real UDP sockets: two hearts, or one heart and a peer that is moved by hand."""

import asyncio
import contextlib
import threading

import pytest

from nbdmirror.config import Address
from nbdmirror.controller.heart import RECEIVE_MAX, Heart
from nbdmirror.core.cluster.heartbeat import BODY_BYTES_MAX, Refusal
from nbdmirror.errors import ConfigError
from tests.support.hearts import (
    MIRROR,
    PORT,
    SILENCE_MS,
    Ear,
    bound,
    ip,
    node,
    nodes,
    puppet,
    run,
    run_in_network,
    started,
    until,
)

PAUSE_S = 2.0


# --- two hearts ---------------------------------------------------------------------------------


def test_two_hearts_hear_each_other() -> None:
    """Breaks in the field: two healthy nodes take each other for dead."""

    async def main() -> None:
        one, two = nodes()
        ears = Ear(one, two), Ear(two, one)
        ears[0].heart.say(b"one")
        assert not ears[0].heart.ever_heard()
        async with started(*ears):
            await until(lambda: ears[0].link().up and ears[1].link().up, "not both up")
            await until(lambda: ears[1].bodies, "no body")
            assert ears[1].bodies[0] == b"one"
            assert ears[0].bodies == []  # the other one has nothing to say
            assert ears[0].heart.ever_heard()
            facts = ears[0].link()
            beats = one.heartbeats[0], two.heartbeats[0]
            assert (facts.name, facts.local, facts.remote) == ("network 1", *map(str, beats))
            assert facts.reason == ""
            assert facts.rtt_ms is not None
            ears[1].heart.say(b"b" * BODY_BYTES_MAX)
            await until(lambda: b"b" * BODY_BYTES_MAX in ears[0].bodies, "no longest body")
            opened = ears[0].heart._networks[0].socket
            assert opened is not None
            assert not opened.get_inheritable()

    run(main)


def test_what_is_said_now_is_sent_now() -> None:
    """Breaks in the field: a node that leaves is missed for as long as one that died."""

    async def main() -> None:
        one, two = nodes()
        ear = Ear(one, two, heartbeat_ms=10_000)
        with puppet(two, one) as peer:
            async with started(ear):

                def spoken() -> bool:
                    ear.heart.say(b"leaving", now=True)
                    peer.say(b"")
                    return peer.links[0].newest is not None

                await until(spoken, "nothing was sent before the next heartbeat was due")
                assert peer.links[0].newest is not None
                assert peer.links[0].newest.body == b"leaving"

    run(main)


def test_a_restarted_heart_is_heard_again() -> None:
    """Breaks in the field: after the restart of a controller the pair never meets again."""

    async def main() -> None:
        one, two = nodes()
        left, right = Ear(one, two), Ear(two, one)
        right.heart.say(b"first life")
        async with started(left):
            async with started(right):
                await until(lambda: left.bodies and right.link().up, "never met")
            again = Ear(two, one)
            again.heart.say(b"second life")
            async with started(again):
                await until(lambda: b"second life" in left.bodies, "the new life is not heard")
                await until(lambda: again.link().up and left.link().up, "not both up")

    run(main)


@pytest.mark.slow
def test_a_peer_that_ends_becomes_silent() -> None:
    """Breaks in the field: the primary is dead and nobody takes over."""

    async def main() -> None:
        one, two = nodes()
        left, right = Ear(one, two), Ear(two, one)
        async with started(left):
            async with started(right):
                await until(lambda: left.link().up, "never met")
            await until(lambda: left.heart.silent_ms() >= SILENCE_MS, "no silence")
            facts = left.link()
            assert not facts.up
            assert "the peer is silent" in facts.reason
            assert facts.rtt_ms is None
            assert left.heart.ever_heard()
            left.heart._networks[0].link.refuse(Refusal.OLD)
            assert "refused" not in left.link().reason  # a straggler explains nothing
            left.heart._networks[0].link.refuse(Refusal.KEY)
            assert Refusal.KEY.value in left.link().reason

    run(main)


def test_a_peer_that_never_came_is_silent_since_the_start() -> None:
    """Breaks in the field: a node that starts alone waits for ever, or not at all."""

    async def main() -> None:
        ear = Ear(*nodes())
        async with started(ear):
            assert ear.heart.silent_ms() < SILENCE_MS
            await until(lambda: ear.heart.silent_ms() >= 200, "no silence")
            assert not ear.heart.ever_heard()
            assert ear.link().silent_ms is None

    run(main)


def test_the_channel_is_a_network_of_its_own() -> None:
    """Breaks in the field: all heartbeats are cut, the channel lives, and a node takes over."""

    async def main() -> None:
        one, two = nodes()
        ears = Ear(one, two), Ear(two, one)
        ears[0].heart.say(b"over the channel")
        ears[0].heart.silent_ms()  # rounds without sockets
        for _ in range(3):
            ears[1].heart.take_extra(ears[0].heart.extra_packet())
            ears[0].heart.take_extra(ears[1].heart.extra_packet())
        for ear in ears:
            assert ear.heart.ever_heard()
            assert [each.up for each in ear.heart.links()] == [False, True]
            assert ear.link(1).name == "channel"
        assert ears[1].bodies[-1] == b"over the channel"
        ears[1].heart.take_extra(b"garbage")
        assert ears[1].link(1).refused_count == 1

    run(main)


@pytest.mark.slow
def test_who_is_heard_on_the_channel_alone_is_not_silent() -> None:
    """Breaks in the field: a busy switch loses all heartbeats, and a living primary is deposed."""

    async def main() -> None:
        one, two = nodes()
        ear, channel = Ear(one, two), Ear(two, one).heart
        async with started(ear):
            await until(lambda: ear.heart.silent_ms() >= 1000, "no silence")
            for _ in range(3):
                channel.take_extra(ear.heart.extra_packet())
                ear.heart.take_extra(channel.extra_packet())
            assert ear.heart.silent_ms() < 1000

    run(main)


# --- what others send ---------------------------------------------------------------------------


def test_a_replay_from_the_right_address_is_refused() -> None:
    """Breaks in the field: with a recording a dead primary holds back its successor for ever."""

    async def main() -> None:
        one, two = nodes()
        ear = Ear(one, two)
        with puppet(two, one) as peer:
            async with started(ear):
                await peer.meet(ear)
                peer.say(b"last word")
                await until(lambda: b"last word" in ear.bodies, "the last word is not heard")
                heard_ms = ear.heart._networks[0].link.heard_ms
                bodies, refused = list(ear.bodies), ear.link().refused_count
                for datagram in peer.said:
                    peer.send(datagram)
                await until(
                    lambda: ear.link().refused_count >= refused + len(peer.said), "not all refused"
                )
                assert ear.heart._networks[0].link.heard_ms == heard_ms
                assert ear.bodies == bodies

    run(main)


def test_only_the_peers_host_is_listened_to_on_any_port() -> None:
    """Breaks in the field: a stranger costs time, or a peer behind another port is not heard."""

    async def main() -> None:
        one, two = nodes()
        ear = Ear(one, two)
        beat = two.heartbeats[0]
        with (
            puppet(two, one) as peer,
            contextlib.closing(bound(beat.host, 0)) as port,
            contextlib.closing(bound("127.0.0.1", 0)) as stranger,
        ):
            async with started(ear):
                await peer.meet(ear)
                refused = ear.link().refused_count
                datagram = peer.word(b"from another port")
                stranger.sendto(datagram, peer.targets[0])
                await until(lambda: ear.link().refused_count == refused + 1, "not refused")
                assert b"from another port" not in ear.bodies
                port.sendto(datagram, peer.targets[0])
                await until(lambda: b"from another port" in ear.bodies, "not heard")

    run(main)


@pytest.mark.slow
def test_a_flood_stops_nothing() -> None:
    """Breaks in the field: anybody in the network can make a node lose its peer."""

    async def main() -> None:
        one, two = nodes()
        left, right = Ear(one, two), Ear(two, one)
        beat = two.heartbeats[0]
        async with started(left, right):
            await until(lambda: left.link().up and right.link().up, "never met")
            target = (one.heartbeats[0].host, PORT)
            with contextlib.closing(bound(beat.host, 0)) as flood:
                for count in range(20_000):
                    # Garbage, too long, and with our magic.
                    garbage = (b"x" * 50, b"x" * 4000, b"NBDMBEAT\x01" + bytes(200))[count % 3]
                    with contextlib.suppress(BlockingIOError):
                        flood.sendto(garbage, target)
                    if count % 100 == 0:
                        await asyncio.sleep(0)
                        assert left.heart.silent_ms() < SILENCE_MS
            right.heart.say(b"after the flood")
            await until(lambda: b"after the flood" in left.bodies, "deaf after the flood")
            assert 1000 < left.link().refused_count <= 20_000
            assert len(left.heart._networks[0].link.refused) <= 3

    run(main)


def test_what_is_received_at_once_is_bounded() -> None:
    """Breaks in the field: a flood keeps the loop, and with it probe and claim, from running."""

    async def main() -> None:
        one, two = nodes()
        ear = Ear(one, two, heartbeat_ms=10_000)
        with puppet(two, one) as peer:
            async with started(ear):
                for _ in range(2 * RECEIVE_MAX):
                    peer.send(b"x")
                ear.heart._readable(ear.heart._networks[0])
                assert ear.link().refused_count == RECEIVE_MAX
                await until(lambda: ear.link().refused_count == 2 * RECEIVE_MAX, "the rest is left")

    run(main)


# --- more networks than one ---------------------------------------------------------------------


@pytest.mark.slow
def test_one_of_two_networks_is_enough() -> None:
    """Breaks in the field: a pulled cable of two makes a node take over, or is not shown."""

    async def main() -> None:
        one, two = nodes(networks=2)
        ear = Ear(one, two)
        with puppet(two, one) as peer:
            async with started(ear):
                await peer.meet(ear, 0)
                await peer.meet(ear, 1)

                def lost() -> bool:
                    peer.say(b"", 0)
                    return not ear.link(1).up

                await until(lost, "the cut network is shown as up")
                assert "silent" in ear.link(1).reason
                assert ear.link(0).up
                assert ear.heart.silent_ms() < SILENCE_MS
                # And the other way round.
                await peer.meet(ear, 1)

    run(main)


def test_an_older_body_on_a_slower_network_is_not_handed_on() -> None:
    """Breaks in the field: a slow network brings back a role that the peer has left."""

    async def main() -> None:
        one, two = nodes(networks=2)
        ear = Ear(one, two)
        with puppet(two, one) as peer:
            async with started(ear):
                await peer.meet(ear, 0)
                await peer.meet(ear, 1)
                older = peer.word(b"older", 1)
                peer.say(b"newer", 0)
                await until(lambda: b"newer" in ear.bodies, "not heard")
                peer.send(older, 1)
                link = ear.heart._networks[1].link
                await until(lambda: link.newest and link.newest.body == b"older", "not fresh")
                assert ear.bodies[-1] == b"newer"

    run(main)


# --- this process -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pause_of_this_process_is_no_silence_of_the_peer() -> None:
    """Breaks in the field: a node that was paused takes over from a peer that lives."""

    async def main() -> None:
        one, two = nodes()
        ear = Ear(one, two)
        with puppet(two, one) as peer:
            async with started(ear):
                await peer.meet(ear)
                before_ms = ear.heart.silent_ms()
                threading.Event().wait(PAUSE_S)  # the loop stands still: this is the fault
                assert ear.heart.silent_ms() < before_ms + SILENCE_MS // 2
                # What the peer said meanwhile is heard before anything is concluded.
                peer.say(b"said in the pause")
                threading.Event().wait(PAUSE_S)
                assert ear.heart.silent_ms() == 0
                assert b"said in the pause" not in ear.bodies  # not from inside of a question
                await until(lambda: ear.bodies[-1] == b"said in the pause", "never handed on")

    run(main)


# --- addresses ----------------------------------------------------------------------------------


def test_an_address_in_use_ends_the_start() -> None:
    """Breaks in the field: a second controller starts beside the first, and both are half deaf."""

    async def main() -> None:
        one, two = nodes(networks=2)
        taken = one.heartbeats[1]
        with contextlib.closing(bound(taken.host, taken.port)):
            heart = Ear(one, two).heart
            with pytest.raises(ConfigError, match=r"heartbeats at 127\..*in use; end the program"):
                await heart.start()
        # Nothing stayed open: another one gets both.
        async with started(Ear(one, two)):
            pass

    run(main)


def test_no_key_no_heart() -> None:
    """Breaks in the field: a node whose key file is empty believes anybody."""
    one, two = nodes()
    heard: list[bytes] = []
    with pytest.raises(ConfigError, match="0 bytes"):
        Heart(b"", MIRROR, one, two, heartbeat_ms=1, silence_ms=5, on_body=heard.append)


@pytest.mark.net
@pytest.mark.slow
def test_an_address_that_comes_later_is_used_then() -> None:
    """Breaks in the field: at boot the controller is faster than the network, and gives up."""

    async def main() -> None:
        one = node(1, (Address("192.0.2.1", PORT), Address("127.0.0.1", PORT)))
        two = node(2, (Address("192.0.2.2", PORT), Address("127.0.0.2", PORT)))
        left, right = Ear(one, two), Ear(two, one)
        async with started(left, right):
            await until(lambda: left.link(1).up, "the network that is there does not work")
            assert not left.link().up
            assert "heartbeats at 192.0.2.1:7789: Cannot assign" in left.link().reason
            ip("address", "add", "192.0.2.1/32", "dev", "lo")
            ip("address", "add", "192.0.2.2/32", "dev", "lo")
            await until(lambda: left.link().up and right.link().up, "never tried again")
            assert left.link().reason == ""

    run_in_network(main)


@pytest.mark.net
def test_a_network_without_a_way_is_told_and_raises_nothing() -> None:
    """Breaks in the field: an unplugged cable ends the controller."""

    async def main() -> None:
        one = node(1, (Address("127.0.0.1", PORT),))
        two = node(2, (Address("198.51.100.1", PORT),))
        ear = Ear(one, two)
        async with started(ear):
            ear.heart.say(b"x", now=True)
            assert "sending to 198.51.100.1:7789: " in ear.link().reason
            assert "nothing was heard" in ear.link().reason

    run_in_network(main)


@pytest.mark.net
def test_networks_may_be_of_ipv6() -> None:
    """Breaks in the field: a pair in a network of IPv6 never meets."""

    async def main() -> None:
        ip("address", "add", "2001:db8::1/128", "dev", "lo", "nodad")
        ip("address", "add", "2001:db8::2/128", "dev", "lo", "nodad")
        one, two = (node(i, (Address(f"2001:db8::{i}", PORT),)) for i in (1, 2))
        left, right = Ear(one, two), Ear(two, one)
        async with started(left, right):
            await until(lambda: left.link().up and right.link().up, "never met")
            assert left.link().remote == "[2001:db8::2]:7789"

    run_in_network(main)
