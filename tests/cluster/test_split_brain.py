"""A split brain on real nodes: told, resolved by one order either way, and nothing of it lost."""

import hashlib
import json
from pathlib import Path

import pytest

from nbdmirror_cli.main import run
from tests.support.cluster import Cluster, ClusterNode, Status

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

MIB = 1 << 20


def put(node: ClusterNode, byte: bytes, offset: int, count: int) -> None:
    """A durable write of a client."""
    client = node.connect()
    client.pwrite(byte * count, offset)
    client.flush()
    client.shutdown()


def checksum(image: Path) -> str:
    """Of a whole file."""
    return hashlib.sha256(image.read_bytes()).hexdigest()


def kept(node: ClusterNode, *words: str) -> int:
    """`nbdmirror kept ...` on a node."""
    return run(["kept", *words, "-c", str(node.config_path), "--node", node.name])


def split(c: Cluster) -> tuple[Status, Status]:
    """Both went on alone and have met: alpha waits, beta serves. Their statuses."""
    c.start()
    put(c.alpha, b"o", 0, 2 * MIB)
    c.beta.order("stop")
    c.alpha.is_now("ALONE")
    put(c.alpha, b"a", MIB, 2 * MIB)
    c.alpha.lose()
    c.beta.order("start")
    c.beta.wait(lambda s: s["row"] == "waits", "the stale copy waits")
    c.beta.order("prim", force=True)
    c.beta.is_now("ALONE")
    put(c.beta, b"b", 2 * MIB, 3 * MIB)
    c.alpha.up()

    def knows(s: Status) -> bool:
        return bool(s["engine"] and s["engine"]["split"] and s["engine"]["split"]["peer_bytes"])

    waits = c.alpha.wait(lambda s: s["role"] == "WAIT" and knows(s), "alpha waits and knows")
    return waits, c.beta.wait(knows, "beta knows")


def test_the_loser_is_given_up_and_can_be_had_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks in the field: nobody says how much is at stake, or the choice was wrong and the writes
    of a night are gone.
    """
    with Cluster() as c:
        waits, serves = split(c)
        mine, theirs = waits["engine"]["split"], serves["engine"]["split"]
        assert (mine["waits"], theirs["waits"]) == (True, False)
        assert (mine["own_bytes"], mine["peer_bytes"]) == (
            theirs["peer_bytes"], theirs["own_bytes"],
        )  # fmt: skip
        assert mine["own_bytes"] >= 2 * MIB
        assert mine["peer_bytes"] >= 3 * MIB
        for status in (waits, serves):
            told = [each for each in status["explain"] if each.startswith("The split brain: ")]
            assert "s ago" in told[0]
            assert str(mine["own_bytes"]) in told[0]
        assert "`nbdmirror second --force` here" in waits["remedy"]
        before = checksum(c.alpha.data)

        done = c.alpha.order("second", force=True)["done"]
        assert "what it holds is kept" in done
        c.in_sync(c.beta)
        put(c.beta, b"n", 0, 4096)
        put(c.beta, b"n", 9 * MIB, 4096)
        image = c.root / "image"
        assert kept(c.alpha, "export", str(image)) == 0
        assert checksum(image) == before

        serves_and_keeps(c, before)
        capsys.readouterr()
        assert kept(c.alpha, "show", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["complete"]
        assert facts["limit_bytes"] == 1 << 30
        assert kept(c.alpha, "discard", "--yes") == 0
        c.alpha.wait(lambda s: s["engine"]["kept"] is None, "gone")
        c.beta.order("stop", both=True)
        for node in c.both:
            node.rests("STOP", "stopped")
        c.assert_equal()


def serves_and_keeps(c: Cluster, before: str) -> None:
    """The loser serves and is restarted, and what it held is there still."""
    c.alpha.order("swap")
    c.in_sync(c.alpha)
    put(c.alpha, b"s", 10 * MIB, 8192)
    put(c.alpha, b"s", MIB, 8192)
    c.alpha.order("stop")
    c.alpha.rests("STOP", "stopped")
    again = c.root / "again"
    assert kept(c.alpha, "export", str(again)) == 0
    assert checksum(again) == before
    c.alpha.order("start")
    c.in_sync(c.beta)


def test_the_one_that_serves_is_given_up() -> None:
    """Breaks in the field: only the side that waits can lose, whatever the operator decides."""
    with Cluster() as c:
        split(c)
        c.beta.order("stop")
        c.beta.rests("STOP", "stopped")
        before = checksum(c.beta.data)
        c.alpha.order("prim", force=True)
        c.alpha.is_now("ALONE")
        c.beta.order("start")
        c.beta.wait(
            lambda s: s["role"] == "WAIT" and bool((s["engine"] or {}).get("split")), "it waits"
        )
        assert c.alpha.connect().pread(4096, MIB) == b"a" * 4096
        c.beta.order("second", force=True)
        c.in_sync(c.alpha)
        image = c.root / "image"
        assert kept(c.beta, "export", str(image)) == 0
        assert checksum(image) == before
        c.alpha.order("stop", both=True)
        for node in c.both:
            node.rests("STOP", "stopped")
        c.assert_equal()


def test_a_resync_waits_for_room_to_keep() -> None:
    """Breaks in the field: a disk without room makes the resync throw away what is to be kept, or
    the node waits and nobody says what for.
    """
    with Cluster(more='[engine]\nkeep_bytes = "256KiB"\n') as c:
        split(c)
        before = checksum(c.alpha.data)
        c.alpha.order("second", force=True)
        waits = c.alpha.wait(lambda s: s["engine"]["resync_waits"], "it waits")
        assert "`nbdmirror kept limit SIZE`" in waits["remedy"]
        assert any(each.startswith("The resync waits: ") for each in waits["explain"])
        c.alpha.rests("WAIT", "peer serves")
        c.beta.is_now("ALONE")
        assert c.alpha.data.read_bytes()[2 * MIB : 3 * MIB] == b"a" * MIB, "not overwritten"
        assert kept(c.alpha, "limit", "64MiB") == 0
        c.in_sync(c.beta)
        image = c.root / "image"
        assert kept(c.alpha, "export", str(image)) == 0
        assert checksum(image) == before
