"""Whose the files of a mirror are: they change hands whole, and never what is not ours."""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from nbdmirror import admin, engine_user, ownership
from nbdmirror.config import Config, load
from nbdmirror.engine_user import Account
from nbdmirror.errors import ConfigError, MetadataError, NbdMirrorError, RefusedError
from tests.support.accounts import MakeAccount, make_account, way_for_users

__all__ = ["make_account"]

MIB = 1 << 20
THIRD = 54321
TEXT = """
mirror = "demo"
key_file = "{root}/key"
arbiter = "none"
[node.alpha]
id = 1
address = "127.0.0.1:17789"
[node.beta]
id = 2
address = "127.0.0.2:17789"
[paths]
data_dir = "{root}/lib/data"
run_dir = "{root}/run"
"""

pytestmark = pytest.mark.usefixtures("require_root")


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that every user gets through."""
    made = Path(tempfile.mkdtemp(prefix="nm"))
    way_for_users(made)
    (made / "key").touch(0o600)
    (made / "key").write_bytes(b"k" * 32)
    (made / "demo.toml").write_text(TEXT.replace("{root}", str(made)))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def config(root: Path) -> Config:
    """A mirror whose files are root's."""
    made = load(root / "demo.toml", "alpha")
    admin.create(made, MIB, join=False, adopt=False, sparse=False)
    (made.me.data_dir / "kept").touch(0o600)
    (made.me.data_dir / "controller.json").touch(0o600)
    return made


@pytest.fixture
def user(make_account: MakeAccount) -> Account:
    """Whom the engine is to run as."""
    return make_account()


def as_user(config: Config, name: str) -> Config:
    """The configuration with that user."""
    return replace(config, engine=config.engine.model_copy(update={"user": name}))


def settle(config: Config, user: Account | None) -> None:
    """As the launcher does."""
    name = user.name if user else ""
    ownership.settle(as_user(config, name), engine_user.another(name))


def given_to(user: Account) -> dict[str, tuple[int, int, int]]:
    """As it is wanted."""
    return {
        "data": (user.uid, user.gid, 0o600),
        "meta": (user.uid, user.gid, 0o600),
        "kept": (user.uid, user.gid, 0o600),
        "controller.json": (0, 0, 0o600),
    }


def look(config: Config) -> tuple[tuple[int, int, int], dict[str, tuple[int, int, int]]]:
    """The directory, and what is in it."""
    directory = config.me.data_dir

    def facts(path: Path) -> tuple[int, int, int]:
        status = path.lstat()
        return status.st_uid, status.st_gid, status.st_mode & 0o7777

    return facts(directory), {path.name: facts(path) for path in directory.iterdir()}


ROOTS = dict.fromkeys(("data", "meta", "kept", "controller.json"), (0, 0, 0o600))


def test_files_become_the_users_and_roots_again(
    config: Config, user: Account, make_account: MakeAccount
) -> None:
    """Breaks in the field: a mirror that gets a user, another one or none does not start again; or
    the engine can exchange what its controller remembers.
    """
    before = look(config)
    assert before == ((0, 0, 0o700), ROOTS)
    settle(config, None)
    assert look(config) == before, "nobody asked"
    other = make_account()
    for each in (user, user, other):
        settle(config, each)
        assert look(config) == ((0, each.gid, 0o1770), given_to(each))
    for _ in range(2):
        settle(config, None)
        assert look(config) == before


def test_what_root_makes_beside_them_later_is_the_users(config: Config, user: Account) -> None:
    """Breaks in the field: root restores a file, or makes the metadata anew, and the engine is
    locked out of its own mirror.
    """
    settle(config, user)
    damaged = config.metadata_file.with_name("meta.damaged")
    config.metadata_file.rename(damaged)
    (config.me.data_dir / "kept").unlink()
    mine = as_user(config, user.name)
    admin.create(mine, MIB, join=True, adopt=True, sparse=False)
    directory, facts = look(config)
    assert (directory, facts["meta"]) == ((0, user.gid, 0o1770), given_to(user)["meta"])
    assert facts["data"] == given_to(user)["data"]
    # By hand, as from a backup; with a mode of its own.
    copy = config.data_file.read_bytes()
    config.data_file.unlink()
    config.data_file.write_bytes(copy)
    config.data_file.chmod(0o644)
    settle(config, user)
    assert look(config)[1]["data"] == given_to(user)["data"]


@pytest.mark.parametrize("how", ["create", "adopt", "join"])
def test_new_files_are_the_users(root: Path, user: Account, how: str) -> None:
    """Breaks in the field: a new mirror with a user does not start before somebody types chown."""
    config = as_user(load(root / "demo.toml", "alpha"), user.name)
    if how == "adopt":
        config.me.data_dir.mkdir(parents=True)
        config.data_file.write_bytes(b"x" * MIB)
    admin.create(config, MIB, join=how == "join", adopt=how == "adopt", sparse=False)
    directory, facts = look(config)
    assert directory == (0, user.gid, 0o1770)
    assert facts == {name: given_to(user)[name] for name in ("data", "meta")}
    report = admin.check(config.metadata_file)
    assert not report.findings, "that is no door to others"


def test_no_new_file_for_nobody(root: Path, user: Account) -> None:
    """Breaks in the field: a creation that ends with a refusal leaves files behind, and the second
    try is refused because of them.
    """
    config = as_user(load(root / "demo.toml", "alpha"), user.name)
    (root / "lib").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=f"may not enter {root / 'lib'} .`chmod o[+]x"):
        admin.create(config, MIB, join=False, adopt=False, sparse=False)
    assert list((root / "lib").iterdir()) == []
    (root / "lib").chmod(0o711)
    config.me.data_dir.mkdir()
    config.data_file.write_bytes(b"x" * MIB)
    os.chown(config.data_file, THIRD, THIRD)
    with pytest.raises(RefusedError, match=f"data belongs to user {THIRD}"):
        admin.create(config, MIB, join=False, adopt=True, sparse=False)
    assert look(config)[1] == {"data": (THIRD, THIRD, 0o644)}


def link(config: Config) -> None:
    """The data are another file, by a link."""
    there = config.me.data_dir.parent / "shadow"
    config.data_file.rename(there)
    config.data_file.symlink_to(there)


def second_name(config: Config) -> None:
    """The data are another program's file, by its inode."""
    there = config.me.data_dir.parent / "shadow"
    there.touch(0o600)
    config.data_file.unlink()
    config.data_file.hardlink_to(there)


def third_user(config: Config) -> None:
    """The data belong to somebody."""
    os.chown(config.data_file, THIRD, THIRD)


def another_mirror(config: Config) -> None:
    """The directory is that of another node."""
    config.metadata_file.unlink()
    (config.me.data_dir / "kept").unlink()
    config.data_file.unlink()
    other = load(config.source, "beta")
    admin.create(other, MIB, join=True, adopt=False, sparse=False)
    (config.me.data_dir / "kept").touch(0o600)


def fifo(config: Config) -> None:
    """Whoever opens it waits."""
    config.data_file.unlink()
    os.mkfifo(config.data_file)


def open_way(config: Config) -> None:
    """Everybody can put another directory there."""
    config.me.data_dir.parent.chmod(0o777)


def foreign_way(config: Config) -> None:
    """Somebody can put another directory there."""
    os.chown(config.me.data_dir.parent, THIRD, THIRD)


def linked_directory(config: Config) -> None:
    """The directory is a link."""
    there = config.me.data_dir.with_name("elsewhere")
    config.me.data_dir.rename(there)
    config.me.data_dir.symlink_to(there)


def closed_way(config: Config) -> None:
    """The user does not get there."""
    config.me.data_dir.parent.chmod(0o700)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (link, "data is a symbolic link"),
        (second_name, "data has 2 names"),
        (third_user, f"data belongs to user {THIRD}, neither root nor"),
        (another_mirror, "belongs to node 2 of demo, not to node 1"),
        (fifo, "data is no regular file"),
        (open_way, "lib .mode 0777, user 0. is open to other users"),
        (foreign_way, f"lib .mode 0711, user {THIRD}. is not root's"),
        (linked_directory, "lib/data is a symbolic link"),
        (closed_way, "lib .`chmod o[+]x"),
    ],
)
def test_no_file_changes_hands_that_is_not_ours(
    config: Config, user: Account, spoil: Callable[[Config], None], why: str
) -> None:
    """Breaks in the field: a slip in data_dir, or a link that somebody put there, gives a file of
    the system to a user without rights.
    """
    spoil(config)
    before = look(config)
    with pytest.raises(NbdMirrorError, match=why):
        settle(config, user)
    assert look(config) == before, "nothing was changed"
    shadow = config.me.data_dir.parent / "shadow"
    if shadow.exists():
        assert shadow.stat().st_uid == 0


def test_what_a_former_user_left_is_not_given_on(
    config: Config, user: Account, make_account: MakeAccount
) -> None:
    """Breaks in the field: whoever was inside the engine leaves a second name of a file of root's
    for the next start, and owns that file after it.
    """
    settle(config, user)
    shadow = config.me.data_dir.parent / "shadow"
    shadow.touch(0o600)
    config.data_file.unlink()
    config.data_file.hardlink_to(shadow)
    for each in (user, make_account(), None):
        with pytest.raises(RefusedError, match="data has 2 names"):
            settle(config, each)
        assert shadow.stat().st_uid == 0


class PowerCutError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("call", ["fchown", "fchmod"])
def test_a_crash_while_files_change_hands_is_taken_up(
    config: Config, user: Account, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Breaks in the field: after a power cut in the wrong moment some files are the user's, some
    root's, and no start is allowed any more.
    """
    whole = getattr(os, call)
    for step, wanted in product(range(5), (user, None)):
        left = [step]

        def cut(*arguments: int, left: list[int] = left) -> None:
            if not left[0]:
                raise PowerCutError
            left[0] -= 1
            whole(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, cut)
            with pytest.raises(PowerCutError):
                settle(config, wanted)
        settle(config, wanted)
        (_, group, mode), facts = look(config)
        assert facts == (given_to(wanted) if wanted else ROOTS)
        assert (group, mode) == ((wanted.gid, 0o1770) if wanted else (0, 0o700))


def test_no_name_changes_while_files_change_hands(
    config: Config, user: Account, make_account: MakeAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: whoever is the engine's user exchanges a name between two looks of
    root's, and gets the file behind it.
    """
    whole, seen = os.fchown, []

    def noted(descriptor: int, uid: int, gid: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            seen.append(look(config)[0])
        whole(descriptor, uid, gid)

    monkeypatch.setattr(os, "fchown", noted)
    for wanted in (user, make_account(), None):
        settle(config, wanted)
    assert seen == [(0, 0, 0o1700)] * 9


def test_a_missing_copy_is_the_engines_to_tell(root: Path, user: Account, config: Config) -> None:
    """Breaks in the field: a node without files says something about owners."""
    missing = replace(config, me=replace(config.me, data_dir=root / "none"))
    settle(missing, user)
    assert not (root / "none").exists()
    config.metadata_file.write_bytes(b"x" * 4096)
    before = look(config)
    with pytest.raises(MetadataError):
        settle(config, user)
    assert look(config) == before


# --- the account ---------------------------------------------------------------------------------


def test_only_a_user_without_rights_will_do(make_account: MakeAccount) -> None:
    """Breaks in the field: the engine's user is root by another name, or every member of a large
    group may make files beside the data.
    """
    assert engine_user.account("") is None
    made = make_account()
    assert engine_user.account(made.name) == made
    with pytest.raises(ConfigError, match="there is no such user on this host; make it"):
        engine_user.account("nobody-of-that-name")
    with pytest.raises(ConfigError, match="is root, or in the group of root"):
        engine_user.account("root")
    with pytest.raises(ConfigError, match="is root, or in the group of root"):
        engine_user.account(make_account(group="root").name)
    sharing = make_account(group=made.name)
    with pytest.raises(ConfigError, match=f"its group {made.gid} is that of {sharing.name}, too"):
        engine_user.account(made.name)


def mistakes_of(path: Path, node: str) -> str:
    """The report, "" where there is none."""
    try:
        load(path, node)
    except ConfigError as error:
        return str(error)
    return ""


def test_only_root_starts_it_as_another_user(
    user: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: who is not root is told of a system call, or gets an engine that runs as
    the wrong user.
    """
    assert engine_user.another(user.name) == user
    monkeypatch.setattr(os, "geteuid", lambda: user.uid)
    assert engine_user.another(user.name) is None, "it is that user already"
    monkeypatch.setattr(os, "geteuid", lambda: THIRD)
    assert engine_user.another("") is None
    with pytest.raises(ConfigError, match=f"user {THIRD} cannot start it as another user"):
        engine_user.another(user.name)


def test_a_user_that_does_not_fit_is_a_mistake_of_the_file(root: Path, user: Account) -> None:
    """Breaks in the field: `config check` calls a file right that no engine starts with."""
    path = root / "demo.toml"
    text = path.read_text()
    for name, port, expected in (
        (user.name, 17789, []),
        ("nobody-of-that-name", 17789, ["there is no such user"]),
        (user.name, 789, ["only root may listen at port 789"]),
        ("nobody-of-that-name", 789, ["there is no such user", "expected a port from"]),
        ("root", 17789, ['where root starts the engine, "" is root']),
        ("a b", 17789, ["not a name"]),
    ):
        changed = text.replace("17789", str(port))
        path.write_text(f'{changed}[engine]\nuser = "{name}"\n')
        if port == 789:
            assert "port 789" not in mistakes_of(path, "alpha"), "it dials"
        found = mistakes_of(path, "beta")
        assert bool(found) is bool(expected)
        for wanted in expected:
            assert wanted in found
        if name not in {"root", "a b"}:
            load(path, "alpha", with_key=False)  # whoever only asks needs no such user


def test_the_rights_are_gone(user: Account, root: Path) -> None:
    """Breaks in the field: what runs behind these words keeps a group, or a way back to root."""
    words = engine_user.becoming(user)
    done = subprocess.run(
        [*words, "cat", "/proc/self/status"], capture_output=True, text=True, check=True
    )
    facts = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert facts["Uid"].split() == [str(user.uid)] * 4
    assert facts["Gid"].split() == [str(user.gid)] * 4
    assert facts["Groups"].split() == []
    for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(facts[each], 16) == 0, each
    assert facts["NoNewPrivs"].strip() == "1"
    secret = root / "lib"
    secret.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=f"cannot read {secret / 'x'}: it may not enter {secret}"):
        engine_user.require_reach(user, enter=root, read=(secret / "x",))
