"""Two nodes that do not belong together say why, on both sides, and touch nothing."""

import secrets

import pytest

from nbdmirror import admin
from tests.support.fixtures import MakePair
from tests.support.impostor import dial, ended_by_the_other
from tests.support.pair import Engine, Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def refusal(engine: Engine, word: str) -> None:
    """Wait until the state of a node gives a reason with that word."""
    engine.wait_state(lambda s: word in s["refusal"].lower(), f"a refusal about {word!r}")


def meet(pair: Pair, beta_size: int = 16 << 20) -> None:
    """Create both as their configurations say, fill the creator's file, and let them meet."""
    admin.create(pair.alpha.config, pair.size, join=False, adopt=False, sparse=False)
    admin.create(pair.beta.config, beta_size, join=True, adopt=False, sparse=False)
    for engine in pair.both:
        engine.start()


def untouched(pair: Pair) -> None:
    """No session, no data: the joiner is as blank as it was."""
    for engine in pair.both:
        assert engine.state()["session"] is None
    assert pair.beta.state()["data_state"] == "blank"
    assert pair.alpha.state()["data_state"] == "uptodate"


def test_another_key(make_pair: MakePair) -> None:
    """Breaks in the field: a node of another installation gets the data, or gives its own."""
    pair = make_pair()
    other = pair.root / "other-key"
    other.touch(0o600)
    other.write_bytes(secrets.token_bytes(32))
    pair.beta.config_path.write_text(pair.config_text("beta", key=str(other)))
    meet(pair)
    refusal(pair.alpha, "mirror")  # its identity is made from the key
    refusal(pair.beta, "mirror")
    untouched(pair)


def test_another_mirror_with_the_same_key(make_pair: MakePair) -> None:
    """Breaks in the field: a wrong address mixes two mirrors of the same servers."""
    pair = make_pair()
    pair.beta.config_path.write_text(pair.config_text("beta", mirror="another"))
    meet(pair)
    refusal(pair.alpha, "mirror")
    refusal(pair.beta, "mirror")
    untouched(pair)


def test_another_size(make_pair: MakePair) -> None:
    """Breaks in the field: the end of the device is on one node only."""
    pair = make_pair()
    meet(pair, beta_size=32 << 20)
    refusal(pair.alpha, "size")
    refusal(pair.beta, "size")
    untouched(pair)


def test_a_stranger_does_not_cover_why_the_peer_was_refused(make_pair: MakePair) -> None:
    """Breaks in the field: a port scanner overwrites the one sentence that says what to repair."""
    pair = make_pair()
    meet(pair, beta_size=32 << 20)
    refusal(pair.beta, "size")
    # Else it comes again, and is refused again.
    pair.alpha.freeze()
    try:
        pair.beta.wait_state(lambda s: s["session"] is None, "the end of what was under way")
        before = pair.beta.last_event()
        with dial(pair, pair.beta) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            ended_by_the_other(connection)
        pair.beta.wait_event("no-peer", after=before)
        assert "size" in pair.beta.state()["refusal"]
    finally:
        pair.alpha.thaw()


def test_the_same_node_id(make_pair: MakePair) -> None:
    """Breaks in the field: a node that was made from a copy of the other mirrors with itself."""
    pair = make_pair()
    pair.alpha.config_path.write_text(pair.config_text("alpha", alpha_id="3", beta_id="5"))
    pair.beta.config_path.write_text(pair.config_text("beta", alpha_id="1", beta_id="3"))
    meet(pair)
    refusal(pair.alpha, "node")
    refusal(pair.beta, "node")
    untouched(pair)


def test_files_of_the_other_node(make_pair: MakePair) -> None:
    """Breaks in the field: a copied directory makes two nodes believe that they are one."""
    pair = make_pair()
    admin.create(pair.alpha.config, pair.size, join=False, adopt=False, sparse=False)
    pair.data_dirs = {"beta": pair.alpha.config.me.data_dir}
    pair.beta.config_path.write_text(pair.config_text("beta"))
    assert pair.beta.start_refused() == 12
    assert "belongs to node 1" in pair.beta.log()


def test_a_second_engine_is_refused(pair: Pair) -> None:
    """Breaks in the field: two engines write one file."""
    rival = Engine("alpha", pair.root / "alpha" / "rival.toml", pair.root)
    rival.log_path = pair.root / "rival.log"
    rival.config_path.write_text(
        pair.config_text("alpha").replace(
            f'run_dir = "{pair.root / "alpha" / "run"}"', f'run_dir = "{pair.root / "rival"}"'
        )
    )
    assert rival.start_refused() == 13
    assert "lock" in rival.log() or "another engine" in rival.log()
    assert pair.alpha.state()["role"] == "primary"
    pair.synced()
