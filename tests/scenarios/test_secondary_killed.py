"""The secondary dies under load, and comes back."""

import pytest

from tests.support.load import Load
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def test_secondary_killed_then_back(pair: Pair) -> None:
    """Breaks in the field: a dead secondary stops the application, or returns with old blocks."""
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(200)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"] and s["question"] == "frozen", "frozen and asking")
    state = alpha.command("alone")
    assert state["right_alone"]
    load.wait(200)
    assert alpha.state()["dirty_extents"] > 0
    load.stop()
    assert not load.error
    behind = alpha.state()["dirty_bytes"]
    beta.start()
    pair.synced()
    copied = alpha.wait_event("resync-finished")
    assert copied["copied_bytes"] <= behind + (4 << 20), "more was copied than was different"
    assert not alpha.state()["right_alone"]
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_secondary_back_while_the_load_goes_on(pair: Pair) -> None:
    """Breaks in the field: writes made during a resync are missing from one copy."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(500)
    beta.start()
    pair.synced()
    load.wait(200)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_secondary_killed_and_back_while_frozen(pair: Pair) -> None:
    """Breaks in the field: frozen writes are lost, or never answered, when the peer restarts."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    beta.start()
    pair.synced()
    load.wait(200)
    load.stop()
    assert not load.error
    assert not alpha.state()["right_alone"]
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
