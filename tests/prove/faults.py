"""What is done to one engine at one of its system calls, by strace.

Owns the points: role, moment, call, file, which call of a thread, what happens there. strace counts
the calls of every thread on its own: the k-th of a point is the first k-th of any thread.
"""

import contextlib
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.pair import Engine

ROLES: Final = ("primary", "secondary")
MOMENTS: Final = ("work", "return")
FAULTS: Final = ("kill", "power", "power-both", "EIO", "ENOSPC", "EPIPE")
DISK_CALLS: Final = ("pwrite64", "pwritev2", "fdatasync", "fallocate", "preadv", "pread64")
SOCKET_CALLS: Final = ("sendmsg", "recvfrom", "sendto", "recvmsg", "read", "write", "writev")
# A disk that cannot give back what it has is not full, and a socket is no disk.
ERRORS: Final = {
    "pwrite64": ("EIO", "ENOSPC"), "pwritev2": ("EIO", "ENOSPC"), "fdatasync": ("EIO", "ENOSPC"),
    "fallocate": ("EIO", "ENOSPC"), "preadv": ("EIO",), "pread64": ("EIO",), "sendmsg": ("EPIPE",),
}  # fmt: skip
ENDED: Final = ("kill", "power", "power-both")
SOON_S: Final = 0.05
LET_GO_S: Final = 5.0
CALL: Final = re.compile(r"^(\d+) +(\w+)\(")


@dataclass(frozen=True, order=True)
class Point:
    """One place where one thing happens. `file`: data, meta, or any for sockets."""

    role: str
    moment: str
    call: str
    file: str
    k: int
    fault: str

    def __str__(self) -> str:
        return ":".join((self.role, self.moment, self.call, self.file, str(self.k), self.fault))

    @classmethod
    def of(cls, text: str) -> "Point":
        """From what a replay names. Raises ValueError."""
        role, moment, call, file, k, fault = text.split(":")
        known = role in ROLES and moment in MOMENTS and fault in FAULTS
        if not known or call not in (*DISK_CALLS, *SOCKET_CALLS) or int(k) < 1:
            raise ValueError(f"{text}: no such point")
        return cls(role, moment, call, file, int(k), fault)

    @property
    def ends_it(self) -> bool:
        """Whether the engine does not survive."""
        return self.fault in ENDED


def path_of(engine: Engine, file: str) -> list[str]:
    """strace's filter for a file of an engine."""
    files = {"data": engine.config.data_file, "meta": engine.config.metadata_file}
    return ["-P", str(files[file])] if file in files else []


def command(engine: Engine, point: Point, told: Path) -> list[str]:
    """strace and what it has to do at a point, without whom it does it to; `told`: its output."""
    what = "signal=SIGKILL" if point.ends_it else f"error={point.fault}"
    return [
        "strace", "-f", "-o", str(told), *path_of(engine, point.file),
        "-e", f"trace={point.call}", "-e", f"inject={point.call}:{what}:when={point.k}",
    ]  # fmt: skip


class Tracer:
    """strace at a running engine. `end` lets go of it, if it still lives."""

    def __init__(self, engine: Engine, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [*arguments, "-p", str(engine.pid)],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        assert b"attached" in said, said

    def end(self) -> None:
        """Detach. strace ends with whom it traces; one that does not, after a kill, is ended."""
        for number in (0, signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SOON_S if number == 0 else LET_GO_S)
                break
        assert self._process.returncode is not None
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextlib.contextmanager
def counted(engine: Engine, calls: Sequence[str], file: str) -> Iterator[Counter[str]]:
    """How many calls the busiest thread makes meanwhile, by call."""
    found: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile(prefix="nm") as output:
        arguments = ["strace", "-f", "-o", output.name, *path_of(engine, file),
                     "-e", f"trace={','.join(calls)}"]  # fmt: skip
        tracer = Tracer(engine, arguments)
        try:
            yield found
        finally:
            tracer.end()
        found.update(busiest(Path(output.name)))


def busiest(output: Path) -> Counter[str]:
    """How many calls the busiest thread made, by call, from what strace wrote."""
    threads: Counter[tuple[str, str]] = Counter()
    for line in output.read_text(errors="replace").splitlines():
        if match := CALL.match(line):
            threads[match.group(1), match.group(2)] += 1
    found: Counter[str] = Counter()
    for (_, call), count in threads.items():
        found[call] = max(found[call], count)
    return found
