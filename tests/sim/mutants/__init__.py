"""Mutants: each rule of docs/safety.md taken away once, to see that the simulator notices.

`python -m tests.sim.mutants` runs them all and prints a table. A mutant that is not caught shows a
fault or a check that the simulator lacks.
"""
