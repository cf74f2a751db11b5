"""When checkers run, and what becomes of their results; against a real page whose answers wait."""

import asyncio
import os
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import pytest
import uvloop
from aiohttp import web

from nbdmirror.config_cluster import CheckerSection
from nbdmirror.controller.checkers import Checkers
from nbdmirror.core.cluster.checking import CheckerFacts
from tests.support.frozen import disk, frozen

BOUND_S = 60.0
RunLoop = Callable[[Coroutine[Any, Any, None]], None]
Result = TypeVar("Result")


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run_loop(request: pytest.FixtureRequest) -> RunLoop:
    """Both loops."""
    made: RunLoop = request.param
    return made


async def soon(awaited: Awaitable[Result]) -> Result:
    """Wait with a bound."""
    async with asyncio.timeout(BOUND_S):
        return await awaited


def until_it_hangs(pid: int) -> None:
    """Until a process waits in the kernel in a way that no signal ends."""
    end_s = monotonic() + BOUND_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "D":
        assert monotonic() < end_s


def wait_for_end(pid: int) -> None:
    """Until a process that is no child of ours has ended."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [], BOUND_S)
        os.close(descriptor)


class Asked:
    """One check that waits for its answer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_s = asyncio.get_running_loop().time()
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()


class Page:
    """A web server that asks the test for each answer. `most` checks of one name were at once."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()
        self.most = 0
        self._now: list[str] = []

    async def handle(self, request: web.Request) -> web.Response:
        """One check; it is gone when its client is."""
        one = Asked(request.path.strip("/"))
        self._now.append(one.name)
        self.most = max(self.most, self._now.count(one.name))
        self.asked.put_nowait(one)
        try:
            return web.Response(status=await one.answer)
        finally:
            self._now.remove(one.name)
            one.gone.set()

    async def next(self) -> Asked:
        """The next check."""
        return await soon(self.asked.get())

    async def answer(self, *statuses: int) -> None:
        """The next checks get these, one after the other."""
        for each in statuses:
            (await self.next()).answer.set_result(each)


class Scene:
    """Checkers, the page that they ask, and the changes that they told."""

    def __init__(self, page: Page, sections: list[CheckerSection]) -> None:
        self.page = page
        self.changes: asyncio.Queue[CheckerFacts] = asyncio.Queue()
        self.checkers = Checkers(sections, self.changes.put_nowait)

    async def change(self) -> CheckerFacts:
        """The next change that was told."""
        return await soon(self.changes.get())

    def role(self, role: str = "") -> None:
        """What the controller says several times a second."""
        self.checkers.active(
            before=role == "before", primary=role == "primary", secondary=role == "secondary"
        )

    def states(self) -> dict[str, str]:
        """The state of each checker."""
        return {each.name: each.state for each in self.checkers.facts()}


def configured(port: int, name: str, keys: dict[str, Any]) -> CheckerSection:
    """A checker of a page of this name, unless the keys say otherwise."""
    given = {"kind": "http", "interval_ms": 100, "timeout_ms": 600_000, **keys}
    if given["kind"] == "http":
        given["url"] = f"http://127.0.0.1:{port}/{name}"
    return CheckerSection.model_validate({"name": name, **given})


@asynccontextmanager
async def scene(**checkers: dict[str, Any]) -> AsyncIterator[Scene]:
    """Checkers by their names, of pages unless they say otherwise."""
    page = Page()
    application = web.Application()
    application.router.add_get("/{name}", page.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made = Scene(page, [configured(runner.addresses[0][1], *each) for each in checkers.items()])
    try:
        yield made
    finally:
        await soon(made.checkers.close())
        await runner.cleanup()


def test_a_checker_rises_and_falls(run_loop: RunLoop) -> None:
    """Breaks in the field: a dead application is not seen, or one error page restarts it."""

    async def main() -> None:
        async with scene(web={"fall": 2, "action": "swap"}) as s:
            assert s.states() == {"web": "off"}
            s.role("primary")
            assert s.states() == {"web": "unknown"}
            await s.page.answer(503, 200)
            up = await s.change()
            assert (up.state, up.reason, up.checks_count) == ("up", "", 2)
            await s.page.answer(503, 200, 503, 503)
            down = await s.change()
            assert down == s.checkers.facts()[0]
            assert (down.name, down.kind, down.action) == ("web", "http", "swap")
            assert (down.when, down.state) == ("primary", "down")
            assert down.reason == "answers 503, 200 expected"
            assert down.checks_count == 6
            assert down.since_ms > up.since_ms
            await s.page.answer(200)
            assert (await s.change()).state == "up"
            assert s.changes.empty()

    run_loop(main())


def test_the_role_says_which_run(run_loop: RunLoop) -> None:
    """Breaks in the field: a secondary without application is judged by the primary's checkers."""

    async def main() -> None:
        names = ("before", "primary", "secondary", "always")
        async with scene(**{each: {"when": each, "action": "tell"} for each in names}) as s:
            running = {}
            for role in ("", "before", "primary", "secondary"):
                s.role(role)
                running[role] = {name for name, state in s.states().items() if state != "off"}
                asked = {(await s.page.next()).name}
                assert asked == ({role} if role else {"always"})
            assert running == {
                "": {"always"},
                "before": {"always", "before"},
                "primary": {"always", "primary"},
                "secondary": {"always", "secondary"},
            }

    run_loop(main())


def test_to_say_the_same_again_changes_nothing(run_loop: RunLoop) -> None:
    """Breaks in the field: a checker begins anew several times a second and never decides."""

    async def main() -> None:
        async with scene(web={}, other={}) as s:
            s.role("primary")
            await s.page.answer(200, 200)
            assert {(await s.change()).name for _ in range(2)} == {"web", "other"}
            held = await s.page.next()
            for _ in range(20):
                s.role("primary")
                await asyncio.sleep(0)
            assert set(s.states().values()) == {"up"}
            while (one := await s.page.next()).name == held.name:
                pytest.fail("a second check of one checker")
            one.answer.set_result(200)
            held.answer.set_result(200)
            assert not held.gone.is_set()

    run_loop(main())


def test_one_that_ends_is_off_and_begins_unknown(run_loop: RunLoop) -> None:
    """Breaks in the field: a new primary is judged by what was found in its last term."""

    async def main() -> None:
        async with scene(web={"fall": 1}) as s:
            s.role("primary")
            await s.page.answer(503)
            assert (await s.change()).state == "down"
            held = await s.page.next()
            s.role("secondary")
            (off,) = s.checkers.facts()
            assert (off.state, off.reason, off.checks_count) == ("off", "", 0)
            await soon(held.gone.wait())
            s.role("primary")
            assert s.states() == {"web": "unknown"}
            await s.page.answer(200)
            assert (await s.change()).state == "up"

    run_loop(main())


def test_never_two_checks_of_one_checker(run_loop: RunLoop) -> None:
    """Breaks in the field: checks of a slow application pile up and make it slower."""

    async def main() -> None:
        async with scene(slow={}, quick={}) as s:
            s.role("primary")
            first = {one.name: one for one in [await s.page.next(), await s.page.next()]}
            first["quick"].answer.set_result(200)
            await s.page.answer(*[200] * 5)  # five intervals: all of them of the quick one
            for _ in range(5):  # begun anew, and that while the old one still ends
                s.role("secondary")
                s.role("primary")
                await asyncio.sleep(0)
            await soon(first["slow"].gone.wait())
            assert {(await s.page.next()).name for _ in range(2)} == {"slow", "quick"}
            assert s.page.most == 1

    run_loop(main())


@pytest.mark.usefixtures("require_root")
@pytest.mark.slow
def test_one_that_hangs_is_not_started_again(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: a change of the role starts a check beside one that hangs."""
    started, told = tmp_path / "started", tmp_path / "told"
    os.mkfifo(told)

    async def main(mount: Path) -> None:
        text = f"echo $$ >> {started}; echo $$ > {told}; echo x > {mount}/x"
        command = ["/bin/sh", "-c", text]
        async with scene(script={"kind": "command", "command": command, "fall": 1}) as s:
            s.role("primary")
            pid = int(await soon(asyncio.to_thread(told.read_text)))
            await asyncio.to_thread(until_it_hangs, pid)
            s.role("secondary")
            s.role("primary")
            assert "cannot be killed" in (await s.change()).reason

    with disk(tmp_path / "disk") as mount:
        with frozen(mount):
            run_loop(main(mount))
        for pid in started.read_text().split():
            wait_for_end(int(pid))
    assert len(started.read_text().split()) == 1


def test_one_that_still_ends_is_waited_for(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: after a change of the role the check that ends fails the next one."""
    told = tmp_path / "told"
    os.mkfifo(told)
    text = f"[ -e {tmp_path}/again ] && exit 0; echo > {tmp_path}/again; echo > {told}; sleep 1000"

    async def main() -> None:
        command = ["/bin/sh", "-c", text]
        async with scene(script={"kind": "command", "command": command, "fall": 1}) as s:
            s.role("primary")
            await soon(asyncio.to_thread(told.read_bytes))
            s.role("secondary")
            s.role("primary")
            assert (await s.change()).state == "up"

    run_loop(main())


def test_a_reset_forgets_and_checks_at_once(run_loop: RunLoop) -> None:
    """Breaks in the field: what was found before the restart leads to the next restart."""

    async def main() -> None:
        async with scene(web={"fall": 1, "interval_ms": 3_600_000}) as s:
            s.role("primary")
            await s.page.answer(503)
            assert (await s.change()).state == "down"
            s.checkers.reset("web")
            (facts,) = s.checkers.facts()
            assert (facts.state, facts.reason, facts.checks_count) == ("unknown", "", 0)
            held = await s.page.next()
            s.checkers.reset("web")
            again = await s.page.next()
            assert held.gone.is_set()
            again.answer.set_result(200)
            assert (await s.change()).checks_count == 1
            s.role()
            s.checkers.reset("web")
            assert s.states() == {"web": "off"}

    run_loop(main())


def test_nothing_runs_during_maintenance(run_loop: RunLoop) -> None:
    """Breaks in the field: an update of the application ends in a failover."""

    async def main() -> None:
        async with scene(web={}, disk={"when": "always"}) as s:
            s.role("primary")
            held = [await s.page.next(), await s.page.next()]
            s.checkers.pause(True)
            s.role("primary")
            assert set(s.states().values()) == {"off"}
            for one in held:
                await soon(one.gone.wait())
            assert s.page.asked.empty()
            s.checkers.pause(False)
            assert set(s.states().values()) == {"unknown"}
            assert {(await s.page.next()).name for _ in range(2)} == {"web", "disk"}

    run_loop(main())


@pytest.mark.slow
def test_the_interval_is_from_start_to_start(run_loop: RunLoop) -> None:
    """Breaks in the field: slow answers make the checker blind for longer than the formula says."""

    async def main() -> None:
        async with scene(web={"interval_ms": 2000}) as s:
            s.role("primary")
            first = await s.page.next()
            passed = asyncio.Event()
            asyncio.get_running_loop().call_later(2.1, passed.set)
            await soon(passed.wait())
            first.answer.set_result(200)
            answered_s = asyncio.get_running_loop().time()
            second = await s.page.next()
            assert second.at_s - answered_s < 1.5
            second.answer.set_result(200)
            third = await s.page.next()
            assert third.at_s - second.at_s >= 1.9

    run_loop(main())


def test_a_mistake_of_the_listener_does_not_end_the_watch(run_loop: RunLoop) -> None:
    """Breaks in the field: after one error in the controller nothing is watched any more."""

    async def main() -> None:
        async with scene(web={"fall": 1}) as s:
            told: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))

            def broken(_: CheckerFacts) -> None:
                raise ValueError("a mistake")

            s.checkers = Checkers([each._section for each in s.checkers._checkers.values()], broken)
            s.role("primary")
            await s.page.answer(200, 503, 200)
            await s.page.next()
            assert [str(each["exception"]) for each in told] == ["a mistake"] * 3

    run_loop(main())


def test_close_ends_everything(run_loop: RunLoop, tmp_path: Path) -> None:
    """Breaks in the field: a controller that was stopped leaves processes, or does not stop."""
    told = tmp_path / "pid"

    async def main() -> None:
        command = ["/bin/sh", "-c", f"echo $$ > {told}.new; mv {told}.new {told}; sleep 1000"]
        async with scene(script={"kind": "command", "command": command}, web={}) as s:
            idle = asyncio.all_tasks()
            s.role("primary")
            (await s.page.next()).answer.set_result(200)
            while not told.exists():
                await s.page.answer(200)
            await soon(s.checkers.close())
            assert set(s.states().values()) == {"off"}
            assert not {each for each in asyncio.all_tasks() - idle if "checker" in each.get_name()}
            s.role("primary")
            s.checkers.pause(False)
            assert set(s.states().values()) == {"off"}

    run_loop(main())
    assert not Path(f"/proc/{told.read_text().strip()}").exists()
