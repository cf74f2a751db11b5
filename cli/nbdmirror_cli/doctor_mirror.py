"""The checks of `nbdmirror doctor` that look at one mirror: configuration, key, places, network.

Owns what of a configuration has to exist on this machine. Must never change anything, touch data or
metadata, or wait without a bound.
"""

import ipaddress
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import psutil

from nbdmirror.config import Address, Config
from nbdmirror.control_client import ControlClient
from nbdmirror.controller import traces
from nbdmirror.engine_user import MAKE_IT, account
from nbdmirror.errors import ConfigError, NbdMirrorError
from nbdmirror_cli.doctor import (
    FAIL,
    OK,
    SYSTEMD,
    WARN,
    Check,
    Finding,
    fuse,
    kernel_nbd,
    loop_devices,
    nbdfuse,
    no_echo,
    probe_port,
)
from nbdmirror_cli.doctor_arbiter import store
from nbdmirror_cli.options import Source
from nbdmirror_cli.tls import certificate_finding

CONNECT_S: Final = 3.0
ASK_S: Final = 5.0
ACCOUNT_CHARS_MAX: Final = 31


def checks(source: Source) -> list[Check]:
    """The checks of one mirror; only the configuration's if that is wrong."""
    try:
        config = source.load(with_key=False)
    except ConfigError as error:
        wrong = error

        def configuration() -> Finding:
            """The file is wrong; nothing else can be looked at."""
            remedy = "mend the file; `nbdmirror config check` lists every mistake"
            return Finding("configuration", FAIL, str(wrong), remedy)

        return [configuration]
    return [
        lambda: Finding("configuration", OK, str(source.path)),
        *(
            partial(check, config)
            for check in (
                *(data_files, run_directory, user_of_engine),
                *(own_addresses, peer, controller_port),
            )
        ),
        partial(key, source),
        *([partial(certificate_finding, config)] if config.engine.tls == "on" else []),
        *([partial(store, source)] if config.arbiter.has_memory else []),
        *_optional(config),
        partial(leftovers, config, source),
    ]


def _optional(config: Config) -> Iterator[Check]:
    """What only some mirrors have."""
    for each in config.virtual_addresses:
        yield partial(virtual_address, each.address, each.interface)
    if config.mount.point is not None:
        yield partial(mount_point, config)
        yield partial(attach, config)
    for command in (config.application.start, config.application.stop):
        if command:
            yield partial(program, Path(command[0]))
    if config.application.units or any(each.kind == "unit" for each in config.checkers):
        yield units
    if config.ping.addresses:
        yield partial(routers, config)


def key(source: Source) -> Finding:
    """The key's file, mode, owner and length, and what stands where the sockets are made."""
    try:
        config = source.load(with_key=True)
    except ConfigError as error:
        lines = "; ".join(error.mistakes or [str(error)])
        return Finding("key", FAIL, lines, "as it says; both nodes need the same key")
    return Finding("key", OK, f"{config.key_file}, for its owner alone")


def data_files(config: Config) -> Finding:
    """This node's copy: both files, or none yet."""
    files = (config.data_file, config.metadata_file)
    missing = [str(each) for each in files if not each.exists()]
    if not missing:
        return Finding("data", OK, str(config.me.data_dir))
    what = f"missing: {', '.join(missing)}"
    if len(missing) == 1:
        return Finding("data", FAIL, what, "`nbdmirror metadata check` says what that means")
    return Finding("data", WARN, what, "make this node's copy: `nbdmirror metadata create`")


def run_directory(config: Config) -> Finding:
    """Where the sockets are made; it is made itself when it is missing."""
    path = config.me.run_dir
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = f"{there}: user {os.geteuid()} can make nothing in it"
        return Finding("run directory", FAIL, what, "another paths.run_dir, or run as its owner")
    mode = stat.S_IMODE(there.stat().st_mode)
    if there == path and mode & 0o022:
        what = f"{path}: others may write to it (mode {mode:04o})"
        return Finding("run directory", WARN, what, f"chmod 0700 {path}")
    return Finding("run directory", OK, str(path) + ("" if there == path else ", made when needed"))


def user_of_engine(config: Config) -> Finding:
    """Whom the engine runs as: it reads what the network and the clients send."""
    name, user = "engine's user", config.engine.user
    uid = _uid_of_engine(config)
    if not user and (os.geteuid() if uid is None else uid):
        return Finding(name, OK, "who starts it, which is not root")
    if not user:
        mine = f"nbdmirror-{config.mirror}"[:ACCOUNT_CHARS_MAX]
        what = 'engine.user = "": the engine runs as root, and so does who breaks into it'
        remedy = f'{MAKE_IT} {mine}`, engine.user = "{mine}", then restart the engine'
        return Finding(name, WARN, what, remedy)
    try:
        found = account(user)
    except ConfigError as error:
        return Finding(name, FAIL, str(error), "as it says; the engine does not start before")
    assert found is not None, "it has a name"
    if uid not in {None, found.uid}:
        what = f"the engine runs as user {uid}, and engine.user is {user} ({found.uid})"
        return Finding(name, WARN, what, "restart the engine: `nbdmirror stop`, `nbdmirror start`")
    return Finding(name, OK, f"{user}, user {found.uid}, without any right")


def _uid_of_engine(config: Config) -> int | None:
    """Of the engine that runs; None if none does, or it may not be asked."""
    with (
        suppress(NbdMirrorError, OSError, psutil.Error),
        ControlClient(config.control_socket, ASK_S) as client,
    ):
        pid = int(client.call("state")["pid"])
        # Not the owner of the directory: what may not be looked into is shown as root's.
        return psutil.Process(pid).uids().effective
    return None


def own_addresses(config: Config) -> Finding:
    """Every address that this node takes channel and heartbeats at is on an interface of it."""
    wanted = {each.host for each in (config.me.address, *config.me.heartbeats)}
    wrong = [f"{host} ({why})" for host in sorted(wanted) if (why := _not_here(host))]
    if wrong:
        what = f"not on any interface of this machine: {', '.join(wrong)}"
        remedy = f"set it, or mend [node.{config.me.name}]; is this node {config.me.name}?"
        return Finding("own addresses", FAIL, what, remedy)
    return Finding("own addresses", OK, ", ".join(sorted(wanted)))


def _not_here(host: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as tried:
        try:
            tried.bind((host, 0))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def peer(config: Config) -> Finding:
    """Whether the other node answers at all: its peer channel, or an echo."""
    if config.me.id > config.peer.id:
        return _peer_that_dials(config)
    name, address = f"peer {config.peer.name}", config.peer.address
    why = _connects(address)
    if not why:
        return Finding(name, OK, f"takes connections at {address}")
    if why == "refused":
        what = f"{address.host} is there, and nothing listens at port {address.port}"
        return Finding(name, WARN, what, "start its controller, or look at its firewall")
    if not no_echo([address.host]):
        what = f"{address.host} answers echoes, but not at port {address.port}: {why}"
        return Finding(name, WARN, what, "let that port through the firewall of both nodes")
    what = f"{address} does not answer ({why}), and sends no echo"
    return Finding(name, WARN, what, "is it up? Then look at cable, route and firewall")


def _peer_that_dials(config: Config) -> Finding:
    """The node with the higher id: it listens, and nothing listens at the other one."""
    name, host = f"peer {config.peer.name}", config.peer.address.host
    with suppress(NbdMirrorError), ControlClient(config.control_socket, ASK_S) as client:
        if client.call("state").get("session"):
            return Finding(name, OK, "is connected")
    why = no_echo([host])
    if not why:
        return Finding(name, OK, f"{host} answers echoes; it dials this node, which listens")
    what = f"{host}: {why}; it dials this node, and is not connected now"
    return Finding(name, WARN, what, "is it up? Then look at cable, route and firewall")


def _connects(address: Address) -> str:
    try:
        socket.create_connection((address.host, address.port), CONNECT_S).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return error.strerror or "no answer in time"
    return ""


def controller_port(config: Config) -> Finding:
    """The port of the probe: free, or our own controller's."""
    if config.probe is None:
        return Finding("probe", OK, "none is configured")
    with suppress(NbdMirrorError), ControlClient(config.controller_socket, ASK_S) as client:
        client.call("status")
        return Finding(f"port {config.probe.port}", OK, "this mirror's controller is running")
    return probe_port(config.probe.host, config.probe.port)


def virtual_address(address: str, interface: str | None) -> Finding:
    """Whether there is an interface that the address can follow the primary to."""
    name, wanted = f"address {address}", ipaddress.ip_interface(address)
    interfaces = psutil.net_if_addrs()
    if interface is not None:
        if interface in interfaces:
            return Finding(name, OK, f"would be on {interface}")
        what = f"no interface {interface}; there are: {', '.join(interfaces)}"
        return Finding(name, FAIL, what, "mend virtual_address.interface")
    for each, addresses in interfaces.items():
        for known in addresses:
            with suppress(ValueError):  # addresses of the hardware
                if ipaddress.ip_address(known.address.partition("%")[0]) in wanted.network:
                    return Finding(name, OK, f"would be on {each}")
    what = "no interface has an address in the same network"
    return Finding(name, FAIL, what, "name the interface: virtual_address.interface")


def mount_point(config: Config) -> Finding:
    """The directory, and the file system's type."""
    point, kind = config.mount.point, config.mount.type
    assert point is not None, "only then is it asked for"
    known = Path("/proc/filesystems").read_text(encoding="ascii", errors="replace").split()
    if kind not in known and shutil.which(f"mkfs.{kind}") is None:
        what = f"type {kind}: neither this kernel nor a mkfs.{kind} knows it"
        return Finding("mount", FAIL, what, "install its tools, or mend mount.type")
    # Of the mount point itself only its parent is asked: what is mounted there may hang.
    if point.parent.is_dir() and point in point.parent.iterdir():
        return Finding("mount", OK, f"{point}, {kind}")
    return Finding("mount", OK, f"{point}, {kind}; made when needed")


def attach(config: Config) -> Finding:
    """Whether the export can become a device by the way that is configured."""
    wanted = config.mount.attach
    kernel = kernel_nbd()
    has_kernel = kernel.state == OK and Path("/sys/block/nbd0").exists()
    fuse_lacks = [each for each in (nbdfuse(), fuse(), loop_devices()) if each.state != OK]
    if wanted in {"auto", "kernel"} and has_kernel:
        return Finding("attach", OK, "by the kernel's NBD client")
    if wanted in {"auto", "fuse"} and not fuse_lacks:
        return Finding("attach", OK, "by nbdfuse and a loop device")
    lacks = [kernel] if wanted == "kernel" else fuse_lacks
    what = f'mount.attach = "{wanted}": {"; ".join(f"{e.name}: {e.what}" for e in lacks)}'
    return Finding("attach", FAIL, what, "; ".join(e.remedy for e in lacks if e.remedy))


def program(path: Path) -> Finding:
    """A program of the application."""
    if path.is_file() and os.access(path, os.X_OK):
        return Finding("application", OK, str(path))
    what = f"{path}: {'cannot be executed' if path.exists() else 'does not exist'}"
    # It may lie on the mirror's own file system, which is not mounted now.
    return Finding("application", WARN, what, "install it, unless it lies on the mirrored device")


def units() -> Finding:
    """What starts units, where there are some to be started."""
    if SYSTEMD.is_dir():
        return Finding("units", OK, "systemd is running")
    return Finding("units", FAIL, "units are configured, and no systemd is running",
                   "use application.start and application.stop instead")  # fmt: skip


def leftovers(config: Config, source: Source) -> Finding:
    """What a dead controller left: nobody looks after it, and the other node may serve by now."""
    if any(_listens(each) for each in (config.controller_socket, config.control_socket)):
        return Finding("left over", OK, "nothing: controller or engine of this mirror runs here")
    run_dir, point = config.me.run_dir, config.mount.point
    left = [f"address {each} is on this host" for each in _held(config)]
    if (run_dir / "service.json").exists():
        left.insert(0, f"{run_dir / 'service.json'} says that the application ran")
    if point is not None:
        places = traces.Places(point, config.export_unix, run_dir, config.mirror)
        left += traces.look(places).sentences()
    if not left:
        return Finding("left over", OK, "nothing")
    node = f" --node {source.node}" if source.node else ""
    remedy = f"left by a dead controller: `nbdmirrord {source.words}{node} --clean`"
    return Finding("left over", WARN, "; ".join(left), remedy)


def _listens(path: Path) -> bool:
    """Whether a process has this socket; one that may not be asked has it, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        tried.setblocking(False)
        try:
            tried.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def _held(config: Config) -> list[str]:
    """The virtual addresses that are on an interface of this host."""
    here = {
        ipaddress.ip_address(known.address.partition("%")[0])
        for addresses in psutil.net_if_addrs().values()
        for known in addresses
        if known.family in {socket.AF_INET, socket.AF_INET6}
    }
    wanted = [each.address for each in config.virtual_addresses]
    return [each for each in wanted if ipaddress.ip_interface(each).ip in here]


def routers(config: Config) -> Finding:
    """Whether one of the addresses that the arbiter `ping` asks answers."""
    why = no_echo(list(config.ping.addresses))
    if not why:
        return Finding("ping", OK, "one of the addresses answers")
    return Finding("ping", WARN, why, "this node would be told no: mend ping.addresses")
