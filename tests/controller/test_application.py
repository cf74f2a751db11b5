"""The application of a mirror: its order, its bounds, and that a stop always comes to an end."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdmirror.config_cluster import ApplicationSection
from nbdmirror.controller import application
from nbdmirror.controller.application import Application
from nbdmirror.errors import RefusedError
from tests.controller.doing import alive, end, pid_in, running, script, tmpfs

# A service manager that notes what it is told, and does what a file of the test says.
SYSTEMCTL = """
verb=$1
for unit; do :; done
echo "$*" >>$D/did
[ "$verb" = is-active ] && [ ! -e $D/active ] && exit 3
if [ -e $D/$verb-$unit ]; then . $D/$verb-$unit; fi
exit 0
"""
NOTE = 'echo "$NBDMIRROR_ACTION $*" >>$D/did'


@pytest.fixture(autouse=True)
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager of the tests."""
    made = script(tmp_path / "systemctl", SYSTEMCTL)
    monkeypatch.setattr(application, "SYSTEMCTL", str(made))


class Made:
    """An application with scripts in a directory, and what it told."""

    def __init__(self, directory: Path, mount_point: Path | None = None, **keys: Any) -> None:
        self.told: list[str] = []
        self._did = directory / "did"
        bounds = {"start_timeout_s": 60, "stop_timeout_s": 60, "force_timeout_s": 60}
        self.it = Application(
            ApplicationSection(**{**bounds, **keys}),
            mirror="demo",
            node="alpha",
            mount_point=mount_point,
            log=directory / "application.log",
            tell=self.told.append,
        )

    def did(self) -> list[str]:
        """What scripts and service manager did, in order."""
        return self._did.read_text().splitlines() if self._did.exists() else []


def scripts(directory: Path, *, start: str = NOTE, stop: str = NOTE) -> dict[str, Any]:
    """The two scripts, made of these lines."""
    return {
        "start": [str(script(directory / "start", start)), "with", "words"],
        "stop": [str(script(directory / "stop", stop))],
    }


def test_order_and_reverse_order(tmp_path: Path) -> None:
    """Breaks in the field: a web server is started before its database, or stopped after it."""
    made = Made(tmp_path, units=["a.service", "b.service"], **scripts(tmp_path))

    async def main() -> None:
        await made.it.start()
        assert made.it.state == "running"
        await made.it.start()
        assert await made.it.stop() == []
        assert made.it.state == "stopped"
        assert await made.it.stop() == []

    uvloop.run(main())
    assert made.did() == [
        "start with words",
        "start --no-ask-password -- a.service",
        "start --no-ask-password -- b.service",
        "stop --no-ask-password -- b.service",
        "stop --no-ask-password -- a.service",
        "stop ",
    ]
    assert made.told == []


def test_scripts_know_where_they_are(tmp_path: Path) -> None:
    """Breaks in the field: one script for several mirrors acts on the wrong one."""
    env = f"env | grep ^NBDMIRROR_ | grep -v _RUN= | sort >{tmp_path}/env"
    made = Made(tmp_path, tmp_path / "mnt", **scripts(tmp_path, start=env))
    uvloop.run(made.it.start())
    assert (tmp_path / "env").read_text().splitlines() == [
        "NBDMIRROR_ACTION=start",
        "NBDMIRROR_MIRROR=demo",
        f"NBDMIRROR_MOUNT={tmp_path}/mnt",
        "NBDMIRROR_NODE=alpha",
    ]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("script", "the start script {0}/start: exit code 4 after "),
        ("hang", "the start script {0}/start: no end within 1 s; it said: why it did not"),
        ("missing", "the start script {0}/start: not started: {0}/start: No such file"),
        ("unit", "the unit b.service: exit code 5 after "),
    ],
    ids=["script", "hang", "missing", "unit"],
)
def test_a_start_that_fails_says_why(tmp_path: Path, what: str, reason: str) -> None:
    """Breaks in the field: a node takes over, its application is not up, and it says it is; or it
    says so and not why.
    """
    says = "echo why it did not"
    keys = scripts(tmp_path, start=says)
    if what == "script":
        keys = scripts(tmp_path, start=f"{says}; exit 4")
    elif what == "hang":
        keys = scripts(tmp_path, start=f"{says}; sleep 1000")
    elif what == "missing":
        (tmp_path / "start").unlink()
    else:
        (tmp_path / "start-b.service").write_text(f"{says}; exit 5")
    bound_s = 1 if what == "hang" else 60
    units = ["a.service", "b.service", "c.service"]
    made = Made(tmp_path, units=units, start_timeout_s=bound_s, **keys)
    with pytest.raises(RefusedError) as error:
        uvloop.run(made.it.start())
    assert reason.format(tmp_path) in str(error.value)
    assert what == "missing" or "it said: why it did not" in str(error.value)
    assert f"see {tmp_path}/application.log" in str(error.value)
    assert made.it.state == "failed"
    assert made.told == [str(error.value)] == [made.it.facts()["reason"]]
    assert "start --no-ask-password -- c.service" not in made.did()


def test_what_failed_to_start_is_stopped(tmp_path: Path) -> None:
    """Breaks in the field: half an application stays behind on a node that gave the role up."""
    made = Made(tmp_path, **scripts(tmp_path, start="exit 1"))

    async def main() -> None:
        with pytest.raises(RefusedError):
            await made.it.start()
        assert await made.it.stop() == []

    uvloop.run(main())
    assert made.did() == ["stop "]
    assert made.it.state == "stopped"


def test_a_new_controller_stops_what_it_did_not_start(tmp_path: Path) -> None:
    """Breaks in the field: after a restart the controller believes that nothing runs, and the
    application of its earlier life goes on beside the other node's.
    """
    made = Made(tmp_path, **scripts(tmp_path))
    assert made.it.state == "stopped"
    assert uvloop.run(made.it.stop()) == []
    assert made.did() == ["stop "]


def test_a_running_application_is_adopted(tmp_path: Path) -> None:
    """Breaks in the field: a restart of the controller starts the application a second time."""
    made = Made(tmp_path, **scripts(tmp_path))
    made.it.adopt()
    uvloop.run(made.it.start())
    assert made.did() == []
    assert uvloop.run(made.it.stop()) == []
    assert made.did() == ["stop "]


@pytest.mark.parametrize("how", ["exit 7", "sleep 1000"])
def test_a_stop_that_fails_is_forced(tmp_path: Path, how: str) -> None:
    """Breaks in the field: a graceful stop that hangs keeps the role on a node that is to leave."""
    stop = f'{NOTE}; [ "$1" = force ] || {how}'
    made = Made(tmp_path, stop_timeout_s=1, **scripts(tmp_path, stop=stop))
    said = uvloop.run(made.it.stop())
    assert made.did() == ["stop ", "force force"]
    assert len(said) == 1
    assert "called for stop, did not stop the application: " in said[0]
    assert made.it.state == "stopped"
    assert made.told == said


@pytest.mark.slow
@pytest.mark.usefixtures("require_root")
def test_what_does_not_stop_is_killed(tmp_path: Path) -> None:
    """Breaks in the field: both calls of the stop script fail, what it should have stopped keeps
    the mount, and the node cannot give its role up.
    """
    daemon = (
        f"setsid sh -c 'echo $$ >{tmp_path}/pid; trap \"\" TERM; while :; do sleep 1000; done' &"
        f"\nuntil [ -s {tmp_path}/pid ]; do :; done"
    )
    keys = scripts(tmp_path, start=daemon, stop=f"{NOTE}; trap '' TERM; sleep 1000; sleep 1000")
    with tmpfs(tmp_path / "mnt") as point:
        made = Made(tmp_path, point, stop_timeout_s=1, force_timeout_s=1, **keys)
        with running("sh", "-c", f"cd {point}; echo ready; read line") as other:

            async def main() -> list[str]:
                await made.it.start()
                return await made.it.stop()

            said = uvloop.run(main())
            assert not alive(other.pid)
        pid = pid_in(tmp_path / "pid")
        assert not alive(pid)
    assert made.did() == ["stop ", "force force"]
    assert f"sh (pid {pid}) was started by a script of this mirror and was killed" in said
    assert f"sh (pid {other.pid}) used {point} and was ended" in said
    assert made.it.state == "stopped"


@pytest.mark.parametrize("units", [[], ["a.service"]])
def test_without_a_stop_script_daemons_are_ended(tmp_path: Path, units: list[str]) -> None:
    """Breaks in the field: whoever names no stop script has an application that never stops."""
    daemon = f"setsid sleep 1000 & echo $! >{tmp_path}/pid"
    start = [str(script(tmp_path / "start", daemon))]
    made = Made(tmp_path, start=start, units=units)

    async def main() -> list[str]:
        await made.it.start()
        assert alive(pid_in(tmp_path / "pid"))
        return await made.it.stop()

    try:
        assert uvloop.run(main()) == []
        assert not alive(pid_in(tmp_path / "pid"))
    finally:
        end(pid_in(tmp_path / "pid"))


def test_a_stop_ends_a_start(tmp_path: Path) -> None:
    """Breaks in the field: a node that is told to leave waits out the start of its application."""
    os.mkfifo(tmp_path / "up")
    start = f"echo $$ >{tmp_path}/pid; echo >{tmp_path}/up; sleep 1000"
    made = Made(tmp_path, **scripts(tmp_path, start=start))

    async def main() -> list[str]:
        starting = asyncio.create_task(made.it.start())
        await asyncio.to_thread((tmp_path / "up").read_text)
        said = await made.it.stop()
        with pytest.raises(RefusedError, match="was told to stop while it started"):
            await starting
        return said

    assert uvloop.run(main()) == []
    assert not alive(pid_in(tmp_path / "pid"))
    assert made.did() == ["stop "]
    assert made.it.state == "stopped"


def test_a_start_that_is_cancelled_ends(tmp_path: Path) -> None:
    """Breaks in the field: the controller gives a start up, and its script goes on."""
    os.mkfifo(tmp_path / "up")
    start = f"echo $$ >{tmp_path}/pid; echo >{tmp_path}/up; sleep 1000"
    made = Made(tmp_path, **scripts(tmp_path, start=start))

    async def main() -> None:
        starting = asyncio.create_task(made.it.start())
        await asyncio.to_thread((tmp_path / "up").read_text)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    uvloop.run(main())
    assert not alive(pid_in(tmp_path / "pid"))
    assert made.it.state == "failed"


def test_a_start_of_a_killed_controller_is_ended(tmp_path: Path) -> None:
    """Breaks in the field: the stop of the next controller is done, and then the start script of
    the one that was killed starts the application.
    """
    os.mkfifo(tmp_path / "up")
    start = f"echo $$ >{tmp_path}/pid; echo >{tmp_path}/up; sleep 1000"
    made = Made(tmp_path, **scripts(tmp_path, start=start))
    code = (
        "import sys; from pathlib import Path; import asyncio\n"
        "from tests.controller.test_application import Made\n"
        "where = Path(sys.argv[1])\n"
        "made = Made(where, start=[str(where / 'start'), 'with', 'words'])\n"
        "asyncio.run(made.it.start())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as controller:
        (tmp_path / "up").read_text()
        controller.kill()
    pid = pid_in(tmp_path / "pid")
    try:
        assert alive(pid)
        said = uvloop.run(made.it.stop())
        assert not alive(pid)
        text = "was started by a start script that a killed controller left and was ended"
        assert any(text in each for each in said)
        assert made.it.state == "stopped"
    finally:
        end(pid)


def test_a_unit_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    """Breaks in the field: a service that hangs in its stop keeps the role on this node."""
    once = "if [ ! -e $D/once ]; then touch $D/once; sleep 1000; fi"
    (tmp_path / "stop-a.service").write_text(once)
    made = Made(tmp_path, units=["a.service"], stop_timeout_s=1)
    said = uvloop.run(made.it.stop())
    assert made.did() == [
        "stop --no-ask-password -- a.service",
        "kill --no-ask-password --signal=SIGKILL -- a.service",
        "stop --no-ask-password -- a.service",
    ]
    assert len(said) == 1
    assert "the unit a.service did not stop the application: no end within 1 s" in said[0]
    assert made.it.state == "stopped"


def test_a_unit_that_stays_is_told(tmp_path: Path) -> None:
    """Breaks in the field: a node says it has stopped its application, and a unit goes on."""
    (tmp_path / "stop-a.service").write_text("exit 1")
    (tmp_path / "active").touch()
    made = Made(tmp_path, units=["a.service"])
    said = uvloop.run(made.it.stop())
    assert said[-1] == "the unit a.service is still active; stop it by hand"
    assert made.it.state == "failed"
    (tmp_path / "stop-a.service").unlink()
    assert uvloop.run(made.it.stop()) == [], "a stop that failed can be tried again"
    assert made.it.state == "stopped"


def test_a_unit_that_does_not_exist_runs_not(tmp_path: Path) -> None:
    """Breaks in the field: a node whose unit was never installed cannot leave a role in order."""
    (tmp_path / "stop-a.service").write_text("exit 5")
    made = Made(tmp_path, units=["a.service"])
    assert uvloop.run(made.it.stop()) == []


def test_no_service_manager_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: as for a missing script."""
    monkeypatch.setattr(application, "SYSTEMCTL", str(tmp_path / "none"))
    made = Made(tmp_path, units=["a.service"])
    with pytest.raises(RefusedError, match=r"the unit a\.service: not started: "):
        uvloop.run(made.it.start())


def test_nothing_configured_is_well(tmp_path: Path) -> None:
    """Breaks in the field: a mirror whose clients are on other machines has no application, and
    cannot become primary for it.
    """
    made = Made(tmp_path)
    uvloop.run(made.it.start())
    assert made.it.facts() == {"state": "running", "start": [], "stop": [], "units": [],
                               "reason": ""}  # fmt: skip
    assert uvloop.run(made.it.stop()) == []
