"""The command line of nbdmirror: one file per group of verbs, over clients that know no click.

Owns words and layout for human eyes. Must never decide anything: what a command may do is decided
by the engine and by the modules of `nbdmirror`.
"""
