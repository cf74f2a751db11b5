"""What operators order, on real nodes: done in full, or refused with the reason and the remedy."""

import contextlib
import json
import re
import time
from collections.abc import Iterator

import pytest

from nbdmirror.errors import RefusedError
from tests.cluster.app.parts import App, application, checker, told
from tests.support.cluster import Cluster, ClusterNode

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """An order that is refused in a text that holds all of these words."""
    with pytest.raises(RefusedError) as error:
        yield
    for word in words:
        assert word in str(error.value), str(error.value)


def write(node: ClusterNode, byte: bytes, count_mib: int = 1) -> None:
    """So many MiB of one byte, from the beginning."""
    client = node.connect()
    for number in range(count_mib):
        client.pwrite(byte * (1 << 20), number << 20)
    client.flush()
    client.shutdown()


def test_orders_and_their_refusals() -> None:
    """Breaks in the field: an order that cannot be carried out is taken and forgotten, or its
    refusal does not say what to do instead.
    """
    with Cluster() as c:
        c.create()
        for node in c.both:
            node.up()
        with refused("swap", "its engine is not running"):
            c.alpha.order("swap")
        with refused("restart", "does not run here"):
            c.alpha.order("restart")
        with refused("second --force", "`nbdmirror start` first"):
            c.alpha.order("second", force=True)
        c.alpha.order("start")
        c.alpha.is_now("ALONE")
        with refused("beta cannot take over: it is STOP not-ready", "until it is SECOND ready"):
            c.alpha.order("swap")
        c.beta.order("start")
        c.in_sync(c.alpha)
        with refused("alpha serves", "`nbdmirror swap`"):
            c.beta.order("prim")
        with refused("primary already"):
            c.alpha.order("prim")
        with refused("this node serves", "`nbdmirror stop`"):
            c.alpha.order("second", force=True)
        with refused("restart", "see `nbdmirror status`"):
            c.beta.order("restart")
        with refused("type it on the primary, alpha"):
            c.beta.order("stop", both=True)
        with refused("unknown command 'dance'"):
            c.alpha.order("dance")
        with refused("name is one of checkers, failover, boot"):
            c.alpha.order("switch", name="lights", on=True)


def test_roles_on_order() -> None:
    """Breaks in the field: an exchange of roles, or the stop of both nodes, loses writes, or ends
    with two copies that differ.
    """
    with Cluster() as c:
        c.start()
        write(c.alpha, b"o")
        assert c.beta.order("swap")["done"] == "alpha is asked to hand over"
        c.in_sync(c.beta)
        assert c.beta.order("second")["done"] == "alpha takes over"
        c.in_sync(c.alpha)
        c.beta.order("second")
        c.alpha.order("resync")
        c.alpha.wait(lambda _: resyncs(c.alpha) >= 1, "everything is compared")
        c.in_sync(c.alpha)

        assert c.alpha.order("stop", both=True)["done"] == "both nodes stop"
        for node, reason in ((c.beta, "together with alpha"), (c.alpha, "by an operator")):
            assert reason in node.rests("STOP", "stopped")["reason"]
        c.assert_equal()
        for node in c.both:
            node.order("start")
        c.alpha.wait(lambda s: s["role"] in ("PRIM", "SECOND"), "they meet again")
        c.in_sync(c.alpha)


def test_the_stop_of_both_outlives_a_controller() -> None:
    """Breaks in the field: the controller of the primary is restarted while the application takes
    its time to stop; the other node then takes over what was to be stopped.
    """
    with Cluster(more=application()) as c:
        app = App(c)
        c.start()
        app.how("alpha", "stop", f"until [ -e {c.root}/go ]; do sleep 0.02; done")
        c.alpha.order("stop", both=True)
        c.alpha.wait(lambda s: s["row"] == "stopping", "the application is being stopped")
        c.alpha.kill()
        (c.root / "go").touch()
        c.alpha.up()
        for node, reason in ((c.beta, "together with alpha"), (c.alpha, "by an operator")):
            assert reason in node.rests("STOP", "stopped")["reason"]
        c.assert_equal()


def test_an_old_stop_of_both_does_not_stop_who_serves_now() -> None:
    """Breaks in the field: the controller that was to stop both nodes comes back an hour later,
    when the other node has taken over long since; and the application is down on both.
    """
    with Cluster(more=application()) as c:
        app = App(c)
        c.start()
        app.how("alpha", "stop", f"until [ -e {c.root}/go ]; do sleep 0.02; done")
        c.alpha.order("stop", both=True)
        c.alpha.wait(lambda s: s["row"] == "stopping", "the application is being stopped")
        c.alpha.lose()
        (c.root / "go").touch()
        c.beta.is_now("ALONE")
        c.alpha.up()
        c.alpha.rests("STOP", "stopped")
        assert c.beta.is_now("ALONE")["wanted"]
        assert app.runs("beta")


def resyncs(node: ClusterNode) -> int:
    """How many have ended, as the node's engine told its controller."""
    return sum(each.get("what") == "resync-finished" for each in node.told("engine"))


def test_two_operators_at_once() -> None:
    """Breaks in the field: two orders that do not go together leave a node between two roles."""
    with Cluster(more=application()) as c:
        app = App(c)
        c.start()
        for name in ("alpha", "beta"):
            app.how(name, "stop", f"until [ -e {c.root}/go ]; do sleep 0.02; done")
        c.alpha.order("swap")
        c.alpha.wait(lambda s: s["order"] == "swap", "under way")
        with refused("restart: swap is under way", "wait for it"):
            c.alpha.order("restart")
        # The other operator, on the other node, wants the same.
        assert c.beta.order("swap")["done"] == "alpha is asked to hand over"
        assert c.alpha.order("second")["done"] == "beta takes over"
        (c.root / "go").touch()
        c.in_sync(c.beta)
        assert app.runs("beta")
        assert not app.runs("alpha")

        # The node that is to take over is stopped in the middle: the other one goes on.
        (c.root / "go").unlink()
        c.beta.order("swap")
        c.alpha.order("stop")
        (c.root / "go").touch()
        c.beta.is_now("ALONE")
        c.alpha.rests("STOP", "stopped")
        assert app.runs("beta")
        assert not app.runs("alpha")


def test_force_and_what_it_costs() -> None:
    """Breaks in the field: the only copy that is left cannot be made to serve; or two lines of
    writes are mixed when the other one returns.
    """
    with Cluster() as c:
        c.start()
        c.beta.order("stop")
        c.alpha.is_now("ALONE")
        write(c.alpha, b"n")
        c.alpha.lose()
        c.beta.order("start")
        status = c.beta.wait(lambda s: s["row"] == "waits", "the stale copy waits")
        assert status["role"] == "WAIT"
        assert "`nbdmirror prim --force`" in status["remedy"]
        with refused("prim: ", "its copy is known to be behind"):
            c.beta.order("prim")
        assert c.beta.status()["role"] == "WAIT"
        c.beta.order("prim", force=True)
        c.beta.is_now("ALONE")
        write(c.beta, b"f")

        # The other line of writes returns: nothing is mixed, and both say what to do.
        c.alpha.up()
        split = [
            node.wait(lambda s: bool(s["engine"]) and "split" in s["engine"]["flags"], "split")
            for node in c.both
        ]
        assert all(any("Split brain" in each for each in s["explain"]) for s in split)
        waits, serves = (c.alpha, c.beta)
        waits.wait(lambda s: s["role"] == "WAIT", "one of them waits")
        serves.is_now("ALONE")
        assert "`nbdmirror second --force` here" in waits.status()["remedy"]
        waits.order("second", force=True)
        c.in_sync(serves)
        assert serves.connect().pread(4096, 0) == b"f" * 4096
        serves.order("stop", both=True)
        waits.rests("STOP", "stopped")
        serves.rests("STOP", "stopped")
        c.assert_equal()


def test_orders_during_a_resync() -> None:
    """Breaks in the field: half a copy is made primary, or a resync that was broken off does not
    go on.
    """
    with Cluster(more='[engine]\nresync_rate = "4MiB"\n') as c:
        c.start()
        c.beta.order("stop")
        c.alpha.is_now("ALONE")
        write(c.alpha, b"r", 12)
        c.beta.order("start")
        c.beta.wait(lambda s: s["role"] == "SECOND" and s["readiness"] == "transient", "resync")
        with refused("beta cannot take over: it is SECOND transient"):
            c.alpha.order("swap")
        with refused("swap: this node cannot serve now: "):
            c.beta.order("swap")
        with refused("alpha serves"):
            c.beta.order("prim")
        c.beta.order("stop")
        c.beta.rests("STOP", "stopped")
        c.alpha.is_now("ALONE")
        c.beta.order("start")
        c.beta.wait(lambda s: s["role"] == "SECOND" and s["readiness"] == "transient", "resync")
        c.beta.order("second", force=True)
        c.alpha.order("restart")
        c.in_sync(c.alpha)
        c.alpha.order("stop", both=True)
        for node in c.both:
            node.rests("STOP", "stopped")
        c.assert_equal()


def test_switches_stay() -> None:
    """Breaks in the field: a switch that an operator set for maintenance is forgotten by a restart,
    and the node takes over in the middle of it.
    """
    with Cluster() as c:
        c.start()
        c.beta.order("switch", name="failover", on=False)
        c.beta.kill()
        c.beta.up()
        c.in_sync(c.alpha)
        c.alpha.lose()
        status = c.beta.wait(lambda s: s["row"] == "waits", "does not take over")
        assert status["role"] == "WAIT"
        assert status["switches"]["failover"] is False
        assert "failover is off: `nbdmirror failover on`, or `nbdmirror prim`" in status["reason"]
        c.beta.order("switch", name="failover", on=True)
        c.beta.is_now("ALONE")

        # The server was booted meanwhile: with boot off the node stays down, with boot on it runs.
        for on, row, role in ((False, "stopped", "STOP"), (True, "second", "SECOND")):
            c.alpha.up()
            if not on:
                c.in_sync(c.beta)
            else:
                c.alpha.order("start")
                c.in_sync(c.beta)
            c.alpha.order("switch", name="boot", on=on)
            c.alpha.lose()
            booted(c.alpha)
            c.alpha.up()
            status = c.alpha.rests(role, row)
            if not on:
                assert status["reason"] == "boot is switched off"
                c.alpha.kill()
        c.in_sync(c.beta)


def booted(node: ClusterNode) -> None:
    """As if the server had been booted since the controller ended."""
    path = node.config.switches_file
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "boot_id": "another"}))


def test_reload() -> None:
    """Breaks in the field: a changed checker or script needs a restart of the node; or a change
    that cannot be made is made by half.
    """
    with Cluster(more=application()) as c:
        app = App(c)
        c.start()
        texts = {node.name: node.config_path.read_text() for node in c.both}

        def rewritten(old: str, new: str, more: str = "") -> None:
            for node in c.both:
                text = texts[node.name]
                assert old in text
                node.config_path.write_text(text.replace(old, new, 1) + more)

        gone = f'kind = "command"\ncommand = ["/bin/test", "!", "-e", "{c.root}/no"]\n'
        extra = checker("file", gone)
        rewritten('"idle"]', '"idle"]\nforce_timeout_s = 7', extra)
        plan = c.alpha.order("reload", dry_run=True)
        hows = {each["key"]: each["how"] for each in plan["plan"]}
        assert hows == {"application.force_timeout_s": "online", "checkers": "online"}
        assert not c.alpha.status()["checkers"]
        for node in c.both:
            node.order("reload", dry_run=False)
        c.alpha.wait(lambda s: [e["state"] for e in s["checkers"]] == ["up"], "it is checked")
        pid = app.pid("alpha")
        (c.root / "no").touch()
        c.alpha.wait(lambda _: told(c.alpha, "restart, because of checker file"), "acts")
        (c.root / "no").unlink()
        c.alpha.wait(lambda _: app.pid("alpha") not in (0, pid), "restarted")
        c.in_sync(c.alpha)
        assert not c.alpha.status()["peer"]["config_differs"]

        # What was fixed at creation, together with what is not: nothing of it.
        rewritten('arbiter = "none"', 'arbiter = "ping"', '[ping]\naddresses = ["127.0.0.1"]\n')
        with refused("arbiter", "nothing was applied"):
            c.alpha.order("reload", dry_run=False)
        assert c.alpha.status()["checkers"], "the old configuration is in force"
        rewritten('mirror = "demo"', 'mirror = "demo"\npreferred = "nobody"')
        with pytest.raises(Exception, match=re.escape('preferred = "nobody": no such node')):
            c.alpha.order("reload", dry_run=False)

        # Preferred takes effect at once: the role goes there by itself, and stays.
        rewritten('mirror = "demo"', 'mirror = "demo"\npreferred = "beta"', extra)
        for node in c.both:
            node.order("reload", dry_run=False)
        c.in_sync(c.beta)
        assert any("beta is the preferred primary" in each["reason"] for each in decisions(c.alpha))
        assert app.runs("beta")


@pytest.mark.parametrize("how", ["engine", "node"])
def test_the_last_primary_is_preferred(how: str) -> None:
    """Breaks in the field: the server that is meant to serve does not get its role back after a
    failure; or it takes it back after an operator gave it away.
    """
    with Cluster(top='preferred = "last"') as c:
        c.start()
        began = time.monotonic()
        if how == "engine":
            c.alpha.kill_engine()
        else:
            c.alpha.lose()
        c.beta.is_now("ALONE", "PRIM")
        if how == "node":
            c.alpha.up()
        c.alpha.wait(lambda s: s["role"] == "SECOND", "it returns")
        c.in_sync(c.alpha)
        assert time.monotonic() - began > 5, "not at once: a node that fails again and again"
        c.alpha.wait(lambda _: len(promoted(c.alpha)) == 2, "told")
        c.alpha.order("swap")
        c.in_sync(c.beta)
        c.beta.wait(lambda _: len(promoted(c.beta)) == 2, "told")
        assert len(promoted(c.alpha)) == 2


def decisions(node: ClusterNode) -> list[dict[str, str]]:
    """Everything that it decided, as far as it was told."""
    return list(node.told("decision"))


def promoted(node: ClusterNode) -> list[str]:
    """Why it became primary, each time."""
    return [each["reason"] for each in decisions(node) if each["step"] == "promote"]
