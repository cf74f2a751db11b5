"""Fixtures of the tests that run real engines: pairs that are always taken down."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.pair import PEER_PORT, Pair
from tests.support.powercut import PowerDisk
from tests.support.proxy import Proxy

MakePair = Callable[..., Pair]
Powered = tuple[Pair, dict[str, PowerDisk]]


@pytest.fixture
def make_pair(request: pytest.FixtureRequest) -> Iterator[MakePair]:
    """Make pairs that end with the test, and tell their story when it failed."""
    made: list[Pair] = []

    def make(**arguments: Any) -> Pair:
        pair = Pair(**arguments)
        made.append(pair)
        return pair

    failed_before = request.session.testsfailed
    yield make
    with ExitStack() as stack:
        for pair in made:
            stack.callback(pair.close)
        if request.session.testsfailed > failed_before:
            for pair in made:
                print(pair.story())  # noqa: T201 - pytest shows it with the failure


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A pair of 16 MiB in sync, alpha primary."""
    return make_pair().up()


@pytest.fixture
def proxied(make_pair: MakePair) -> Iterator[tuple[Pair, Proxy]]:
    """A pair of 16 MiB in sync whose channel goes through a relay."""
    proxy = Proxy()
    try:
        pair = make_pair(dial=proxy.address)
        proxy.target = (pair.hosts["beta"], PEER_PORT)
        yield pair.up(), proxy
    finally:
        proxy.close()


@contextmanager
def powered_pair(
    directory: Path, make_pair: MakePair, *, disk_bytes: int, **arguments: Any
) -> Iterator[Powered]:
    """A pair in sync, each node on a disk of its own whose power can be cut. Root only."""
    disks: dict[str, PowerDisk] = {}
    try:
        for name in ("alpha", "beta"):
            (directory / name).mkdir()
            disks[name] = PowerDisk(directory / name, disk_bytes)
        data_dirs = {name: disk.mountpoint / "node" for name, disk in disks.items()}
        pair = make_pair(data_dirs=data_dirs, **arguments)
        for engine in pair.both:
            engine.allowed.add("EIO")  # a disk without power fails every path that meets it
        yield pair.up(), disks
        pair.close()
    finally:
        for disk in disks.values():
            disk.close()
