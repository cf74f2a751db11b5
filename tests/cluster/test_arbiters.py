"""Arbiters with a memory, on real nodes and with real stores: one goes on, the other does not."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror import admin
from nbdmirror.errors import RefusedError
from tests.support.cluster import Cluster
from tests.support.record_stores import KINDS, credentials, secret_file
from tests.support.stores import ACCOUNT, ACCOUNT_KEY, BUCKET, CONTAINER, Etcd, Server
from tests.support.third_host import section
from tests.support.volume import read, write

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    """One etcd for the mirrors of this module; each has a key of its own."""
    with Etcd() as server:
        yield server


def table_of(kind: str, server: Server, directory: Path) -> str:
    """The table of a store in the configuration."""
    if kind == "etcd":
        return f'[etcd]\nendpoints = ["{server.url}"]\n'
    if kind == "s3":
        secret = secret_file(directory, credentials())
        place = f'endpoint = "{server.url}"\nbucket = "{BUCKET}"'
        return f'[s3]\n{place}\ncredentials_file = "{secret}"\n'
    secret = secret_file(directory, f"{ACCOUNT_KEY}\n")
    place = f'account_url = "{server.url}/{ACCOUNT}"\ncontainer = "{CONTAINER}"'
    return f'[azure-blob]\n{place}\nkey_file = "{secret}"\n'


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_lost_host_is_taken_over_and_does_not_come_back_as_it_was(
    kind: str, tmp_path: Path
) -> None:
    """Breaks in the field: the survivor waits although the arbiter would let it go on; or the one
    that was lost serves again with what it had.
    """
    with (
        KINDS[kind].serve() as server,
        Cluster(arbiter=kind, more=table_of(kind, server, tmp_path)) as c,
    ):
        c.start()
        write(c.alpha, b"a")
        c.alpha.lose()
        status = c.beta.is_now("ALONE")
        assert status["arbiter"]["record"]["owner"] == "beta"
        write(c.beta, b"b")
        c.beta.lose()

        # The lost one comes back first: it has no right, and says whose it is.
        c.alpha.up()
        status = c.alpha.wait(lambda s: s["row"] == "takeover, no", "the record says no")
        assert status["role"] == "WAIT"
        assert "node 2" in status["reason"]
        c.beta.up()
        c.in_sync(c.beta)
        assert read(c.beta) == b"b"
        status = c.beta.wait(
            lambda s: s["arbiter"]["record"]["owner"] == "", "the record names both"
        )
        assert any("(c)" in line for line in status["promise"])
        c.beta.order("stop", both=True)
        c.alpha.rests("STOP", "stopped")
        c.beta.rests("STOP", "stopped")
        c.assert_equal()


def test_without_its_arbiter_a_pair_serves_and_a_lone_node_waits(etcd: Etcd) -> None:
    """Breaks in the field: an arbiter that is down stops a healthy pair; or a node goes on without
    the arbiter's word.
    """
    with Cluster(arbiter="etcd", more=section(etcd)) as c:
        c.start()
        with etcd.frozen():
            write(c.alpha, b"c")
            c.alpha.lose()
            status = c.beta.wait(lambda s: s["row"] == "takeover, unknown", "no answer")
            assert status["role"] == "WAIT"
            assert etcd.url in status["reason"]
            assert "`nbdmirror prim --force`" in status["remedy"], "without, it would wait, too"
        c.beta.is_now("ALONE")
        assert read(c.beta) == b"c"
        with etcd.frozen():
            c.beta.lose()
            c.beta.up()
            status = c.beta.wait(lambda s: s["row"] == "right, unread", "it may have been deposed")
            assert "`nbdmirror prim --force`" in status["remedy"]
        c.beta.is_now("ALONE")


def test_a_store_that_lost_everything_is_told_and_gets_its_record_again() -> None:
    """Breaks in the field: the etcd was made anew from nothing, nobody notices, and at the next
    failover both nodes wait; or a node goes on by the word of a store that has forgotten.
    """
    with Etcd() as server, Cluster(arbiter="etcd", more=section(server)) as c:
        c.start()
        write(c.alpha, b"e")
        server.delete_all()
        for node in c.both:
            node.signal(signal.SIGTERM)
            assert node.ended() == 0
            node.up()
        status = c.alpha.wait(lambda s: "lost it" in s["arbiter"]["trouble"], "it is told")
        assert any("no node goes on alone" in line for line in status["promise"])
        c.alpha.order("resync")
        c.alpha.wait(
            lambda s: s["arbiter"]["record"] is not None and not s["arbiter"]["trouble"], "again"
        )
        c.in_sync(c.alpha)
        c.alpha.lose()
        c.beta.is_now("ALONE")
        assert read(c.beta) == b"e"


def typed(c: Cluster, *words: str) -> "subprocess.CompletedProcess[str]":
    """One command of the command line, on alpha."""
    command = [str(Path(sys.executable).with_name("nbdmirror")), *words]
    where = ["-c", str(c.alpha.config_path), "--node", "alpha"]
    return subprocess.run([*command, *where], capture_output=True, text=True, check=False)


def doctor(c: Cluster) -> str:
    """What `doctor` finds about the arbiter."""
    findings = json.loads(typed(c, "doctor", "--json").stdout)["checks"]
    (found,) = [each["what"] for each in findings if each["name"] == "arbiter"]
    return str(found)


def test_the_record_is_made_with_the_mirror(etcd: Etcd) -> None:
    """Breaks in the field: a second `create` instead of `join` takes the right from the node that
    serves; or a node joins a mirror that its arbiter has never heard of.
    """
    with Cluster(arbiter="etcd", more=section(etcd)) as c:
        with pytest.raises(RefusedError, match="make it on the other node first"):
            admin.create(c.beta.config, c.size, join=True, adopt=False, sparse=True)
        assert "holds no record" in doctor(c)
        c.create()
        assert "node 1 owns the record, counter 1" in doctor(c)
        c.alpha.config.metadata_file.unlink()
        c.alpha.data.unlink()
        again = ("metadata", "create", "--size", "16MiB", "--sparse")
        refused = typed(c, *again)
        assert refused.returncode == RefusedError.exit_code
        assert "of node 1, with counter 1" in refused.stderr
        assert "--replace-record" in refused.stderr
        assert not c.alpha.data.exists(), "nothing is half done"
        assert typed(c, *again, "--replace-record").returncode == 0
        assert "counter 2" in doctor(c)


def test_another_store_is_never_asked(etcd: Etcd) -> None:
    """Breaks in the field: the address in one node's file leads to another etcd; both nodes are let
    go on, each by its own.
    """
    with Etcd(token="another") as other, Cluster(arbiter="etcd", more=section(etcd)) as c:
        c.start()
        c.beta.config_path.write_text(c.config_text("beta", section(other)))
        c.beta.signal(signal.SIGTERM)
        assert c.beta.ended() == 0
        c.beta.up()
        c.beta.wait(lambda s: "is not the store" in s["arbiter"]["trouble"], "it is told")
        assert "is not the store" in c.beta.status()["promise"][-1]
        c.alpha.lose()
        status = c.beta.wait(lambda s: s["row"] == "takeover, unknown", "it waits")
        assert "is not the store" in status["reason"]
        assert status["role"] == "WAIT"
