"""Arbiters with a memory: stores of one record that can compare and swap."""
