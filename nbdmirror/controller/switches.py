"""What a controller remembers over its own end: the operator's switches, and its counts.

Owns one small file beside the metadata, replaced as a whole and durably. Roles and data are not in
it: of those the engine's metadata is the only memory. Must never: read a wall clock (an action of
an earlier boot counts as if it had happened at the start of this one), stop a node because the
file is damaged (then the node runs, all else is as at creation, and that is told), or make the loop
wait for a disk: heartbeats leave from there.
"""

import asyncio
import json
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from nbdmirror.errors import StoreError
from nbdmirror.files import FILE_MODE, store_error, sync_directory, write_all

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
FILE_BYTES_MAX: Final = 1024 * 1024
ACTIONS_KEPT_MAX: Final = 128
REASON_CHARS_MAX: Final = 300
HOUR_S: Final = 3600
STORE_S: Final = 5.0
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
        self._stored: Remembered | None = None
        self._tried: Remembered | None = None
        self._work: asyncio.Task[None] | None = None
        self.now = self._read()
        if self.now.boot_id != self._boot_id:
            # The first start since this boot: the boot switch decides whether the node runs.
            wanted = self.now.wanted and self.now.boot
            reason = self.now.stop_reason if not self.now.wanted else "boot is switched off"
            self.now = replace(
                self.now, wanted=wanted, stop_reason="" if wanted else reason, boot_id=self._boot_id
            )

    def _read(self) -> Remembered:
        try:
            with self._path.open("rb") as file:
                self._stored = remembered(json.loads(file.read(FILE_BYTES_MAX)))
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
        """From now on; `kept` makes it outlive this process."""
        self.now = replace(self.now, **fields)

    @property
    def untried(self) -> bool:
        """Whether something changed that nobody tried to store."""
        return self.now not in (self._stored, self._tried)

    async def kept(self) -> str:
        """Store what is in force; returns why that does not outlive this process, "" if it does.

        Waits for the disk `STORE_S` seconds at the most, in a thread.
        """
        while self.now != self._stored:
            if self._work is None:
                self._work = asyncio.create_task(asyncio.to_thread(self.store))
            work = self._work
            if not (await asyncio.wait({work}, timeout=STORE_S))[0]:
                return f"it is in force, but {self._path} was not written within {STORE_S:g} s"
            self._work = None if self._work is work else self._work
            if isinstance(error := work.exception(), StoreError):
                return f"it is in force, but could not be stored: {error}"
            work.result()
        return ""

    def store(self) -> None:
        """Write what is in force, durably. Blocks.

        Raises:
            StoreError: it could not be stored; it is in force all the same until this process ends.
        """
        self._tried = wanted = self.now
        if wanted == self._stored:
            return
        temporary = self._path.with_suffix(".json.new")
        data = json.dumps(asdict(wanted), indent=1).encode() + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(temporary, flags, FILE_MODE)
            try:
                write_all(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
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
