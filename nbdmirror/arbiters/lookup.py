"""Names of stores, looked up without ever holding up anything else.

Owns one thread for each name that is being looked up, and no more: the system's resolver cannot be
interrupted, and waits for a dead name server many times longer than an arbiter may take. In the
event loop's own pool such threads would pile up until nothing else of the process gets one.
Addresses that are numbers need no thread. Must never: remember an answer, or wait without the
caller's bound.
"""

import asyncio
import socket
import threading
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

_Found = list[tuple[Any, ...]]


class Lookup(AbstractResolver):
    """aiohttp's resolver for one store."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, int], asyncio.Future[_Found]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """All addresses of a name. Raises OSError."""
        key = (host, family)
        if key not in self._running:
            self._running[key] = self._start(host, family)
        # Shielded: a caller that gives up leaves the look-up to those that come after.
        found = await asyncio.shield(self._running[key])
        return [
            ResolveResult(
                hostname=host,
                host=address[0],
                port=port,
                family=kind,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, _, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is held: a thread that still runs ends when the system answers it."""

    def _start(self, host: str, family: int) -> asyncio.Future[_Found]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Found] = loop.create_future()

        def settle(found: _Found | OSError) -> None:
            self._running.pop((host, family), None)
            if isinstance(found, OSError):
                future.set_exception(found)
                future.exception()  # nobody may be waiting any more
            else:
                future.set_result(found)

        def look_up() -> None:
            found: _Found | OSError
            try:
                found = list(socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                found = error if isinstance(error, OSError) else OSError(f"{host} is no name")
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, found)

        # A daemon: the end of the process waits for no name server.
        threading.Thread(target=look_up, name="arbiter-lookup", daemon=True).start()
        return future
