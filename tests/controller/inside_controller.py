"""A controller that attaches and mounts, then dies or leaves: `python -m ... DIRECTORY`.

Owns one attachment, made as the test's process would make it. Says "ready" when it is mounted, and
ends in order when its standard input ends. Must never: clean up.
"""

import sys
from pathlib import Path

import uvloop

from nbdmirror.controller.attachment import Attachment
from tests.controller.attaching import attachment


async def main(made: Attachment) -> None:
    """Attach, mount, wait."""
    await made.attach()
    await made.mount()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    uvloop.run(main(attachment(Path(sys.argv[1]))))
