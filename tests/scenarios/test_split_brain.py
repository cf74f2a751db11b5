"""Both nodes went on alone: found at contact, nothing is copied, both copies stay."""

import shutil

import nbd
import pytest

from nbdmirror.errors import RefusedError
from tests.support.load import Load
from tests.support.pair import Engine, Pair
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def alone_on_both(pair: Pair, proxy: Proxy) -> tuple[Load, Load]:
    """Cut the link and let both acknowledge, each in its own part of the device."""
    alpha, beta = pair.both
    one = Load(alpha.uri, slots=512, seed=1).start()
    one.wait(50)
    proxy.refuse(True)
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    beta.wait_state(lambda s: s["session"] is None, "cut")
    beta.command("promote")
    other = Load(beta.uri, first=1024, slots=512, seed=2).start()
    one.wait(100)
    other.wait(100)
    return one, other


def refused_at_contact(engine: Engine) -> str:
    """Wait for the refusal and return its reason."""
    return str(engine.wait_event("refused")["reason"])


def test_both_copies_are_kept_until_one_is_discarded(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: one side's writes vanish without anybody having decided it."""
    pair, proxy = proxied
    alpha, beta = pair.both
    one, other = alone_on_both(pair, proxy)
    idle = beta.connect()
    proxy.refuse(False)
    assert "split" in refused_at_contact(alpha).lower()
    assert "split" in refused_at_contact(beta).lower()
    one.stop()
    other.stop()
    one.assert_kept(alpha.data)
    other.assert_kept(beta.data)
    for engine in pair.both:
        assert engine.state()["session"] is None
    assert alpha.state()["role"] == "primary"
    beta.wait_state(lambda s: s["role"] == "none" and not s["right_alone"], "the one that waits")
    beta.wait_state(lambda s: s["clients"] == 0, "rule 22: no client outlives the term")
    with pytest.raises(nbd.Error):
        idle.pread(512, 0)
    with pytest.raises(RefusedError, match="rule 19"):
        beta.command("promote")
    with pytest.raises(RefusedError, match="demote"):
        alpha.command("discard")
    kept = pair.root / "kept"
    shutil.copyfile(beta.data, kept)
    beta.command("discard")
    pair.synced()
    pair.stop()
    pair.assert_equal()
    one.assert_kept(alpha.data, beta.data)
    other.assert_kept(kept)


def test_split_brain_survives_restarts(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a restart makes the two forget that they went apart, and one is lost."""
    pair, proxy = proxied
    alpha, beta = pair.both
    one, other = alone_on_both(pair, proxy)
    alpha.kill()
    beta.kill()
    one.ended()
    other.ended()
    proxy.refuse(False)
    alpha.start()
    beta.start()
    assert "split" in refused_at_contact(alpha).lower()
    assert "split" in refused_at_contact(beta).lower()
    one.assert_kept(alpha.data)
    other.assert_kept(beta.data)


def test_alone_without_a_write_is_no_split(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a promotion that nobody wrote under costs an operator's night."""
    pair, proxy = proxied
    alpha, beta = pair.both
    proxy.refuse(True)
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("demote")
    beta.wait_state(lambda s: s["session"] is None, "cut")
    beta.command("promote")
    load = Load(beta.uri).start()
    load.wait(50)
    proxy.refuse(False)
    pair.synced()
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
