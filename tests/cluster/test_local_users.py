"""A user of the server without rights: what of a running node is within reach."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.nobody import attempts
from tests.support.pair import processes_of

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

# What the product made, against what the test did: its logs and the public configuration.
PUBLIC = ("alpha.toml", "beta.toml", "alpha.log", "beta.log")
OWN_DIRECTORIES = {"data", "run"}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two running nodes whose files nothing above them protects."""
    with Cluster() as made:
        made.start()
        for directory in (made.root, made.root / "alpha", made.root / "beta"):
            directory.chmod(0o755)
        # Else nobody gets as far as what these tests are about, and they hold for nothing.
        closed = [path for path in made.root.parents if not path.stat().st_mode & 0o001]
        assert not closed, f"TMPDIR must lie where every user may go: {closed}"
        yield made


def every_path(cluster: Cluster) -> list[Path]:
    """All that there is, but what is public."""
    found = [cluster.root, *cluster.root.rglob("*")]
    names = {path.name for path in found}
    assert {"engine.sock", "controller.sock", "nbd.sock", "meta", "engine.log", "key"} <= names
    return [path for path in found if path.name not in PUBLIC]


def processes(cluster: Cluster) -> list[int]:
    """The controllers and the engines."""
    pids = set(processes_of(cluster.root)) | {node.engine_pid() for node in cluster.both}
    assert len(pids) >= 4
    return sorted(pids)


def test_a_user_without_rights_reaches_nothing(cluster: Cluster) -> None:
    """Breaks in the field: any user of the server, or a web application that was broken into, reads
    the volume or the key, commands a node, or puts files where the node looks for its own.
    """
    done = attempts(every_path(cluster), processes(cluster))
    # The directories that the test opened; the product's own ones stay closed.
    opened = {
        f"list {path}" for path in (cluster.root, *(cluster.root / n.name for n in cluster.both))
    }
    assert set(done) == opened
    cluster.in_sync(cluster.alpha)


def test_each_file_and_socket_is_closed_by_itself(cluster: Cluster) -> None:
    """Breaks in the field: an operator opens a directory for a monitoring, and so the volume."""
    for node in cluster.both:
        for name in OWN_DIRECTORIES:
            directory = cluster.root / node.name / name
            assert directory.stat().st_mode & 0o777 == 0o700
            directory.chmod(0o755)
    paths = every_path(cluster)
    done = attempts(paths, processes(cluster))
    assert set(done) == {f"list {path}" for path in paths if path.is_dir()}
    assert not list(cluster.root.rglob("made-by-nobody"))
    cluster.in_sync(cluster.alpha)


def test_the_attempts_would_find_an_open_door(cluster: Cluster) -> None:
    """Breaks in the field: nothing; it shows that the tests above can fail."""
    directory = cluster.root / "alpha" / "run"
    directory.chmod(0o777)
    (directory / "nbd.sock").chmod(0o666)
    (directory / "engine.sock").chmod(0o666)
    (cluster.root / "key").chmod(0o644)
    try:
        done = attempts(every_path(cluster), [os.getpid()])
    finally:
        (cluster.root / "key").chmod(0o600)
    assert f"make in {directory}" in done
    assert f"connect {directory / 'nbd.sock'}" in done
    assert f"read {cluster.root / 'key'}" in done
    # Whoever gets as far as a control socket is asked for by the kernel's word.
    assert f"connect {directory / 'engine.sock'}" in done
    assert f"ask {directory / 'engine.sock'}" not in done
