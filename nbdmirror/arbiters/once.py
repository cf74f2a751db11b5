"""aiohttp, so that it sends a request once.

Owns the session that every store asks through. Where a connection ends without an answer aiohttp
sends what it calls idempotent again by itself, a PUT among it, on a new connection as on an old
one. The second answer to a claim would then be a no, after the first had been done: rule 11 asks
that whoever claims knows what was sent. Connections are not kept: one that died meanwhile turns a
claim into one whose end nobody knows. Redirects are refused by those who ask.
"""

import ssl
from typing import Any

import aiohttp

from nbdmirror.arbiters.lookup import Lookup


async def once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """A middleware that gives a lost connection a name under which aiohttp does not try again."""
    try:
        return await handler(request)
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise  # nothing was sent
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(f"the connection ended: {error}") from error


def connector_arguments() -> dict[str, Any]:
    """How a connector keeps and remembers nothing."""
    return {"force_close": True, "use_dns_cache": False, "resolver": Lookup()}


def new_session(tls: ssl.SSLContext | None, **more: Any) -> aiohttp.ClientSession:
    """A session that sends once. `tls`: None is the system's certificates."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=tls or True, **connector_arguments()),
        cookie_jar=aiohttp.DummyCookieJar(),
        middlewares=(once,),
        **more,
    )
