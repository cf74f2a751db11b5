"""What a controller remembers over its own end: the operator's switches, and its counts.

Owns one small file beside the metadata, replaced as a whole and durably. Roles and data are not in
it: of those the engine's metadata is the only memory. Must never: read a wall clock (an action of
an earlier boot counts as if it had happened at the start of this one), stop a node because the
file is damaged (then the node runs, all else is as at creation, and that is told), or write
without being asked to: `keeper` does it, in a thread of its own.
"""

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from nbdmirror.files import FILE_MODE, store_error, sync_directory, write_all

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
FILE_BYTES_MAX: Final = 1024 * 1024
ACTIONS_KEPT_MAX: Final = 128
REASON_CHARS_MAX: Final = 300
HOUR_S: Final = 3600
_SWITCHES: Final = ("wanted", "boot", "failover", "checkers", "served", "stop_both")
# What was written can be read again, and counted up to any bound: a character has up to 12 bytes.
assert ACTIONS_KEPT_MAX * (12 * REASON_CHARS_MAX + 200) < FILE_BYTES_MAX // 2


@dataclass(frozen=True, slots=True)
class Remembered:
    """The content of the file. `actions`: (boot id, seconds since that boot, what).

    `served`: it took the role, and has not given it up in order; on a node that is not primary any
    more this means that it lost the role by a failure. `stop_both`: what stops here is the mirror,
    so this node waits for the other one.
    """

    wanted: bool = False
    stop_reason: str = "it was never started"
    boot: bool = True
    failover: bool = True
    checkers: bool = True
    served: bool = False
    stop_both: bool = False
    boot_id: str = ""
    actions: tuple[tuple[str, int, str], ...] = field(default=())


class Switches:
    """The file, and what follows from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot_id = read_boot_id()
        self.note = ""
        self.on_change: Callable[[], None] = lambda: None
        self._stored: Remembered | None = None
        self.now = self._read()
        if self.now.boot_id != self._boot_id:
            # The first start since this boot: the boot switch decides whether the node runs.
            wanted = self.now.wanted and self.now.boot
            reason = self.now.stop_reason if not self.now.wanted else "boot is switched off"
            self.now = replace(
                self.now, wanted=wanted, stop_reason="" if wanted else reason, boot_id=self._boot_id
            )
        # What nobody changed needs not be written, however little of the file could be used.
        self._tried = self.now

    def _read(self) -> Remembered:
        try:
            self._stored = remembered(json.loads(read_own(self._path)))
        except FileNotFoundError:
            return Remembered()
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as no:
            self.note = (
                f"{self._path} cannot be used ({type(no).__name__}: {no}); this node runs, and all "
                "switches are as at creation: set those again that were different"
            )
            return Remembered(wanted=True, stop_reason="")
        return self._stored

    def change(self, **fields: Any) -> None:
        """From now on; `store` makes it outlive this process. Never blocks."""
        self.now = replace(self.now, **fields)
        self.on_change()

    @property
    def untried(self) -> bool:
        """Whether something changed that nobody tried to store."""
        return self.now is not self._tried

    def store(self) -> None:
        """Write what is in force, durably. Blocks.

        Raises:
            StoreError: it could not be stored; it is in force all the same until this process ends.
        """
        self._tried = wanted = self.now
        if wanted == self._stored:
            return
        self._stored = None
        temporary = self._path.with_suffix(".json.new")
        data = json.dumps(asdict(wanted), indent=1).encode() + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            # Never what is there: the engine's user may make files in this directory.
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, flags, FILE_MODE)
            try:
                write_all(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if self.note:
                # Whatever was wrong with it, an operator may still want to read it.
                with contextlib.suppress(OSError):
                    self._path.rename(self._path.with_suffix(".json.damaged"))
                self.note = ""
            temporary.replace(self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            raise store_error(error, f"{self._path}") from error
        self._stored = wanted

    # --- the bound on automatic actions -----------------------------------------------------------

    def actions_within(self, hours: int) -> list[str]:
        """What was done by itself within so many hours."""
        since_s = uptime_s() - hours * HOUR_S
        return [
            what
            for boot_id, at_s, what in self.now.actions
            if (at_s if boot_id == self._boot_id else 0) >= since_s
        ]

    def count_action(self, what: str) -> None:
        """One more."""
        entry = (self._boot_id, uptime_s(), what[:REASON_CHARS_MAX])
        self.change(actions=(*self.now.actions, entry)[-ACTIONS_KEPT_MAX:])


def read_own(path: Path) -> bytes:
    """A file of this user's or of root's: the engine's user may make others of any name beside it.

    Raises:
        ValueError: it is no plain file, or somebody else's. OSError: it cannot be read.
    """
    # Without waiting for whoever would write into a FIFO.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no plain file")
        if status.st_uid not in {0, os.geteuid()}:
            raise ValueError(f"it belongs to user {status.st_uid}")
        return file.read(FILE_BYTES_MAX)


def remembered(facts: Any) -> Remembered:
    """The content of the file; what another version of this program wrote beside it is left out.

    Raises:
        ValueError, TypeError, LookupError, ArithmeticError: it is none.
    """
    if not isinstance(facts, dict) or "wanted" not in facts:
        raise ValueError("it does not say whether this node is wanted")
    known = {each.name: facts[each.name] for each in fields(Remembered) if each.name in facts}
    actions = known.get("actions", ())
    known["actions"] = tuple((str(b), int(at), str(what)) for b, at, what in actions)
    made = Remembered(**known)
    for name in _SWITCHES:
        if not isinstance(getattr(made, name), bool):
            raise ValueError(f"{name} is neither true nor false")  # noqa: TRY004 - one class here
    for name in ("stop_reason", "boot_id"):
        if not isinstance(getattr(made, name), str):
            raise ValueError(f"{name} is no text")  # noqa: TRY004 - one class here
    return made


def read_boot_id() -> str:
    """Of this boot of the host."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def uptime_s() -> int:
    """Since the boot, suspended time included."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))
