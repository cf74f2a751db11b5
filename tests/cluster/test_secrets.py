"""The mirror's key, and that of TLS, in a running pair: where they are, and nowhere else.

The key of this mirror is a word that can be searched for. It is looked for in every place that
others read or that gets copied into a report, as it is and in the forms that programs print.
"""

import base64
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from nbdmirror.config import load
from nbdmirror.config_files import own_certificate
from nbdmirror.control_client import ControlClient
from nbdmirror.core.channel import Channel
from nbdmirror.core.handshake import Handshake
from nbdmirror.core.messages import Stable
from nbdmirror.errors import ConfigError
from nbdmirror.peering import Credentials
from tests.support.cluster import Cluster, ClusterNode
from tests.support.pair import PEER_PORT
from tests.unit.test_sealed import ONE, TWO, feed

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

COMMAND = Path(sys.executable).parent / "nbdmirror"
BOUND_S = 120.0
PEEPER = (
    'for f in environ cmdline; do tr "\\\\0" "\\\\n" < /proc/self/$f; done >> {root}/peeped; '
    "ls -l /proc/$$/fd >> {root}/peeped"
)
APPLICATION = f"""
[engine]
tls = "on"
[application]
start = ["/bin/sh", "-c", '{PEEPER}']
stop = ["/bin/sh", "-c", '{PEEPER}']
[[checker]]
name = "peep"
kind = "command"
command = ["/bin/sh", "-c", '{PEEPER}']
interval_ms = 200
"""
SHOWN = (
    ("status", "--json"),
    ("status",),
    ("explain",),
    ("doctor", "--json"),
    ("config", "show", "--json"),
    ("config", "check"),
    ("engine", "state", "--json"),
    ("metadata", "show", "--json"),
    ("kept", "show"),
    ("tls", "show"),
    ("tls", "show", "--json"),
    ("events", "--no-follow", "--json"),
)


@pytest.fixture
def canary() -> bytes:
    """A key that can be told from everything else."""
    return f"canary-{secrets.token_hex(24)}".encode()


@pytest.fixture
def cluster(canary: bytes) -> Iterator[Cluster]:
    """Two running nodes with that key, and scripts that write down what they are given."""
    with Cluster(more=APPLICATION) as made:
        (made.root / "key").write_bytes(canary)
        yield made.start()


def forms(secret: bytes) -> dict[str, bytes]:
    """As programs print bytes. A part is as good as the whole, so 12 bytes of it are looked for."""
    part = secret[12:24]
    return {
        "as it is": part,
        "hex": part.hex().encode(),
        "HEX": part.hex().upper().encode(),
        "base64": base64.b64encode(part),
        "numbers": ", ".join(map(str, part)).encode(),
    }


def found_in(text: bytes, secret: bytes) -> list[str]:
    """In which forms a text holds the secret."""
    return [name for name, form in forms(secret).items() if form in text]


def typed(node: ClusterNode, *words: str) -> bytes:
    """All that one command says."""
    line = [str(COMMAND), *words, "-c", str(node.config_path), "--node", node.name]
    done = subprocess.run(
        line, capture_output=True, check=False, timeout=BOUND_S, stdin=subprocess.DEVNULL
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def of_processes() -> Iterator[tuple[str, bytes]]:
    """Arguments and environment of every process of this machine that may be looked at."""
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        for name in ("cmdline", "environ"):
            try:
                yield f"{directory.name} {name}", (directory / name).read_bytes()
            except OSError:
                continue


def of_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of the two nodes, data and metadata as well, but the keys' own."""
    for path in root.rglob("*"):
        if path.is_file() and path.name not in {"key", "tls.pem"}:
            yield str(path), path.read_bytes()


def keys_of_tls(cluster: Cluster) -> list[bytes]:
    """The private keys of both nodes, as numbers and as their files have them."""
    found = []
    for node in cluster.both:
        pem = own_certificate(node.config.me.data_dir).read_bytes()
        key = load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        found += [key.private_numbers().private_value.to_bytes(32, "big"), pem.splitlines()[2]]
        assert found_in(pem, found[-1]) == ["as it is"]
    return found


def test_the_key_is_in_its_file_and_nowhere_else(cluster: Cluster, canary: bytes) -> None:
    """Breaks in the field: a list of processes, a log, a report to a forum or the output of a
    status command gives the key away, and with it the volume.
    """
    alpha, beta = cluster.both
    stranger = Channel(Handshake(True, b"x" * 32, ONE, b"n" * 32))
    with socket.create_connection((cluster.hosts["beta"], PEER_PORT), 10) as connection:
        connection.sendall(stranger.start())
        connection.recv(4096)
    alpha.order("swap")
    cluster.in_sync(beta)
    places = [*of_processes(), *of_files(cluster.root)]
    for node in cluster.both:
        places += [(f"{node.name}: {' '.join(words)}", typed(node, *words)) for words in SHOWN]
        for path in (node.config.control_socket, node.config.controller_socket):
            with ControlClient(path, BOUND_S) as client:
                answer = client.call("state" if path.name == "engine.sock" else "status")
            places.append((str(path), repr(answer).encode()))
        places.append((f"{node.name}: events", repr(node.followers[-1].events).encode()))
    for secret in (canary, *keys_of_tls(cluster)):
        assert not {place: how for place, text in places if (how := found_in(text, secret))}
    for node in cluster.both:
        assert node.status()["engine"]["session"]["tls"].startswith("TLSv1.3")
    names = " ".join(place for place, _ in places)
    for wanted in ("engine.log", "alpha.log", "peeped", "meta", "environ", "config show"):
        assert wanted in names, "the place was looked at"
    assert found_in((cluster.root / "key").read_bytes(), canary) == ["as it is"]


def test_mistakes_with_the_key_do_not_tell_it(cluster: Cluster, canary: bytes) -> None:
    """Breaks in the field: the report of a mistake in a key file quotes the file."""
    key = cluster.root / "key"
    secret = canary
    for broken, mode in ((secret[:31], 0o600), (secret * 100, 0o600), (secret, 0o644)):
        key.write_bytes(broken)
        key.chmod(mode)
        said = typed(cluster.alpha, "config", "check") + typed(cluster.alpha, "doctor", "--json")
        assert b"key_file" in said
        assert not found_in(said, secret)
    key.write_bytes(secret)
    key.chmod(0o600)


def test_what_a_traceback_shows_has_no_key(tmp_path: Path, canary: bytes) -> None:
    """Breaks in the field: a defect ends with a report of local variables, and the key is in it."""
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(canary)
    path = tmp_path / "demo.toml"
    lines = ['mirror = "demo"', f'key_file = "{key}"', 'arbiter = "none"']
    for number, name in enumerate(("alpha", "beta"), 1):
        lines += [f"[node.{name}]", f"id = {number}", f'address = "10.1.0.{number}:7789"']
    path.write_text("\n".join(lines))
    config = load(path, "alpha")
    assert config.key == canary
    one = Credentials(ONE, canary, asks_macs=True).handshake(dialer=True)
    two = Credentials(TWO, canary, asks_macs=True).handshake(dialer=False)
    ends = Channel(one), Channel(two)
    feed(ends[1], ends[0].start())
    feed(ends[0], ends[1].take_outgoing())
    feed(ends[1], ends[0].take_outgoing())
    ends[0].control_frame(Stable(seq=1))
    done = one.done
    assert done is not None
    shown = repr((config, Credentials(ONE, canary, asks_macs=True), one, two, ends, done)).encode()
    keys = [canary, done.send_frame_key, done.receive_frame_key, done.send_mac_key, done.hash_key]
    assert not [how for secret in keys for how in found_in(shown, secret)]
    with pytest.raises(ConfigError) as caught:
        Handshake(True, canary[:31], ONE, b"n" * 32)
    assert not found_in(str(caught.value).encode(), canary)
