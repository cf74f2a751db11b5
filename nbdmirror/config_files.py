"""The files and sockets of one mirror on one node: their names, and what would replace what.

Owns where each of them lies, as the raw configuration has it, and whether those for the arbiter's
store, and for TLS, can be read. Must never open one that holds data.
"""

import os
import stat
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final

from nbdmirror.config_arbiters import SECRETS, arbiter_files
from nbdmirror.config_fields import NAME, parse_path
from nbdmirror.errors import ConfigError, RefusedError, StoreError
from nbdmirror.files import open_regular
from nbdmirror.limits import (
    ARBITER_SECRET_BYTES_MAX,
    SOCKET_PATH_BYTES_MAX,
    TLS_CA_BYTES_MAX,
    TLS_CERTIFICATE_BYTES_MAX,
)
from nbdmirror.secret_files import read_secret

TLS_KEYS: Final = ("tls_certificate", "tls_key", "tls_ca")
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
        # Among themselves they may be one: certificate and key.
        strange = {**arbiter_files(raw), **tls_files(raw)}
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
        "tls.pem in data_dir": own_certificate(directories["data_dir"]),
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


def own_certificate(data_dir: Path) -> Path:
    """Where a node has the certificate that it made for itself, and its key."""
    return data_dir / "tls.pem"


def tls_files(raw: dict[str, Any]) -> dict[str, Path]:
    """Every file for TLS that the configuration names rightly, under its key."""
    found = {f"engine.{key}": path_at(raw, "engine", key) for key in TLS_KEYS}
    return {key: path for key, path in found.items() if path is not None}


def tls_problems(raw: dict[str, Any]) -> list[str]:
    """What the keys for TLS must be together."""
    has_certificate, has_key, has_ca = (
        lookup(raw, ("engine", key)) is not None for key in TLS_KEYS
    )
    problems = [
        f"engine.{lacking}: is not set, and engine.{there} is; expected both or neither"
        for there, lacking, wrong in (
            ("tls_certificate", "tls_key", has_certificate and not has_key),
            ("tls_key", "tls_certificate", has_key and not has_certificate),
        )
        if wrong
    ]
    if has_ca and not has_certificate and not has_key:
        problems.append(
            "engine.tls_certificate: is not set, and engine.tls_ca is, by which the peer would "
            "refuse the one that this node makes for itself; expected one that tls_ca signs"
        )
    return problems


def tls_file_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the files that TLS reads, if it is on."""
    if lookup(raw, ("engine", "tls")) != "on":
        return []
    problems = []
    for key, path in tls_files(raw).items():
        try:
            _read_tls_file(key, path)
        except ConfigError as error:
            problems.append(f'{key} = "{path}": {error}')
    return problems


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the files for TLS hold; they are read once, so that all of it is of one moment."""

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes | None


def read_tls_files(certificate: Path, key: Path, ca: Path | None) -> TlsFiles:
    """Read them. Raises ConfigError; its text never holds a byte of the key."""
    found = {}
    for name, path in zip(TLS_KEYS, (certificate, key, ca), strict=True):
        try:
            found[name] = None if path is None else _read_tls_file(f"engine.{name}", path)
        except ConfigError as error:
            raise ConfigError(f'engine.{name} = "{path}": {error}') from error
    mine, secret = found["tls_certificate"], found["tls_key"]
    assert mine is not None
    assert secret is not None
    return TlsFiles(mine, secret, found["tls_ca"])


def read_certificate(path: Path) -> bytes:
    """The text of a file with certificates. Raises ConfigError."""
    try:
        return _read_tls_file("engine.tls_certificate", path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_tls_key(path: Path) -> bytes:
    """The key of TLS, if nobody else can read it. Raises ConfigError."""
    return _read_tls_file("engine.tls_key", path)


def _read_tls_file(key: str, path: Path) -> bytes:
    remedy = "put it there, or leave the key out: then this node makes its own"
    if key == "engine.tls_key":
        return read_secret(path, 1, TLS_CERTIFICATE_BYTES_MAX, remedy)
    most = TLS_CA_BYTES_MAX if key == "engine.tls_ca" else TLS_CERTIFICATE_BYTES_MAX
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            text = file.read(most + 1)
    except (RefusedError, StoreError) as error:
        raise ConfigError(f"{error}; {remedy}") from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    if len(text) > most:
        raise ConfigError(f"more than {most} bytes; expected PEM")
    return text
