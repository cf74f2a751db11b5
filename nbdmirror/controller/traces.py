"""What of a mirror's attachment is on this machine: mounts, devices, the helper process.

Owns: the places of an attachment, the record that survives a controller, and the search for what
is there, by the text of /proc and /sys alone. Must never: believe the record without looking, ask
a file system or a device that may be dead, or count as ours what another mirror attached.

A loop device is ours by the name of its backing file, which only this mirror in this run directory
has; the name stays also when the FUSE mount below it was detached. A kernel device is ours when
its client was started with our socket. When that client is dead, the device is ours if the record
names it, or if it is mounted at our mount point.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from nbdmirror.controller.mounts import Mount, mounts
from nbdmirror.controller.processes import Process, process, processes
from nbdmirror.files import FILE_MODE

BLOCK: Final = Path("/sys/block")
RECORD_BYTES_MAX: Final = 4096
KERNEL: Final = "kernel NBD"
FUSE: Final = "nbdfuse and a loop device"
NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class Places:
    """Where an attachment keeps what. `point`: None where nothing is to be mounted."""

    point: Path | None
    export: Path
    run_dir: Path
    mirror: str

    @property
    def fuse(self) -> Path:
        """The directory where nbdfuse mounts."""
        return self.run_dir / "fuse"

    @property
    def file(self) -> Path:
        """The device as a file. No other mirror of this machine has one of that name."""
        digest = sha256(os.fsencode(self.run_dir)).hexdigest()[:12]
        return self.fuse / f"nbdmirror-{self.mirror}-{digest}"

    @property
    def record(self) -> Path:
        """What the next controller is told."""
        return self.run_dir / "attachment.json"

    @property
    def log(self) -> Path:
        """What the helper says."""
        return self.run_dir / "attach.log"


@dataclass(frozen=True, slots=True)
class Record:
    """What was attached. `helper`, `started`: pid and start of nbdfuse or nbd-client."""

    kind: str
    device: str
    helper: int
    started: int


def write_json(path: Path, values: dict[str, Any]) -> None:
    """All of it or nothing; lost with the machine, like what it describes. Raises OSError."""
    fresh = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(fresh, flags, FILE_MODE)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(values, file)
    fresh.replace(path)


def write_record(path: Path, record: Record) -> None:
    """What was attached. Raises OSError."""
    write_json(path, asdict(record))


def read_record(path: Path) -> Record | None:
    """None where there is none that can be read."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(path, flags), "rb") as file:
            values = json.loads(file.read(RECORD_BYTES_MAX))
        kinds = {"kind": str, "device": str, "helper": int, "started": int}
        if not all(type(values[key]) is kind for key, kind in kinds.items()):
            return None
        return Record(**{key: values[key] for key in kinds})
    except (OSError, ValueError, TypeError, KeyError):
        return None


Copy = tuple[Process, Mount]


@dataclass(frozen=True, slots=True)
class Traces:
    """What there is. `devices`: "/dev/loop3"; `numbers`: the "major:minor" of each.

    `mounted`: our file system, wherever it is mounted, then what is mounted below it; in the order
    of mounting. `foreign`: what somebody else has mounted at our mount point.

    `elsewhere`, `fuse_elsewhere`: copies of our mounts in other mount namespaces, each with a
    process there. Where nothing propagates they keep the device in use, and nobody sees them.
    """

    helpers: tuple[Process, ...]
    fuse: tuple[Mount, ...]
    devices: tuple[str, ...]
    numbers: tuple[str, ...]
    mounted: tuple[Mount, ...]
    elsewhere: tuple[Copy, ...]
    fuse_elsewhere: tuple[Copy, ...]
    foreign: Mount | None

    def sentences(self) -> list[str]:
        """One for each thing."""
        return [
            *(f"{m.source} is mounted at {m.point}" for m in self.mounted),
            *(f"{m.source} is mounted at {m.point} for {process}" for process, m in self.elsewhere),
            *(f"{device} is attached" for device in self.devices),
            *(f"nbdfuse is mounted at {m.point}" for m in self.fuse),
            *(f"nbdfuse is mounted at {m.point} for {each}" for each, m in self.fuse_elsewhere),
            *(f"{helper} serves a device" for helper in self.helpers),
        ]


def look(places: Places) -> Traces:
    """What is here now. Reads /proc and /sys; call it in a thread, with a bound."""
    now = mounts()
    record = read_record(places.record)
    helpers = tuple(_helpers(places))
    fuse = tuple(m for m in now if m.point == places.fuse and m.type.startswith("fuse"))
    names = [*_loops(places.file), *_kernel_devices(places, helpers, record, now)]
    numbers = tuple(number for name in names if (number := _text(BLOCK / name / "dev")))
    mounted = _ours(numbers, now)
    foreign = [m for m in now if m.point == places.point and m not in mounted]
    devices = tuple(f"/dev/{name}" for name in names)
    wanted = {*numbers, *(m.device for m in fuse)}
    copies = list(_elsewhere(places.fuse, wanted)) if wanted or helpers else []
    return Traces(
        helpers,
        fuse,
        devices,
        numbers,
        mounted,
        elsewhere=tuple(c for c in copies if c[1].device in numbers),
        fuse_elsewhere=tuple(c for c in copies if c[1].device not in numbers),
        foreign=foreign[-1] if foreign else None,
    )


def _ours(numbers: Sequence[str], now: Sequence[Mount]) -> tuple[Mount, ...]:
    """Our file system at its place and elsewhere, and what lies below its place."""
    ours = [m for m in now if m.device in numbers]
    points = {m.point for m in ours}
    below = [m for m in now if m not in ours and points & set(m.point.parents)]
    return (*ours, *below)


def _elsewhere(fuse: Path, numbers: Collection[str]) -> Iterator[Copy]:
    """Our mounts in each other mount namespace of a process."""
    seen = {_namespace("self")}
    for each in processes():
        with contextlib.suppress(OSError):
            namespace = _namespace(str(each.pid))
            if namespace not in seen:
                seen.add(namespace)
                for m in mounts(each.pid):
                    if m.device in numbers or (m.point == fuse and m.type.startswith("fuse")):
                        yield each, m


def _namespace(pid: str) -> str:
    """Raises OSError."""
    return os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115 - its text is wanted


def _helpers(places: Places) -> Iterator[Process]:
    """The processes of nbdfuse and nbd-client that were started with our file or socket."""
    file, export = os.fsencode(places.file), os.fsencode(places.export)
    for each in processes():
        if each.name not in {"nbdfuse", "nbd-client"}:
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{each.pid}/cmdline").read_bytes().split(b"\0")
            if (file if each.name == "nbdfuse" else export) in words:
                yield each


def _loops(file: Path) -> Iterator[str]:
    """The loop devices over our file. A mount that was detached leaves only the name."""
    for backing in sorted(BLOCK.glob("loop*/loop/backing_file")):
        path = _text(backing).removesuffix(" (deleted)")
        if path == str(file) or path.rpartition("/")[2] == file.name:
            yield backing.parts[-3]


def _kernel_devices(
    places: Places, helpers: Sequence[Process], record: Record | None, now: Sequence[Mount]
) -> Iterator[str]:
    """The kernel's devices that our client connected, or that it left behind."""
    ours = {str(each.pid) for each in helpers}
    recorded = record.device if record is not None and record.kind == KERNEL else ""
    at_point = {m.source for m in now if m.point == places.point}
    for directory in sorted(BLOCK.glob("nbd*")):
        name, pid = directory.name, _text(directory / "pid")
        if pid in ours:
            yield name
        elif pid.isdigit() and process(int(pid)) is not None:
            continue  # another one's client lives
        elif f"/dev/{name}" in at_point or (f"/dev/{name}" == recorded and pid):
            yield name


def ends_by_itself(device: str) -> bool:
    """Whether a loop device is freed with its last user."""
    return _text(BLOCK / Path(device).name / "loop" / "autoclear") == "1"


def _text(path: Path) -> str:
    """A file of /sys; "" where it has gone."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""
