"""What checkers cause on real nodes: each action, its bound, and when nothing may happen.

Most checkers here are commands that fail on one node alone: `bad` of DIRECTORY/NAME holds the
process ids of the controllers for which they fail, and a command is a child of its controller.
"""

import os
import secrets
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.app.parts import App, Stack, application, checker, process_checker, told
from tests.controller.doing import alive
from tests.support.cluster import Cluster, ClusterNode, Status
from tests.support.pair import processes_of

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

PORT = 8099
SHUTDOWN = """
import fcntl, os, sys
from tests.support.powercut import EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH)
"""


def command_checker(name: str, action: str, keys: str = "") -> str:
    """Down for the controllers that `bad` names."""
    test = f'["/bin/sh", "-c", "! grep -qsx $PPID {{root}}/{name}"]'
    return checker(name, f'kind = "command"\ncommand = {test}\naction = "{action}"\n{keys}')


def bad(root: Path, name: str, *nodes: ClusterNode) -> None:
    """From now on this checker fails on these nodes, and on no other one."""
    pids = [str(node.daemon.pid) for node in nodes if node.daemon is not None]
    (root / name).write_text("".join(f"{pid}\n" for pid in pids))


def state_of(status: Status, name: str) -> str:
    """Of one checker."""
    return str(next(each["state"] for each in status["checkers"] if each["name"] == name))


def count_of(status: Status) -> int:
    """Automatic actions so far."""
    return int(status["actions"]["count"])


def test_restart_and_what_is_only_told() -> None:
    """Breaks in the field: an application that crashed stays down; or a check that is only to tell,
    that flaps, or that is down where nothing runs, takes a node away.
    """
    odd = "test ! -e {root}/odd && touch {root}/odd || { rm {root}/odd; exit 1; }"
    flaps = f'kind = "command"\ncommand = ["/bin/sh", "-c", "{odd}"]\naction = "stop"\nfall = 2'
    more = (
        application()
        + process_checker("restart")
        + command_checker("told", "tell")
        + command_checker("everywhere", "restart", 'when = "always"')
        + checker("flaps", flaps).replace("fall = 1\n", "")
    )
    with Cluster(more=more) as c:
        app = App(c)
        c.start()
        engine, first = c.alpha.engine_pid(), app.pid("alpha")
        bad(c.root, "told", c.alpha)
        bad(c.root, "everywhere", c.beta)
        os.kill(first, signal.SIGKILL)
        c.alpha.wait(lambda _: app.pid("alpha") not in (0, first), "started again")
        status = c.alpha.wait(
            lambda s: state_of(s, "told") == "down" and s["service"]["state"] == "up", "told"
        )
        assert count_of(status) == 1
        assert "restart: checker program: 0 processes match" in status["actions"]["last"]
        assert app.did()[-2:] == ["alpha stop", "alpha start"]
        status = c.beta.wait(lambda s: state_of(s, "everywhere") == "down", "down on beta, too")
        assert count_of(status) == 0, "there is nothing to restart on a secondary"

        # The switch: nothing is checked, also after a restart of the controller.
        c.alpha.order("switch", name="checkers", on=False)
        second = app.pid("alpha")
        os.kill(second, signal.SIGKILL)
        for node in (c.beta, c.alpha):
            node.kill()
        for node in (c.beta, c.alpha):
            node.up()
        c.in_sync(c.alpha)
        status = c.alpha.status()
        assert status["switches"]["checkers"] is False
        assert {each["state"] for each in status["checkers"]} == {"off"}
        assert app.pid("alpha") == second
        assert not alive(second)
        c.alpha.order("switch", name="checkers", on=True)
        c.alpha.wait(lambda _: app.pid("alpha") not in (0, second), "started again")
        c.in_sync(c.alpha)
        assert c.alpha.engine_pid() == engine
        assert count_of(c.beta.status()) == 0


def test_swap_by_what_clients_see() -> None:
    """Breaks in the field: a web server that answers with an error stays primary beside a node that
    would answer well; or a node hands over to one that cannot take it.
    """
    host = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(254) + 1}.3"
    more = (
        application("answer", host, str(PORT))
        + checker("web", f'kind = "http"\nurl = "http://{host}:{PORT}/"\naction = "swap"')
        + checker("port", f'kind = "tcp"\naddress = "{host}:{PORT}"\naction = "tell"')
    )
    with Cluster(more=more) as c:
        app = App(c)
        c.start()
        status = c.alpha.wait(
            lambda s: {state_of(s, "web"), state_of(s, "port")} == {"up"}, "both are up"
        )
        assert count_of(status) == 0
        app.how("beta", "start", f"rm -f {c.root}/answer")
        (c.root / "answer.new").write_text("503")
        (c.root / "answer.new").replace(c.root / "answer")
        c.in_sync(c.beta)
        status = c.alpha.status()
        assert "swap: checker web: answers 503" in status["actions"]["last"]
        assert count_of(status) == 1
        c.alpha.order("stop")
        c.beta.is_now("ALONE")
        pid = app.pid("beta")
        os.kill(pid, signal.SIGKILL)
        c.beta.wait(lambda _: app.pid("beta") not in (0, pid), "restarted here")
        c.beta.wait(lambda _: told(c.beta, "alpha cannot take over now; restarting here"), "told")
        c.beta.is_now("ALONE")


def test_wait_before_and_stop() -> None:
    """Breaks in the field: a node without what its application needs serves, or never again; or a
    checker stops a node, and nobody says which one.
    """
    more = (
        application()
        + command_checker("needs", "wait", 'when = "before"')
        + command_checker("network", "wait")
        + command_checker("memory", "stop", 'when = "always"')
    )
    with Cluster(more=more) as c:
        app = App(c)
        c.create()
        for node in c.both:
            node.up()
        bad(c.root, "needs", c.alpha)
        c.alpha.order("start")
        status = c.alpha.wait(lambda s: "checker needs: " in s["reason"], "held back")
        assert status["role"] == "WAIT"
        assert "alpha start" not in app.did()
        bad(c.root, "needs")
        c.alpha.is_now("ALONE")
        c.beta.order("start")
        c.in_sync(c.alpha)

        # A secondary without it does not take over: neither by an order nor by itself.
        bad(c.root, "needs", c.beta)
        c.beta.wait(lambda s: "checker needs" in str(s["explain"]), "it is held back")
        c.alpha.wait(lambda s: s["peer"]["readiness"] != "ready", "the peer knows")
        for node in c.both:
            with pytest.raises(Exception, match=r"swap: .*(cannot take over|checker needs)"):
                node.order("swap")
        bad(c.root, "needs")
        c.in_sync(c.alpha)

        # Wait: it steps back, and comes back when the checker is up.
        bad(c.root, "network", c.alpha)
        c.beta.is_now("PRIM")
        status = c.alpha.wait(lambda s: s["role"] == "SECOND", "stepped back")
        assert any("waiting, because of checker network" in each for each in status["explain"])
        bad(c.root, "network")
        c.in_sync(c.beta)
        c.alpha.wait(lambda _: told(c.alpha, "checker network is up again"), "told")

        # Stop: this node, with the reason; the other one goes on.
        bad(c.root, "memory", c.beta)
        c.alpha.is_now("ALONE")
        status = c.beta.rests("STOP", "stopped")
        assert "stopped because of checker memory: " in status["reason"]

        # Alone: wait means that nobody serves, and that it goes on by itself.
        bad(c.root, "network", c.alpha)
        status = c.alpha.wait(lambda s: s["role"] == "WAIT", "stepped back")
        c.alpha.wait(lambda _: not app.runs("alpha"), "its application is down")
        bad(c.root, "network")
        c.alpha.is_now("ALONE")
        assert app.runs("alpha")


def test_the_bound_on_actions() -> None:
    """Breaks in the field: an application that says it has started and has not is restarted for
    ever, on two nodes in turn, and nobody is called.
    """
    with Cluster(more=application() + process_checker("restart")) as c:
        app = App(c)
        c.start()
        for node in c.both:
            app.how(node.name, "start", "exit 0")
        os.kill(app.pid("alpha"), signal.SIGKILL)
        for node in c.both:
            status = node.rests("STOP", "stopped")
            assert "checker program: 0 processes match" in status["reason"]
            assert "at most 3 are taken without an operator" in status["reason"]
        assert [app.did().count(f"{node} start") for node in ("alpha", "beta")] == [4, 4]
        app.as_usual()
        for node in (c.beta, c.alpha):
            assert count_of(node.order("start")) == 0
        c.in_sync(c.beta)
        assert app.runs("beta")


@pytest.mark.usefixtures("require_root")
def test_a_file_system_that_fails() -> None:
    """Breaks in the field: a file system that an error shut down keeps the application on the node
    that has it.
    """
    keys = 'kind = "filesystem"\npath = "{root}/mnt"\naction = "stopstart"'
    with Stack(more=application("write", "{root}/mnt") + checker("files", keys)) as c:
        app = App(c)
        c.start()
        c.alpha.wait(lambda s: state_of(s, "files") == "up", "checked")
        c.run(c.alpha, sys.executable, "-c", SHUTDOWN, f"{c.root}/mnt")
        c.in_sync(c.beta)
        assert "stopstart: checker files: " in c.alpha.status()["actions"]["last"]
        assert {number for number, _ in app.ledger()} <= c.records(c.beta)
        assert not c.mounted(c.alpha)
        c.beta.order("stop", both=True)
        for node in c.both:
            node.rests("STOP", "stopped")
        c.assert_equal()


@pytest.mark.usefixtures("require_root")
def test_a_controller_that_dies_while_a_check_hangs() -> None:
    """Breaks in the field: the look at a file system whose device is frozen keeps the dead
    controller's lock, no other one can start, and only that one could end the freeze.
    """
    keys = 'kind = "filesystem"\npath = "{root}/mnt"\naction = "tell"'
    with Stack(more=application("write", "{root}/mnt") + checker("files", keys)) as c:
        app = App(c)
        c.start()
        c.beta.lose()
        c.alpha.wait(lambda _: hanging(c.root), "a look waits for the device")
        c.alpha.kill()
        c.alpha.up()
        c.alpha.is_now("ALONE")
        count = len(app.ledger())
        c.alpha.wait(lambda _: len(app.ledger()) > count, "the application goes on")
        c.alpha.order("stop")
        c.alpha.rests("STOP", "stopped")


def hanging(root: Path) -> bool:
    """Whether a look at this file system waits in the kernel."""
    looks = (pid for pid in processes_of(root / "mnt") if "file_system_look" in words_of(pid))
    return any(state_in_kernel(pid) == "D" for pid in looks)


def words_of(pid: int) -> str:
    """The command line of a process, "" if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def state_in_kernel(pid: int) -> str:
    """One letter, "" if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
