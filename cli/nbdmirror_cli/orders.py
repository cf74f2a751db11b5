"""The orders to the controller: what this node shall do, and the wait until it is done.

Owns: what is waited for after an order, and what is confirmed before one. Must never decide
anything that the controller decides, or repeat an order by itself: its answer may have been lost.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import click

from nbdmirror.config import running_controller
from nbdmirror.control_client import ControlClient, Listener
from nbdmirror.errors import ConfigError, NbdMirrorError, RefusedError
from nbdmirror.limits import COMMAND_TIMEOUT_MS, CONTROL_ANSWER_TIMEOUT_MS
from nbdmirror_cli.engine import _confirm as confirm
from nbdmirror_cli.options import Source, config_options, json_option, print_json
from nbdmirror_cli.status_view import Facts, headline, part, summary, word, words
from nbdmirror_cli.view import force_loss, given_up, printable

ANSWER_TIMEOUT_S: Final = CONTROL_ANSWER_TIMEOUT_MS / 1000
# For what goes on for a while inside of the controller before it answers.
ORDER_TIMEOUT_S: Final = COMMAND_TIMEOUT_MS / 1000 + 5
WAIT_S: Final = 120.0
WAIT_S_MAX: Final = 86_400.0
POLL_S: Final = 0.25
# How the controller's explanation begins that has the answer of the engine.
LAST_REFUSED: Final = "The last order was refused"
_PRIMARY: Final = ("PRIM", "ALONE")
_Command = TypeVar("_Command", bound=Callable[..., Any])
yes_option = click.option("--yes", is_flag=True, help="Do not ask; for scripts.")


def controller(source: Source, timeout_s: float = ANSWER_TIMEOUT_S) -> ControlClient:
    """A client of this node's controller; also of one whose file has mistakes by now.

    Raises:
        ConfigError: it has mistakes, and no controller runs.
    """
    listener = Listener("controller", f"nbdmirrord {source.words}")
    try:
        path = source.load(with_key=False).controller_socket
    except ConfigError as error:
        running = running_controller(source.path, source.node)
        if running is None:
            raise
        click.echo(printable(f"warning: {error}\nThe controller runs with what it read before."),
                   err=True)  # fmt: skip
        path = running
    return ControlClient(path, timeout_s, listener)


@dataclass(frozen=True, slots=True)
class Order:
    """One order, and by what one sees that it is carried out: (status before, status now).

    `moves`: it is for another role, so it was given up when it has ended in the old one.
    """

    name: str
    done: Callable[[Facts, Facts], bool]
    args: Facts = field(default_factory=dict)
    moves: bool = False


def wait_options(command: _Command) -> _Command:
    """Add --wait, --no-wait and --timeout; the command gets `limit_s`, None for not at all."""

    def collect(context: click.Context, _: click.Parameter, timeout_s: float) -> float | None:
        return timeout_s if context.params.pop("wait") else None

    for option in (
        click.option(
            "--timeout",
            "limit_s",
            metavar="S",
            type=click.FloatRange(0, WAIT_S_MAX),
            default=WAIT_S,
            show_default=True,
            callback=collect,
            help="Wait at most so many seconds; what was ordered goes on.",
        ),
        click.option(
            "--wait/--no-wait",
            default=True,
            is_eager=True,
            help="Wait until it is done (default), or only until it is accepted.",
        ),
    ):
        command = option(command)
    return command


def _runs(_before: Facts, now: Facts) -> bool:
    return word(now, "role") == "SECOND" or _serves(_before, now)


def _serves(_before: Facts, now: Facts) -> bool:
    return word(now, "role") in _PRIMARY and word(now, "readiness") == "ready"


def _stopped(_before: Facts, now: Facts) -> bool:
    return word(now, "role") == "STOP"


def _second(_before: Facts, now: Facts) -> bool:
    return word(now, "role") == "SECOND"


def _swapped(before: Facts, now: Facts) -> bool:
    return (_second if word(before, "role") in _PRIMARY else _serves)(before, now)


def _restarted(_before: Facts, now: Facts) -> bool:
    return not word(now, "order") and word(part(now, "service"), "state") == "up"


def _compared(before: Facts, now: Facts) -> bool:
    """In sync again, in another session; without one before, it begins when the peer is met."""
    old, new = (part(part(facts, "engine"), "session") for facts in (before, now))
    return not old or (new.get("phase") == "synced" and new.get("number") != old.get("number"))


def _mounted(_before: Facts, now: Facts) -> bool:
    return part(now, "service").get("mounted") is True


def _unmounted(_before: Facts, now: Facts) -> bool:
    service = part(now, "service")
    return not service.get("mounted") and not word(service, "device")


@click.command("start")
@config_options
@wait_options
@json_option
def start(source: Source, limit_s: float | None, *, as_json: bool) -> None:
    """Start this node: the engine, then what its role needs.

    Waits until it serves, or is secondary (which may still be brought up to date).
    """
    _order(source, Order("start", _runs), limit_s, as_json=as_json)


@click.command("stop")
@config_options
@click.option(
    "--both", is_flag=True, help="Stop both nodes, typed on the primary; the copies end equal."
)
@click.option(
    "--shutdown", is_flag=True, help="Stop only until the controller starts again; for services."
)
@wait_options
@json_option
def stop(
    source: Source, limit_s: float | None, *, both: bool, shutdown: bool, as_json: bool
) -> None:
    """Stop this node: the application, then the engine, which leaves in order.

    If the other node is up to date, it takes over. With --both nobody does: first the application
    of the primary ends, then the other node, then this one.
    """
    args = {"both": both, "shutdown": shutdown}
    _order(source, Order("stop", _stopped, args), limit_s, as_json=as_json)


@click.command("prim")
@config_options
@click.option(
    "--force", is_flag=True, help="Although the rules forbid it; says what may be lost, and asks."
)
@yes_option
@wait_options
@json_option
def prim(source: Source, limit_s: float | None, *, force: bool, yes: bool, as_json: bool) -> None:
    """Make this node primary: it serves, and the application is started here.

    Refused where writes could be lost; the refusal says which. With --force it is done all the
    same, after the loss was named and confirmed.
    """
    order = Order("prim", _serves, {"force": force}, moves=True)
    with controller(source, ORDER_TIMEOUT_S) as client:
        before = client.call("status")
        if force:
            loss = force_loss(part(before, "engine"))
            confirm(printable(loss), "Make this node primary by force?", yes=yes)
        _carry_out(client, before, order, limit_s, as_json=as_json)


@click.command("second")
@config_options
@click.option(
    "--force", is_flag=True, help="Give up this node's copy and fill it from the peer; asks."
)
@click.option("--no-keep", is_flag=True, help="With --force: keep nothing of what it holds.")
@yes_option
@wait_options
@json_option
def second(source: Source, limit_s: float | None, **how: bool) -> None:
    """Make this node secondary: it takes the writes of the other one.

    With --force the copy of this node is given up, after that was confirmed, and filled from the
    other node: the way out of a split brain, on the side that loses. After a split brain only what
    differs is copied, and what this copy holds there is kept first, up to `keep_bytes` of the
    configuration: see `nbdmirror kept`.
    """
    force, keep = how["force"], not how["no_keep"]
    args = {"force": True, "keep": keep} if force else {"force": False}
    order = Order("second", _second, args, moves=True)
    with controller(source, ORDER_TIMEOUT_S) as client:
        before = client.call("status")
        if force and part(before, "engine").get("role") == "primary":
            # The controller would say the same; nobody shall confirm a loss for nothing.
            raise RefusedError("second --force: this node serves; `nbdmirror stop` or `swap` first")
        if force:
            loss = discard_loss(before, keep=keep)
            confirm(loss, "Give up this node's copy?", yes=how["yes"])
        _carry_out(client, before, order, limit_s, as_json=how["as_json"])


def discard_loss(facts: Facts, *, keep: bool) -> str:
    """What `second --force` destroys, in words."""
    peer = word(facts, "peer_name") or "the other node"
    loss = printable(given_up(part(facts, "engine"), keep=keep, peer=peer))
    if part(facts, "peer").get("heard") is True:
        return loss
    return f"{loss} {peer} is not heard now: until it is back, this node has no copy at all."


@click.command("swap")
@config_options
@wait_options
@json_option
def swap(source: Source, limit_s: float | None, *, as_json: bool) -> None:
    """Exchange the roles of the two nodes; typed on either one. Nothing is copied."""
    _order(source, Order("swap", _swapped, moves=True), limit_s, as_json=as_json)


@click.command("restart")
@config_options
@wait_options
@json_option
def restart(source: Source, limit_s: float | None, *, as_json: bool) -> None:
    """Stop the application of this node and start it again; the role stays."""
    _order(source, Order("restart", _restarted), limit_s, as_json=as_json)


@click.command("resync")
@config_options
@wait_options
@json_option
def resync(source: Source, limit_s: float | None, *, as_json: bool) -> None:
    """Compare the whole device with the peer and copy what differs.

    Until that is done the peer is no second copy. Waits for the end; without a peer the comparison
    is only noted, and begins when the peer is met.
    """
    _order(source, Order("resync", _compared), limit_s, as_json=as_json)


@click.command("mount")
@config_options
@wait_options
@json_option
def mount(source: Source, limit_s: float | None, *, as_json: bool) -> None:
    """Attach the device and mount it by hand, while the application of a primary is down.

    For maintenance: file-system checks, restores. Take it away again with `nbdmirror unmount`.
    """
    _order(source, Order("mount", _mounted), limit_s, as_json=as_json)


@click.command("unmount")
@config_options
@wait_options
@json_option
def unmount(source: Source, limit_s: float | None, *, as_json: bool) -> None:
    """Unmount and detach what `nbdmirror mount` made."""
    _order(source, Order("unmount", _unmounted), limit_s, as_json=as_json)


def _order(source: Source, order: Order, limit_s: float | None, *, as_json: bool) -> None:
    with controller(source, ORDER_TIMEOUT_S) as client:
        _carry_out(client, client.call("status"), order, limit_s, as_json=as_json)


def _carry_out(
    client: ControlClient, before: Facts, order: Order, limit_s: float | None, *, as_json: bool
) -> None:
    """Give the order, wait for it, say what became of it.

    Raises:
        NbdMirrorError: accepted, but failed, or not done within the limit. RefusedError,
        UnreachableError: as ControlClient.call.
    """
    now = client.call(order.name, **order.args)
    said = word(now, "done") or "accepted"
    if limit_s is not None:
        client.timeout_s = ANSWER_TIMEOUT_S
        try:
            now = _wait(client, order, (before, now), limit_s)
        except KeyboardInterrupt:
            click.echo(f"{order.name}: not waited for any longer; it goes on", err=True)
            raise
    if as_json:
        print_json({**now, "done": said})
        return
    remedy = word(now, "remedy")
    click.echo(f"{order.name}: {said}")
    click.echo(f"now {headline(now)}: {word(now, 'reason')}" + (f"; {remedy}" if remedy else ""))


def _wait(client: ControlClient, order: Order, known: tuple[Facts, Facts], limit_s: float) -> Facts:
    """Ask until it is done; returns the status then. `known`: the status before and after."""
    before, now = known
    until_s, told, ended_count = time.monotonic() + limit_s, "", 0
    under_way = bool(word(now, "order"))
    while not order.done(before, now):
        line = summary(now)
        if _failed(before, now) or _waits_for_room(before, now):
            raise NbdMirrorError(f"{order.name}: accepted, and failed: now {_with_remedy(now)}")
        ended = order.moves and under_way and not word(now, "order")
        # Twice: the role may be shown a moment after the order has ended well.
        ended_count = ended_count + 1 if ended and _same_side(before, now) else 0
        if ended_count >= 2:
            raise NbdMirrorError(f"{order.name}: accepted, and given up: now {_with_remedy(now)}")
        if line != told:
            click.echo(f"{order.name}: waiting; now {line}", err=True)
            told = line
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise NbdMirrorError(
                f"{order.name}: accepted, but not done within {limit_s:g} s; it goes on (look at "
                f"`nbdmirror status`): now {_with_remedy(now)}"
            )
        threading.Event().wait(min(POLL_S, left_s))
        now = client.call("status")
    return now


def _same_side(before: Facts, now: Facts) -> bool:
    """Whether it serves now if it did before, and does not if it did not."""
    return (word(before, "role") in _PRIMARY) == (word(now, "role") in _PRIMARY)


def _failed(before: Facts, now: Facts) -> bool:
    """Whether the service came to rest as failed since the order, rather than being so before."""

    def marks(facts: Facts) -> tuple[str, ...]:
        service = part(facts, "service")
        return (*(word(facts, key) for key in ("role", "row", "order")),
                *(word(service, key) for key in ("state", "reason")))  # fmt: skip

    failed = word(part(now, "service"), "state") == "failed" and not word(now, "order")
    return failed and marks(now) != marks(before)


def _waits_for_room(before: Facts, now: Facts) -> bool:
    """Whether the resync has begun to wait for an operator, who may be the one who waits here."""
    was, waits = (word(part(facts, "engine"), "resync_waits") for facts in (before, now))
    return bool(waits) and not was


def _with_remedy(facts: Facts) -> str:
    """The status in one line, what the engine said to an order, and what to type."""
    refused = [each for each in words(facts, "explain") if each.startswith(LAST_REFUSED)]
    return "; ".join(filter(None, (summary(facts), *refused, word(facts, "remedy"))))


ORDERS: Final[tuple[click.Command, ...]] = (
    *(start, stop, prim, second, swap, restart, resync, mount, unmount),
)
