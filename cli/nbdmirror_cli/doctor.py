"""`nbdmirror doctor`: what this machine lacks for a mirror, and how to get it.

Owns: the checks of the machine, the run of all checks side by side, each with a bound, and the
exit code. Must never change anything, need a mirror, or end with a traceback: what cannot be looked
at is a warning. The checks of one mirror are in `doctor_mirror`.

Exit code: 0 if nothing failed (warnings or not), 1 if something did. `ok`, `warn` and `fail`: it
is there; a mirror runs without it, with the loss that is named; no mirror runs.
"""

import concurrent.futures
import errno
import importlib
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import click
from rich.table import Table
from rich.text import Text

from nbdmirror.errors import ConfigError, NbdMirrorError
from nbdmirror.limits import PROBE_PORT
from nbdmirror_cli.options import Source, Wanted, json_option, late_config_options, print_json
from nbdmirror_cli.status_view import Screen
from nbdmirror_cli.view import printable

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"
FAILED: Final = 1  # the exit code
CHECK_S: Final = 20.0
COMMAND_S: Final = 10.0
ECHO_S: Final = 2.0
ECHOES_COUNT: Final = 2
MOUNT_IDS_SINCE: Final = (6, 8)
PORTS_TRIED_COUNT: Final = 64
PACKAGES: Final = (
    *("aiohttp", "bitarray", "blake3", "click", "construct", "crc32c", "crcmod", "icmplib"),
    *("psutil", "pydantic", "pyroute2", "rich", "uvloop"),
)
# They take microseconds to be read, jump, or stop with a virtual machine.
POOR_CLOCKS: Final = frozenset({"hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit"})
CAP_IPC_LOCK: Final = 14
CAP_SYS_RESOURCE: Final = 24
SYSTEMD: Final = Path("/run/systemd/system")
CLOCK: Final = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
_STYLES: Final = {OK: "green", WARN: "yellow", FAIL: "bold red"}


class Finding(NamedTuple):
    """What one check found: its name, ok, warn or fail, what it saw, and what to do."""

    name: str
    state: str
    what: str
    remedy: str = ""


Check = Callable[[], Finding]


@click.command("doctor")
@late_config_options
@json_option
def doctor(wanted: Wanted, *, as_json: bool) -> int:
    """Say what this machine lacks for a mirror, and how to get it; changes nothing.

    Needs no mirror. Where one is named, or only one is configured, its configuration, key,
    directories, addresses and programs are looked at, too.

    Exit code 0 if nothing failed, 1 if something did; warnings alone are 0.
    """
    checks = list(MACHINE)
    source = _source(wanted)
    if source is not None:
        # Only who has a mirror needs what reads one.
        mirror = importlib.import_module("nbdmirror_cli.doctor_mirror")
        checks += mirror.checks(source)
    else:
        checks.append(partial(probe_port, "0.0.0.0", PROBE_PORT))  # noqa: S104 - the default
    findings = run_all(checks)
    if as_json:
        print_json(as_facts(findings))
    else:
        print_findings(findings)
    return FAILED if any(each.state == FAIL for each in findings) else 0


def _source(wanted: Wanted) -> Source | None:
    """The mirror to look at, if there is one.

    Raises:
        ConfigError: one was named, and there is no such file.
    """
    try:
        source = wanted.source()
    except ConfigError:
        if wanted.named:
            raise
        return None
    if wanted.named and not source.path.exists():
        raise ConfigError(f"{source.path}: cannot be read: there is no such file")
    return source


def run_all(checks: Sequence[Check], bound_s: float = CHECK_S) -> list[Finding]:
    """Run every check in a thread of its own; in their order, each within `bound_s`.

    A check that hangs in the system is left behind, and is a warning.
    """
    promises = [_started(check) for check in checks]
    done, _ = concurrent.futures.wait(promises, bound_s)
    return [
        promise.result()
        if promise in done
        else Finding(name_of(check), WARN, f"no answer of the system within {bound_s:g} s")
        for check, promise in zip(checks, promises, strict=True)
    ]


def _started(check: Check) -> "concurrent.futures.Future[Finding]":
    promise: concurrent.futures.Future[Finding] = concurrent.futures.Future()

    def work() -> None:
        try:
            found = check()
        except Exception as error:  # noqa: BLE001 - one check that fails must not hide the others
            why = f"could not be looked at: {type(error).__name__}: {error}"
            found = Finding(name_of(check), WARN, why)
        promise.set_result(found)

    threading.Thread(target=work, daemon=True).start()
    return promise


def name_of(check: Check) -> str:
    """The name of a check that did not get to say its own."""
    function = check.func if isinstance(check, partial) else check
    return getattr(function, "__name__", "check").replace("_", " ").strip("<>")


def as_facts(findings: Sequence[Finding]) -> dict[str, object]:
    """What `doctor --json` prints. Its keys stay."""
    return {
        "checks": [each._asdict() for each in findings],
        "failed": sum(each.state == FAIL for each in findings),
        "warned": sum(each.state == WARN for each in findings),
    }


def print_findings(findings: Sequence[Finding]) -> None:
    """The table, and one line that counts."""
    table = Table("check", "", "what", "remedy")
    for column in table.columns:
        column.overflow = "fold"
    for each in findings:
        name, state, what, remedy = map(printable, each)
        table.add_row(Text(name), Text(state, style=_STYLES[each.state]), Text(what), Text(remedy))
    Screen().print(table)
    facts = as_facts(findings)
    click.echo(f"{len(findings)} checks: {facts['failed']} failed, {facts['warned']} warnings")


# --- what checks are made of ----------------------------------------------------------------------


def said(*words: str) -> str:
    """What a program prints; "" if it is missing, fails or takes too long."""
    program = shutil.which(words[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - fixed words, no shell
            [program, *words[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=COMMAND_S,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def may(capability: int) -> bool:
    """Whether this process has a capability of Linux."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> capability & 1)


def openable(path: str) -> str:
    """ "" if a device can be opened for reading and writing, else why not."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def first_line(text: str) -> str:
    """The first line, or ""."""
    return (text.splitlines() or [""])[0].strip()


# --- the engine's host ----------------------------------------------------------------------------


def nbdkit() -> Finding:
    """The server that the engine runs in, and whether it bears several threads a connection."""
    name, path = "nbdkit", shutil.which("nbdkit")
    if path is None:
        remedy = "apt-get install nbdkit nbdkit-plugin-python"
        return Finding(name, FAIL, "not installed", remedy)
    launcher = importlib.import_module("nbdmirror.launcher")
    version = launcher.version_of(path)
    shown = ".".join(map(str, version)) or "an unknown version"
    if version >= launcher.BEARS_THREADS:
        return Finding(name, OK, shown)
    return Finding(
        name,
        WARN,
        f"{shown}: one thread for each connection, so its requests are served one by one",
        "nbdkit 1.34 or newer, or clients that open several connections",
    )


def nbdkit_python() -> Finding:
    """nbdkit's Python plugin, and that it embeds the Python that the packages are made for."""
    name = "nbdkit's Python"
    dump = said("nbdkit", "python", "--dump-plugin")
    match = re.search(r"^python_version=(\d+)\.(\d+)", dump, re.MULTILINE)
    if match is None:
        remedy = "apt-get install nbdkit-plugin-python"
        return Finding(name, FAIL, "nbdkit has no Python plugin", remedy)
    embedded, own = (int(match[1]), int(match[2])), sys.version_info[:2]
    shown = ".".join(map(str, embedded))
    if embedded != own:
        what = f"nbdkit embeds Python {shown}, and this is {'.'.join(map(str, own))}"
        return Finding(name, FAIL, what, f"install nbdmirror for python{shown}")
    return Finding(name, OK, shown)


def plugin() -> Finding:
    """Our own plugin for nbdkit."""
    try:
        path = importlib.import_module("nbdmirror.launcher").plugin_file()
    except NbdMirrorError as error:
        return Finding("plugin", FAIL, str(error), "install nbdmirror again")
    return Finding("plugin", OK, str(path))


def packages() -> Finding:
    """The Python packages of the program."""
    broken = []
    for each in PACKAGES:
        try:
            importlib.import_module(each)
        except ImportError as error:
            broken.append(f"{each} ({error})")
    if broken:
        what = f"cannot be imported: {', '.join(broken)}"
        return Finding("packages", FAIL, what, "install nbdmirror again, with its dependencies")
    return Finding("packages", OK, f"{len(PACKAGES)} are there")


def crcmod_extension() -> Finding:
    """crcmod without its extension works, hundreds of times slower, and says nothing."""
    try:
        importlib.import_module("crcmod._crcfunext")
    except ImportError:
        return Finding(
            "crcmod",
            WARN,
            "without its C extension: checks of metadata are hundreds of times slower",
            "install gcc and the headers of Python, then crcmod again, from source",
        )
    return Finding("crcmod", OK, "has its C extension")


# --- devices and file systems ---------------------------------------------------------------------


def nbdfuse() -> Finding:
    """The program that makes a file of the export."""
    path = shutil.which("nbdfuse")
    if path is None:
        return Finding(
            "nbdfuse", WARN, "not installed: no device without the kernel's NBD client",
            "apt-get install libnbd-bin (nbdfuse in newer releases)",
        )  # fmt: skip
    return Finding("nbdfuse", OK, first_line(said("nbdfuse", "--version")) or path)


def fuse() -> Finding:
    """The device by which nbdfuse mounts."""
    why = openable("/dev/fuse")
    if why:
        return Finding("fuse", WARN, f"{why}: nbdfuse cannot mount", "modprobe fuse, as root")
    return Finding("fuse", OK, "/dev/fuse")


def loop_devices() -> Finding:
    """What makes a block device of nbdfuse's file."""
    why = openable("/dev/loop-control")
    if not why and shutil.which("losetup") is None:
        why = "losetup is not installed"
    if why:
        remedy = "modprobe loop, as root; apt-get install util-linux mount"
        return Finding("loop devices", WARN, f"{why}: nbdfuse's file becomes no device", remedy)
    return Finding("loop devices", OK, "/dev/loop-control, losetup")


def kernel_nbd() -> Finding:
    """The kernel's own NBD client, and the program that connects it."""
    there = Path("/sys/block/nbd0").exists()
    client = shutil.which("nbd-client") is not None
    if there and client:
        return Finding("kernel NBD", OK, "nbd devices and nbd-client")
    if not there:
        loadable = bool(said("modinfo", "-F", "filename", "nbd"))
        if not loadable:
            return Finding(
                "kernel NBD", OK, "this kernel has none; nbdfuse and a loop device serve"
            )
        return Finding("kernel NBD", WARN, "the module is not loaded; nbdfuse serves instead",
                       "modprobe nbd")  # fmt: skip
    return Finding("kernel NBD", WARN, "nbd-client is not installed; nbdfuse serves instead",
                   "apt-get install nbd-client")  # fmt: skip


def file_systems() -> Finding:
    """The programs that make a file system."""
    found = [each for each in ("mkfs.ext4", "mkfs.xfs") if shutil.which(each)]
    if not found:
        return Finding("file systems", WARN, "neither mkfs.ext4 nor mkfs.xfs",
                       "apt-get install e2fsprogs")  # fmt: skip
    return Finding("file systems", OK, ", ".join(found))


# --- network --------------------------------------------------------------------------------------


def iproute2() -> Finding:
    """The program by which an operator looks at addresses and routes."""
    shown = said("ip", "-V").strip()
    if not shown:
        return Finding("iproute2", WARN, "`ip` is not installed: addresses are hard to look at",
                       "apt-get install iproute2")  # fmt: skip
    return Finding("iproute2", OK, shown)


def icmp() -> Finding:
    """The right to ask for echoes, tried on this host."""
    why = no_echo(["127.0.0.1"])
    if why:
        what = f"{why}: the arbiter ping and checkers of that kind see nobody"
        return Finding("ICMP", WARN, what, "run as root, or with CAP_NET_RAW")
    return Finding("ICMP", OK, "echoes can be asked for")


def no_echo(hosts: Sequence[str]) -> str:
    """ "" if one of these numeric addresses answers an echo, else why none did."""
    icmplib = importlib.import_module("icmplib")
    try:
        asked = icmplib.multiping(hosts, count=ECHOES_COUNT, interval=0.2, timeout=ECHO_S)
    except icmplib.SocketPermissionError:
        return "no right to open a raw socket"
    except (icmplib.ICMPLibError, OSError) as error:
        return f"cannot be asked: {type(error).__name__}"
    return "" if any(each.is_alive for each in asked) else f"no echo from {', '.join(hosts)}"


def probe_port(host: str, port: int) -> Finding:
    """Whether the port of health probe, API and console is free; else the next one that is."""
    name = f"port {port}"
    error = _bind(host, port)
    if error is None:
        return Finding(name, OK, "free")
    if error.errno != errno.EADDRINUSE:
        return Finding(name, FAIL, f"{host}: {error.strerror}", "choose another probe.address")
    free = (each for each in range(port + 1, port + PORTS_TRIED_COUNT) if not _bind(host, each))
    another = next(free, None)
    remedy = f"end what has it, or set probe.address with port {another or 'another one'}"
    return Finding(name, WARN, "another program listens there", remedy)


def _bind(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
            tried.listen(1)
        except OSError as error:
            return error
    return None


# --- the system -----------------------------------------------------------------------------------


def user() -> Finding:
    """Devices, mounts, addresses and raw sockets are root's."""
    if os.geteuid() == 0:
        return Finding("user", OK, "root")
    what = f"user {os.geteuid()}: the controller needs root; some checks here, too"
    return Finding("user", WARN, what, "run it as root")


def memory_lock() -> Finding:
    """Whether an engine may keep itself out of swap."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if may(CAP_IPC_LOCK) or soft == resource.RLIM_INFINITY:
        return Finding("memory lock", OK, "an engine can keep itself out of swap")
    what = f"limited to {soft} bytes: a device mounted on its own host can wait for itself"
    return Finding("memory lock", WARN, what, "LimitMEMLOCK=infinity in the unit")


def oom_score() -> Finding:
    """Whether an engine may keep the OOM killer away, or already inherits that."""
    score = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    if may(CAP_SYS_RESOURCE) or score <= -1000:
        return Finding("OOM killer", OK, "an engine can keep it away")
    what = "this process may not lower oom_score_adj: a full memory may end an engine"
    return Finding("OOM killer", WARN, what, "OOMScoreAdjust=-1000 in the unit, or a limit for "
                   "everything else")  # fmt: skip


def systemd() -> Finding:
    """The service manager that starts mirrors, and runs units as an application."""
    if SYSTEMD.is_dir():
        return Finding("systemd", OK, "is running")
    what = "is not running: no units as an application, and nothing starts the mirrors at boot"
    return Finding("systemd", WARN, what, "start nbdmirrord by the service manager that is there")


def clock_source() -> Finding:
    """What the kernel reads time from."""
    try:
        source = CLOCK.read_text(encoding="ascii").strip()
    except OSError as error:
        return Finding("clock", WARN, f"{CLOCK}: {error.strerror}", "look at the kernel's log")
    if source in POOR_CLOCKS:
        what = f"{source}: slow to read, and a guest's may jump"
        return Finding("clock", WARN, what, "clocksource=tsc, or the clock of the hypervisor")
    return Finding("clock", OK, source)


def mount_ids() -> Finding:
    """Whether this kernel can tell one mount of a place from a later one (rule 12)."""
    release = os.uname().release
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is not None and (int(match[1]), int(match[2])) >= MOUNT_IDS_SINCE:
        return Finding("kernel", OK, f"{release}, with mount ids")
    what = f"{release}: no mount ids: a node whose engine was killed has to meet its peer first"
    return Finding("kernel", WARN, what, "Linux 6.8 or newer")


MACHINE: Final[tuple[Check, ...]] = (
    *(nbdkit, nbdkit_python, plugin, packages, crcmod_extension),
    *(kernel_nbd, nbdfuse, fuse, loop_devices, file_systems),
    *(user, iproute2, icmp, memory_lock, oom_score, systemd, clock_source, mount_ids),
)
