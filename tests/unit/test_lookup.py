"""Names of an arbiter's store: no name server holds up more than the question itself."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nbdmirror.arbiters.lookup import Lookup

BOUND_S = 60


class Hanging:
    """The system's resolver, while the name server is dead."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.over = threading.Event()

    def getaddrinfo(self, host: str, *_: object, **__: object) -> list[Any]:
        """As socket.getaddrinfo, but it waits."""
        self.asked.append(host)
        self.over.wait(BOUND_S)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    """A dead name server, that comes back at the end of the test at the latest."""
    made = Hanging()
    monkeypatch.setattr("nbdmirror.arbiters.lookup.socket.getaddrinfo", made.getaddrinfo)
    yield made
    made.over.set()


def test_a_dead_name_server_takes_one_thread(hanging: Hanging) -> None:
    """Breaks in the field: each question leaves a thread behind, until the disk gets none."""

    async def main() -> None:
        lookup = Lookup()
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await lookup.resolve("store", 1)
        assert hanging.asked == ["store"]
        waiting = asyncio.create_task(lookup.resolve("store", 2379))
        await asyncio.sleep(0)
        hanging.over.set()
        async with asyncio.timeout(BOUND_S):
            (found,) = await waiting
        assert (found["host"], found["port"]) == ("192.0.2.1", 2379)
        # Nothing is remembered: the next question asks anew.
        await lookup.resolve("store", 1)
        assert hanging.asked == ["store", "store"]

    asyncio.run(main())


def test_an_unknown_name_is_an_error() -> None:
    """Breaks in the field: a mistyped name ends the controller."""

    async def main() -> None:
        for name in ("store.invalid", "x" * 300, "a..b"):
            with pytest.raises(OSError, match=r"\w"):
                await Lookup().resolve(name, 1)

    asyncio.run(main())


def test_a_late_answer_meets_no_loop(hanging: Hanging) -> None:
    """Breaks in the field: an engine that ends while a name is looked up ends with an error."""

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await Lookup().resolve("store", 1)

    asyncio.run(main())
    hanging.over.set()
    for thread in threading.enumerate():
        if thread.name == "arbiter-lookup":
            thread.join(BOUND_S)
