"""The engine's standard error, on its way to whoever keeps the journal.

nbdkit writes there from the middle of a callback, with Python's lock held: a journal that nobody
reads would stop writes, clock and peer. So the engine's end of this pipe never blocks, and what
does not fit is lost; a thread of the launcher carries the rest on.

Owns the pipe and that thread. Must never: let the launcher wait for the journal, except for a
moment at its end.
"""

import contextlib
import os
import threading
from typing import Final

STDERR: Final = 2
CHUNK_BYTES: Final = 64 * 1024
LAST_WORDS_S: Final = 2.0


class Journal:
    """A pipe whose writing end the engine gets as its standard error."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        # Of this pipe alone: the launcher's own standard error may be shared with others.
        os.set_blocking(self.write_end, False)
        self._thread = threading.Thread(target=self._carry, name="journal", daemon=True)

    def start(self) -> None:
        """Begin to carry on; after the fork."""
        self._thread.start()

    def say(self, text: str) -> None:
        """One line of the launcher's own; lost where the engine's would be."""
        with contextlib.suppress(OSError):
            os.write(self.write_end, f"nbdmirror: {text}\n".encode())

    def close(self) -> None:
        """After the engine's end: carry on what it said last, if the journal takes it in time."""
        os.close(self.write_end)
        if self._thread.is_alive():
            self._thread.join(LAST_WORDS_S)

    def _carry(self) -> None:
        while data := os.read(self._read_end, CHUNK_BYTES):
            view = memoryview(data)
            with contextlib.suppress(OSError):
                while view:
                    view = view[os.write(STDERR, view) :]
