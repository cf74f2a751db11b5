"""`nbdmirror create`, `invite` and `join`: a mirror on two servers, with one token between them.

Owns the questions, the proposals and the words; `nbdmirror.creation` makes the files and
`nbdmirror.invitation` brings them over. Must never: choose the arbiter, put a token into a file, or
overwrite anything.
"""

import asyncio
import contextlib
import json
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import click

from nbdmirror import admin, creation
from nbdmirror.config import Address, Config, format_size
from nbdmirror.core.cluster.promise import no_promise_c
from nbdmirror.creation import ARBITER_CHOICE, ARBITERS, Made, Place, Plan
from nbdmirror.errors import ConfigError, RefusedError
from nbdmirror.invitation import (
    CONFIGURATION_CHARS_MAX,
    TOKEN_CHARS_MAX,
    Invitation,
    Joined,
    Offer,
    parse_token,
)
from nbdmirror.invitation import join as join_inviter
from nbdmirror.limits import PROBE_PORT
from nbdmirror_cli.options import (
    CONFIG_DIRECTORY,
    SizeType,
    Source,
    config_options,
    json_option,
    replace_record_option,
)
from nbdmirror_cli.questions import Questions
from nbdmirror_cli.view import printable

TIMEOUT_S: Final = 600
TIMEOUT_S_MAX: Final = 86_400
_PATH: Final = click.Path(path_type=Path)
_STORES: Final = {
    "etcd": "endpoints=https://10.1.0.9:2379",
    "s3": "bucket=NAME",
    "azure-blob": "account_url=https://NAME.blob.core.windows.net",
}
config_dir_option = click.option(
    "--config-dir",
    type=_PATH,
    default=CONFIG_DIRECTORY,
    show_default=True,
    metavar="DIR",
    help="Where configuration and key go.",
)
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.IntRange(1, TIMEOUT_S_MAX),
    default=TIMEOUT_S,
    show_default=True,
    metavar="S",
    help="Seconds that the token is good for.",
)
listen_option = click.option(
    "--listen",
    metavar="IP[:PORT]",
    help="Where this server waits for the other one; default: the node's address, a free port.",
)
engine_user_option = click.option(
    "--engine-user",
    metavar="NAME",
    help="Whom the engine runs as on this node, a user without rights; default: who starts it.",
)


# --- create --------------------------------------------------------------------------------------


@click.command("create")
@click.argument("name")
@click.option("--node-name", metavar="NAME", help="This node; default: the name of this host.")
@click.option("--address", metavar="IP[:PORT]", help="Peer channel of this node; port 7789.")
@click.option("--peer-name", metavar="NAME", help="The other node, best the name of its host.")
@click.option("--peer-address", metavar="IP[:PORT]", help="Peer channel of the other node.")
@click.option("--size", type=SizeType(), help='Size of the device, like "10GiB".')
@click.option("--arbiter", metavar="WORD", help=f"Needed: {', '.join(ARBITERS)}.")
@click.option("--ping-address", multiple=True, metavar="IP", help="What the arbiter ping asks.")
@click.option(
    "--store",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of [etcd], [s3] or [azure-blob], like endpoints=https://10.1.0.9:2379.",
)
@replace_record_option
@click.option("--mount-point", metavar="PATH", help="Where the file system is mounted.")
@click.option("--start", metavar="COMMAND", help="Starts the application: program and words.")
@click.option("--stop", metavar="COMMAND", help="Stops the application.")
@click.option(
    "--virtual-address", multiple=True, metavar="IP/BITS", help="An address of the primary."
)
@click.option(
    "--probe-port", type=click.IntRange(1, 65535), help="Port of the probe; from 9010 on."
)
@click.option(
    "--heartbeat",
    multiple=True,
    metavar="LOCAL,REMOTE",
    help="A further network: address of this node, address of the other one.",
)
@config_dir_option
@click.option("--data-dir", type=_PATH, metavar="DIR", help="Holds the data, on both nodes.")
@click.option("--run-dir", type=_PATH, metavar="DIR", help="Holds the sockets, on both nodes.")
@engine_user_option
@click.option("--sparse", is_flag=True, help="Reserve no space, on both nodes.")
@click.option("--adopt", is_flag=True, help="Keep the existing file `data` of the data directory.")
@click.option(
    "--mkfs",
    "file_system",
    type=click.Choice(sorted(creation.MAKE_FILE_SYSTEM)),
    help="Make a file system of this kind on the new device; with --mount-point.",
)
@click.option("--invite/--no-invite", default=True, help="Go on as `invite`; default: yes.")
@listen_option
@timeout_option
@click.option("--yes", is_flag=True, help="Ask nothing: take the options and the proposals.")
@json_option
def create(name: str, **chosen: Any) -> None:
    """Make the mirror NAME on this server; asks for what the options do not say.

    Writes NAME.toml and NAME.key, and makes the data and metadata files: all of it, or nothing.
    Nothing that exists is overwritten. Then it waits for the other server, as `invite` does.

    With --json each step is one object on one line; the token is in the second one.
    """
    plan, place = _plan(name, chosen)
    as_json = chosen["as_json"]
    with interruptible():
        made = creation.make(plan, place)
    _tell_made(made, plan, as_json=as_json)
    if chosen["invite"]:
        source = Source(made.config.source, plan.node)
        _invite(source, chosen["listen"], chosen["timeout_s"], as_json=as_json)


def _plan(name: str, chosen: dict[str, Any]) -> tuple[Plan, Place]:
    """Every choice, asked for where it is missing."""
    arbiter = chosen["arbiter"]
    if arbiter not in ARBITERS:
        shown = f"{arbiter!r} is none" if arbiter else "is not chosen"
        raise click.UsageError(f"--arbiter {shown}: {ARBITER_CHOICE}")
    if arbiter == "ping" and not chosen["ping_address"]:
        raise click.UsageError(
            "--arbiter ping asks addresses: name a router that both nodes see, and better two, "
            "with --ping-address"
        )
    if (arbiter in _STORES) != bool(chosen["store"]):
        raise click.UsageError(
            f"--arbiter {arbiter} and --store: "
            + (
                f"name where the record lies, like --store {_STORES[arbiter]}"
                if arbiter in _STORES
                else "this arbiter has no store"
            )
        )
    if chosen["file_system"] and chosen["adopt"]:
        raise click.UsageError("--mkfs would destroy what --adopt keeps; leave one of them out")
    ask = Questions(chosen)
    ask.require_what_cannot_be_proposed()
    config_dir = chosen["config_dir"]
    others = creation.taken(config_dir, name)
    node = ask("node_name", "Name of this node", socket.gethostname().lower().partition(".")[0])
    own = ask("address", "Address of this node for the peer channel (IP, or IP:port)")
    peer = ask("peer_name", "Name of the other node")
    theirs = ask("peer_address", "Its address for the peer channel (IP, or IP:port)")
    creation.require_names(name, node, peer)
    address, peer_address = _peer_addresses(own, theirs, others)
    size = None if chosen["adopt"] and chosen["size"] is None else ask.size()
    plan = Plan(
        mirror=name,
        node=node,
        address=address,
        peer=peer,
        peer_address=peer_address,
        arbiter=arbiter,
        ping_addresses=tuple(chosen["ping_address"]),
        store=tuple(_key_value(each) for each in chosen["store"]),
        replace_record=chosen["replace_record"],
        size_bytes=size,
        mount_point=ask.optional("mount_point", "Mount point of the file system"),
        start=_words("--start", ask.optional("start", "Command that starts the application")),
        stop=_words("--stop", ask.optional("stop", "Command that stops it")),
        virtual_addresses=ask.several("virtual_address", "Virtual address (IP/prefix length)"),
        probe_port=_probe_port(ask, others),
        heartbeats=tuple(_network(each, address.port) for each in chosen["heartbeat"]),
        data_dir=chosen["data_dir"],
        run_dir=chosen["run_dir"],
        engine_user=chosen["engine_user"] or "",
        sparse=chosen["sparse"],
        adopt=chosen["adopt"],
        file_system=chosen["file_system"],
    )
    creation.require_peer_addresses([address, peer_address], others)
    ask.confirm(plan)
    return plan, Place(config_dir)


def _peer_addresses(own: str, theirs: str, others: creation.Taken) -> tuple[Address, Address]:
    """Where no port is named both nodes get the same one."""
    (host, port), (peer_host, peer_port) = creation.endpoint(own), creation.endpoint(theirs)
    if port is None:
        port = peer_port or creation.free_peer_port([host, peer_host], others)
    return Address(host, port), Address(peer_host, peer_port or port)


def _probe_port(ask: Questions, others: creation.Taken) -> int:
    proposal = creation.free_probe_port(others)
    if proposal != PROBE_PORT:
        why = creation.why_taken(PROBE_PORT, others.probe_ports)
        ask.say(f"Port {PROBE_PORT} of the probe {why}; the next free one is {proposal}.")
    port = ask.number("probe_port", "Port of the probe", proposal)
    creation.require_probe_port(port, others)
    return port


def _words(option: str, line: str | None) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line or ""))
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from error


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise click.UsageError(f"--store {text}: expected KEY=VALUE, with a key of that table")
    return key, value


def _network(text: str, port: int) -> tuple[Address, Address]:
    mine, comma, theirs = text.partition(",")
    if not comma:
        raise click.UsageError(f"--heartbeat {text}: expected LOCAL,REMOTE")
    (host, own_port), (peer_host, peer_port) = creation.endpoint(mine), creation.endpoint(theirs)
    return Address(host, own_port or port), Address(peer_host, peer_port or port)


def _tell_made(made: Made, plan: Plan, *, as_json: bool) -> None:
    config = made.config
    facts = _facts("made", made)
    warnings = [*_warnings(config), no_promise_c(config.arbiter.word)]
    steps = _next_steps(config)
    if as_json:
        _print_line({**facts, "warnings": warnings, "next": steps})
        return
    size = format_size(made.superblock.device_bytes)
    click.echo(
        f"Made {config.source}, {config.key_file}, {config.data_file} and {config.metadata_file}: "
        f"mirror {plan.mirror}, {size}, node {plan.node}."
    )
    _tell_what_follows(warnings, steps)


def _tell_what_follows(warnings: Sequence[str], steps: Sequence[str]) -> None:
    for warning in warnings:
        click.echo(printable(f"Note: {warning}"))
    click.echo("Next, on this server (nbdmirrord stays in the foreground, or is a unit):")
    for step in steps:
        click.echo(f"    {step}")


def _facts(event: str, made: Made) -> dict[str, Any]:
    config = made.config
    return {
        "event": event,
        "mirror": config.mirror,
        "node": config.me.name,
        "config": str(config.source),
        "key_file": str(config.key_file),
        "data": str(config.data_file),
        "metadata": str(config.metadata_file),
        "size_bytes": made.superblock.device_bytes,
    }


def _next_steps(config: Config) -> list[str]:
    source = Source(config.source, config.me.name)
    words = source.words if _found_by_host(config) else f"{source.words} --node {config.me.name}"
    return [
        f"nbdmirror config check {words}",
        f"nbdmirrord {words}",
        f"nbdmirror start {words}",
    ]


def _found_by_host(config: Config) -> bool:
    """Whether commands find their node by the name of this host."""
    host = socket.gethostname().lower()
    return config.me.name in {host, host.partition(".")[0]}


def _warnings(config: Config) -> list[str]:
    found = []
    if not creation.on_this_machine(config.me.address):
        found.append(
            f"{config.me.address.host}, the address of {config.me.name}, is on no interface of "
            "this server: the nodes will not meet until it is"
        )
    if not _found_by_host(config):
        found.append(
            f"this host is not called {config.me.name}: every command here needs --node "
            f"{config.me.name}, or NBDMIRROR_NODE in its environment"
        )
    return found


# --- invite --------------------------------------------------------------------------------------


@click.command("invite")
@config_options
@listen_option
@timeout_option
@json_option
def invite(source: Source, *, listen: str | None, timeout_s: int, as_json: bool) -> None:
    """Make a token for the other server, and wait until it has joined with it.

    The token is good for one join. Whoever sees it can join until then: paste it into the other
    server's terminal and nowhere else. Five joins that fail, or the end of the time, make it void.
    """
    _invite(source, listen, timeout_s, as_json=as_json)


def _invite(source: Source, listen: str | None, timeout_s: int, *, as_json: bool) -> None:
    config = source.load(with_key=True)
    host, port = creation.endpoint(listen) if listen else (config.me.address.host, None)

    def tell(sentence: str) -> None:
        if as_json:
            _print_line({"event": "attempt", "reason": sentence})
        else:
            click.echo(sentence, err=True)

    with (
        interruptible(),
        contextlib.closing(Invitation(_offer(config), (host, port or 0), tell)) as invitation,
    ):
        _tell_token(invitation, config, timeout_s, as_json=as_json)
        node, address = asyncio.run(invitation.wait(timeout_s))
    if as_json:
        _print_line({"event": "joined", "node": node, "address": address})
    else:
        click.echo(f"{node} has joined, from {address}: its copy is blank until the engines meet.")


def _offer(config: Config) -> Offer:
    """What travels. Raises RefusedError: more than an offer holds."""
    text = config.source.read_text(encoding="utf-8")
    if len(text) > CONFIGURATION_CHARS_MAX:
        raise RefusedError(
            f"{config.source} has more than {CONFIGURATION_CHARS_MAX} characters: copy it and the "
            "key by hand"
        )
    facts = admin.show(config.metadata_file)
    return Offer(
        mirror=config.mirror,
        inviter=config.me.name,
        configuration=text,
        key=config.key.hex(),
        size_bytes=facts["device_bytes"],
        sparse="sparse" in facts["flags"],
    )


def _tell_token(invitation: Invitation, config: Config, timeout_s: int, *, as_json: bool) -> None:
    token, peer, address = invitation.token.text(), config.peer.name, invitation.token.address
    if as_json:
        facts = {"token": token, "address": str(address), "timeout_s": timeout_s}
        _print_line({"event": "token", "mirror": config.mirror, "peer": peer, **facts})
        return
    click.echo(
        f"\nThe token, good once and for {timeout_s} s; whoever sees it can join until then:\n\n"
        f"    {token}\n\n"
        f"Type this on {peer}, and paste the token when it asks:\n\n"
        f"    nbdmirror join -\n\n"
        "(`join` takes the token as an argument, too; there the list of processes shows it.)\n"
        f"Waiting for {peer} at {address} ..."
    )


# --- join ----------------------------------------------------------------------------------------


@click.command("join")
@click.argument("token", default="-")
@click.option("--node", metavar="NAME", help="Be this node; default: the one that is free.")
@config_dir_option
@click.option("--data-dir", type=_PATH, metavar="DIR", help="Holds the data, on this node.")
@click.option("--run-dir", type=_PATH, metavar="DIR", help="Holds the sockets, on this node.")
@engine_user_option
@json_option
def join(token: str, **chosen: Any) -> None:
    """Make this server the second one of the mirror that TOKEN is for.

    TOKEN is what `create` or `invite` printed on the first server; "-", or nothing, reads it from
    standard input, unseen on a terminal. Configuration and key come over encrypted, the copy is
    blank and is filled when the engines meet. All of it is made, or nothing; nothing that exists is
    overwritten.
    """
    directories = (chosen["config_dir"], chosen["data_dir"], chosen["run_dir"])
    place = Place(*directories, chosen["engine_user"])
    parsed = parse_token(_read_token() if token == "-" else token)  # noqa: S105 - no secret, a dash
    done: list[Made] = []

    def take(offer: Offer) -> str:
        done.append(creation.take(offer, place, chosen["node"]))
        return done[0].config.me.name

    with interruptible():
        joined = join_inviter(parsed, take)
    _tell_joined(done[0], joined, as_json=chosen["as_json"])


def _read_token() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Token", hide_input=True, err=True))
    line = sys.stdin.readline(TOKEN_CHARS_MAX + 2).strip()
    if not line:
        raise ConfigError("no token on standard input: `nbdmirror invite` prints one")
    return line


def _tell_joined(made: Made, joined: Joined, *, as_json: bool) -> None:
    config, inviter = made.config, joined.offer.inviter
    warnings = _warnings(config)
    if not joined.told:
        warnings.append(
            f"{inviter} did not hear that this server has joined; all is made here all the same"
        )
    steps = _next_steps(config)
    if as_json:
        facts = {"inviter": inviter, "told": joined.told, "warnings": warnings, "next": steps}
        _print_line({**_facts("joined", made), **facts})
        return
    size = format_size(made.superblock.device_bytes)
    click.echo(
        f"This server is {config.me.name} of mirror {config.mirror}, {size}; {inviter} has the "
        f"data.\nMade {config.source}, {config.key_file}, {config.data_file} and "
        f"{config.metadata_file}.\nThis copy is blank: it is filled when the other node's engine "
        "is met."
    )
    _tell_what_follows(warnings, steps)


# --- all -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A terminal that hangs up, or a SIGTERM, undoes what was begun, as Ctrl-C does."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _print_line(facts: dict[str, Any]) -> None:
    """One object, one line, at once: whoever reads may have to act on it while we wait."""
    click.echo(json.dumps(facts))
    sys.stdout.flush()
