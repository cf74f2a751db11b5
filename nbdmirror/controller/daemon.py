"""`nbdmirrord`: the controller's process. Puts the parts together and ends in order.

Owns the command line of the daemon, the signals, and the order of start and end. SIGTERM ends the
controller alone: engine and application go on, and the next controller adopts them; a node is
stopped by `nbdmirror stop`. `--clean` removes what a killed controller left, for service managers.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Final

import uvloop

from nbdmirror import __version__, launcher, memory
from nbdmirror.config import Config, load
from nbdmirror.controller import api
from nbdmirror.controller.conductor import Conductor
from nbdmirror.controller.engine_link import PING_S, Lines
from nbdmirror.controller.probe import Probe
from nbdmirror.controller.service import Service
from nbdmirror.core.superblock import choose
from nbdmirror.errors import NbdMirrorError, RefusedError, UnreachableError
from nbdmirror.events import EventLog
from nbdmirror.metastore import FileMetaStore

CONFIG_DIRECTORY: Final = Path("/etc/nbdmirror")
LAST_WORDS_S: Final = 0.5


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="nbdmirrord", description="The controller of a mirror.")
    parser.add_argument("--version", action="version", version=f"nbdmirrord, version {__version__}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-m", "--mirror", metavar="NAME", help="use /etc/nbdmirror/NAME.toml")
    source.add_argument("-c", "--config", type=Path, metavar="FILE", help="use this file")
    parser.add_argument("--node", metavar="NAME", help="be this node; default: this host's name")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="remove what a controller left that was killed, unless the engine serves; then end",
    )
    return parser.parse_args(given)


def mirror_id_of(config: Config) -> bytes:
    """From the metadata, read without a lock.

    Raises:
        MetadataError: there is none, or it cannot be trusted.
    """
    meta = FileMetaStore.open_to_read(config.metadata_file, locked=False)
    try:
        return choose(*meta.read_slots()).superblock.mirror_id
    finally:
        meta.close()


async def serve(config: Config, events: EventLog) -> None:
    """Until a signal.

    Raises:
        NbdMirrorError: it cannot begin.
    """
    conductor = Conductor(config, events, mirror_id_of(config))
    door = api.Api(conductor)
    probe = Probe(config.probe, config.mirror, conductor.serving) if config.probe else None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, conductor.end)
    try:
        await conductor.start()
        await door.start(config.controller_socket)
        if probe is not None:
            await probe.start()
        events.emit("started", reason=f"controller of {config.mirror}, node {config.me.name}",
                    pid=os.getpid())  # fmt: skip
        await conductor.run()
    finally:
        await door.close()
        if probe is not None:
            await probe.close()
        await conductor.close()


async def clean(config: Config, events: EventLog) -> None:
    """Take down what belongs to a primary, where no engine serves any more."""
    launcher.make_directory(config.me.run_dir, "run_dir")
    # Held to the end of this process: no controller starts meanwhile, and none runs.
    launcher.take_lock(config.me.run_dir / "launcher.lock")
    lines = Lines(config.control_socket)
    try:
        state = await lines.call("state", PING_S)
    except UnreachableError:
        launcher.require_no_engine(config.control_socket)  # one that hangs may serve again
        state = {}
    finally:
        lines.close()
    if state.get("role") == "primary":
        raise RefusedError("the engine of this node serves: nothing is removed under it")
    service = Service(config, lambda said: events.emit("note", reason=said), lambda: None)
    service.leave(served=False)
    await service.finished()
    await service.close()


def run(config: Config, *, only_clean: bool = False) -> int:
    """The whole process; returns its exit code."""
    events = EventLog()
    threading.Thread(target=events.write_for_ever, name="journal", daemon=True).start()
    if not only_clean and config.engine.lock_memory:
        for refusal in memory.lock_memory(flusher=False):
            events.emit("memory", refused=refusal)
    work = clean(config, events) if only_clean else serve(config, events)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    finally:
        events.wait_written(LAST_WORDS_S)
    return 0


def main(given: list[str] | None = None) -> int:
    """The console script."""
    asked = arguments(sys.argv[1:] if given is None else given)
    path = asked.config or CONFIG_DIRECTORY / f"{asked.mirror}.toml"
    try:
        return run(load(path, asked.node), only_clean=asked.clean)
    except NbdMirrorError as error:
        sys.stderr.write(f"nbdmirrord: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
