"""What runs on the primary, as one thing: device, mount, addresses, application.

    enter:  attach, mount, take the addresses, start the application
    leave:  stop the application, drop the addresses, unmount, detach

Owns the order, one piece of work at a time, and the mark by which the next controller of this node
recognises what it may adopt. Must never decide that it is time for either, or block the loop.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nbdmirror.config import Config
from nbdmirror.controller.addresses import Addresses, DuplicateAddressError
from nbdmirror.controller.application import Application
from nbdmirror.controller.attachment import Attachment
from nbdmirror.controller.traces import NONE, write_json
from nbdmirror.core.cluster.view import Service as State
from nbdmirror.errors import NbdMirrorError

MARK_BYTES_MAX: Final = 4096
TAKE_AGAIN_S: Final = 2.0
FROZEN_REST_S: Final = 30


class Service:
    """Application and what it stands on. `tell` takes a sentence, `on_change` is called after."""

    def __init__(
        self, config: Config, tell: Callable[[str], None], on_change: Callable[[], None]
    ) -> None:
        self.state = State.DOWN
        self.reason = ""
        self.leftovers: list[str] = []
        self._mark = config.me.run_dir / "service.json"
        self._tell = tell
        self._on_change = on_change
        self._work: asyncio.Task[None] | None = None
        self.log = config.me.run_dir / "application.log"
        self.attachment = Attachment(
            config.mount,
            export=config.export_unix,
            run_dir=config.me.run_dir,
            mirror=config.mirror,
            tell=tell,
            # A freeze is no failure of the device: its requests wait until it is decided.
            request_timeout_s=config.engine.freeze_limit_ms // 1000 + FROZEN_REST_S,
        )
        self.addresses = Addresses(config.virtual_addresses, tell=tell)
        self.application = Application(
            config.application,
            mirror=config.mirror,
            node=config.me.name,
            mount_point=config.mount.point,
            log=self.log,
            tell=tell,
        )

    # --- up ---------------------------------------------------------------------------------------

    def enter(self, term: str, *, may_force: Callable[[], bool]) -> None:
        """Begin to bring everything up for the primary term `term`.

        `may_force`: whether to take the addresses even if somebody answers for them: the peer is
        silent, and what answers is a host that has lost its role.
        """
        assert self._work is None
        self._change(State.ENTERING)
        self._begin(self._enter(term, may_force))

    async def _enter(self, term: str, may_force: Callable[[], bool]) -> None:
        try:
            await self.attachment.attach()
            await self.attachment.mount()
            await self._take_addresses(may_force)
            await self.application.start()
        except NbdMirrorError as error:
            self._change(State.FAILED, str(error))
            return
        self._store_mark(term)
        self._change(State.UP)

    async def _take_addresses(self, may_force: Callable[[], bool]) -> None:
        """Until the network has them free: against a third host no other node would help.

        Raises:
            RefusedError: something else is in the way.
        """
        while True:
            try:
                await self.addresses.take(force=may_force())
            except DuplicateAddressError as error:
                if self.reason != str(error):
                    self._change(State.ENTERING, str(error))
                await asyncio.sleep(TAKE_AGAIN_S)
            else:
                return

    # --- down -------------------------------------------------------------------------------------

    def leave(self, *, served: bool) -> None:
        """Begin to take everything down. `served`: the device still works, so it can be in order.

        What is being brought up is broken off first.
        """
        if self.state is State.LEAVING:
            return
        self._change(State.LEAVING)
        before, self._work = self._work, None
        self._begin(self._leave(before, served=served))

    async def _leave(self, before: "asyncio.Task[None] | None", *, served: bool) -> None:
        if before is not None:
            before.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await before
        self._remove_mark()
        if not served:
            # First of all: the peer takes them at once.
            await self.drop_addresses()
        problems = await self.application.stop()
        await self.drop_addresses()
        if served:
            problems += await self._detach(force=bool(problems))
        await self.look_for_leftovers()
        if self.leftovers:
            problems += await self.attachment.clean()
            await self.look_for_leftovers()
        for problem in problems:
            self._tell(problem)
        self._change(State.DOWN)

    async def _detach(self, *, force: bool) -> list[str]:
        problems = await self.attachment.unmount(force=force)
        if problems and not force:
            problems += await self.attachment.unmount(force=True)
        return problems + await self.attachment.detach(force=bool(problems))

    async def drop_addresses(self) -> None:
        """Before anything else, when the engine died: the peer is about to take them."""
        try:
            await self.addresses.drop()
        except NbdMirrorError as error:
            self._tell(str(error))  # what is still held is found as left over

    async def finished(self) -> None:
        """Wait for the end of what is under way."""
        while self._work is not None:
            await asyncio.wait({self._work})

    async def look_for_leftovers(self) -> None:
        """Find out what is here that should not be, while nothing should be."""
        self.leftovers = await self.attachment.leftovers() + await self.addresses.leftovers()

    # --- by hand ----------------------------------------------------------------------------------

    async def mount(self) -> None:
        """Device and file system alone, for maintenance. Raises RefusedError."""
        await self.attachment.attach()
        await self.attachment.mount()

    async def unmount(self) -> list[str]:
        """The reverse; sentences of what went wrong."""
        return await self.attachment.unmount(force=False) + await self.attachment.detach(
            force=False
        )

    # --- a controller that was started again ------------------------------------------------------

    async def adopt(self, term: str) -> bool:
        """Go on with what an earlier controller brought up in this very term, if all of it is well.

        Rule 22: an attachment belongs to one term of one node.
        """
        if self._read_mark() != term:
            return False
        if self.attachment.kind != NONE and not await self.attachment.adopt():
            return False
        try:
            await self.addresses.take()
        except NbdMirrorError as error:
            self._tell(str(error))
            return False
        self.application.adopt()
        self._change(State.UP)
        return True

    def _store_mark(self, term: str) -> None:
        with contextlib.suppress(OSError):  # without it the next controller begins anew
            write_json(self._mark, {"term": term})

    def _read_mark(self) -> str:
        try:
            with self._mark.open("rb") as file:
                return str(json.loads(file.read(MARK_BYTES_MAX))["term"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _remove_mark(self) -> None:
        self._mark.unlink(missing_ok=True)

    # --- one piece of work at a time --------------------------------------------------------------

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = asyncio.create_task(work, name="service")
        self._work.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if self._work is task:
            self._work = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._change(State.FAILED, f"{type(error).__name__}: {error}")
        self._on_change()

    def _change(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._tell(f"service {state.value}" + (f": {reason}" if reason else ""))
        self._on_change()

    def facts(self) -> dict[str, Any]:
        """For status."""
        attached = self.attachment.facts()
        return {
            "state": self.state.value,
            "reason": self.reason or "; ".join(self.leftovers),
            "application": self.application.state,
            "device": attached["device"],
            "attach": attached["kind"],
            "mount_point": attached["point"],
            "mounted": attached["mounted"],
            "log": str(self.log),
        }

    async def close(self) -> None:
        """Let go; what runs goes on, for the next controller to adopt."""
        work, self._work = self._work, None
        if work is not None:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        await self.addresses.close()
