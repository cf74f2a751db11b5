"""One check at a time, against the real thing: what the tests of the kinds of checks share."""

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from uuid import uuid4

import uvloop

from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checks import check

BOUND_S = 60.0
SOON_MS = 30_000  # where an answer is expected, on a machine that is many times slower
RunLoop = Callable[[Coroutine[Any, Any, Any]], Any]

# Checks in a process of their own: on another host, or with another command line.
ALONE = """
import json, sys, uvloop
from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checks import check

async def main():
    for given in json.loads(sys.argv[1]):
        print(await check(CheckerSection.model_validate(given)))

uvloop.run(main())
"""


def section(kind: str, **keys: Any) -> CheckerSection:
    """One `[[checker]]`; no two of a run have the same name."""
    given = {"name": f"t{uuid4().hex[:12]}", "kind": kind, "timeout_ms": SOON_MS, **keys}
    return CheckerSection.model_validate(given)


def looked(kind: str, **keys: Any) -> str:
    """What one check says."""
    return uvloop.run(check(section(kind, **keys)))


def alone(before: tuple[str, ...], *sections: dict[str, Any], more: str = "") -> list[str]:
    """What these checks say in a process of its own, with these words before and behind."""
    given = [{"name": "alone", "timeout_ms": SOON_MS, **each} for each in sections]
    command = (*before, sys.executable, "-c", ALONE, json.dumps(given), more)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


async def soon(awaited: Awaitable[Any]) -> Any:
    """Wait with a bound."""
    async with asyncio.timeout(BOUND_S):
        return await awaited


async def answered(one: CheckerSection) -> str:
    """One check, with a bound of the test's own."""
    async with asyncio.timeout(BOUND_S):
        return await check(one)


def ended(pid: int) -> bool:
    """Whether a process that is no child of ours has ended, or does so soon."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], BOUND_S)[0])
    finally:
        os.close(descriptor)
