"""A prober that behaves like the HTTP health probe of Azure Load Balancer, as far as documented.

Owns one backend's state as such a load balancer sees it. Must never: know what it probes, or retry
within an interval. Documented ("Azure Load Balancer health probes", state of 2023-10):

- an HTTP GET of the path, every interval; 5 s is the default and the shortest;
- a probe fails at any status but 200, at a TCP reset, and when no answer is there after the shorter
  of the interval and 30 s (31 s in older versions of the page);
- one success makes a backend healthy; a backend that never had one is not in use.

The reference of the resource has another word: `probeThreshold` failures in a row take a backend
out, and as many successes bring it back. Which of the two holds is left open: 2 failures (so does
the template of the product that we follow: every 5 s x 2) and 1 success here, unless told.

Assumed, as no page says it: a new connection for each probe, HTTP/1.1 with `Connection: Keep-Alive`
and the agent's name below, and intervals counted from start to start. Not copied: the longer wait
after a state that changes too often.
"""

import asyncio
from collections import deque
from typing import Literal, Self

from nbdmirror.config_fields import Address

INTERVAL_S = 5.0
TIMEOUT_S_MAX = 30.0
FALL_COUNT = 2
RISE_COUNT = 1
HEAD_BYTES_MAX = 16_384
REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: {address}\r\n"
    "User-Agent: Load Balancer Agent\r\nConnection: Keep-Alive\r\n\r\n"
)
State = Literal["healthy", "unhealthy"]


class AzureProber:
    """Probes `path` at `address` from start() (or `async with`) to close().

    `interval_s`, `timeout_s`: for tests that cannot wait; by default those of Azure. `fall_count`,
    `rise_count`: failures and successes in a row that change the state.
    """

    def __init__(
        self,
        address: Address,
        path: str,
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float | None = None,
        fall_count: int = FALL_COUNT,
        rise_count: int = RISE_COUNT,
    ) -> None:
        self.state: State = "unhealthy"
        self.outcomes: deque[str] = deque(maxlen=32)  # the latest last; "200" is the only success
        self._address = address
        self._request = REQUEST.format(path=path, address=address).encode()
        self._interval_s = interval_s
        self._timeout_s = min(interval_s, TIMEOUT_S_MAX) if timeout_s is None else timeout_s
        self._fall_count = fall_count
        self._rise_count = rise_count
        self._run_count = 0  # how many in a row were as the last one
        self._changed = asyncio.Condition()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin with a first probe at once."""
        assert self._task is None
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End; what went wrong inside is raised here."""
        self._closing.set()
        if self._task is not None:
            await self._task

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def wait_for(self, state: State, bound_s: float) -> None:
        """Until the backend is in `state`. Raises TimeoutError with what the last probes met."""
        try:
            async with asyncio.timeout(bound_s), self._changed:
                await self._changed.wait_for(lambda: self.state == state)
        except TimeoutError:
            raise TimeoutError(f"{self._address}: {self.state}: {list(self.outcomes)}") from None

    async def probe(self) -> str:
        """One probe, which does not count: the status code, or what came instead."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask()
        except TimeoutError:
            return "no answer"
        except OSError as error:
            return type(error).__name__
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError):
            return "no HTTP"

    async def _ask(self) -> str:
        reader, writer = await asyncio.open_connection(
            self._address.host, self._address.port, limit=HEAD_BYTES_MAX
        )
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            version, code = head.decode("ascii").split(" ", 2)[:2]
            return code if version in {"HTTP/1.0", "HTTP/1.1"} else "no HTTP"
        finally:
            writer.transport.abort()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing.is_set():
            next_at = loop.time() + self._interval_s
            await self._count(await self.probe())
            try:
                async with asyncio.timeout_at(next_at):
                    await self._closing.wait()
            except TimeoutError:
                continue

    async def _count(self, outcome: str) -> None:
        async with self._changed:
            success = outcome == "200"
            as_before = bool(self.outcomes) and (self.outcomes[-1] == "200") == success
            self._run_count = self._run_count + 1 if as_before else 1
            self.outcomes.append(outcome)
            if success and self._run_count >= self._rise_count:
                self.state = "healthy"
            elif not success and self._run_count >= self._fall_count:
                self.state = "unhealthy"
            self._changed.notify_all()
