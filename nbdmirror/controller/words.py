"""Speaking for this node's engine when it is dead, or has no channel to its peer (rule 16).

Owns who asks whom to leave, and under which lock. `dialogs` carries the words, the engine or
`dead_engine` stores what they mean. Must never speak for an engine that has a channel: it speaks
for itself.
"""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from nbdmirror.controller.dead_engine import dead_engine
from nbdmirror.errors import NbdMirrorError

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

# Both ends give a silent channel up after the same time, but do not begin to count together.
CHANNEL_S: Final = 1.5


class Words:
    """What one controller says, and does, about leaving."""

    def __init__(self, conductor: "Conductor") -> None:
        self._c = conductor

    async def ask_peer(self) -> None:
        """Ask the peer to leave, so that this node can go on."""
        c = self._c
        before = c.dialogs.parts.done

        def over() -> bool:
            """It has left, or is gone; or it does not hear this node, and serves by now."""
            serves = c.peer_body is not None and c.peer_body.primary
            return c.dialogs.parts.done != before or serves or not c.peer_heard()

        await c.dialogs.please(over)

    async def speak(self) -> None:
        """For the dead engine of this node: the addresses go first, then the words."""
        await self._c.service.drop_addresses()
        problem = await self._leave_for_the_dead()
        if problem:
            self._c.tell(f"nothing was said for the dead engine: {problem}")

    async def _leave_for_the_dead(self) -> str:
        async with self._c.hands:
            if self._c.supervisor.alive:
                return "it runs again"
            with dead_engine(self._c.config) as dead:
                dead.require_leaving()

                async def mark(_session: str) -> None:
                    await asyncio.to_thread(dead.mark_outdated)

                return await self._c.dialogs.leave(dead.generation, mark)

    async def on_please(self) -> bool:
        """The peer serves, or wants to, and asks this node to leave; True when it did."""
        try:
            if self._c.supervisor.alive:
                problem = await self._leave_for_the_living()
            else:
                problem = await self._leave_for_the_dead()
        except NbdMirrorError as error:
            problem = str(error)
        self._c.tell(f"the peer asked this node to leave: {problem or 'it did'}")
        return not problem

    async def _leave_for_the_living(self) -> str:
        await self._channel_ended()
        state = self._c.engine_state or {}
        generation = str(state.get("generation", ""))

        async def mark(session: str) -> None:
            await self._c.link.word("leave", generation=generation, session=session)

        return await self._c.dialogs.leave(generation, mark)

    async def _channel_ended(self) -> None:
        """The peer has lost the channel; this engine may need a moment longer to see that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHANNEL_S):
                while (self._c.engine_state or {}).get("session"):
                    self._c.looked.clear()
                    await self._c.looked.wait()
