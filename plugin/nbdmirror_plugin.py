"""The nbdkit plugin: callbacks in, engine calls out, errors to errno. No logic lives here.

nbdkit runs this file as a script and calls what it defines. `buf` of a write is valid only until
the callback returns; the engine returns only when it does not need it any more.
"""

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbdkit

from nbdmirror.config import load
from nbdmirror.driver import report_to_stderr
from nbdmirror.engine import FUA, MAY_TRIM, Engine
from nbdmirror.errors import NbdMirrorError
from nbdmirror.handing import taken
from nbdmirror.limits import NBD_REQUEST_BYTES_MAX
from nbdmirror.threads import keep, sweep

API_VERSION = 2
# `handed` and `control` are descriptors, for an engine with a user of its own.
KNOWN = ("configuration", "node", "handed", "control")
EXTENT_TYPE_HOLE_ZERO = 3  # nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO

# One line per error, not a traceback: refusals are a normal answer here.
sys.tracebacklimit = 0

_parameters: dict[str, str] = {}
_engine: Engine | None = None


def _guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one place where an exception becomes an errno, and where nbdkit's threads get at home."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        keep()
        try:
            return function(*arguments)
        except NbdMirrorError as error:
            nbdkit.set_error(error.nbd_errno)
            raise

    return guarded


def _the_engine() -> Engine:
    assert _engine is not None
    return _engine


def config(key: str, value: str) -> None:
    if key not in KNOWN:
        raise RuntimeError(f"unknown parameter {key}={value}; known: {'=, '.join(KNOWN)}=")
    _parameters[key] = value


def config_complete() -> None:
    if "configuration" not in _parameters:
        raise RuntimeError("configuration=/etc/nbdmirror/MIRROR.toml is missing")


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    global _engine
    try:
        if "handed" in _parameters:
            engine = Engine(*taken(_parameters))
        else:
            engine = Engine(load(Path(_parameters["configuration"]), _parameters.get("node")))
        engine.start()
    except NbdMirrorError as error:
        sys.stderr.write(f"nbdmirror: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - an engine that is half there must not stay
        report_to_stderr("start", error)
        os._exit(NbdMirrorError.exit_code)
    _engine = engine


def open(readonly: bool) -> int:
    engine = _the_engine()
    if not engine.is_primary():
        raise RuntimeError("this node is not primary")
    engine.opened()
    return 1


def close(_handle: int) -> None:
    _the_engine().closed()
    sweep()


def get_size(_handle: int) -> int:
    return _the_engine().node.geometry.device_bytes


def can_write(_handle: int) -> bool:
    return True


def can_flush(_handle: int) -> bool:
    return True


def can_fua(_handle: int) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_multi_conn(_handle: int) -> bool:
    return True


def can_trim(_handle: int) -> bool:
    return _the_engine().node.trim_ok


def can_zero(_handle: int) -> bool:
    return True


def can_fast_zero(_handle: int) -> bool:
    return True


def can_extents(_handle: int) -> bool:
    return True


def can_cache(_handle: int) -> int:
    return int(nbdkit.CACHE_NATIVE)


def is_rotational(_handle: int) -> bool:
    return False


def block_size(_handle: int) -> tuple[int, int, int]:
    return (1, 4096, NBD_REQUEST_BYTES_MAX)


@_guard
def pread(_handle: int, buf: Any, offset: int, flags: int) -> None:
    _the_engine().pread(buf, offset)


def _wire_flags(flags: int) -> int:
    wire = FUA if flags & nbdkit.FLAG_FUA else 0
    return wire | (MAY_TRIM if flags & nbdkit.FLAG_MAY_TRIM else 0)


@_guard
def pwrite(_handle: int, buf: Any, offset: int, flags: int) -> None:
    _engine.pwrite(buf, offset, FUA if flags else 0)  # type: ignore[union-attr] # hot path


@_guard
def flush(_handle: int, flags: int) -> None:
    _the_engine().flush()


@_guard
def trim(_handle: int, count: int, offset: int, flags: int) -> None:
    _the_engine().trim(offset, count, _wire_flags(flags) & FUA)


@_guard
def zero(_handle: int, count: int, offset: int, flags: int) -> None:
    engine = _the_engine()
    if flags & nbdkit.FLAG_FAST_ZERO and not engine.node.fast_zero_ok:
        nbdkit.set_error(errno.EOPNOTSUPP)
        raise RuntimeError("not faster than writing zeros")
    engine.zero(offset, count, _wire_flags(flags))


@_guard
def cache(_handle: int, count: int, offset: int, flags: int) -> None:
    _the_engine().cache(offset, count)


@_guard
def extents(_handle: int, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    at, result = offset, []
    for start, end in _the_engine().extents(offset, count):
        if start > at:
            result.append((at, start - at, EXTENT_TYPE_HOLE_ZERO))
        result.append((start, end - start, 0))
        at = end
    if at < offset + count:
        result.append((at, offset + count - at, EXTENT_TYPE_HOLE_ZERO))
    return result
