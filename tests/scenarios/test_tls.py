"""Real engines that speak TLS: under load, in the middle of an attack, and not understood."""

import shutil
from pathlib import Path

import pytest

from nbdmirror import certificate
from nbdmirror.config_files import own_certificate
from tests.support.certificates import Authority, Issued
from tests.support.fixtures import MakePair
from tests.support.links import make_setup
from tests.support.load import Load
from tests.support.middleman import Middleman
from tests.support.pair import PEER_PORT, ROOT, Engine, Pair
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

TLS = {"tls": "on"}
RECORDS = 400


def refused(engine: Engine, *words: str) -> None:
    """Wait until the state of a node gives a reason with these words."""
    told = f"a refusal with {words}"
    engine.wait_state(lambda s: all(word in s["refusal"] for word in words), told)


def assert_inside_tls(pair: Pair) -> None:
    """Both say so, with the same cipher."""
    said = {engine.state()["session"]["tls"] for engine in pair.both}
    assert len(said) == 1
    assert said.pop().startswith("TLSv1.3 TLS_")


def test_a_mirror_inside_tls_loses_nothing(make_pair: MakePair) -> None:
    """Breaks in the field: with `tls = "on"` a write is lost, doubled or out of order: under load,
    when the secondary dies, in the resync, or when the roles change.
    """
    pair = make_pair(engine=TLS).up()
    alpha, beta = pair.both
    assert_inside_tls(pair)
    for engine in pair.both:
        path = own_certificate(engine.config.me.data_dir)
        assert path.stat().st_mode & 0o777 == 0o600, "made with the files"
    load = Load(alpha.uri, depth=16).start()
    load.wait(200)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(300)
    beta.start()
    pair.synced()
    load.wait(200)
    load.stop()
    assert not load.error
    seen = beta.last_event()
    alpha.kill()
    beta.wait_event("session-lost", after=seen)
    beta.command("promote")
    load.start(beta.uri).wait(100)
    alpha.start()
    pair.synced()
    assert_inside_tls(pair)
    load.wait(100)
    load.stop()
    assert not load.error
    client = beta.connect()
    for at in range(0, 8 << 20, 1 << 20):
        client.pwrite(bytes([at >> 20]) * (1 << 20), at + (8 << 20))
    client.flush()
    client.shutdown()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


@pytest.mark.parametrize("tls", ["off", "on"])
def test_nothing_is_readable_inside_tls(make_pair: MakePair, tls: str) -> None:
    """Breaks in the field: `tls` is on, and the volume goes over the network as it is."""
    seen = bytearray()

    def listen(piece: bytes) -> bytes:
        seen.extend(piece)
        return piece

    proxy = Proxy()
    try:
        proxy.editors = lambda: (listen, listen)
        pair = make_pair(dial=proxy.address, engine={"tls": tls})
        proxy.target = (pair.hosts["beta"], PEER_PORT)
        pair.up()
        client = pair.alpha.connect()
        client.pwrite(b"confidential    " * 256, 4096)
        client.flush()
        client.shutdown()
        pair.stop()
        pair.assert_equal()
    finally:
        proxy.close()
    for told in (b"confidential", b"NBDMIRR", b"alpha"):
        readable = tls == "off" and told != b"alpha"
        assert (told in seen) == readable, told


def test_new_keys_cost_no_write(make_pair: MakePair, tmp_path: Path) -> None:
    """Breaks in the field: a connection reaches the bound of its keys, and writes fail, the nodes
    stay apart, or somebody is asked who answers at once (a controller: go on alone).
    """
    for part in ("nbdmirror", "plugin"):
        shutil.copytree(ROOT / part, tmp_path / part)
    limits = tmp_path / "nbdmirror" / "limits.py"
    text = limits.read_text()
    wanted = "TLS_RECORDS_RENEW: Final = 1 << 24"
    assert wanted in text
    limits.write_text(text.replace(wanted, f"TLS_RECORDS_RENEW: Final = {RECORDS}"))
    pair = make_pair(engine=TLS)
    for engine in pair.both:
        engine.program = tmp_path
    pair.up()
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    seen = 0
    for _ in range(3):
        lost = alpha.wait_event("session-lost", after=seen)
        assert f"have served {RECORDS} records" in lost["reason"]
        between = range(seen + 1, lost["number"])
        assert not [e for e in alpha.events if e["number"] in between and e["event"] == "question"]
        seen = alpha.wait_event("resumed", after=lost["number"])["number"]
    load.wait(50)
    load.stop()
    assert not load.error
    pair.synced()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_somebody_in_the_middle_gets_no_session(make_pair: MakePair, tmp_path: Path) -> None:
    """Breaks in the field: who controls a switch, and has a certificate as anybody can make one,
    reads the volume and writes to it.
    """
    middleman = Middleman(make_setup(tmp_path))
    try:
        pair = make_pair(dial=middleman.address, engine=TLS).create()
        middleman.target = (pair.hosts["beta"], PEER_PORT)
        for engine in pair.both:
            engine.start()
        pair.alpha.command("promote")
        refused(pair.alpha, "TLS ends at somebody in the middle")
        refused(pair.beta, "authentication failed")
        assert middleman.relayed > 200, "he passed on what both said"
        for engine in pair.both:
            state = engine.state()
            assert state["session"] is None
            assert not [e for e in engine.events if e["event"] in ("decided", "in-sync")]
        assert pair.beta.state()["data_state"] == "blank"
    finally:
        middleman.close()


@pytest.mark.parametrize("speaks", ["alpha", "beta"])
def test_only_one_of_the_two_speaks_tls(make_pair: MakePair, speaks: str) -> None:
    """Breaks in the field: `tls = "on"` is in one file yet, and both nodes say "handshake failed",
    or wait for each other.
    """
    pair = make_pair()
    node = getattr(pair, speaks)
    text = node.config_path.read_text()
    node.config_path.write_text(text.replace("[engine]", '[engine]\ntls = "on"'))
    pair.create()
    for engine in pair.both:
        engine.start()
    for engine in pair.both:
        refused(engine, "engine.tls differs", "set it to the same on both")
        assert engine.state()["session"] is None
    # What the message asks for is what helps.
    other = pair.other(node)
    other.stop()
    text = other.config_path.read_text()
    other.config_path.write_text(text.replace("[engine]", '[engine]\ntls = "on"'))
    other.start()
    assert own_certificate(other.config.me.data_dir).exists(), "made at the start"
    assert "made " in other.wait_event("tls")["note"]
    pair.alpha.command("promote")
    pair.synced()
    assert_inside_tls(pair)


def with_certificates(pair: Pair, issued: dict[str, Issued], ca: str) -> None:
    """Write each node's own into its configuration."""
    for engine in pair.both:
        mine = issued[engine.name]
        keys = {"tls_certificate": mine.cert_file, "tls_key": mine.key_file, "tls_ca": ca}
        more = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
        text = pair.config_text(engine.name)
        engine.config_path.write_text(text.replace("[engine]", f"[engine]\n{more}"))


def test_certificates_of_an_authority(make_pair: MakePair, tmp_path: Path) -> None:
    """Breaks in the field: an authority's certificates do not work; or a foreign one, or one that
    has run out, is taken, or is refused without a word.
    """
    ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign")
    pair = make_pair(engine=TLS)
    alpha, beta = pair.both
    good = ours.issue("alpha")
    with_certificates(pair, {"alpha": good, "beta": ours.issue("beta")}, ours.ca_file)
    pair.up()
    assert_inside_tls(pair)
    assert not own_certificate(alpha.config.me.data_dir).exists(), "none is needed"
    beta.stop()
    late = ours.issue("beta", expired=True)
    with_certificates(pair, {"alpha": good, "beta": late}, ours.ca_file)
    beta.start()
    assert "expired" in beta.wait_event("tls")["note"]
    refused(alpha, "engine.tls_ca", "certificate has expired")
    refused(beta, "refuses this node's certificate", "certificate expired")
    beta.stop()
    with_certificates(pair, {"alpha": good, "beta": foreign.issue("beta")}, ours.ca_file)
    beta.start()
    refused(alpha, "engine.tls_ca", "issuer certificate")
    refused(beta, "refuses this node's certificate", "unknown ca")
    for engine in pair.both:
        assert engine.state()["session"] is None


def test_a_dialer_that_is_refused_by_an_authority_says_so(
    make_pair: MakePair, tmp_path: Path
) -> None:
    """Breaks in the field: with TLS 1.3 a dialer hears of it only behind its own handshake; the
    node that has to be mended says "connection reset".
    """
    ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign")
    pair = make_pair(engine=TLS)
    pair.create()
    issued = {"alpha": foreign.issue("alpha"), "beta": ours.issue("beta")}
    with_certificates(pair, issued, ours.ca_file)
    for engine in pair.both:
        engine.start()
    refused(pair.beta, "engine.tls_ca", "issuer certificate")
    refused(pair.alpha, "refuses this node's certificate", "unknown ca")


def test_an_own_certificate_that_has_run_out_stops_nothing(
    make_pair: MakePair, tmp_path: Path
) -> None:
    """Breaks in the field: ten years later the mirror does not come up after a restart."""
    pair = make_pair(engine=TLS).create()
    for engine in pair.both:
        issued = Authority(tmp_path / engine.name).issue("own", expired=True)
        path = own_certificate(engine.config.me.data_dir)
        path.write_bytes(Path(issued.key_file).read_bytes() + Path(issued.cert_file).read_bytes())
        assert certificate.read(path).expired
        engine.start()
        assert "the mirror goes on" in engine.wait_event("tls")["note"]
    pair.alpha.command("promote")
    pair.synced()
    assert_inside_tls(pair)


def test_a_key_that_others_can_read_is_refused(make_pair: MakePair) -> None:
    """Breaks in the field: a backup tool opens the key to everybody, and nobody hears of it."""
    pair = make_pair(engine=TLS).create()
    own_certificate(pair.alpha.config.me.data_dir).chmod(0o644)
    assert pair.alpha.start_refused() == 11
    assert "its mode is 0644, expected 0600" in pair.alpha.log()
