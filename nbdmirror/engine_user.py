"""The user that an engine runs as: who it is on this host, how one becomes it, what it may reach.

Owns the look-up of the name, what makes an account fit for an engine, and the words that give up
every right (setpriv of util-linux). Must never change a file, or take an account that has a right
of root's or shares its group: the data directory is open to that group.
"""

import grp
import os
import pwd
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdmirror.errors import ConfigError

PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
TRIED_S: Final = 20.0
SHOWN_MAX: Final = 3
PORT_DIGITS_MAX: Final = 5
PORTS_FROM: Final = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
PORTS_FROM_DEFAULT: Final = 1024
MAKE_IT: Final = "`useradd --system --user-group --no-create-home --shell /usr/sbin/nologin"


@dataclass(frozen=True, slots=True)
class Account:
    """One user of this host, with the one group that an engine gets."""

    name: str
    uid: int
    gid: int


def account(name: str) -> Account | None:
    """The account of that name; None for "", which is the user who starts the engine.

    Raises:
        ConfigError: there is none, or an engine would not be apart from others with it.
    """
    if not name:
        return None
    key = f'engine.user = "{name}"'
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            f'{key}: there is no such user on this host; make it ({MAKE_IT} {name}`), or set "", '
            "which is the user who starts the engine"
        ) from None
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise ConfigError(
            f'{key}: is root, or in the group of root; expected a user without rights, or ""'
        )
    others = _others_in(entry)
    if others:
        raise ConfigError(
            f"{key}: its group {entry.pw_gid} is that of {', '.join(others[:SHOWN_MAX])}, too; "
            f"expected a group of its own ({MAKE_IT} {name}`)"
        )
    return Account(name, entry.pw_uid, entry.pw_gid)


def _others_in(entry: pwd.struct_passwd) -> list[str]:
    """Who else has that group, as far as this host lists its users."""
    found = {
        each.pw_name
        for each in pwd.getpwall()
        if each.pw_gid == entry.pw_gid and each.pw_uid != entry.pw_uid
    }
    with suppress(KeyError):
        found.update(grp.getgrgid(entry.pw_gid).gr_mem)
    return sorted(found - {entry.pw_name})


def another(name: str) -> Account | None:
    """The account that an engine started here has to be given; None if it stays who starts it.

    Raises:
        ConfigError: as account(); or this process cannot become that user.
    """
    found = account(name)
    if found is None or found.uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise ConfigError(
            f'engine.user = "{name}": user {os.geteuid()} cannot start it as another user; run '
            'this as root, or set ""'
        )
    return found


def problems(raw: dict[str, Any], node: str) -> list[str]:
    """What of a raw configuration does not fit this host for an engine with a user of its own."""
    engine, nodes = raw.get("engine"), raw.get("node")
    name = engine.get("user", "") if isinstance(engine, dict) else ""
    if not isinstance(name, str) or not name or not isinstance(nodes, dict):
        return []  # none, or the model says so
    found = []
    try:
        account(name)
    except ConfigError as error:
        found.append(str(error))
    tables = {each: table for each, table in nodes.items() if isinstance(table, dict)}
    me = tables.get(node, {})
    port, least = str(me.get("address")).rpartition(":")[2], ports_from()
    if not (port.isdecimal() and len(port) <= PORT_DIGITS_MAX and int(port) < least):
        return found
    ids = [each for table in tables.values() if isinstance(each := table.get("id"), int)]
    if ids and me.get("id") == max(ids):
        # The other one dials, from any port.
        found.append(
            f'node.{node}.address = "{me["address"]}": only root may listen at port {port}, and '
            f'the engine runs as {name}; expected a port from {least} on, or engine.user = ""'
        )
    return found


def ports_from() -> int:
    """The lowest port that a user without rights may listen at."""
    try:
        return int(PORTS_FROM.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return PORTS_FROM_DEFAULT


def becoming(user: Account) -> list[str]:
    """The words before a command that make it run as that user, without any right, for good.

    Raises:
        ConfigError: setpriv is missing.
    """
    program = shutil.which("setpriv", path=PATH)
    if program is None:
        raise ConfigError(
            f'engine.user = "{user.name}": setpriv is not installed: apt-get install util-linux'
        )
    return [
        *(program, f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"),
        *("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"),
    ]


def require_reach(user: Account, *, enter: Path | None = None, read: tuple[Path, ...] = ()) -> None:
    """Whether that user gets into a directory, or can read these files; tried as that user.

    Raises:
        ConfigError: it does not, with the directory or file that stops it.
    """
    if enter is not None and not _may(user, "test", "-x", enter):
        raise _stopped(user, enter, "enter")
    if read and not _may(user, "head", "--bytes=0", "--", *read):  # at once, for the time of it
        blamed = next((each for each in read if not _may(user, "test", "-r", each)), read[0])
        raise _stopped(user, blamed, "read")


def _stopped(user: Account, path: Path, verb: str) -> ConfigError:
    way = [*reversed(path.parents), *([path] if verb == "enter" else [])]
    closed = next((each for each in way if not _may(user, "test", "-x", each)), None)
    if closed is None:
        why, remedy = f"it may not {verb} {path} itself", f"chmod o+r {path}"
    else:
        why, remedy = f"it may not enter {closed}", f"chmod o+x {closed}"
    return ConfigError(
        f'engine.user = "{user.name}": that user cannot {verb} {path}: {why} (`{remedy}`, or '
        "another place)"
    )


def _may(user: Account, *words: str | Path) -> bool:
    """Whether a command succeeds as that user. Raises ConfigError: it cannot be run so."""
    command = [*becoming(user), *map(str, words)]
    try:
        done = subprocess.run(  # noqa: S603 - fixed words and paths, no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=TRIED_S, cwd="/", env={"PATH": PATH, "LANG": "C.UTF-8"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f'engine.user = "{user.name}": {command[0]}: {error}') from error
    if done.returncode not in (0, 1):
        said = done.stderr.strip()[-300:]
        raise ConfigError(
            f'engine.user = "{user.name}": this process cannot become that user ({said}); it needs '
            "the capabilities SETUID, SETGID and SETPCAP"
        )
    return done.returncode == 0
