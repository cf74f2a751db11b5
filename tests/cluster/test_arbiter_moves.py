"""Another arbiter for a mirror that runs: `arbiter move`, with real nodes and a real etcd."""

import contextlib
import signal
from collections.abc import Iterator

import pytest

from nbdmirror.errors import ArbiterError, RefusedError
from tests.support.cluster import Cluster
from tests.support.stores import Etcd
from tests.support.third_host import section
from tests.support.volume import begin, read, write

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    """One etcd for the mirrors of this module; each has a key of its own."""
    with Etcd() as server:
        yield server


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
