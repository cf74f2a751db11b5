"""The same with controllers and an etcd: nobody answers anything but they.

Owns one etcd for many runs; each run has a mirror of its own. Clients follow the primary. The two
come together by themselves after everything that happens.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from random import Random
from time import monotonic
from typing import Final

import nbd

from nbdmirror.errors import NbdMirrorError
from tests.campaign.plan import Accident, Plan
from tests.prove.history import History, course
from tests.support.cluster import Cluster, ClusterNode
from tests.support.stores import Etcd

BOUND_S: Final = 120.0
LOOK_S: Final = 0.02
MOMENT_S: Final = 3.0
PAUSE_S: Final = (0.3, 4.0)
COURSE_COUNT: Final = 60


class Mirror:
    """One run."""

    def __init__(self, etcd: Etcd) -> None:
        self.cluster = Cluster(arbiter="etcd", more=f'[etcd]\nendpoints = ["{etcd.url}"]\n')
        self.history = History()
        self._seed = 0

    def run(self, plan: Plan) -> None:
        """All of a plan.

        Raises:
            AssertionError, TimeoutError, RuntimeError, NbdMirrorError: something did not hold.
        """
        self.cluster.start()
        for accident in plan.accidents:
            self.answers(accident.after)
            self.strike(accident, Random(accident.seed))
            if plan.heal:
                self.together()
        self.together()
        self.judge()

    def primary(self) -> ClusterNode | None:
        """Who serves, as it says itself."""
        return next((node for node in self.cluster.both if role(node) in ("PRIM", "ALONE")), None)

    def pump(self) -> None:
        """Clients begin again, wherever somebody serves."""
        if not self.history.wait(LOOK_S):
            return
        node = self.primary()
        if node is not None:
            self._seed += 1
            with contextlib.suppress(nbd.Error):
                uri = f"nbd+unix:///?socket={node.config.export_unix}"
                self.history.start(uri, course(self._seed, COURSE_COUNT))

    def until(self, wanted: Callable[[], bool], bound_s: float) -> bool:
        """Keep clients going until something is so; whether it became so in time."""
        until = monotonic() + bound_s
        while not wanted():
            if monotonic() > until:
                return False
            self.pump()
        return True

    def answers(self, count: int) -> None:
        """Until clients had so many answers, or get none."""
        wanted = self.history.answered + count
        self.until(lambda: self.history.answered >= wanted, MOMENT_S)

    def strike(self, accident: Accident, dice: Random) -> None:
        """One of the catalogue."""
        serving = self.primary()
        node = self.cluster.alpha if serving is None else serving
        if accident.role == "secondary":
            node = self.cluster.beta if node is self.cluster.alpha else self.cluster.alpha
        with contextlib.suppress(NbdMirrorError, ProcessLookupError, TypeError):
            if accident.name == "swap":
                (serving or node).order("swap")
            elif accident.name == "lose node":
                node.lose()
            elif accident.name == "kill controller":
                node.kill()
            else:
                self.hit_engine(node, accident, dice)
        self.until(lambda: False, dice.uniform(0.1, MOMENT_S))
        if node.daemon is None:
            node.up()

    def hit_engine(self, node: ClusterNode, accident: Accident, dice: Random) -> None:
        """End or pause an engine; its controller lives."""
        engine = node.status()["engine"]
        if engine is None:
            return
        pid = int(engine["pid"])
        if accident.name == "kill engine":
            os.kill(pid, signal.SIGKILL)
            return
        os.kill(pid, signal.SIGSTOP)
        self.until(lambda: False, dice.uniform(*PAUSE_S))
        os.kill(pid, signal.SIGCONT)

    def together(self) -> None:
        """PRIM and SECOND, both ready, by themselves."""

        def both() -> bool:
            states = [standing(node) for node in self.cluster.both]
            return sorted(states) == [("PRIM", "ready"), ("SECOND", "ready")]

        assert self.until(both, BOUND_S), [standing(node) for node in self.cluster.both]

    def judge(self) -> None:
        """Stopped in order, both images hold everything that was acknowledged, and are equal."""
        assert self.history.wait(BOUND_S), "clients wait for ever"
        self.until(lambda: bool(self.history.answered), BOUND_S)
        assert self.history.wait(BOUND_S), "clients wait for ever"
        node = self.primary()
        assert node is not None
        node.order("stop", both=True)
        for each in self.cluster.both:
            each.rests("STOP", "stopped")
            losses = self.history.losses(each.data)
            assert not losses, f"{each.name} lost {len(losses)}:\n" + "\n".join(losses[:10])
        self.cluster.assert_equal()
        self.history.settle(self.cluster.alpha.data)


def standing(node: ClusterNode) -> tuple[str, str]:
    """Role and readiness; nothing if its controller does not answer."""
    try:
        status = node.status()
    except (NbdMirrorError, OSError):
        return "", ""
    return str(status["role"]), str(status["readiness"])


def role(node: ClusterNode) -> str:
    """The role of a node that is ready in it."""
    name, readiness = standing(node)
    return name if readiness == "ready" else ""
