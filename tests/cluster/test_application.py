"""The application of a mirror on real nodes: its order, its failures, and what outlives whom.

The scripts are tests/cluster/app/app.sh: they note what they are asked for, and do first what a
test told them. Where the mount matters each node has mounts of its own (`Stack`).
"""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.app.parts import App, Stack, application, told
from tests.controller.doing import alive, pid_in, tmpfs
from tests.support.cluster import Cluster, ClusterNode

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

MOUNTED = 'grep -q " $NBDMIRROR_MOUNT ext4 " /proc/mounts || exit 9; echo seen: $NBDMIRROR_ACTION'
KILLED = "(pid {pid}) was started by a script of this mirror and was ended"
STUBBORN = "trap '' TERM; while :; do sleep 1000; done"


def clean(node: ClusterNode) -> "subprocess.CompletedProcess[str]":
    """`nbdmirrord --clean`."""
    words = [*node.enter, *node.command("--clean")]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def stack() -> Iterator[tuple[Stack, App]]:
    """Both nodes, with a file system, and an application that writes on it."""
    with Stack(more=application("write", "{root}/mnt")) as made:
        app = App(made)
        for node in ("alpha", "beta"):
            for action in ("start", "stop"):
                app.how(node, action, MOUNTED)
        # The first stop comes from the search for leftovers: nothing can be mounted then.
        app.how("alpha", "stop", "")
        app.how("beta", "stop", "")
        made.start()
        app.how("alpha", "stop", MOUNTED)
        app.how("beta", "stop", MOUNTED)
        yield made, app


def everything_is_there(c: Stack, app: App, node: ClusterNode) -> None:
    """What the application acknowledged is in its file there."""
    acknowledged = {number for number, _ in app.ledger()}
    assert acknowledged
    assert acknowledged <= c.records(node)


def test_order_of_things(stack: tuple[Stack, App]) -> None:
    """Breaks in the field: an application starts on an empty directory, is cut off from its files
    before it has stopped, or runs on both nodes.
    """
    c, app = stack
    before = app.did()
    c.alpha.order("restart")
    c.alpha.wait(lambda s: s["order"] is None and s["service"]["state"] == "up", "restarted")
    engine = c.alpha.is_now("PRIM")["engine"]
    assert engine["term"] == 1
    c.beta.order("swap")
    c.in_sync(c.beta)
    assert not c.mounted(c.alpha)
    everything_is_there(c, app, c.beta)
    c.beta.order("stop")
    c.alpha.is_now("ALONE")
    c.beta.rests("STOP", "stopped")
    assert not c.mounted(c.beta)
    everything_is_there(c, app, c.alpha)
    assert app.did()[len(before) :] == [
        "alpha stop", "alpha start", "alpha stop", "beta start", "beta stop", "alpha start",
    ]  # fmt: skip
    assert not app.runs("beta")
    log = (c.alpha.config.me.run_dir / "application.log").read_text()
    assert log.count("seen: start\n") == 3
    assert log.count("seen: stop\n") == 2


def test_controllers_that_end_move_nothing(stack: tuple[Stack, App]) -> None:
    """Breaks in the field: an upgrade or a crash of the controller restarts the application."""
    c, app = stack
    engine, pid = c.alpha.engine_pid(), app.pid("alpha")
    app.how("beta", "stop", "")
    # Both: beside a peer with a controller the engine would step back after 10 s.
    for node in (c.beta, c.alpha):
        node.signal(signal.SIGTERM)
        assert node.ended() == 0
    refused = clean(c.alpha)
    assert refused.returncode == 13
    assert "the engine of this node serves: nothing is removed under it" in refused.stderr
    count = len(app.ledger())
    c.alpha.up()
    c.alpha.wait(lambda _: len(app.ledger()) > count, "the application went on writing")
    c.alpha.is_now("PRIM")
    c.alpha.kill()
    for node in c.both:
        node.up()
    c.alpha.wait(lambda s: s["peer"]["readiness"] == "ready", "it hears its peer")
    assert (c.alpha.engine_pid(), app.pid("alpha")) == (engine, pid)
    assert [did for did in app.did() if did.startswith("alpha")] == ["alpha stop", "alpha start"]
    assert alive(pid)
    c.alpha.order("swap")
    c.in_sync(c.beta)
    assert not alive(pid), "what was adopted is stopped like what was started"
    everything_is_there(c, app, c.beta)


def test_what_a_lost_node_left_is_removed(stack: tuple[Stack, App]) -> None:
    """Breaks in the field: the node that comes back has a dead mount and an application on it, and
    hangs at the next takeover, or serves old files.
    """
    c, app = stack
    daemon = f"cd $NBDMIRROR_MOUNT; setsid sleep 1000 & echo $! >{c.root}/other"
    app.how("beta", "start", daemon)
    app.how("alpha", "start", daemon)
    for victim, other in ((c.alpha, c.beta), (c.beta, c.alpha)):
        victim.lose()
        other.is_now("ALONE")
        everything_is_there(c, app, other)
        assert c.mounted(victim)
        app.how(victim.name, "stop", "")
        if victim is c.alpha:
            assert clean(victim).returncode == 0
            assert not c.mounted(victim)
        victim.up()
        c.in_sync(other)
        assert not c.mounted(victim)
        assert not app.runs(victim.name)
    assert app.runs("alpha")


def test_a_start_that_hangs_goes_to_the_other_node() -> None:
    """Breaks in the field: the application is down on a node that cannot start it, beside one that
    can.
    """
    keys = "start_timeout_s = 1"
    with Cluster(more=application(keys=keys)) as c:
        app = App(c)
        app.how("beta", "start", "echo no licence; sleep 1000")
        c.start()
        c.alpha.order("swap")
        c.beta.wait(lambda _: told(c.beta, "service failed"), "the start has failed")
        c.in_sync(c.alpha)
        assert app.did()[-4:] == ["alpha stop", "beta start", "beta stop", "alpha start"]
        status = c.beta.status()
        assert "no end within 1 s; it said: no licence" in status["actions"]["last"]
        assert app.runs("alpha")


def test_a_start_that_fails_everywhere_ends() -> None:
    """Breaks in the field: two nodes hand an application that starts on neither to each other for
    ever.
    """
    with Cluster(more=application()) as c:
        app = App(c)
        c.start()
        app.how("alpha", "start", "echo no licence; exit 4")
        app.how("beta", "start", "echo no licence; exit 4")
        c.alpha.order("restart")
        for node in c.both:
            status = node.rests("STOP", "stopped")
            assert "no licence" in status["reason"]
            assert "this would be action 4 within 24 hours" in status["reason"]
            assert status["remedy"] == "`nbdmirror start`"
        assert app.did().count("alpha start") <= 6
        assert app.did().count("beta start") <= 6
        last = c.alpha if app.did()[-1].startswith("alpha") else c.beta
        app.as_usual()
        for node in c.both:
            assert node.order("start")["actions"]["count"] == 0
        c.in_sync(last)
        assert app.runs(last.name)


def test_a_start_in_the_middle_of_which_the_controller_dies() -> None:
    """Breaks in the field: the start script of a controller that was killed goes on, and starts the
    application once more, or on a node that has stepped back by then.
    """
    with Cluster(more=application()) as c:
        app = App(c)
        app.how("alpha", "start", f"echo $$ >{c.root}/starting; sleep 1000")
        c.create()
        c.alpha.up().order("start")
        c.alpha.wait(lambda _: (c.root / "starting").exists(), "the start script runs")
        c.alpha.kill()
        app.as_usual()
        c.alpha.up()
        c.alpha.is_now("ALONE")
        assert not alive(pid_in(c.root / "starting"))
        assert app.did()[1:] == ["alpha start", "alpha stop", "alpha start"]
        assert app.runs("alpha")


def test_a_stop_that_hangs_or_fails_ends() -> None:
    """Breaks in the field: an application that does not stop keeps the role on a node that an
    operator wants to work on.
    """
    keys = "stop_timeout_s = 1\nforce_timeout_s = 1"
    with Cluster(more=application(keys=keys)) as c:
        app = App(c)
        c.start()
        app.how("alpha", "stop", STUBBORN)
        pid = app.pid("alpha")
        c.alpha.order("swap")
        c.in_sync(c.beta)
        assert app.did()[-3:] == ["alpha stop", "alpha force", "beta start"]
        assert not alive(pid)
        app.how("beta", "stop", "exit 1")
        app.how("beta", "force", STUBBORN)
        pid = app.pid("beta")
        c.beta.order("stop")
        c.alpha.is_now("ALONE", "PRIM")
        c.beta.rests("STOP", "stopped")
        assert app.did()[-3:] == ["beta stop", "beta force", "alpha start"]
        assert not alive(pid)
        c.beta.wait(lambda _: told(c.beta, KILLED.format(pid=pid)), "it is told who was killed")
        assert told(c.beta, "the stop script, called for stop, did not stop the application: exit")


@contextmanager
def full(*places: Path) -> Iterator[None]:
    """File systems without room, there."""
    with ExitStack() as stack:
        for place in places:
            point = stack.enter_context(tmpfs(place, "1m"))
            with suppress(OSError), (point / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        yield


def test_a_full_disk_under_the_logs() -> None:
    """Breaks in the field: a full /run or /var takes the standby away on the day it is needed."""
    with Stack(more=application("write", "{root}/mnt")) as c:
        app = App(c)
        places = [c.root / node.name / "run" for node in c.both]
        with full(*places):
            c.start()
            c.alpha.order("swap")
            c.in_sync(c.beta)
            c.beta.kill_engine()
            c.alpha.is_now("ALONE", "PRIM")
            c.in_sync(c.alpha)
            everything_is_there(c, app, c.alpha)
            assert (
                not list(places[0].glob("application.log*"))
                or not (places[0] / "application.log").read_text()
            )
            c.alpha.kill()
            c.alpha.up()
            c.in_sync(c.alpha)
            c.alpha.order("stop")
            c.beta.is_now("ALONE")
            everything_is_there(c, app, c.beta)
            for node in c.both:
                node.destroy()
