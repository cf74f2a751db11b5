"""The primary dies under load; the other one takes over."""

import pytest

from tests.support.load import Load
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def test_primary_killed_other_promoted_then_back(pair: Pair) -> None:
    """Breaks in the field: an acknowledged write is gone after a failover."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(300)
    alpha.kill()
    load.ended()
    assert load.error
    assert beta.command("promote")["role"] == "primary"
    load.assert_kept(beta.data)
    load.start(beta.uri).wait(200)
    alpha.start()
    pair.synced()
    load.wait(100)
    load.stop()
    assert not load.error
    assert alpha.state()["role"] == "secondary"
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_roles_swapped_back_and_forth(pair: Pair) -> None:
    """Breaks in the field: a planned swap copies data, or needs the other node's restart."""
    alpha, beta = pair.both
    load = Load(alpha.uri)
    generation = alpha.state()["generation"]
    for source, target in ((alpha, beta), (beta, alpha), (alpha, beta)):
        load.start(source.uri).wait(50)
        load.stop()
        assert not load.error
        source.command("demote")
        target.command("promote")
        pair.synced()
    assert alpha.state()["generation"] == generation, "a swap begins no generation (rule 9)"
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_both_killed_at_once(pair: Pair) -> None:
    """Breaks in the field: the power of both servers fails and the pair does not come up equal."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(300)
    alpha.kill()
    beta.kill()
    load.ended()
    alpha.start()
    beta.start()
    pair.synced()
    assert alpha.command("promote")["role"] == "primary"
    pair.synced()
    load.start(alpha.uri).wait(100)
    load.stop()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
