"""An engine with a user of its own, started by `engine run`: what it makes, and what it refuses."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror import certificate
from nbdmirror.engine_user import Account, becoming
from nbdmirror.errors import ConfigError
from tests.scenarios.test_split_brain import checksum, kept, went_apart
from tests.support.accounts import MakeAccount, make_account, rights_of, way_for_users
from tests.support.certificates import Authority
from tests.support.fixtures import MakePair
from tests.support.pair import PEER_PORT, ROOT, Pair
from tests.support.proxy import Proxy

__all__ = ["make_account"]

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

CAP_SYS_RESOURCE = 24
AFTER_EXEC = "from nbdmirror.memory import lock_memory; print(*lock_memory(), sep='\\n')"
BEFORE_EXEC = """
import os, sys
from nbdmirror.becoming import become
become({}, sys.argv[2:], dict(os.environ), prepare=bool(sys.argv[1]))
"""


@pytest.fixture
def user(make_account: MakeAccount) -> Account:
    """Of both engines."""
    return make_account()


@pytest.fixture
def proxied(user: Account, make_pair: MakePair) -> Iterator[tuple[Pair, Proxy]]:
    """A pair in sync whose channel goes through a relay; keyed codes, TCP, all that there is."""
    proxy = Proxy()
    keys = {"user": user.name, "integrity": "mac"}
    try:
        pair = make_pair(dial=proxy.address, engine=keys, tcp=True)
        way_for_users(pair.root, *(pair.root / node.name for node in pair.both))
        proxy.target = (pair.hosts["beta"], PEER_PORT)
        yield pair.up(), proxy
    finally:
        proxy.close()


def test_what_is_kept_is_the_engines_own(proxied: tuple[Pair, Proxy], user: Account) -> None:
    """Breaks in the field: after a split brain an engine without rights cannot keep what its copy
    held, or root's `kept export` and `kept discard` find it locked.
    """
    pair, proxy = proxied
    alpha, beta = pair.both
    for engine in pair.both:
        assert rights_of(engine.pid)["Uid"] == [str(user.uid)] * 4
    one, other = went_apart(pair, proxy)
    before = checksum(beta.data)
    beta.command("give-up", keep=True)
    pair.synced()
    file = beta.data.parent / "kept"
    assert (file.stat().st_uid, file.stat().st_gid) == (user.uid, user.gid)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    beta.start()
    pair.synced()
    image = pair.root / "image"
    assert kept(beta, "export", str(image)) == 0
    assert checksum(image) == before
    other.assert_kept(image)
    pair.stop()
    assert kept(beta, "discard", "--yes") == 0
    assert not file.exists()
    assert beta.config.metadata_file.stat().st_uid == user.uid
    pair.assert_equal()
    one.assert_kept(alpha.data, beta.data)


def test_a_start_that_cannot_be_changes_nothing(make_pair: MakePair, user: Account) -> None:
    """Breaks in the field: the first start with a user fails on the way, and leaves files that
    neither the new user nor the old one can use.
    """
    pair = make_pair().create()
    alpha = pair.alpha
    way_for_users(pair.root)
    pair.engine_keys["user"] = user.name
    alpha.config_path.write_text(pair.config_text("alpha"))
    assert alpha.start_refused() == ConfigError.exit_code
    closed = pair.root / "alpha"
    assert f"that user cannot enter {closed}: it may not enter {closed}" in alpha.log()
    assert [path.stat().st_uid for path in (alpha.data, alpha.config.metadata_file)] == [0, 0]
    closed.chmod(0o711)
    assert alpha.start().data.stat().st_uid == user.uid
    alpha.stop()


def test_the_keys_of_tls_reach_an_engine_without_rights(
    user: Account, make_pair: MakePair, tmp_path: Path
) -> None:
    """Breaks in the field: with a user of its own an engine cannot read root's key of TLS, or root
    has made the certificate that the engine looks for.
    """
    authority = Authority(tmp_path / "ca")
    pair = make_pair(engine={"user": user.name, "tls": "on"})
    way_for_users(pair.root, *(pair.root / node.name for node in pair.both))
    alpha, beta = pair.both
    named = authority.issue("alpha")
    text = pair.config_text("alpha")
    keys = f'tls_certificate = "{named.cert_file}"\ntls_key = "{named.key_file}"'
    alpha.config_path.write_text(text.replace("[engine]", f"[engine]\n{keys}"))
    pair.up()
    for engine in pair.both:
        assert engine.state()["session"]["tls"].startswith("TLSv1.3")
        assert rights_of(engine.pid)["Uid"] == [str(user.uid)] * 4
    own = beta.config.tls_certificate
    assert (own.stat().st_uid, own.stat().st_mode & 0o777) == (user.uid, 0o600)
    assert Path(named.key_file).stat().st_uid == os.geteuid()
    beta.stop()
    certificate.make(own, "demo", "beta", replace=True)
    assert own.stat().st_uid == os.geteuid()
    beta.start()
    pair.synced()
    assert own.stat().st_uid == user.uid, "the next start gives it away"


@pytest.mark.parametrize("prepare", [True, False])
def test_what_keeps_it_out_of_swap_stays(user: Account, *, prepare: bool) -> None:
    """Breaks in the field: an engine without rights is not protected from a full memory, and waits
    for its own device; or it locks what it has under a limit and finds no memory for the rest.
    """
    rights = int(rights_of(os.getpid())["CapEff"][0], 16)
    may = prepare and bool(rights >> CAP_SYS_RESOURCE & 1)
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_EXEC, "yes" if prepare else "",
         *becoming(user), sys.executable, "-c", AFTER_EXEC],
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    finite = limit != resource.RLIM_INFINITY
    assert ("this user may lock" in done.stdout) is (finite and not may)
    assert ("I/O flusher" in done.stdout) is (not may)
    assert not (may and "oom_score_adj" in done.stdout)
