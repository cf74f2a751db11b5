"""The pure core: formats, tables and the paths of every operation.

Nothing below this package touches a socket, a file, a thread, a clock or a random number. The
engine drives it with real ones, the simulator with simulated ones.
"""
