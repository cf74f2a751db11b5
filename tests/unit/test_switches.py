"""What a controller remembers over its own end: durable as a whole, and never a reason to stop."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from nbdmirror.config_cluster import ControllerSection
from nbdmirror.controller import keeper, switches
from nbdmirror.controller.keeper import Keeper
from nbdmirror.controller.switches import HOUR_S, Remembered, Switches
from nbdmirror.errors import StoreError

HALF: Final = 20


class PowerCutError(BaseException):
    """The process ends here; nothing in it goes on."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a node that runs, in a boot that the test knows."""
    boot(monkeypatch, tmp_path, "boot-1")
    at_uptime(monkeypatch, 1000)
    made = tmp_path / "controller.json"
    change(Switches(made), wanted=True, stop_reason="")
    return made


def change(made: Switches, **fields: Any) -> None:
    """Change and store."""
    made.change(**fields)
    made.store()


def kept(made: Switches) -> str:
    """What who typed a switch is told."""

    async def asked() -> str:
        keeper = Keeper(made, lambda _told: None)
        keeper.begin()
        return await keeper.kept()

    return asyncio.run(asked())


def boot(monkeypatch: pytest.MonkeyPatch, directory: Path, boot_id: str) -> None:
    """The host has started anew."""
    source = directory / "boot_id"
    source.write_text(boot_id + "\n")
    monkeypatch.setattr(switches, "BOOT_ID", source)


def at_uptime(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """So many seconds have passed since the boot."""
    monkeypatch.setattr(switches, "uptime_s", lambda: seconds)


def test_a_node_that_never_ran_does_not_run(tmp_path: Path) -> None:
    """Breaks in the field: a node that was only installed starts, or says that it is damaged."""
    made = Switches(tmp_path / "controller.json")
    assert (made.note, made.now.wanted) == ("", False)
    assert made.now.stop_reason == "it was never started"
    assert not (tmp_path / "controller.json").exists(), "looking changes nothing"


def test_what_was_switched_is_so_after_a_restart(path: Path) -> None:
    """Breaks in the field: a restart of the controller forgets what the operator had switched."""
    first = Switches(path)
    first.change(failover=False, checkers=False, boot=False, served=True)
    first.count_action("restart: the page is down")
    first.store()
    again = Switches(path)
    assert again.now == first.now
    assert again.note == ""
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in path.parent.iterdir()) == ["boot_id", path.name]


Failing = Callable[[BaseException], None]


def half_a_write(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    """The data reach the file in part."""
    whole = os.pwrite
    calls: list[int] = []

    def write(descriptor: int, data: Any, offset: int) -> int:
        if calls:
            raise failure
        calls.append(1)
        return whole(descriptor, data[:HALF], offset)

    monkeypatch.setattr(os, "pwrite", write)


def failing(name: str) -> Callable[[pytest.MonkeyPatch, BaseException], None]:
    """A function of `os`, or of a path, that does not come back, or fails."""

    def patch(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
        def fail(*_args: object, **_more: object) -> None:
            raise failure

        owner = Path if name == "replace" else switches if name == "sync_directory" else os
        monkeypatch.setattr(owner, name, fail)

    return patch


STEPS: Final = {
    "open": failing("open"),
    "write": half_a_write,
    "sync": failing("fsync"),
    "rename": failing("replace"),
    "sync of the directory": failing("sync_directory"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_leaves_the_old_or_the_new(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Breaks in the field: after a power cut in the wrong moment the file is damaged, and what the
    operator had switched off is on.
    """
    made = Switches(path)
    with monkeypatch.context() as patched:
        STEPS[step](patched, PowerCutError())
        with pytest.raises(PowerCutError):
            change(made, wanted=False, stop_reason="an operator")
    again = Switches(path)
    assert again.note == ""
    assert again.now.wanted is (step != "sync of the directory")
    # What the crash left beside it is in nobody's way.
    change(again, failover=False)
    assert Switches(path).now == again.now


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_stored_is_told_and_stored_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """Breaks in the field: `stop` on a full disk is forgotten by the next start, although it was
    typed again when there was room.
    """
    made = Switches(path)
    with monkeypatch.context() as patched:
        STEPS[step](patched, OSError(number, os.strerror(number)))
        made.change(wanted=False, stop_reason="an operator")
        problem = kept(made)
    assert str(path) in problem
    assert "could not be stored" in problem
    assert made.now.wanted is False, "it is in force"
    assert not made.untried, "or a full disk would be written to without end"
    assert kept(made) == ""
    assert Switches(path).now == made.now


def test_a_disk_that_does_not_answer_holds_nothing_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: while a disk takes its time over the operator's switch no heartbeat
    leaves the node, and its peer takes over.
    """
    released = threading.Event()
    monkeypatch.setattr(keeper, "STORE_S", 0.05)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: released.wait())
    made = Switches(path)

    async def switched() -> None:
        keeps = Keeper(made, lambda _told: None)
        keeps.begin()
        made.change(failover=False)
        assert "was not stored within" in await keeps.kept()
        made.change(checkers=False)
        assert "was not stored within" in await keeps.kept()
        made.change(failover=True)
        made.change(failover=False)
        released.set()
        monkeypatch.setattr(keeper, "STORE_S", HALF)
        assert await keeps.kept() == ""

    asyncio.run(switched())
    assert Switches(path).now == made.now
    assert (made.now.failover, made.now.checkers) == (False, False)


def test_what_could_not_be_stored_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: the disk was full for a minute when the operator typed `stop`; a week
    later the node runs again after a restart.
    """
    monkeypatch.setattr(keeper, "AGAIN_S", 0.01)
    told: list[str] = []
    full = threading.Event()
    full.set()
    synced, real = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)
        synced.set()

    monkeypatch.setattr(os, "fsync", fsync)
    made = Switches(path)
    keeps = Keeper(made, told.append)
    keeps.begin()
    made.change(wanted=False, stop_reason="an operator")
    assert "could not be stored" in asyncio.run(keeps.kept())
    full.clear()
    assert synced.wait(HALF)
    assert asyncio.run(keeps.kept()) == ""
    assert Switches(path).now.wanted is False
    assert len(told) == 1, "the journal is not filled with it"


def test_what_was_damaged_is_kept_aside(path: Path) -> None:
    """Breaks in the field: one error while the file is read, and what was in it is gone."""
    path.write_bytes(b"{")
    made = Switches(path)
    assert not made.untried, "nothing is written before something is switched"
    change(made, failover=False)
    assert path.with_suffix(".json.damaged").read_bytes() == b"{"
    assert Switches(path).note == ""


def test_the_data_are_durable_before_they_get_the_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: a power cut after the rename leaves an empty file under the name."""
    order: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            order.append(name)
            return real(*args, **more)

        return call

    monkeypatch.setattr(os, "pwrite", noted("write", os.pwrite))
    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync))
    monkeypatch.setattr(Path, "replace", noted("rename", Path.replace))
    change(Switches(path), failover=False)
    assert order == ["write", "sync", "rename", "sync"]


def test_a_link_in_the_place_of_the_new_file_is_not_followed(path: Path) -> None:
    """Breaks in the field: who may write there makes the controller overwrite any file."""
    victim = path.parent / "victim"
    victim.write_text("precious")
    path.with_suffix(".json.new").symlink_to(victim)
    made = Switches(path)
    made.change(failover=False)
    assert kept(made) == ""
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_a_directory_that_is_not_there_stops_nothing(tmp_path: Path) -> None:
    """Breaks in the field: with its data directory not mounted a controller ends at a click."""
    made = Switches(tmp_path / "missing" / "controller.json")
    with pytest.raises(StoreError, match="ENOENT"):
        change(made, wanted=True)
    assert made.now.wanted


def good(**changed: Any) -> bytes:
    """A file as it is written, but for what is given."""
    facts = {"wanted": False, "stop_reason": "x", "boot": True, "failover": False, "actions": []}
    return json.dumps({**facts, **changed}).encode()


DAMAGED: Final = {
    "empty": b"",
    "cut": good()[:30],
    "zeros": bytes(4096),
    "no object": b"[1, 2]",
    "nothing in it": b"{}",
    "null": b"null",
    "text": b'"wanted"',
    "no UTF-8": b'{"wanted": "\xff"}',
    "deep": b"[" * 100_000,
    "too long": good(stop_reason="x" * switches.FILE_BYTES_MAX),
    "wanted is a number": good(wanted=1),
    "wanted is null": good(wanted=None),
    "reason is a number": good(stop_reason=7),
    "boot id is a list": good(boot_id=[]),
    "actions are a number": good(actions=3),
    "an action is a number": good(actions=[3]),
    "an action is short": good(actions=[["boot-1", 3]]),
    "a time is infinite": good(actions=[]).replace(b"[]", b'[["boot-1", Infinity, "x"]]'),
    "a time is no number": good(actions=[["boot-1", "soon", "x"]]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_stops_nothing(path: Path, content: bytes) -> None:
    """Breaks in the field: one bad block in a file of switches ends the controller, or the
    application that has been running all the time.
    """
    path.write_bytes(content)
    made = Switches(path)
    assert str(path) in made.note
    assert "cannot be used" in made.note
    assert made.now == Remembered(wanted=True, stop_reason="", boot_id="boot-1")
    change(made, failover=False)
    again = Switches(path)
    assert (again.note, again.now) == ("", made.now)


def test_a_file_that_cannot_be_read_stops_nothing(path: Path) -> None:
    """Breaks in the field: as above, with a disk that gives EIO."""
    path.unlink()
    path.mkdir()
    assert Switches(path).now.wanted
    assert "IsADirectoryError" in Switches(path).note


def test_the_file_of_another_version_counts(path: Path) -> None:
    """Breaks in the field: an upgrade, or the way back, sets every switch as at creation."""
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "failover": False, "a_new_switch": {"a": 1}}))
    assert (Switches(path).note, Switches(path).now.failover) == ("", False)
    del facts["actions"], facts["served"]
    path.write_text(json.dumps(facts))
    assert (Switches(path).note, Switches(path).now.wanted) == ("", True)


# --- a boot of the host -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "switch", "runs", "reason"),
    [
        (True, True, True, ""),
        (True, False, False, "boot is switched off"),
        (False, True, False, "an operator"),
        (False, False, False, "an operator"),
    ],
)
def test_a_boot_of_the_host_asks_the_switch(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, wanted: bool, switch: bool, runs: bool,
    reason: str,
) -> None:  # fmt: skip
    """Breaks in the field: a host that was to come up without the mirror starts it, or a mirror
    that was running does not come back after a power cut.
    """
    change(Switches(path), wanted=wanted, boot=switch, stop_reason="" if wanted else "an operator")
    assert Switches(path).now.wanted is wanted, "a restart of the controller is no boot"
    boot(monkeypatch, path.parent, "boot-2")
    made = Switches(path)
    assert (made.now.wanted, made.now.stop_reason) == (runs, reason)
    assert Switches(path).now == made.now, "nor is a restart after the boot"
    change(made, wanted=True, stop_reason="")
    assert Switches(path).now.wanted, "who starts it by hand has it running in this boot"


def test_a_host_that_does_not_tell_its_boot_is_one_boot(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: in a container without that file every restart counts as a boot."""
    monkeypatch.setattr(switches, "BOOT_ID", path.parent / "missing")
    change(Switches(path), wanted=True, boot=False)
    assert Switches(path).now.wanted


# --- the bound on automatic actions -----------------------------------------------------------


def test_actions_are_counted_within_the_window(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: a node restarts its application for ever, or stops after one restart a
    week.
    """
    made = Switches(path)
    at_uptime(monkeypatch, 10 * HOUR_S)
    made.count_action("restart: a")
    at_uptime(monkeypatch, 11 * HOUR_S)
    made.count_action("restart: b")
    made.store()
    at_uptime(monkeypatch, 12 * HOUR_S)
    assert made.actions_within(2) == ["restart: a", "restart: b"]
    at_uptime(monkeypatch, 12 * HOUR_S + 1)
    assert Switches(path).actions_within(2) == ["restart: b"]


def test_an_action_before_a_boot_counts_from_the_boot(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: an application that takes its host down with it is started again and
    again, because each boot begins to count anew.
    """
    at_uptime(monkeypatch, 1000 * HOUR_S)
    made = Switches(path)
    made.count_action("restart: a")
    made.store()
    boot(monkeypatch, path.parent, "boot-2")
    at_uptime(monkeypatch, 60)
    assert Switches(path).actions_within(1) == ["restart: a"]
    at_uptime(monkeypatch, HOUR_S + 1)
    assert Switches(path).actions_within(1) == [], "and it does end"


def test_what_is_counted_can_be_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: after some hundred restarts the file is longer than what is read of it;
    it counts as damaged, and all switches are as at creation.
    """
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(switches, "sync_directory", lambda _directory: None)
    made = Switches(path)
    made.change(failover=False)
    for number in range(2 * switches.ACTIONS_KEPT_MAX):
        made.count_action(f"{number} " + "\N{GRINNING FACE}" * 1000)
        made.store()
    again = Switches(path)
    assert (again.note, again.now) == ("", made.now)
    assert len(again.actions_within(1)) == switches.ACTIONS_KEPT_MAX
    assert again.actions_within(1)[-1].startswith(f"{2 * switches.ACTIONS_KEPT_MAX - 1} ")


def test_the_bound_of_the_configuration_can_be_reached() -> None:
    """Breaks in the field: `actions_max` larger than what is remembered never stops a node."""
    bounds = [
        getattr(each, "le", None) for each in ControllerSection.model_fields["actions_max"].metadata
    ]
    assert max(each for each in bounds if each is not None) <= switches.ACTIONS_KEPT_MAX


def test_a_file_of_another_user_is_not_believed(path: Path, require_root: None) -> None:
    """Breaks in the field: who is inside the engine writes a file of the controller's, and a node
    that an operator stopped runs again, or without failover.
    """
    wanted = Switches(path).now
    change(Switches(path), failover=False)
    os.chown(path, 54321, 54321)
    made = Switches(path)
    assert "it belongs to user 54321" in made.note
    assert made.now.failover
    os.chown(path, 0, 0)
    assert Switches(path).now == replace(wanted, failover=False)
    path.unlink()
    os.mkfifo(path)
    assert "it is no plain file" in Switches(path).note, "and nobody waits for a writer"


def test_what_lies_in_the_way_is_not_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks in the field: who is inside the engine puts a second name of a file of root's in the
    place of the draft, or a file that it keeps open, and the controller writes into that.
    """
    victim = path.parent / "victim"
    victim.write_text("precious")
    draft = path.with_suffix(".json.new")
    draft.hardlink_to(victim)
    change(Switches(path), failover=False)
    assert victim.read_text() == "precious"
    assert path.stat().st_nlink == 1
    assert Switches(path).now.failover is False
    # It is there again at once.
    draft.hardlink_to(victim)
    monkeypatch.setattr(Path, "unlink", lambda _path, missing_ok: None)
    with pytest.raises(StoreError, match="EEXIST"):
        change(Switches(path), failover=True)
    assert victim.read_text() == "precious"
