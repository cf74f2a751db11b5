"""The commands against real controllers: what the stand-in of the other tests claims, held.

Owns the comparison of the shapes, and one life of a mirror by the command line alone.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake_controller import STATUS
from tests.support.cluster import Cluster, ClusterNode

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

COMMAND = Path(sys.executable).parent / "nbdmirror"
BOUND_S = 120.0
# What a command may add to the status; the stand-in has no differing configurations.
MORE = {"config_differences"}


def typed(node: ClusterNode, *words: str) -> "subprocess.CompletedProcess[str]":
    """One command on one node, to its end."""
    line = [str(COMMAND), *words, "-c", str(node.config_path), "--node", node.name]
    return subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=BOUND_S, stdin=subprocess.DEVNULL
    )


def shape(facts: dict[str, Any]) -> dict[str, set[str]]:
    """The names of the members, and of those of each object in it but the engine's."""
    parts = {key: value for key, value in facts.items() if isinstance(value, dict)}
    del parts["engine"]
    return {"": set(facts)} | {key: set(value) - MORE for key, value in parts.items()}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes with controllers, brought up by the command line."""
    with Cluster() as made:
        made.create()
        alpha, beta = made.both
        assert typed(alpha, "status", "--quiet").returncode == 5
        for node in made.both:
            node.up()
        assert typed(alpha, "status", "-q").stdout == "STOP\n"
        for node in (alpha, beta):
            done = typed(node, "start")
            assert done.returncode == 0, done.stderr
            assert "start: this node shall run" in done.stdout
        made.in_sync(alpha)
        yield made


def test_the_stand_in_answers_as_the_real_one(cluster: Cluster) -> None:
    """Breaks in the field: the command line is right for the stand-in of its tests, and shows
    nothing of what the controller says.
    """
    alpha, beta = cluster.both
    codes = [typed(node, "status", "--quiet").returncode for node in cluster.both]
    assert codes == [3, 4]
    facts = json.loads(typed(alpha, "status", "--json").stdout)
    assert shape(facts) == shape(STATUS)
    for key in ("links", "checkers", "addresses"):
        for each in facts[key]:
            assert set(each) == set(STATUS[key][0]), key
    assert "SECOND ready" in typed(beta, "status").stdout
    assert 'row "second"' in typed(beta, "explain").stdout
    done = typed(alpha, "failover", "off")
    assert done.stdout.splitlines()[-1] == "now checkers on, failover OFF, boot on"
    assert "not changed" in typed(alpha, "apply", "--yes").stdout
    lines = typed(beta, "events", "--no-follow", "--json").stdout.splitlines()
    assert {"order", "decision"} <= {json.loads(line)["event"] for line in lines}


def test_every_order_is_carried_out(cluster: Cluster) -> None:
    """Breaks in the field: an order is not understood, or the wait for it never ends."""
    alpha, beta = cluster.both
    done = typed(alpha, "prim")
    assert (done.returncode, done.stdout) == (13, "")
    assert "this node is primary already" in done.stderr
    assert typed(alpha, "second", "--force", "--yes").returncode == 13
    for node, name in ((beta, "swap"), (beta, "restart"), (beta, "resync"), (beta, "second")):
        done = typed(node, name)
        assert done.returncode == 0, (name, done.stderr)
        cluster.in_sync(alpha if name == "second" else beta)
    done = typed(alpha, "stop", "--both")
    assert done.returncode == 0, done.stderr
    beta.wait(lambda status: status["role"] == "STOP", "stopped, too")
    assert typed(alpha, "status", "-q").stdout == "STOP\n"
    cluster.assert_equal()
