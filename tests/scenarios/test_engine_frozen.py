"""One engine stops moving under load (SIGSTOP: a hung disk, a paused machine), then goes on."""

import pytest

from tests.support.load import Load
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def test_secondary_frozen_then_thawed(pair: Pair) -> None:
    """Breaks in the field: a hung secondary stops the application, or splits the copies."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    beta.freeze()
    state = alpha.wait_state(lambda s: s["frozen"], "frozen by the deadline")
    assert "ms" in state["frozen_reason"], state["frozen_reason"]
    alpha.command("alone")
    load.wait(200)
    beta.thaw()
    pair.synced()
    load.wait(100)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_secondary_frozen_and_back_before_the_answer(pair: Pair) -> None:
    """Breaks in the field: a pause without a decision costs a resync, or loses frozen writes."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    generation = alpha.state()["generation"]
    beta.freeze()
    alpha.wait_state(lambda s: s["frozen"], "frozen by the deadline")
    before = alpha.last_event()
    beta.thaw()
    alpha.wait_event("resumed", after=before)
    load.wait(100)
    load.stop()
    assert not load.error
    assert alpha.state()["generation"] == generation
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_primary_frozen_other_promoted_then_thawed(pair: Pair) -> None:
    """Breaks in the field: a primary that wakes up acknowledges writes that the new one lacks."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    alpha.freeze()
    beta.wait_state(lambda s: s["session"] is None, "the silence is noticed")
    beta.command("promote")
    acknowledged = load.count
    after = Load(beta.uri, first=1024, seed=2).start()
    after.wait(100)
    alpha.thaw()
    # The arbiter is `none`: it goes on holding its writes until somebody decides.
    alpha.wait_state(lambda s: s["frozen"], "the woken one freezes")
    assert load.count <= acknowledged + load.depth, "it may finish what had both legs done"
    alpha.command("demote")
    load.ended()
    pair.synced()
    after.wait(50)
    after.stop()
    assert not after.error
    pair.stop()
    pair.assert_equal()
    after.assert_kept(alpha.data, beta.data)
    load.assert_kept(alpha.data, beta.data)
