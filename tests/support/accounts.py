"""Users without rights, made for one test and removed after it.

Owns the accounts that it made, by names that no other has. Must never touch another account.
"""

import pwd
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdmirror.engine_user import Account

BOUND_S = 60.0
MakeAccount = Callable[..., Account]


@contextmanager
def accounts() -> Iterator[MakeAccount]:
    """Makes users; `group`: one that is there already, instead of one of its own."""
    made: list[str] = []

    def make(group: str = "") -> Account:
        name = f"nm-{secrets.token_hex(6)}"
        which = ["--gid", group] if group else ["--user-group"]
        options = ["--system", "--no-create-home", "--shell", "/usr/sbin/nologin"]
        subprocess.run(
            ["useradd", *options, *which, name], check=True, capture_output=True, timeout=BOUND_S
        )
        made.append(name)
        entry = pwd.getpwnam(name)
        return Account(name, entry.pw_uid, entry.pw_gid)

    try:
        yield make
    finally:
        for name in reversed(made):
            subprocess.run(["userdel", name], check=True, capture_output=True, timeout=BOUND_S)


@pytest.fixture
def make_account(require_root: None) -> Iterator[MakeAccount]:
    """Makes users that end with the test."""
    with accounts() as make:
        yield make


def way_for_users(*directories: Path) -> None:
    """Let every user through these; fails where one above them is closed."""
    for each in directories:
        each.chmod(0o711)
        closed = [path for path in each.parents if not path.stat().st_mode & 0o001]
        assert not closed, f"TMPDIR must lie where every user may go: {closed}"


def rights_of(pid: int) -> dict[str, list[str]]:
    """What the kernel says of a process: each line of its status, in words."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
