"""Both nodes went on alone: found at contact, nothing is copied, both copies stay."""

import hashlib
import json
import shutil
from pathlib import Path

import nbd
import pytest

from nbdmirror.errors import RefusedError
from nbdmirror_cli.main import run
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


def checksum(image: Path) -> str:
    """Of a whole file."""
    return hashlib.sha256(image.read_bytes()).hexdigest()


def kept(engine: Engine, *words: str) -> int:
    """`nbdmirror kept ...` on the node of an engine."""
    return run(["kept", *words, "-c", str(engine.config_path), "--node", engine.name])


def shown(engine: Engine, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """What `kept show` says of a complete image."""
    capsys.readouterr()
    assert kept(engine, "show", "--json") == 0
    facts: dict[str, object] = json.loads(capsys.readouterr().out)
    assert facts["complete"] is True
    return facts


def went_apart(pair: Pair, proxy: Proxy) -> tuple[Load, Load]:
    """A split brain that both know of; the writers have ended, and beta waits."""
    one, other = alone_on_both(pair, proxy)
    proxy.refuse(False)
    for engine in pair.both:
        refused_at_contact(engine)
    one.stop()
    other.stop()
    pair.beta.wait_state(lambda s: s["role"] == "none", "it waits")
    return one, other


def test_what_the_loser_held_is_exported_byte_for_byte(
    proxied: tuple[Pair, Proxy], capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks in the field: the wrong side was given up, and what comes back is not what it had."""
    pair, proxy = proxied
    alpha, beta = pair.both
    one, other = went_apart(pair, proxy)
    split = beta.state()["split"]
    assert split["waits"]
    assert split["parted_s"] >= split["found_s"] >= 0
    assert 0 < split["own_bytes"] <= pair.size
    assert split["peer_bytes"] > 0
    told = beta.wait_event("split-brain")
    assert (told["own_bytes"], told["peer_bytes"]) == (split["own_bytes"], split["peer_bytes"])
    before = checksum(beta.data)

    beta.command("give-up", keep=True)
    pair.synced()
    verdicts = [e["verdict"] for e in alpha.events if e["event"] == "decided"]
    assert verdicts[-1] == "COPY_BY_MAP", "only what differs is copied"
    later = Load(alpha.uri, first=2048, slots=512, seed=3).start()
    later.wait(50)
    image = pair.root / "image"
    assert kept(beta, "export", str(image), "--json") == 0
    later.wait(50)
    assert checksum(image) == before
    other.assert_kept(image)
    assert kept(beta, "export", str(image)) == RefusedError.exit_code, "never over a file"

    later.stop()
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    beta.start()
    pair.synced()
    again = pair.root / "again"
    assert kept(beta, "export", str(again)) == 0
    assert checksum(again) == before

    assert shown(beta, capsys)["own_bytes"] == split["own_bytes"]
    assert kept(beta, "discard", "--yes") == 0
    assert not (beta.data.parent / "kept").exists()
    assert beta.state()["kept"] is None
    pair.stop()
    pair.assert_equal()
    one.assert_kept(alpha.data, beta.data)
    later.assert_kept(alpha.data, beta.data)


def test_the_loser_is_killed_while_it_is_overwritten(proxied: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a crash in the resync takes what was kept so far, or mixes two days."""
    pair, proxy = proxied
    alpha, beta = pair.both
    one, _ = went_apart(pair, proxy)
    before = checksum(beta.data)
    beta.command("kept-limit", bytes=64 * 1024)
    beta.command("give-up", keep=True)
    beta.wait_state(lambda s: bool(s["resync_waits"]), "the space is used up")
    alpha.wait_state(lambda s: "waits with the resync" in s["refusal"], "both sides say so")
    assert kept(beta, "export", str(pair.root / "half")) == 0
    assert checksum(pair.root / "half") == before
    for number in range(3):
        beta.kill()
        beta.start()
        image = pair.root / f"image{number}"
        assert kept(beta, "export", str(image)) == 0
        assert checksum(image) == before
    assert kept(beta, "limit", "1GiB") == 0
    pair.synced()
    assert kept(beta, "export", str(pair.root / "whole")) == 0
    assert checksum(pair.root / "whole") == before
    pair.stop()
    pair.assert_equal()
    one.assert_kept(alpha.data, beta.data)
    # Without an engine, too.
    assert kept(beta, "discard", "--yes") == 0
    assert kept(beta, "show") == RefusedError.exit_code
