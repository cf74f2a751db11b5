"""The files and sockets of one mirror on one node: their names, and what would replace what.

Owns where each of them lies, as the raw configuration has it, and whether those for the arbiter's
store can be read. Must never open one that holds data.
"""

import os
import stat
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final

from nbdmirror.config_arbiters import SECRETS, arbiter_files
from nbdmirror.config_fields import NAME, parse_path
from nbdmirror.errors import ConfigError, RefusedError, StoreError
from nbdmirror.files import open_regular
from nbdmirror.limits import ARBITER_SECRET_BYTES_MAX, SOCKET_PATH_BYTES_MAX
from nbdmirror.secret_files import read_secret

SOCKETS: Final = ("engine.sock in run_dir", "controller.sock in run_dir", "export.unix")


def lookup(raw: Any, location: tuple[str | int, ...]) -> object:
    """What the file has at a place, None if nothing."""
    for step in location:
        if isinstance(raw, list):
            raw = dict(enumerate(raw))
        if not isinstance(raw, dict) or step not in raw:
            return None
        raw = raw[step]
    return raw


def file_problems(raw: dict[str, Any], source: Path) -> list[str]:
    """Files of one node that would replace each other.

    Sockets are the reason: what has a socket's name is removed before the socket is made, be it
    the key or all of the data.
    """
    nodes = raw.get("node")
    problems: dict[str, None] = {}  # in order, each once: both nodes may have the same paths
    for name in nodes if isinstance(nodes, dict) else ():
        files = {"this file": source.absolute(), **files_of(raw, name)}
        strange = arbiter_files(raw)  # among themselves they may be one: certificate and key
        pairs = [*combinations(files.items(), 2), *product(files.items(), strange.items())]
        for (first, one), (second, other) in pairs:
            problems.update(dict.fromkeys(collision(first, one, second, other)))
        data_dir = files["data"].parent
        if lookup(raw, ("export", "unix")) and data_dir in files["export.unix"].parents:
            problems[
                f'export.unix = "{files["export.unix"]}": lies in the data_dir "{data_dir}", which '
                "is for `data` and `meta` alone; expected a path outside of it, best in run_dir"
            ] = None
        for what in SOCKETS:
            length = len(os.fsencode(files[what]))
            if length > SOCKET_PATH_BYTES_MAX:
                problems[
                    f'{what} is "{files[what]}": {length} bytes, and the system takes no names of '
                    f"more than {SOCKET_PATH_BYTES_MAX} for sockets; expected a shorter run_dir"
                ] = None
    return list(problems)


def collision(first: str, one: Path, second: str, other: Path) -> list[str]:
    """What is wrong with these two files of a node, one line or none."""
    # Through symbolic links as they are on this node; of what is missing only `..` is resolved.
    real, real_other = (Path(os.path.realpath(each)) for each in (one, other))
    if real == real_other:
        return [f'{second} is "{other}": that is {first}, too; expected a path of its own']
    if real in real_other.parents:
        return [f'{second} is "{other}": lies beneath {first} ("{one}"), which is a file']
    if real_other in real.parents:
        return [f'{second} is "{other}": {first} ("{one}") lies beneath it; expected another path']
    return []


def files_of(raw: dict[str, Any], node: str) -> dict[str, Path]:
    """Every file and socket that a node makes or reads, under the name an operator knows it by.

    Defaults stand in for values that are wrong on their own: those are told by the model.
    """
    mirror = raw.get("mirror")
    # What is no name of a mirror may hold anything, a zero byte as well, which no path can have.
    named = mirror if isinstance(mirror, str) and NAME.fullmatch(mirror) else ""
    directories = {}
    for key, default in (("data_dir", "/var/lib/nbdmirror"), ("run_dir", "/run/nbdmirror")):
        given = path_at(raw, "node", node, key) or path_at(raw, "paths", key)
        directories[key] = given or Path(default, named)
    run_dir = directories["run_dir"]
    key_file = path_at(raw, "key_file")
    return {
        **({"key_file": key_file} if key_file else {}),
        "data": directories["data_dir"] / "data",
        "meta": directories["data_dir"] / "meta",
        "launcher.lock in run_dir": run_dir / "launcher.lock",
        "controller.json in data_dir": directories["data_dir"] / "controller.json",
        "engine.sock in run_dir": run_dir / "engine.sock",
        "controller.sock in run_dir": run_dir / "controller.sock",
        "export.unix": path_at(raw, "export", "unix") or run_dir / "nbd.sock",
    }


def path_at(raw: dict[str, Any], *location: str) -> Path | None:
    """The path at `location`, None if there is no right one."""
    try:
        return parse_path(lookup(raw, location))
    except ValueError:
        return None


def socket_problems(raw: dict[str, Any], node: str) -> list[str]:
    """What stands where this node makes its sockets and would be removed for it."""
    if not node:
        return []
    problems = []
    files = files_of(raw, node)
    for what in SOCKETS:
        try:
            mode = files[what].lstat().st_mode
        except OSError:
            continue  # nothing there, or not to be seen: then it cannot be replaced either
        if not stat.S_ISSOCK(mode):
            problems.append(
                f'{what} is "{files[what]}": something that is no socket has that name, and would '
                "be removed; move it away, or name another path"
            )
    return problems


def arbiter_file_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the files that the chosen arbiter reads."""
    problems = []
    secrets = {f"{table}.{key}" for table, key in SECRETS}
    for key, path in arbiter_files(raw).items():
        if key.partition(".")[0] != raw.get("arbiter"):
            continue
        try:
            if key in secrets:
                read_secret(path, 1, ARBITER_SECRET_BYTES_MAX, "put it there, with mode 0600")
            else:
                os.close(open_regular(path, os.O_RDONLY))
        except (ConfigError, RefusedError, StoreError) as error:
            problems.append(f'{key} = "{path}": {error}')
    return problems
