"""Mutated inputs for every parser of bytes from outside; `python -m tests.fuzz` runs them.

An input that passes a checksum or a proof only by luck tests the checksum and nothing behind it. So
each parser brings valid inputs to begin with, and a way to seal a changed one again.
"""
