"""Fixtures of the tests with NBD clients."""

from tests.support.fixtures import make_pair, pair, proxied

__all__ = ["make_pair", "pair", "proxied"]
