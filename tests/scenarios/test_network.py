"""The network between two hosts fails: in one direction, for long, or a packet here and there.

Each node has a network namespace of its own, and TCP meets the faults as it would on a real cable:
nobody resets anything, packets are just not there.
"""

from collections.abc import Iterator

import pytest

from tests.support.fixtures import MakePair
from tests.support.load import Load
from tests.support.network import OTHER, Network
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

# The shortest that the configuration takes; of five of them the flush has to be back.
ACK_TIMEOUT_MS = 1_500
FREEZE_LIMIT_MS = 6 * ACK_TIMEOUT_MS
LOST_PERCENT = 20


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts and a cable."""
    with Network() as made:
        yield made


@pytest.fixture
def hosts(network: Network, make_pair: MakePair) -> Pair:
    """A pair in sync, each node on its own host."""
    keys = {"ack_timeout_ms": ACK_TIMEOUT_MS, "freeze_limit_ms": FREEZE_LIMIT_MS}
    return make_pair(network=network, engine=keys).up()


def undecided(pair: Pair, seen: int, generation: str) -> None:
    """Since event `seen` the session was only resumed: nothing compared, nothing changed."""
    pair.synced()
    assert pair.alpha.state()["generation"] == generation, "nobody decided, so nothing changes"
    decided = [e for e in pair.alpha.events if e["event"] == "decided" and e["number"] > seen]
    assert not decided


def ends_equal(pair: Pair, load: Load) -> None:
    """The load never saw an error, both copies have all of it, and they are the same."""
    load.wait(100)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(pair.alpha.data, pair.beta.data)


@pytest.mark.parametrize("sender", ["alpha", "beta"])
def test_one_direction_is_cut(hosts: Pair, network: Network, sender: str) -> None:
    """Breaks in the field: a switch that passes one direction only leaves a primary that believes
    in a session which its peer has given up, and both go on.

    First nobody decides, and the same session's writes go out again; then the primary is told to go
    on alone, and what it wrote is copied.
    """
    alpha, beta = hosts.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    generation = alpha.state()["generation"]
    seen = alpha.last_event()
    network.cut(sender)
    alpha.wait_state(lambda s: s["frozen"], "frozen by its own deadline")
    beta.wait_state(lambda s: s["session"] is None, "the receiver gave up, too")
    before = load.count
    network.heal()
    alpha.wait_event("resumed", after=seen)
    load.wait(100)
    assert load.count > before
    undecided(hosts, seen, generation)
    seen = alpha.last_event()
    network.cut(sender)
    alpha.wait_state(lambda s: s["frozen"], "frozen again")
    alpha.command("alone")
    load.wait(200)
    assert beta.state()["role"] != "primary"
    network.heal()
    alpha.wait_event("resync-finished", after=seen)
    hosts.synced()
    assert alpha.state()["generation"] != generation
    ends_equal(hosts, load)


def test_a_loss_longer_than_every_deadline(hosts: Pair, network: Network) -> None:
    """Breaks in the field: after a long night without a network the frozen writes are lost, fail,
    or are acknowledged although only one node has them.
    """
    alpha, beta = hosts.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    generation = alpha.state()["generation"]
    seen = alpha.last_event()
    network.cut(*OTHER)
    alpha.wait_event("held", after=seen)
    state = alpha.state()
    assert state["frozen"]
    assert state["question"] == "frozen", "it goes on asking"
    assert state["in_flight"] > 0
    beta.wait_state(lambda s: s["session"] is None and s["role"] == "none", "beta waits")
    network.heal()
    alpha.wait_event("resumed", after=seen)
    load.wait(100)
    undecided(hosts, seen, generation)
    ends_equal(hosts, load)


def test_every_fifth_packet_is_lost(hosts: Pair, network: Network) -> None:
    """Breaks in the field: on a bad line sessions end again and again, and each end loses a write,
    doubles one, or costs a decision that nobody wanted.
    """
    alpha = hosts.alpha
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    network.lose(LOST_PERCENT)
    load.wait(200, 60)
    assert all(network.lost(host) > 10 for host in OTHER), "the line was not bad at all"
    network.heal()
    load.wait(100)
    hosts.synced()
    assert not alpha.state()["right_alone"]
    ends_equal(hosts, load)
