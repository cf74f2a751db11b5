"""Calls and commands that may hang: each comes to an end, and the program with it."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvloop

from nbdmirror.controller.bounded import SAID_BYTES_MAX, Done, command, in_thread
from tests.controller.doing import alive, script


def test_a_command_is_heard(tmp_path: Path) -> None:
    """Breaks in the field: the device that losetup chose, or the reason of mount, is lost."""
    does = script(tmp_path / "does", "echo out; echo why >&2; echo not >&2; exit $1")

    async def main() -> list[Done]:
        return [await command([str(does), code], 60) for code in ("0", "32")]

    assert uvloop.run(main()) == [Done(0, "out", "why not"), Done(32, "out", "why not")]


def test_a_command_that_is_missing_is_told(tmp_path: Path) -> None:
    """Breaks in the field: nobody is told which program is not installed."""
    done = uvloop.run(command([str(tmp_path / "none")], 60))
    assert done == Done(None, "", f"{tmp_path}/none: No such file or directory")
    assert not done.ok


def test_a_command_that_hangs_is_killed(tmp_path: Path) -> None:
    """Breaks in the field: a hung umount holds up the stop, and each try leaves one more."""
    does = script(tmp_path / "does", f"echo $$ >{tmp_path}/pid; exec sleep 1000")
    done = uvloop.run(command([str(does)], 1))
    assert (done.code, done.error) == (None, "no end within 1 s")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_cancelled_command_is_killed(tmp_path: Path) -> None:
    """Breaks in the field: what was given up goes on, and mounts when nobody expects it."""
    os.mkfifo(tmp_path / "up")
    does = script(
        tmp_path / "does", f"echo $$ >{tmp_path}/pid; echo >{tmp_path}/up; exec sleep 1000"
    )

    async def main() -> None:
        task = asyncio.create_task(command([str(does)], 60))
        await asyncio.to_thread((tmp_path / "up").read_text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    uvloop.run(main())
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_talkative_command_takes_no_memory(tmp_path: Path) -> None:
    """Breaks in the field: a command that repeats its error for ever fills the controller."""
    done = uvloop.run(command(["/bin/sh", "-c", "yes | head -c 1000000"], 60))
    assert done.ok
    assert len(done.out) <= SAID_BYTES_MAX


def test_a_call_that_hangs_is_left() -> None:
    """Breaks in the field: a look at a dead file system stops the loop, or fills a pool of threads
    until every other look waits, too.
    """
    let_go = threading.Event()

    async def main() -> None:
        calls = [in_thread(let_go.wait, 0.2) for _ in range(40)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in done] == [TimeoutError] * 40
        assert await in_thread(lambda: 7, 60) == 7
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0, 60)

    uvloop.run(main())
    let_go.set()


def test_a_call_that_hangs_does_not_keep_the_program() -> None:
    """Breaks in the field: the controller cannot be stopped while a file system hangs."""
    code = (
        "import asyncio, contextlib, threading\n"
        "from nbdmirror.controller.bounded import in_thread\n"
        "async def main():\n"
        "    with contextlib.suppress(TimeoutError):\n"
        "        await in_thread(threading.Event().wait, 0.1)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=False, env={"PYTHONPATH": root}
    )
    assert done.returncode == 0
