"""Arbiters with a memory, on real nodes and with a real etcd: one goes on, the other does not.

In the partitions each node is on a host of its own, and so is the etcd.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror import admin
from nbdmirror.errors import ArbiterError, RefusedError
from tests.support.cluster import Cluster, ClusterNode
from tests.support.load import Load
from tests.support.network import Switched
from tests.support.record_stores import KINDS, credentials, secret_file
from tests.support.stores import ACCOUNT, ACCOUNT_KEY, BUCKET, CONTAINER, Etcd, Server
from tests.support.third_host import Parted, ThirdHost, section

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

# The application is a file that is there while it runs.
APPLICATION = """
[application]
start = ["/bin/sh", "-c", "touch {root}/$NBDMIRROR_NODE.runs"]
stop = ["/bin/sh", "-c", "rm -f {root}/$NBDMIRROR_NODE.runs"]
"""


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    """One etcd for the mirrors of this module; each has a key of its own."""
    with Etcd() as server:
        yield server


def write(node: ClusterNode, byte: bytes, offset: int = 0) -> None:
    """One MiB of one byte, flushed."""
    client = node.connect()
    client.pwrite(byte * (1 << 20), offset)
    client.flush()
    client.shutdown()


def read(node: ClusterNode, offset: int = 0) -> bytes:
    """The byte that fills this MiB."""
    client = node.connect()
    data = bytes(client.pread(1 << 20, offset))
    client.shutdown()
    assert data == data[:1] * len(data)
    return data[:1]


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
        c.beta.is_now("ALONE")
        assert read(c.beta) == b"c"


@pytest.fixture
def network() -> Iterator[Switched]:
    """Two nodes, and a router with the etcd."""
    with Switched() as made:
        yield made


@pytest.fixture
def c(network: Switched) -> Iterator[Parted]:
    """A pair in sync."""
    with (
        ThirdHost(network) as server,
        Parted(arbiter="etcd", more=APPLICATION + section(server), network=network) as made,
    ):
        made.start()
        yield made


def runs(c: Cluster) -> set[str]:
    """On which nodes the application runs."""
    return {node.name for node in c.both if (c.root / f"{node.name}.runs").exists()}


def begin(node: ClusterNode) -> Load:
    """A client that writes on this node."""
    load = Load(f"nbd+unix:///?socket={node.config.export_unix}", first=1, slots=256)
    load.start().wait(50)
    return load


def test_a_cut_between_the_nodes_leaves_one(c: Parted, network: Switched) -> None:
    """Breaks in the field: with the arbiter reached by both, both go on; or neither does.

    Which one is a race that the primary wins, unless its host is busy with something else.
    """
    load = begin(c.alpha)
    network.part("alpha", "beta")
    status = c.alpha.wait(lambda s: s["row"] in ("alone", "takeover, no"), "it is decided")
    wins, waits = (c.alpha, c.beta) if status["row"] == "alone" else (c.beta, c.alpha)
    wins.is_now("ALONE")
    status = waits.wait(lambda s: s["row"] == "takeover, no", "the record says no")
    assert f"node {1 if wins is c.alpha else 2}" in status["reason"]
    assert "`nbdmirror prim --force`" in status["remedy"]
    assert runs(c) == {wins.name}
    if wins is c.alpha:
        load.wait(200)
    network.heal()
    c.in_sync(wins)
    if wins is c.alpha:
        load.wait(50)
        load.stop()
        assert not load.error
    load.assert_kept(wins.data)
    c.alpha.order("stop", both=True)
    c.alpha.rests("STOP", "stopped")
    c.beta.rests("STOP", "stopped")
    c.assert_equal()


def test_a_primary_behind_a_dead_port_gives_way(c: Parted, network: Switched) -> None:
    """Breaks in the field: the primary that sees nobody acknowledges; or nobody takes over."""
    load = begin(c.alpha)
    network.isolate("alpha")
    c.beta.is_now("ALONE")
    write(c.beta, b"z", offset=8 << 20)
    c.alpha.wait(lambda s: s["engine"]["frozen"] and s["row"] == "frozen, unknown", "it waits")
    network.heal()
    c.in_sync(c.beta)
    assert load.ended().error, "what was frozen ends as an error: outcome unknown"
    load.assert_kept(c.beta.data)
    assert read(c.beta, 8 << 20) == b"z"
    assert runs(c) == {"beta"}
    c.beta.order("stop", both=True)
    c.alpha.rests("STOP", "stopped")
    c.beta.rests("STOP", "stopped")
    c.assert_equal()


def test_a_freeze_without_an_answer_has_an_end(network: Switched) -> None:
    """Breaks in the field: a primary that sees nobody holds its clients for ever, and is not ready
    to meet its peer when the cable is back.
    """
    limit = "[engine]\nfreeze_limit_ms = 5000\n"
    with (
        ThirdHost(network) as server,
        Parted(arbiter="etcd", more=limit + section(server), network=network) as c,
    ):
        c.start()
        load = begin(c.alpha)
        network.isolate("alpha")
        c.beta.is_now("ALONE")
        c.alpha.wait(lambda s: s["row"] == "takeover, unknown", "the bound")
        assert load.ended().error
        network.heal()
        c.in_sync(c.beta)


def test_a_primary_that_slept_acknowledges_nothing(c: Parted) -> None:
    """Breaks in the field: a host that was suspended wakes up and goes on where it was, after its
    peer has taken over.
    """
    load = begin(c.alpha)
    engine = c.alpha.engine_pid()
    c.alpha.signal(signal.SIGSTOP)
    os.kill(engine, signal.SIGSTOP)
    c.beta.is_now("ALONE")
    load_there = begin(c.beta)
    os.kill(engine, signal.SIGCONT)
    c.alpha.signal(signal.SIGCONT)
    c.in_sync(c.beta)
    assert load.ended().error
    load_there.wait(50)
    load_there.stop()
    assert not load_there.error
    assert runs(c) == {"beta"}
    load_there.assert_kept(c.alpha.data, c.beta.data)


def test_an_operator_forces_against_the_record(c: Parted, network: Switched) -> None:
    """Breaks in the field: the owner of the record is gone for good, and nobody can serve; or the
    one that was forced over returns, and both serve.
    """
    load = begin(c.alpha)
    c.beta.signal(signal.SIGSTOP)  # who is first is not what this is about
    network.part("alpha", "beta")
    c.alpha.is_now("ALONE")
    c.beta.signal(signal.SIGCONT)
    c.beta.wait(lambda s: s["row"] == "takeover, no", "the record says no")
    load.stop()
    write(c.alpha, b"o")
    network.isolate("alpha")
    c.beta.order("prim", force=True)
    status = c.beta.is_now("ALONE")
    c.beta.wait(lambda s: s["arbiter"]["record"]["owner"] == "beta", "the record is replaced")
    write(c.beta, b"n")
    assert status["wanted"]
    network.part("alpha", "beta")
    # It sees the record again, and nothing else.
    c.alpha.wait(lambda s: s["role"] == "WAIT", "it gives way")
    assert runs(c) == {"beta"}
    network.heal()
    c.alpha.wait(lambda s: bool(s["engine"]) and "split" in s["engine"]["flags"], "a split brain")
    c.alpha.order("second", force=True)
    c.in_sync(c.beta)
    assert read(c.beta) == b"n"


def test_a_store_that_lost_everything_is_told_and_gets_its_record_again(network: Switched) -> None:
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


def test_a_running_mirror_moves_to_another_store(etcd: Etcd) -> None:
    """Breaks in the field: the old etcd is to be switched off, and the mirror has to be stopped for
    it; or after the move one node still asks the old one.
    """
    with Etcd(token="new") as new, Cluster(arbiter="etcd", more=section(etcd)) as c:
        c.start()
        load = begin(c.alpha)
        for node in c.both:
            node.config_path.write_text(c.config_text(node.name, section(new)))
        assert "type it on alpha, too" in c.beta.order("arbiter-move")["done"]
        c.alpha.wait(lambda s: "arbiter move" in s["arbiter"]["trouble"], "it is told", 90)
        assert c.alpha.order("arbiter-move")["done"] == "both nodes ask etcd now"
        for node in c.both:
            node.wait(lambda s: s["arbiter"]["where"].startswith(f"etcd at {new.url}"), "moved")
            node.wait(lambda s: s["arbiter"]["proven_s"] is not None, "it could claim there")
        assert c.alpha.order("arbiter-move")["done"] == "this node asks etcd already"
        c.in_sync(c.alpha)
        load.wait(50)
        load.stop()
        assert not load.error
        # Nobody claims from the old one, and the new one decides.
        c.alpha.lose()
        status = c.beta.is_now("ALONE")
        assert status["arbiter"]["record"]["owner"] == "beta"
        assert status["arbiter"]["where"].startswith(f"etcd at {new.url}")
        load.assert_kept(c.beta.data)


def test_a_mirror_gets_an_arbiter_while_it_runs(etcd: Etcd) -> None:
    """Breaks in the field: who began with `none` has to make the mirror anew to have (c)."""
    with Cluster(arbiter="none") as c:
        c.start()
        c.arbiter = "etcd"
        for node in c.both:
            node.config_path.write_text(c.config_text(node.name, section(etcd)))
        for node in c.both:
            node.order("arbiter-move")
        c.in_sync(c.alpha)
        assert "(c) two nodes never" in c.alpha.status()["promise"][-1]
        c.beta.lose()
        status = c.alpha.is_now("ALONE")
        assert status["arbiter"]["record"]["owner"] == "alpha"
        assert status["engine"]["reads"] != "stale-possible"
        with refused("not in sync"):
            c.alpha.config_path.write_text(c.config_text("alpha", section(etcd)).replace(
                'arbiter = "etcd"', 'arbiter = "none"'))  # fmt: skip
            c.alpha.order("arbiter-move")


@contextlib.contextmanager
def refused(words: str) -> Iterator[None]:
    """An order that is refused in a text with these words."""
    with pytest.raises(RefusedError, match=words):
        yield


def test_a_move_that_broke_in_the_middle_is_ended_by_typing_it_again(etcd: Etcd) -> None:
    """Breaks in the field: a node is lost between the two halves of a move; the other one serves by
    the new store, and the lost one can never join it again.
    """
    with Etcd(token="halfway") as new, Cluster(arbiter="etcd", more=section(etcd)) as c:
        c.start()
        for node in c.both:
            node.config_path.write_text(c.config_text(node.name, section(new)))
        c.alpha.order("arbiter-move")
        c.beta.lose()
        status = c.alpha.is_now("ALONE")
        assert status["arbiter"]["record"]["owner"] == "alpha"
        write(c.alpha, b"h")
        # It starts with the new file, and its metadata still name the old store.
        c.beta.up()
        c.beta.wait(
            lambda s: s["peer"]["heard"] and s["engine"] is not None, "they hear each other"
        )
        assert c.beta.order("arbiter-move")["done"] == "both nodes ask etcd now"
        c.in_sync(c.alpha)
        c.alpha.lose()
        c.beta.is_now("ALONE")
        assert read(c.beta) == b"h"


def test_a_controller_with_the_new_file_does_not_leave_the_old_record_open(etcd: Etcd) -> None:
    """Breaks in the field: the file is edited, the controller restarted, and then the move typed:
    the other node may still claim from the old store.
    """
    with Etcd(token="early") as new, Cluster(arbiter="etcd", more=section(etcd)) as c:
        c.start()
        c.alpha.config_path.write_text(c.config_text("alpha", section(new)))
        c.alpha.signal(signal.SIGTERM)
        assert c.alpha.ended() == 0
        c.alpha.up()
        c.alpha.wait(lambda s: "is not the store" in s["arbiter"]["trouble"], "it is told")
        with pytest.raises(ArbiterError, match="is not the store"):
            c.alpha.order("arbiter-move")
