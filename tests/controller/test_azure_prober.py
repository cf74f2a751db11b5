"""The prober in Azure's manner, against a server that answers by a script."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import uvloop

from nbdmirror.config_fields import Address
from tests.support.azure_prober import AzureProber

PAGE = "/ready"
BOUND_S = 60.0


def run(main: Coroutine[Any, Any, None]) -> None:
    """On the loop of production, with a bound."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, BOUND_S))


@pytest.mark.slow
def test_the_prober_counts_as_documented() -> None:
    """Breaks in the field: nothing; but a prober that is always content proves nothing."""
    script = [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n",
              b"HTTP/1.1 404 No\r\n\r\n", b"SSH-2.0-x\r\n\r\n", None, b""]  # fmt: skip

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        given = script.pop(0)
        if given is None:
            await reader.read()  # until the prober gives up
        else:
            writer.write(given)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        prober = AzureProber(address, PAGE, interval_s=0.0, timeout_s=2.0)
        seen: list[str] = []
        while script:
            await prober._count(await prober.probe())
            seen.append(prober.state)
        server.close()
        await server.wait_closed()
        await prober._count(await prober.probe())
        assert list(prober.outcomes) == [
            "200", "503", "200", "404", "no HTTP", "no answer", "no HTTP", "ConnectionRefusedError",
        ]  # fmt: skip
        assert seen == ["healthy"] * 4 + ["unhealthy"] * 3
        with pytest.raises(TimeoutError, match="ConnectionRefusedError"):
            await prober.wait_for("healthy", 0.01)
        slow_to_rise = AzureProber(address, PAGE, rise_count=2)
        rising = []
        for outcome in ("200", "503", "200", "200"):
            await slow_to_rise._count(outcome)
            rising.append(slow_to_rise.state)
        assert rising == ["unhealthy"] * 3 + ["healthy"]

    run(main())
