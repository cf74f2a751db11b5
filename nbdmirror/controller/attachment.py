"""Device and mount of a mirror on this node, from attach to detach, and the removal of leftovers.

Owns: the order in which they are made and taken away, who may be ended for it, and the adoption of
what an earlier controller of this node left in good order. Must never: touch a mount or a device
that is not this mirror's (`traces` says what is), ask a file system whose server may be dead, or
wait without a bound. What the kernel does not give back is told and left.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nbdmirror.config_cluster import MountSection
from nbdmirror.controller import devices
from nbdmirror.controller.bounded import Done, command, in_thread
from nbdmirror.controller.devices import Attached
from nbdmirror.controller.holders import end_users, sentences, using
from nbdmirror.controller.mounts import Mount, at, mounts
from nbdmirror.controller.processes import Process, end, reap
from nbdmirror.controller.traces import (
    FUSE,
    KERNEL,
    NONE,
    Places,
    Traces,
    ends_by_itself,
    look,
    read_record,
)
from nbdmirror.errors import RefusedError

LOOK_S: Final = 5.0
MOUNT_S: Final = 30.0
UNMOUNT_S: Final = 60.0  # in order: everything that is dirty has to be written first
UNMOUNT_FORCED_S: Final = 10.0
FREED_S: Final = 10.0
FREED_FORCED_S: Final = 3.0
HOLDERS_S: Final = 3.0
HELPER_S: Final = 2.0
POLL_S: Final = 0.05
SHOWN_MAX: Final = 8

MNT_DETACH: Final = 2
# umount(8) reads /proc/self, which in the namespaces of another process may be somebody else's. A
# process, because a thread that hangs in the kernel would keep this program from ending.
UMOUNT_WITHIN: Final = """
import ctypes, os, sys
libc, (_, pid, point, flags) = ctypes.CDLL(None, use_errno=True), sys.argv
namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
CLONE_NEWNS = 0x20000
if libc.setns(namespace, CLONE_NEWNS) or libc.umount2(os.fsencode(point), int(flags)):
    sys.exit(os.strerror(ctypes.get_errno()))
"""


class Attachment:
    """The device and the file system of one mirror, as `[mount]` has it.

    `request_timeout_s`: of the kernel's NBD client; has to be longer than a freeze may take.
    """

    def __init__(
        self,
        section: MountSection,
        *,
        export: Path,
        run_dir: Path,
        mirror: str,
        tell: Callable[[str], None],
        request_timeout_s: int = devices.NBD_TIMEOUT_S,
    ) -> None:
        self._section = section
        point = section.point
        if point is not None:
            # mountinfo shows real paths. Of the mount point itself only the parent is asked.
            point = Path(os.path.realpath(point.parent)) / point.name
        self._places = Places(point, export, Path(os.path.realpath(run_dir)), mirror)
        self._tell = tell
        self._request_timeout_s = request_timeout_s
        self._attached: Attached | None = None
        self._mounted = False
        nothing = point is None or section.attach == "none"
        self.kind = NONE if nothing else devices.choice(section.attach)

    def facts(self) -> dict[str, Any]:
        """For status: as this program left it, without asking the system."""
        return {
            "kind": self.kind,
            "device": "" if self._attached is None else self._attached.device,
            "point": "" if self._places.point is None else str(self._places.point),
            "attached": self._attached is not None,
            "mounted": self._mounted,
        }

    async def _look(self) -> Traces:
        return await in_thread(lambda: look(self._places), LOOK_S)

    # --- made ---------------------------------------------------------------------------------

    async def attach(self) -> str:
        """Make the device; returns its path. "" where nothing is to be attached.

        Does nothing when it is attached already.

        Raises:
            RefusedError: something of an earlier life is still here, or it cannot be made; then
            nothing of it is left.
        """
        if self.kind == NONE:
            return ""
        if self._attached is not None:
            return self._attached.device
        if left := await self.leftovers():
            raise RefusedError(
                f"{'; '.join(left)}: left by an earlier life of {self._places.mirror}; "
                "it has to be removed first"
            )
        try:
            self._attached = await devices.attach(
                self.kind, self._places, self._request_timeout_s, self._tell
            )
        finally:
            if self._attached is None:
                for each in await self.clean():
                    self._tell(each)
        self._tell(f"{self._attached.device} is attached ({self.kind})")
        return self._attached.device

    async def mount(self) -> None:
        """Mount the file system; a journal that a crash left is replayed here.

        Raises:
            RefusedError: the place is taken, not empty or no directory, or mount refuses.
        """
        point, attached = self._places.point, self._attached
        if self.kind == NONE or point is None or self._mounted:
            return
        if attached is None:
            raise RefusedError(f"{point}: nothing is attached that could be mounted there")
        taken = at(point, mounts())
        if taken is not None:
            raise RefusedError(
                f"mount.point = {point}: {taken.source} ({taken.type}) is mounted there; "
                "unmount it, or name another directory"
            )
        try:
            await in_thread(lambda: _prepare(point), LOOK_S)
        except OSError as error:  # TimeoutError is one
            raise RefusedError(f"mount.point = {point}: {str(error) or 'no answer'}") from error
        options = ["-o", ",".join(self._section.options)] if self._section.options else []
        words = ["mount", "-t", self._section.type, *options, attached.device, str(point)]
        done = await command(words, MOUNT_S)
        if not done.ok:
            raise RefusedError(
                f"{attached.device} cannot be mounted at {point}: {done.error}; a new device needs "
                f"a file system first: mkfs.{self._section.type} {attached.device}"
            )
        self._mounted = True
        self._tell(f"{attached.device} is mounted at {point}")

    async def adopt(self) -> bool:
        """Take over what an earlier controller attached and mounted, if all of it is well.

        From then on attach() and mount() have nothing to do. False: nothing was changed, and
        clean() removes what there is.
        """
        if self.kind == NONE:
            return False
        with contextlib.suppress(OSError):
            record, found = read_record(self._places.record), await self._look()
            if record is None or found.devices != (record.device,) or not self._is_well(found):
                return False
            helper = next(
                (e for e in found.helpers if (e.pid, e.started) == (record.helper, record.started)),
                None,
            )
            if helper is None or (record.kind == FUSE and not found.fuse):
                return False
            held = -1 if record.kind == KERNEL else await devices.hold(record.device)
            self._attached = Attached(record.kind, record.device, helper, held)
            self.kind, self._mounted = record.kind, True
            self._tell(f"{record.device}, mounted at {self._places.point}, is taken over")
            return True
        return False

    def _is_well(self, found: Traces) -> bool:
        """Mounted in its place, and not turned read-only by an error."""
        mount = next((m for m in found.mounted if m.point == self._places.point), None)
        if mount is None or found.foreign is not None or mount.device not in found.numbers:
            return False
        return not mount.read_only or "ro" in self._section.options

    # --- taken away ---------------------------------------------------------------------------

    async def unmount(self, *, force: bool) -> list[str]:
        """Unmount in order; everything written is on the device when it returns.

        `force`: who uses it is ended first, what is mounted below it is unmounted too, and if
        that does not help it is detached lazily. Returns a sentence for everything that went
        wrong, with the names of those who use it; [] when it was not mounted.
        """
        try:
            found = await self._look()
            if force:
                said = await self._end_users(found)
                said += await self._unmount_all(found, UNMOUNT_FORCED_S)
                said += await self._detach_lazily()
            else:
                said = await self._unmount_all(found, UNMOUNT_S)
                if said:
                    said += await self._users(found)
            found = await self._look()
        except TimeoutError:
            return ["the mounts of this machine cannot be looked at in time"]
        self._mounted = any(m.point == self._places.point for m in found.mounted)
        return said

    async def _end_users(self, found: Traces, *, opened: bool = False) -> list[str]:
        said: list[str] = []
        spare = frozenset(e.pid for e in found.helpers)
        for number in found.numbers:
            ending = await end_users(number, HOLDERS_S, spare, opened=opened)
            said += sentences(ending, f"used the device of {self._places.mirror}")
        return said

    async def _unmount_all(self, found: Traces, bound_s: float, *, lazy: bool = False) -> list[str]:
        """The last mounted first, then the copies that other mount namespaces have."""
        said: list[str] = []
        doing = [(None, mount) for mount in reversed(found.mounted)]
        for process, mount in [*doing, *reversed(found.elsewhere)]:
            done = await _umount(mount, bound_s, lazy=lazy, within=process)
            if not done.ok:
                whose = f" for {process}" if process is not None else ""
                said.append(f"{mount.point} cannot be unmounted{whose}: {done.error}")
        if said and not (now := await self._look()).mounted and not now.elsewhere:
            # A namespace that ended, or a mount that went with another one. What hangs is told.
            return [each for each in said if "no end within" in each]
        return said

    async def _detach_lazily(self) -> list[str]:
        """What is still mounted gets out of the way; it ends with its last user."""
        found = await self._look()
        places = [*found.mounted, *(mount for _, mount in found.elsewhere)]
        said = [f"{mount.point} was detached while it was in use" for mount in places]
        return said + await self._unmount_all(found, UNMOUNT_FORCED_S, lazy=True)

    async def _users(self, found: Traces) -> list[str]:
        """Who uses it, for the operator."""
        try:
            users = await in_thread(lambda: [e for n in found.numbers for e in using(n)], LOOK_S)
        except TimeoutError:
            return []
        names = [str(each) for each in users if each.pid != os.getpid()]
        return [f"it is used by {', '.join(names[:SHOWN_MAX])}"] if names else []

    async def detach(self, *, force: bool) -> list[str]:
        """Give the device up: flushed, then disconnected, and the helper's end.

        `force`: whatever keeps the device is ended, the helper last. Returns a sentence for
        everything that went wrong; [] when nothing was attached.
        """
        try:
            found = await self._look()
            places = [*found.mounted, *(mount for _, mount in found.elsewhere)]
            if places and not force:
                return [f"{places[0].point} is still mounted: the device stays attached"]
            said = await self._free_devices(found, force=force)
            self._attached = None
            said += await self._end_helper(force=force)
            found = await self._look()
        except TimeoutError:
            return ["the devices of this machine cannot be looked at in time"]
        record = read_record(self._places.record)
        if record is not None and not found.sentences():
            reap(record.helper, record.started)
            self._places.record.unlink(missing_ok=True)
        return said

    async def _free_devices(self, found: Traces, *, force: bool) -> list[str]:
        """Disconnect, and wait until the kernel has let go of the device."""
        await self._let_go()
        for device in found.devices:
            if device.startswith("/dev/nbd"):
                await command(["nbd-client", "-nonetlink", "-d", device], FREED_S)
            elif not ends_by_itself(device):
                await command(["losetup", "--detach", device], FREED_S)
        if await self._gone(FREED_FORCED_S if force else FREED_S):
            return []
        if not force:
            return [f"{device} is still in use" for device in found.devices]
        # Requests that wait for a frozen server fail with the helper, and so does who waits.
        await self._kill_helpers()
        said = await self._end_users(found, opened=True)
        if not await self._gone(FREED_S):
            said += [f"{device} is still in use" for device in (await self._look()).devices]
        return said

    async def _let_go(self) -> None:
        """Close what keeps the loop device. The last close flushes, so it may take long."""
        attached = self._attached
        if attached is not None and attached.held >= 0:
            held, attached.held = attached.held, -1
            with contextlib.suppress(TimeoutError):
                await in_thread(lambda: os.close(held), FREED_S)

    async def _gone(self, bound_s: float) -> bool:
        until = time.monotonic() + bound_s
        while (await self._look()).devices:
            if time.monotonic() > until:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _end_helper(self, *, force: bool) -> list[str]:
        """nbdfuse ends with its mount, nbd-client with its connection."""
        said: list[str] = []
        found = await self._look()
        for process, mount in [*((None, m) for m in found.fuse), *found.fuse_elsewhere]:
            done = await _umount(mount, UNMOUNT_FORCED_S, lazy=force, within=process)
            if not done.ok:
                said.append(f"{mount.point} cannot be unmounted: {done.error}")
        until = time.monotonic() + (FREED_FORCED_S if force else FREED_S)
        while (await self._look()).helpers:
            if time.monotonic() > until:
                if force:
                    await self._kill_helpers()
                said += [f"{each} does not end" for each in (await self._look()).helpers]
                break
            await asyncio.sleep(POLL_S)
        return said

    async def _kill_helpers(self) -> None:
        await end(lambda: look(self._places).helpers, grace_s=HELPER_S)

    # --- leftovers ----------------------------------------------------------------------------

    async def leftovers(self) -> list[str]:
        """What of this mirror is on this machine, one sentence each: mounts, devices, helpers.

        Raises:
            RefusedError: the machine cannot be looked at.
        """
        try:
            return (await self._look()).sentences()
        except TimeoutError as error:
            raise RefusedError(
                "the mounts and devices of this machine cannot be looked at in time"
            ) from error

    async def clean(self) -> list[str]:
        """Remove all of it, in reverse order, also when the server of the device is dead or frozen.

        Ends who uses the mount. Returns a sentence for everything that went wrong or is still
        there. Takes seconds over a dead server, and less than a minute over a frozen one; with the
        kernel's client up to `request_timeout_s` more, so end a frozen engine first.
        """
        try:
            found = await self._look()
            for each in found.sentences():
                self._tell(f"removing: {each}")
            said = await self._end_users(found)
            await self._unmount_all(found, UNMOUNT_FORCED_S)
            now = await self._look()
            if now.mounted or now.elsewhere:
                # Requests that wait for a frozen server fail with the helper, and with them who
                # could not be killed.
                await self._kill_helpers()
                said += await self._end_users(found)
                said += await self._unmount_all(await self._look(), UNMOUNT_FORCED_S)
                said += await self._detach_lazily()
            said += await self.detach(force=True)
            left = await self._look()
        except TimeoutError:
            return ["the mounts and devices of this machine cannot be looked at in time"]
        self._mounted = any(m.point == self._places.point for m in left.mounted)
        return said + [f"still there: {each}" for each in left.sentences()]


async def _umount(
    mount: Mount, bound_s: float, *, lazy: bool, within: Process | None = None
) -> Done:
    """`within`: a process in whose mount namespace it is done."""
    if within is not None:
        flags = MNT_DETACH if lazy else 0
        words = [sys.executable, "-I", "-S", "-c", UMOUNT_WITHIN, str(within.pid)]
        return await command([*words, str(mount.point), str(flags)], bound_s)
    # -c: the path is real already, and asking for it may hang. -i: no helper of others.
    options = ["-c", "-i", *(["-l"] if lazy else [])]
    return await command(["umount", *options, str(mount.point)], bound_s)


def _prepare(point: Path) -> None:
    """Make the directory, and see that nothing would be hidden.

    Raises:
        RefusedError, OSError
    """
    if point.is_symlink():
        raise RefusedError(f"mount.point = {point} is a symbolic link; name the directory itself")
    point.mkdir(mode=0o755, parents=True, exist_ok=True)
    if any(point.iterdir()):
        raise RefusedError(
            f"mount.point = {point} is not empty, and a mount would hide what is in it: "
            "move that away, or name another directory"
        )
