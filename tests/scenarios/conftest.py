"""Fixtures of the scenarios."""

from tests.support.fixtures import make_pair, pair, proxied

__all__ = ["make_pair", "pair", "proxied"]
