"""The last steps before a process is nbdkit: its descriptors, and what it needs a right for.

Owns the numbers of the descriptors that an engine is given. Runs in a child of the launcher and in
the controller's shim, which has no site packages: imports nothing but the standard library, and
what does so, too. Must never return to the caller's code.
"""

import fcntl
import os
from collections.abc import Mapping
from typing import Final, NoReturn

from nbdmirror import memory

# The NBD sockets begin here, by the rule of socket activation; there are two at most.
LISTEN_FDS_START: Final = 3
CONTROL_FD: Final = 5
HANDED_FD: Final = 6
# Out of the way of all of them.
HIGH_FD: Final = 64


def become(
    places: Mapping[int, int], command: list[str], variables: dict[str, str], *, prepare: bool
) -> NoReturn:
    """Be `command`. `places`: number of a descriptor there -> descriptor here.

    `prepare`: the command gives the rights up that keeping out of swap needs.

    Raises:
        OSError: the system refuses.
    """
    # First away from the low numbers, then to their places.
    high = {to: fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, HIGH_FD) for to, each in places.items()}
    for each in places.values():
        os.set_inheritable(each, False)  # the shim got them under these numbers
    for to, each in high.items():
        os.dup2(each, to, inheritable=True)
    if HANDED_FD in places:
        os.chdir("/")  # another user may not enter where this one was started
    if prepare:
        memory.prepare()
    listening = sum(to < CONTROL_FD for to in places)
    activation = {"LISTEN_FDS": str(listening), "LISTEN_PID": str(os.getpid())}
    os.execve(command[0], command, {**variables, **activation})  # noqa: S606 - no shell is the point
