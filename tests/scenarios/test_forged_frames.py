"""Somebody on the way changes frames of real engines and repairs their checks, without the key."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nbdmirror.core.wire import FrameType
from nbdmirror.errors import PeerRefusedError
from tests.support.fixtures import MakePair
from tests.support.forger import Campaign
from tests.support.impostor import prove
from tests.support.load import Load
from tests.support.pair import PEER_PORT, Engine, Pair
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

BLOCK = b"a" * 4096


@contextmanager
def forged_pair(make_pair: MakePair, campaign: Campaign, integrity: str) -> Iterator[Pair]:
    """A pair in sync; the campaign reads all that its nodes say to each other."""
    proxy = Proxy()
    try:
        proxy.editors = campaign.editors
        keys = {"integrity": integrity, "ack_timeout_ms": 30_000, "freeze_limit_ms": 30_000}
        pair = make_pair(dial=proxy.address, engine=keys)
        proxy.target = (pair.hosts["beta"], PEER_PORT)
        yield pair.up()
    finally:
        proxy.close()


def kinds(engine: Engine) -> set[str]:
    """What this engine told."""
    return {event["event"] for event in engine.events}


def test_changed_data_with_repaired_checks_passes_unnoticed_with_crc(make_pair: MakePair) -> None:
    """Breaks in the field: nothing; it shows what the documents say that "crc" does not cover, and
    that the forger of the tests with "mac" is no straw man.
    """
    campaign = Campaign(FrameType.WRITE, macs=False)
    with forged_pair(make_pair, campaign, "crc") as pair:
        alpha, beta = pair.both
        before = beta.state()["session"]
        assert before["integrity"] == "crc"
        campaign.arm()
        client = alpha.connect()
        client.pwrite(BLOCK, 8192)
        client.flush()
        client.shutdown()
        assert campaign.count == 1
        assert beta.state()["session"]["number"] == before["number"], "nobody noticed"
        pair.stop()
        assert alpha.data.read_bytes()[8192:12288] == BLOCK
        assert beta.data.read_bytes()[8192:12288] == BLOCK.upper()


@pytest.mark.parametrize(
    ("kind", "finder"),
    [
        (FrameType.WRITE, "beta"),
        (FrameType.FLUSH, "beta"),
        (FrameType.ACK, "alpha"),
        (FrameType.ECHO_REPLY, "either"),
    ],
)
def test_a_forged_frame_ends_the_session_and_changes_nothing_with_mac(
    make_pair: MakePair, kind: FrameType, finder: str
) -> None:
    """Breaks in the field: who controls a switch between the nodes writes to the secondary's disk,
    acknowledges in its name, or keeps the lease of a primary alive that was replaced.
    """
    campaign = Campaign(kind, macs=True)
    with forged_pair(make_pair, campaign, "mac") as pair:
        alpha, beta = pair.both
        before = alpha.state()["session"]
        assert before["integrity"] == beta.state()["session"]["integrity"] == "mac"
        seen = {engine.name: engine.last_event() for engine in pair.both}
        load = Load(alpha.uri).start()
        load.wait(20)
        campaign.arm()
        for engine in pair.both:
            engine.wait_event("session-lost", after=seen[engine.name])
        found = {e["reason"] for each in pair.both for e in each.events if "protocol" in e["event"]}
        assert len(found) == 1
        assert f"{kind.name} frame: its MAC" in found.pop()
        if finder != "either":
            name = {each.name for each in pair.both if "protocol-error" in kinds(each)}
            assert name == {finder}
        load.wait(50)
        load.stop()
        assert not load.error
        pair.synced()
        assert campaign.count == 1
        assert alpha.state()["session"]["number"] != before["number"]
        pair.stop()
        pair.assert_equal()
        load.assert_kept(alpha.data, beta.data)


def test_one_node_that_says_mac_is_enough(make_pair: MakePair) -> None:
    """Breaks in the field: "mac" is in one file by mistake only, or in one file yet, and the
    mirror stands still or goes on without it.
    """
    pair = make_pair().create()
    text = pair.beta.config_path.read_text()
    pair.beta.config_path.write_text(text.replace("[engine]", '[engine]\nintegrity = "mac"'))
    for engine in pair.both:
        engine.start()
    pair.alpha.command("promote")
    pair.synced()
    for engine in pair.both:
        assert engine.state()["session"]["integrity"] == "mac"
    load = Load(pair.alpha.uri).start()
    load.wait(50)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()


def test_a_peer_that_cannot_do_macs_is_told_why(make_pair: MakePair) -> None:
    """Breaks in the field: a program without the feature takes "mac" away from a node set to it."""
    pair = make_pair(engine={"integrity": "mac", "ack_timeout_ms": 30_000}).up()
    beta = pair.beta
    session, seen = beta.state()["session"]["number"], beta.last_event()
    with pytest.raises(PeerRefusedError, match="a required feature is missing"):
        prove(pair, beta)  # offers no feature at all
    told = beta.wait_event("no-peer", after=seen)["reason"]
    assert 'engine.integrity = "mac"' in told
    assert beta.state()["session"]["number"] == session
