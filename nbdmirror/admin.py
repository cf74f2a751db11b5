"""What an operator does to the files of a mirror while no engine runs: create, show, check.

Owns: the first superblock of a node, and the reading of its files for human eyes. Must never:
repair, overwrite an existing file, leave half a creation behind, or change a file that an engine
holds.
"""

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Required, TypedDict, Unpack

from blake3 import blake3

from nbdmirror import engine_user, ownership
from nbdmirror.arbiters.registration import identity_for, look, register
from nbdmirror.certificate import make_if_missing
from nbdmirror.config import Config
from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.intentlog import IntentLog
from nbdmirror.core.record import Record
from nbdmirror.core.superblock import (
    ARBITER_IDENTITY_BYTES,
    ID_BYTES,
    NO_ID,
    ArbiterKind,
    DataState,
    Flags,
    Superblock,
    choose,
    decode,
    log_generations,
)
from nbdmirror.errors import ConfigError, MetadataError, OutOfSpaceError, RefusedError, StoreError
from nbdmirror.files import open_regular, store_error, sync_directory
from nbdmirror.kept import path_beside
from nbdmirror.kept import remove as remove_kept
from nbdmirror.metastore import FileMetaStore, holder
from nbdmirror.metastore import create as create_metadata
from nbdmirror.store import FileStore

MIRROR_ID_CONTEXT: Final = "nbdmirror 2026 mirror id"
NO_IDENTITY: Final = bytes(ARBITER_IDENTITY_BYTES)
DIRECTORY_MODE: Final = 0o700
WAY_MODE: Final = 0o711
OTHERS_MAY: Final = 0o077
OTHERS_MAY_WRITE: Final = 0o022


def derive_mirror_id(key: bytes, mirror: str) -> bytes:
    """16 bytes that both nodes of a mirror agree on without an exchange, and nobody else has."""
    assert key, "the configuration was loaded with its key"
    return blake3(key + mirror.encode("ascii"), derive_key_context=MIRROR_ID_CONTEXT).digest(
        ID_BYTES
    )


def first_superblock(
    config: Config,
    size: int,
    *,
    join: bool,
    zeroed: bool,
    arbiter_identity: bytes = NO_IDENTITY,
) -> Superblock:
    """What a node knows at birth.

    The creator has a generation of its own and is ALONE; the one that joins is blank. Both are
    CLEAN: everything is synced before the superblock exists. The sparse flag is the caller's.

    Raises:
        ConfigError: the format cannot describe such a device.
    """
    flags = Flags.CLEAN | (Flags.ZEROED if zeroed else Flags(0))
    try:
        return Superblock(
            mirror_id=derive_mirror_id(config.key, config.mirror),
            mirror_name=config.mirror,
            node_id=config.me.id,
            node_uuid=os.urandom(ID_BYTES),
            device_bytes=size,
            extent_bytes=config.device.extent,
            region_bytes=config.device.region,
            map_id=os.urandom(ID_BYTES),
            arbiter=config.arbiter,
            arbiter_identity=arbiter_identity,
            generation=NO_ID if join else os.urandom(ID_BYTES),
            data_state=DataState.BLANK if join else DataState.UPTODATE,
            flags=flags if join else flags | Flags.ALONE,
            sequence=1,
        )
    except MetadataError as error:
        raise ConfigError(f"this device cannot be made: {error}") from error


def look_at_store(config: Config) -> tuple[str, Record | None]:
    """The identity, in hex, of the store of an arbiter, and its record of this mirror.

    Raises:
        ArbiterError: the store cannot be asked, or holds what is none.
    """
    identity, record = look(config, derive_mirror_id(config.key, config.mirror))
    return identity.hex(), record


class Wanted(TypedDict, total=False):
    """How a node is to be born.

    `join`: the other node is the source, whatever this one holds is overwritten by its data.
    `adopt`: the data file exists and its content is kept. `sparse`: reserve no space. `fill`: puts
    the first content into the new data file, a file system for example, and makes it durable.
    `replace_record`: what an arbiter with a memory still holds of an earlier mirror counts no more.
    """

    join: Required[bool]
    adopt: Required[bool]
    sparse: Required[bool]
    fill: Callable[[Path], None] | None
    replace_record: bool


def create(config: Config, size: int | None, **wanted: Unpack[Wanted]) -> Superblock:
    """Make the data and the metadata file of this node; all of it, or nothing.

    `size` is that of the device in bytes; None, only with `adopt`: that of the existing data file.
    They belong to the user of the engine.

    Raises:
        ArbiterError: an arbiter with a memory cannot be asked.
        ConfigError: no size, or one that the format cannot describe; an engine's user that there is
        none of, or who cannot get there.
        RefusedError: a file, or a record, that would have to be overwritten is there; or what is
        there cannot become the engine's user's.
        MetadataError: the adopted file is missing or smaller than the device.
        StoreError: the system refuses; OutOfSpaceError when the space cannot be reserved.
    """
    data, meta, adopt = config.data_file, config.metadata_file, wanted["adopt"]
    if os.path.lexists(meta):
        raise RefusedError(
            f"{meta} exists and is not overwritten: this node has a mirror already; "
            "look at it with `nbdmirror metadata show`"
        )
    if size is None:
        size = _size_to_adopt(data, adopt=adopt)
    user = engine_user.another(config.engine.user)
    if user is not None:
        ownership.require_settled(config, user)
    superblock = first_superblock(
        config,
        size,
        join=wanted["join"],
        zeroed=not adopt and wanted.get("fill") is None,
        arbiter_identity=_store_identity(config, wanted),
    )
    if wanted["sparse"]:
        superblock = replace(superblock, flags=superblock.flags | Flags.SPARSE)
    undo: list[Callable[[], None]] = []
    try:
        _make_files(config, superblock, wanted, undo)
        ownership.settle(config, user)
    except BaseException as error:
        for step in reversed(undo):
            with contextlib.suppress(OSError):  # the first error is the one to tell
                step()
        if isinstance(error, OutOfSpaceError) and not wanted["sparse"]:
            where = f"{error.where} (make room, or reserve no space with `--sparse`)"
            raise OutOfSpaceError(error.number, where) from error
        raise
    return superblock


def _make_files(
    config: Config, superblock: Superblock, wanted: Wanted, undo: list[Callable[[], None]]
) -> None:
    """Each file, and the record; `undo` takes back what was made."""
    data, size, fill = config.data_file, superblock.device_bytes, wanted.get("fill")
    _make_directory(config.me.data_dir, undo)
    make = FileStore.adopt if wanted["adopt"] else FileStore.create
    store = make(data, size, sparse=wanted["sparse"])
    if not wanted["adopt"]:
        undo.append(data.unlink)
    store.close()
    if fill is not None:
        fill(data)
    if config.engine.tls == "on" and config.engine.tls_certificate is None:
        own = config.tls_certificate
        if make_if_missing(own, config.mirror, config.me.name):
            undo.append(own.unlink)
    if config.arbiter.has_memory and not wanted["join"]:
        # Before the metadata: without the record a node would be alone by its own word.
        register(config, superblock, replace=wanted.get("replace_record", False))
    create_metadata(config.metadata_file, superblock, superblock.geometry())
    undo.append(config.metadata_file.unlink)


def _store_identity(config: Config, wanted: Wanted) -> bytes:
    if not config.arbiter.has_memory:
        return NO_IDENTITY
    mirror_id = derive_mirror_id(config.key, config.mirror)
    replaces = wanted.get("replace_record", False)
    return identity_for(config, mirror_id, join=wanted["join"], replace=replaces)


def _size_to_adopt(data: Path, *, adopt: bool) -> int:
    if not adopt:
        raise ConfigError("the size of the device is not given; only an adopted file has one")
    try:
        return data.stat().st_size
    except OSError as error:
        raise MetadataError(
            f"{data} cannot be adopted ({error.strerror}): put the file with the data there first"
        ) from error


def _make_directory(directory: Path, undo: list[Callable[[], None]]) -> None:
    """Make the data directory and what is missing above it, durably."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        for each in reversed(missing):
            # Whoever the engine runs as gets through those above, and others see nothing there.
            each.mkdir(mode=DIRECTORY_MODE if each == directory else WAY_MODE)
            undo.append(each.rmdir)
            sync_directory(each.parent)
    except OSError as error:
        raise store_error(error, f"make {directory}") from error


def discard_kept(config: Config) -> None:
    """Forget what is kept of a copy that was given up, where no engine runs.

    Raises:
        RefusedError: an engine runs, or nothing is kept. MetadataError, StoreError: see open().
    """
    path = path_beside(config.data_file)
    if not os.path.lexists(path):
        raise RefusedError(f"nothing is kept on this node ({path} is not there)")
    meta = FileMetaStore.open(config.metadata_file)
    try:
        chosen = choose(*meta.read_slots())
        remove_kept(path)
        sb = chosen.superblock
        meta.write_superblock(replace(sb, sequence=sb.sequence + 1, saved_bytes=0))
    finally:
        meta.close()


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, and what that means for the mirror.

    `severity`: "damage", or "warning" for what is whole but open to others. `remedy` may be empty.
    """

    part: str
    problem: str
    meaning: str
    severity: str = "damage"
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found. Nothing was changed."""

    path: Path
    findings: tuple[Finding, ...]
    facts: dict[str, Any]

    @property
    def damaged(self) -> bool:
        """Whether something is lost; warnings alone are no damage."""
        return any(finding.severity == "damage" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "damaged": self.damaged,
            "findings": [asdict(finding) for finding in self.findings],
            "facts": self.facts,
        }


def superblock_facts(sb: Superblock) -> dict[str, Any]:
    """The fields of a superblock for JSON: ids in hex ("" = none), enums and flags by name."""
    facts: dict[str, Any] = {}
    for name, value in asdict(sb).items():
        if isinstance(value, bytes):
            facts[name] = value.hex() if any(value) else ""
        elif isinstance(value, tuple):
            facts[name] = [each.hex() for each in value]
        elif isinstance(value, Flags):
            facts[name] = [str(flag.name).lower() for flag in value]  # as the engine's state
        elif isinstance(value, ArbiterKind):
            facts[name] = value.word
        elif name in {"data_state", "pending_kind"}:
            facts[name] = value.name.lower()
        else:
            facts[name] = value
    return facts


def show(path: Path) -> dict[str, Any]:
    """What the metadata file says, for JSON. While an engine runs it is behind the engine.

    Raises:
        MetadataError: there is none, or no slot can be trusted.
        RefusedError, StoreError: it is not a plain file, or cannot be read.
    """
    meta = FileMetaStore.open_to_read(path, locked=False)
    try:
        chosen = choose(*meta.read_slots())
        findings, counts = _look_at_log_and_map(meta, chosen.superblock)
        return {
            "path": str(path),
            "held_by_pid": holder(meta.fileno()),
            "slot": chosen.slot,
            "fell_back": chosen.fell_back,
            "notes": [*chosen.notes, *(f"{each.part}: {each.problem}" for each in findings)],
            **superblock_facts(chosen.superblock),
            **counts,
        }
    finally:
        meta.close()


def check(path: Path, run_dir: Path | None = None) -> Report:
    """Decode all of the metadata and look for the data file beside it; repair nothing.

    Also says as warnings who else can reach the files, and the sockets in `run_dir`.

    Raises:
        RefusedError: an engine holds it, or it is not a plain file.
        StoreError: it cannot be read.
    """
    try:
        meta = FileMetaStore.open_to_read(path, locked=True)
    except MetadataError as error:
        lost = "this node does not start, and its peer goes on without it"
        return Report(path, (Finding("file", str(error), lost),), {})
    try:
        report = _checked(path, meta)
        return replace(report, findings=(*report.findings, *_look_at_access(path, meta, run_dir)))
    finally:
        meta.close()


def _checked(path: Path, meta: FileMetaStore) -> Report:
    slots = meta.read_slots()
    findings = []
    for number, block in enumerate(slots):
        try:
            decode(block)
        except MetadataError as error:
            findings.append(
                Finding(f"superblock slot {number}", str(error), "one copy of two is lost")
            )
    try:
        chosen = choose(*slots)
    except MetadataError as error:
        lost = "what this node knew of itself is lost; it does not start"
        return Report(path, (*findings, Finding("superblock", str(error), lost)), {})
    if chosen.fell_back:
        meaning = "this node is neither promoted nor a source until its peer confirms its state"
        findings.append(Finding("superblock", "; ".join(chosen.notes), meaning))
    found, counts = _look_at_log_and_map(meta, chosen.superblock)
    findings += found
    findings += _look_at_data(path.with_name("data"), chosen.superblock)
    return Report(path, tuple(findings), {**superblock_facts(chosen.superblock), **counts})


def _look_at_log_and_map(
    meta: FileMetaStore, sb: Superblock
) -> tuple[list[Finding], dict[str, Any]]:
    geometry = sb.geometry()
    findings = []
    log = IntentLog(geometry, sb.map_id)
    loaded = log.load(meta.read_ring(), log_generations(sb), sb.own_txn)
    if loaded.damaged:
        meaning = "every extent counts as dirty: the next resync compares the whole device"
        findings.append(Finding("intent log", loaded.reason, meaning))
    dirty = DirtyMap(geometry, sb.map_id)
    bad = dirty.load(meta.read_map())
    findings += [_bad_page(geometry, index) for index in bad]
    return findings, {
        "dirty_bytes": min(dirty.count * geometry.extent_bytes, geometry.device_bytes),
        "hot_regions_count": len(loaded.hot),
        "log_txn": loaded.txn,
        "damaged_pages_count": len(bad),
    }


def _bad_page(geometry: Geometry, index: int) -> Finding:
    extents = geometry.extents_of_page(index)
    offset, end = geometry.bytes_of_extents(extents.start, extents.stop)
    return Finding(
        f"dirty map page {index}",
        "its checksum or its identity is wrong",
        f"bytes {offset} to {end} count as dirty: the next resync compares them",
    )


def _look_at_data(data: Path, sb: Superblock) -> list[Finding]:
    lost = "the engine refuses to start until the data file is back"
    try:
        descriptor = open_regular(data, os.O_RDONLY)
    except StoreError as error:
        return [Finding("data", f"{data}: {os.strerror(error.number)}", lost)]
    except RefusedError as error:
        return [Finding("data", str(error), "the engine refuses to start with it")]
    try:
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if size < sb.device_bytes:
        return [Finding("data", f"{data} has {size} of {sb.device_bytes} bytes", lost)]
    return []


def _warning(part: str, problem: str, meaning: str, remedy: str) -> Finding:
    return Finding(part, problem, meaning, "warning", remedy)


def _look_at_access(path: Path, meta: FileMetaStore, run_dir: Path | None) -> list[Finding]:
    """Who else can read, change or exchange what belongs to this node."""
    # Root runs the engine, or a user of its own, to whom the metadata then belongs.
    owner = os.fstat(meta.fileno()).st_uid
    owners = {0, os.geteuid(), owner}
    findings = []
    for part, file in (("meta", path), ("data", path.with_name("data"))):
        findings += _open_file(part, file, owner)
    findings += _open_directory("data_dir", path.parent, owners, owner)
    if run_dir is not None:
        findings += _open_directory("run_dir", run_dir, owners, owner)
    return findings


def _open_file(part: str, file: Path, owner: int) -> list[Finding]:
    try:
        status = file.lstat()
    except OSError:
        return []  # told as damage
    if not stat.S_ISREG(status.st_mode):
        return []
    findings = []
    mode = stat.S_IMODE(status.st_mode)
    if mode & OTHERS_MAY:
        meaning = "other users may read or change the blocks of the mirror behind the engine's back"
        findings.append(
            _warning(part, f"{file} has mode {mode:04o}", meaning, f"chmod 0600 {file}")
        )
    if status.st_uid not in {0, owner}:
        meaning = "that user may change it behind the engine's back"
        problem = f"{file} belongs to user {status.st_uid}, the metadata to user {owner}"
        findings.append(_warning(part, problem, meaning, f"chown {owner} {file}"))
    if status.st_nlink > 1:
        meaning = "what is done under its other name changes the mirror behind the engine's back"
        remedy = f"find the others with `find -xdev -samefile {file}` and remove them"
        findings.append(_warning(part, f"{file} has {status.st_nlink} names", meaning, remedy))
    return findings


def _open_directory(part: str, directory: Path, owners: set[int], owner: int) -> list[Finding]:
    """Whoever can write into a directory on the way can put another one in its place."""
    try:
        real = directory.resolve(strict=True)
        way = [(each, each.stat()) for each in (real, *real.parents)]
    except OSError:
        return []  # not made yet, or told as damage
    exchange = "can exchange the files and sockets in it"
    findings = []
    if directory.is_symlink():
        findings.append(
            _warning(
                part,
                f"{directory} is a symbolic link to {real}",
                f"whoever may change the link {exchange}",
                f"name {real} itself in the configuration",
            )
        )
    for each, status in way:
        mode = stat.S_IMODE(status.st_mode)
        # In a sticky directory only the owner of a name can exchange it; not so for its own files.
        sticky = mode & stat.S_ISVTX and (each != real or ownership.is_given(status, owner))
        if mode & OTHERS_MAY_WRITE and not sticky:
            problem = f"{each} has mode {mode:04o}"
            remedy = f"chmod {mode & ~OTHERS_MAY_WRITE:04o} {each}"
            findings.append(_warning(part, problem, f"other users {exchange}", remedy))
        if status.st_uid not in owners:
            problem = f"{each} belongs to user {status.st_uid}"
            findings.append(
                _warning(part, problem, f"that user {exchange}", f"chown {owner} {each}")
            )
    return findings
