"""TLS without sockets: what the proofs are bound to, how it fails, and what may come unproven."""

import hashlib
import ssl
import stat
from pathlib import Path

import pytest

from nbdmirror import certificate, tls
from nbdmirror.core.handshake import (
    NOT_PROVEN_IN_TLS,
    TLS_DIFFERS,
    Handshake,
    RefusalCode,
    encode_refusal,
)
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    PeerProtocolError,
    PeerRefusedError,
    RefusedError,
)
from nbdmirror.limits import TLS_CERTIFICATE_DAYS, TLS_HANDSHAKE_BYTES_MAX
from nbdmirror.tls import TlsSetup, TlsStream
from tests.support.certificates import Authority, Issued
from tests.support.links import make_setup
from tests.unit.test_handshake import KEY, ONE, TWO, dialer, done, listener, meet

HERE, ELSEWHERE = b"b" * 32, b"B" * 32


def setup_of(issued: Issued, ca: str | None) -> TlsSetup:
    """As a node has it."""
    authority = Path(ca) if ca else None
    return tls.load(Path(issued.cert_file), Path(issued.key_file), authority)


@pytest.fixture
def own(tmp_path: Path) -> TlsSetup:
    """With a certificate that signs itself."""
    return make_setup(tmp_path)


def shaken(one: TlsStream, two: TlsStream) -> None:
    """TLS's handshake between the two, without a wire."""
    finished = [False, False]
    for _ in range(4):
        for index, (mine, other) in enumerate(((one, two), (two, one))):
            finished[index] = finished[index] or mine.shake()
            if piece := mine.outgoing.read():
                other.feed(piece)
    assert all(finished)


# --- the binding ----------------------------------------------------------------------------------


def test_one_channel_is_one_session() -> None:
    """Breaks in the field: no session over TLS at all."""
    one, two = dialer(binding=HERE), listener(binding=HERE)
    meet(one, two)
    assert done(one).session == done(two).session


@pytest.mark.parametrize(("mine", "theirs"), [(HERE, ELSEWHERE), (HERE, b""), (b"", HERE)])
def test_a_listeners_proof_in_another_channel_fails(mine: bytes, theirs: bytes) -> None:
    """Breaks in the field: somebody in the middle with a certificate of his own passes the proofs
    on, and reads and changes everything.
    """
    one, two = dialer(binding=mine), listener(binding=theirs)
    reply = two.receive(one.start())
    with pytest.raises(AuthenticationError):
        one.receive(reply)
    assert one.done is None
    with pytest.raises(PeerRefusedError, match="authentication failed"):
        two.receive(one.refusal)
    assert two.done is None


class Trusting(Handshake):
    """A dialer that somebody in the middle has talked into believing any listener."""

    def _check_proof(self, label: bytes, transcript: bytes, proof: bytes) -> None:
        """Whatever it is."""


@pytest.mark.parametrize(("mine", "theirs"), [(HERE, ELSEWHERE), (HERE, b""), (b"", HERE)])
def test_a_dialers_proof_in_another_channel_fails(mine: bytes, theirs: bytes) -> None:
    """Breaks in the field: as above, from the other side."""
    one = Trusting(True, KEY, ONE, b"n" * 32, binding=mine)
    two = Handshake(False, KEY, TWO, b"o" * 32, binding=theirs)
    confirm = one.receive(two.receive(one.start()))
    with pytest.raises(AuthenticationError) as caught:
        two.receive(confirm)
    assert two.done is None
    assert (str(caught.value) == NOT_PROVEN_IN_TLS) == bool(theirs), "and says what it may be"


def test_a_binding_changes_nothing_of_a_plain_handshake() -> None:
    """Breaks in the field: a node that was not updated yet is refused by one that was."""
    plain = meet(dialer(), listener())
    assert plain == meet(dialer(binding=b""), listener(binding=b""))
    bound = meet(dialer(binding=HERE), listener(binding=HERE))
    assert bound[0] == plain[0]
    assert bound[1][:-32] == plain[1][:-32]
    assert bound[1][-32:] != plain[1][-32:]
    assert bound[2] != plain[2]


def test_both_ends_name_the_listeners_certificate(tmp_path: Path, own: TlsSetup) -> None:
    """Breaks in the field: each end is bound to something else, and no two nodes ever meet."""
    (tmp_path / "other").mkdir()
    other = make_setup(tmp_path / "other")
    one, two = TlsStream(own, dialer=True), TlsStream(other, dialer=False)
    shaken(one, two)
    der = ssl.PEM_cert_to_DER_cert(
        (tmp_path / "other" / "tls.pem").read_text().partition("-----END PRIVATE KEY-----\n")[2]
    )
    assert one.binding == two.binding == hashlib.sha256(der).digest()
    assert one.binding != own.binding


# --- TLS itself -----------------------------------------------------------------------------------


def test_it_is_tls_13_without_sessions_to_resume(own: TlsSetup) -> None:
    """Breaks in the field: an older version, or a resumed session, whose certificate nobody saw."""
    one, two = TlsStream(own, dialer=True), TlsStream(own, dialer=False)
    shaken(one, two)
    assert one.describe() == two.describe()
    assert one.describe().startswith("TLSv1.3 TLS_")
    assert one.object.compression() is None
    two.write(b"frames")
    one.incoming.write(two.outgoing.read())
    assert one.read(memoryview(bytearray(10))) == 6
    assert one.object.session is None or not one.object.session.has_ticket
    assert own.dialing.keylog_filename is None


@pytest.mark.parametrize("old_end", ["dialer", "listener"])
def test_an_older_version_is_refused(own: TlsSetup, old_end: str) -> None:
    """Breaks in the field: somebody on the way talks two nodes down to TLS 1.2."""
    dials = old_end == "dialer"
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if dials else ssl.PROTOCOL_TLS_SERVER)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    there = TlsSetup(old, old, HERE)
    one = TlsStream(there if dials else own, dialer=True)
    two = TlsStream(own if dials else there, dialer=False)
    with pytest.raises(PeerProtocolError, match="TLS: "):
        shaken(one, two)


@pytest.mark.parametrize(
    ("piece", "error", "told"),
    [
        (b"\x00\x67\x01NBDMIRR\x01", PeerRefusedError, "engine.tls differs"),
        (encode_refusal(RefusalCode.TLS, TLS_DIFFERS), PeerRefusedError, "engine.tls differs"),
        (b"GET / HTTP/1.1\r\n", PeerProtocolError, "is no TLS"),
        (b"\xff" * 100, PeerProtocolError, "is no TLS"),
    ],
)
def test_who_speaks_without_tls_is_told_in_plain_words(
    own: TlsSetup, piece: bytes, error: type[Exception], told: str
) -> None:
    """Breaks in the field: one node has `tls = "on"`, the other one not yet, and both say "wrong
    version number".
    """
    stream = TlsStream(own, dialer=False)
    with pytest.raises(error, match=told):
        stream.feed(piece)
    with pytest.raises(PeerRefusedError, match=r"engine\.tls differs"):
        dialer().receive(stream.farewell())


def test_a_plain_listener_knows_tls_when_it_comes(own: TlsSetup) -> None:
    """Breaks in the field: the node without TLS says that a message has 5635 bytes."""
    stream = TlsStream(own, dialer=True)
    stream.shake()
    two = listener()
    with pytest.raises(PeerRefusedError, match=r"engine\.tls differs"):
        two.receive(stream.outgoing.read())
    with pytest.raises(PeerRefusedError, match=r"engine\.tls differs"):
        stream.feed(two.refusal)


def test_nobody_unproven_fills_the_memory(own: TlsSetup) -> None:
    """Breaks in the field: a stranger sends a handshake without end."""
    stream = TlsStream(own, dialer=False)
    stream.feed(b"\x16\x03\x01")
    for _ in range(TLS_HANDSHAKE_BYTES_MAX // 1024 - 1):
        stream.feed(bytes(1024))
    with pytest.raises(PeerProtocolError, match=f"more than {TLS_HANDSHAKE_BYTES_MAX}"):
        stream.feed(bytes(1024))


@pytest.mark.parametrize("hostile", [b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x05\x01\x00\x00"])
def test_hostile_records_fail_in_words(own: TlsSetup, hostile: bytes) -> None:
    """Breaks in the field: a stranger's bytes end in a traceback, or in a wait without an end."""
    stream = TlsStream(own, dialer=False)
    stream.feed(hostile + b"\xff" * 1000)
    with pytest.raises(PeerProtocolError, match="TLS: "):
        stream.shake()


# --- an authority ---------------------------------------------------------------------------------


def test_an_authority_judges_both(tmp_path: Path) -> None:
    """Breaks in the field: `tls_ca` is set, and a certificate that it never signed is believed."""
    ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign")
    good = setup_of(ours.issue("a"), ours.ca_file)
    also_good = setup_of(ours.issue("b"), ours.ca_file)
    shaken(TlsStream(good, dialer=True), TlsStream(also_good, dialer=False))
    stranger = setup_of(foreign.issue("c"), ours.ca_file)
    late = setup_of(ours.issue("d", expired=True), ours.ca_file)
    for bad, why in ((stranger, "unable to get local issuer"), (late, "expired")):
        for one, two in ((good, bad), (bad, good)):
            with pytest.raises(PeerProtocolError, match=rf"engine\.tls_ca: .*{why}"):
                shaken(TlsStream(one, dialer=True), TlsStream(two, dialer=False))


def test_the_one_that_is_refused_is_told_why(tmp_path: Path) -> None:
    """Breaks in the field: only one of the two nodes can say what to mend."""
    ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign")
    good = setup_of(ours.issue("a"), ours.ca_file)
    bad = setup_of(foreign.issue("c"), ours.ca_file)
    bad.dialing.verify_mode = ssl.CERT_NONE  # the dialer is content, the listener is not
    one, two = TlsStream(bad, dialer=True), TlsStream(good, dialer=False)
    with pytest.raises(PeerProtocolError, match=r"refused by engine\.tls_ca"):
        shaken(one, two)
    one.feed(two.farewell())
    with pytest.raises(PeerProtocolError, match=r"refuses this node's certificate.*unknown ca"):
        one.read(memoryview(bytearray(10)))


# --- certificates ---------------------------------------------------------------------------------


def test_an_own_certificate(tmp_path: Path) -> None:
    """Breaks in the field: a key that others can read, or a new one where the old was wanted."""
    path = tmp_path / "tls.pem"
    made = certificate.make(path, "demo", "alpha", replace=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "CN=alpha" in made.subject
    assert "O=demo" in made.subject
    assert made.subject == made.issuer
    assert TLS_CERTIFICATE_DAYS - 3 < made.days_left <= TLS_CERTIFICATE_DAYS
    assert certificate.read(path) == made
    with pytest.raises(RefusedError, match="tls create --force"):
        certificate.make(path, "demo", "alpha", replace=False)
    assert not certificate.make_if_missing(path, "demo", "alpha")
    assert certificate.read(path) == made
    assert certificate.make(path, "demo", "alpha", replace=True).fingerprint != made.fingerprint
    assert [each.name for each in tmp_path.iterdir()] == ["tls.pem"], "no drafts"


def test_a_name_of_any_length_fits(tmp_path: Path) -> None:
    """Breaks in the field: a long name of a node, and the engine does not start."""
    made = certificate.make(tmp_path / "tls.pem", "m" * 64, "n" * 63, replace=False)
    assert "n" * 63 in made.subject


def test_a_certificate_that_cannot_be_made(tmp_path: Path) -> None:
    """Breaks in the field: a traceback instead of the missing directory."""
    with pytest.raises(ConfigError, match=r"No such file or directory.*metadata create"):
        certificate.make(tmp_path / "none" / "tls.pem", "demo", "alpha", replace=False)


def test_dates_are_told(tmp_path: Path) -> None:
    """Breaks in the field: a certificate that an authority signed runs out on a Sunday, unseen."""
    authority = Authority(tmp_path / "ca")
    late = certificate.read(Path(authority.issue("a", expired=True).cert_file))
    good = certificate.read(Path(authority.issue("b").cert_file))
    assert late.expired
    assert certificate.remark(good, own=False, believed_by_ca=True) == ""
    told = certificate.remark(late, own=False, believed_by_ca=True)
    assert "the peer refuses it" in told
    told = certificate.remark(late, own=True, believed_by_ca=False)
    assert "the mirror goes on" in told
    assert "tls create --force" in told


@pytest.mark.parametrize("what", ["another key", "no certificate", "password", "open key"])
def test_files_that_do_not_fit(tmp_path: Path, what: str) -> None:
    """Breaks in the field: an engine does not start, and does not say which file to look at."""
    authority = Authority(tmp_path / "ca")
    issued, other = authority.issue("a"), authority.issue("b")
    cert, key = Path(issued.cert_file), Path(issued.key_file)
    if what == "another key":
        key = Path(other.key_file)
    elif what == "no certificate":
        cert.write_text("nothing")
    elif what == "open key":
        key.chmod(0o640)
    else:
        key.write_bytes(_locked(key.read_bytes()))
    with pytest.raises(ConfigError) as caught:
        tls.load(cert, key, None)
    assert str(cert) in str(caught.value) or "mode is 0640" in str(caught.value)


def _locked(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - for this one only
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(pem, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
