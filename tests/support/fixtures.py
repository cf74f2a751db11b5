"""Fixtures of the tests that run real engines: pairs that are always taken down."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.pair import PEER_PORT, Pair
from tests.support.proxy import Proxy

MakePair = Callable[..., Pair]


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
