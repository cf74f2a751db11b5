"""JSON lines over a Unix socket: what the engine's and the controller's sockets have in common.

Owns the form of a request and of an error, and the check of who asks. Must never know a command.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
from typing import Any, Final

from nbdmirror.errors import RefusedError

PEERCRED: Final = struct.Struct("3i")


def may_command(writer: asyncio.StreamWriter) -> bool:
    """Only root and the user the engine runs as, by the kernel's word, not the file mode."""
    sock: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size)
        _, uid, _ = PEERCRED.unpack(credentials)
        return uid in (0, os.geteuid())
    return False


def described(kind: str, reason: str, exit_code: int) -> dict[str, Any]:
    """The `error` member of an answer."""
    return {"kind": kind, "reason": reason, "remedy": "", "exit_code": exit_code}


def parse(line: bytes) -> dict[str, Any]:
    """One request.

    Raises:
        RefusedError: not a JSON object with a command.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"not a line of JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise RefusedError('a request is {"id": ..., "command": "...", "args": {...}}')
    if not isinstance(request.get("args") or {}, dict):
        raise RefusedError("args has to be an object")
    return request
