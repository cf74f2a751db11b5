"""A process with nothing but a Probe: `python -m tests.support.probed`.

Owns what a test may stop without stopping itself. It is ready as long as its own last look at a
clock is not older than `LOOK_AGE_S`, as the controller's is at its engine. Writes its port to its
output, and ends with its input. Must never: outlive the test.
"""

import asyncio
import sys
import time

import uvloop

from nbdmirror.config_fields import Address
from nbdmirror.controller.probe import Probe

LOOK_AGE_S = 1.0
LOOK_EVERY_S = 0.1


class Looker:
    """Looks again and again; a loop that hangs does not."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def look(self) -> None:
        """Now, and then again."""
        self._last_s = time.monotonic()
        asyncio.get_running_loop().call_later(LOOK_EVERY_S, self.look)

    def is_ready(self) -> bool:
        """The last look is young."""
        return time.monotonic() - self._last_s < LOOK_AGE_S


async def main() -> None:
    """Until the input ends."""
    looker = Looker()
    looker.look()
    probe = Probe(Address("127.0.0.1", 0), "demo", looker.is_ready)
    await probe.start()
    sys.stdout.write(f"{probe.address.port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await probe.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
