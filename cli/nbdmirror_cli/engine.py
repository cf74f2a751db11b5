"""`nbdmirror engine`: run the engine of this node, ask it, command it."""

import importlib
import json
import sys
from typing import Any, Final

import click

from nbdmirror.control_client import ControlClient
from nbdmirror.core.cluster.promise import mode_of, no_promise_c, phase_of
from nbdmirror.errors import RefusedError
from nbdmirror.limits import COMMAND_TIMEOUT_MS
from nbdmirror_cli.options import Source, config_options, json_option, print_json
from nbdmirror_cli.view import (
    QUESTIONS,
    bytes_text,
    force_loss,
    given_up,
    print_state,
    printable,
)

# The engine bounds its own work; the answer needs a moment more than the longest of it.
COMMAND_TIMEOUT_S: Final = COMMAND_TIMEOUT_MS / 1000 + 5
_yes_option = click.option("--yes", is_flag=True, help="Do not ask; for scripts.")


@click.group("engine")
def engine_group() -> None:
    """Run, ask and command the engine of this node.

    A command is carried out only if the engine still is what it was when the command was given: the
    same process, in the same role. Otherwise it is refused with exit code 14.
    """


@engine_group.command("run")
@config_options
def run(source: Source) -> int:
    """Run the engine of this node in the foreground, in no role. SIGTERM ends it in order."""
    config = source.load(with_key=True)
    # Only this command needs the engine's modules; the others stay quick and need less.
    launcher = importlib.import_module("nbdmirror.launcher")
    code = launcher.run(config)
    return code if isinstance(code, int) else 0


@engine_group.command("state")
@config_options
@json_option
def state(source: Source, *, as_json: bool) -> None:
    """Show role, mode, data, session, resync, open question and the promise in force."""
    with _client(source) as client:
        facts = client.call("state")
    if as_json:
        print_json(facts)
    else:
        print_state(facts)


@engine_group.command("promote")
@config_options
@click.option(
    "--force", is_flag=True, help="Promote although the rules forbid it; says what may be lost."
)
@_yes_option
@json_option
def promote(source: Source, *, force: bool, yes: bool, as_json: bool) -> None:
    """Make this node primary: it serves NBD clients.

    Refused where writes could be lost; the refusal says which. With --force it is done all the
    same, after the loss was named and confirmed.
    """
    with _client(source) as client:
        facts = client.call("state")
        if force:
            _confirm(force_loss(facts), "Promote this node by force?", yes=yes)
        done = _command(client, facts, "promote", force=force)
    # A planned promotion ends the session; the peer comes back in its new role by itself.
    waits = bool(done.get("frozen")) and phase_of(facts) == "synced"
    mode = "waiting for the peer to return as secondary" if waits else ""
    _tell(done, "promote: this node is primary", mode, as_json=as_json)
    if not as_json:
        click.echo(f"Note: {no_promise_c(str(facts.get('arbiter', 'none')))}")


@engine_group.command("demote")
@config_options
@json_option
def demote(source: Source, *, as_json: bool) -> None:
    """Stop serving clients; what they wrote is flushed. Frozen writes end with an error."""
    _simple(source, "demote", "demote: this node serves no clients any more", as_json=as_json)


@engine_group.command("alone")
@config_options
@json_option
def alone(source: Source, *, as_json: bool) -> None:
    """Answer a freeze: go on without the peer, which is behind from then on.

    There is one copy of what is written until the peer is in sync again.
    """
    _simple(source, "alone", "alone: going on with one copy", as_json=as_json)


@engine_group.command("reconnected")
@config_options
@json_option
def reconnected(source: Source, *, as_json: bool) -> None:
    """Answer a freeze: the link is back, what froze is sent again. Refused if it is not back."""
    _simple(source, "reconnected", "reconnected: the peer is back", as_json=as_json)


@engine_group.command("resync")
@config_options
@json_option
def resync(source: Source, *, as_json: bool) -> None:
    """Compare the whole device with the peer and copy what differs; run it on the source.

    A session that runs is ended for it: writes wait until the peer is back, which takes a moment
    (and is a freeze like any other if it does not come back). Until the copy is done the peer is no
    second copy. Without a peer it is noted, and begins when the peer is met.
    """
    with _client(source) as client:
        facts = client.call("state")
        answer = _command(client, facts, "resync")
    done = "resync: everything is compared with the peer, beginning with a new session"
    if not phase_of(facts):
        done = "resync: noted; the peer is not connected, everything is compared when it is met"
    mode = "waiting for the peer to return" if answer.get("frozen") and phase_of(facts) else ""
    _tell(answer, done, mode, as_json=as_json)


@engine_group.command("drain")
@config_options
@json_option
def drain(source: Source, *, as_json: bool) -> None:
    """Wait until nothing is in flight and everything is durable on every connected node."""
    _simple(source, "drain", "drain: everything is durable", as_json=as_json)


@engine_group.command("stop")
@config_options
@json_option
def stop(source: Source, *, as_json: bool) -> None:
    """Leave in order and end the engine: hand over if the peer stays, flush, mark it clean."""
    _simple(source, "stop", "stop: the engine ends", as_json=as_json)


@engine_group.command("discard")
@config_options
@_yes_option
@json_option
def discard(source: Source, *, yes: bool, as_json: bool) -> None:
    """Give up this node's copy: it becomes blank, and all of it is copied anew from the peer.

    Nothing of it is kept. After a split brain `engine give-up` is the better way.
    """
    with _client(source) as client:
        facts = client.call("state")
        if facts.get("role") == "primary":
            # The engine would say the same; nobody shall confirm a loss for nothing.
            raise RefusedError("discard: this node is primary; demote it first")
        size = bytes_text(facts.get("device_bytes"))
        loss = f"All {size} of this node's copy are given up; whatever only it holds is lost."
        _confirm(loss, "Give up this node's copy?", yes=yes)
        done = _command(client, facts, "discard")
    _tell(done, "discard: this copy is blank now", as_json=as_json)


@engine_group.command("give-up")
@config_options
@click.option("--no-keep", is_flag=True, help="Keep nothing of what this copy holds.")
@_yes_option
@json_option
def give_up(source: Source, *, no_keep: bool, yes: bool, as_json: bool) -> None:
    """Settle a split brain on the side that loses: its copy becomes the peer's.

    Only what differs is copied. What this copy holds there is kept first, and can be had with
    `nbdmirror kept export` until `nbdmirror kept discard`.
    """
    with _client(source) as client:
        facts = client.call("state")
        if facts.get("role") == "primary":
            raise RefusedError("give-up: this node is primary; demote it first")
        _confirm(given_up(facts, keep=not no_keep), "Give up this node's copy?", yes=yes)
        done = _command(client, facts, "give-up", keep=not no_keep)
    kept = "; what it holds is kept" if done.get("is_kept") is True else ""
    _tell(done, f"give-up: this copy is given up{kept}", as_json=as_json)


@engine_group.command("accept-peer")
@config_options
@_yes_option
@json_option
def accept_peer(source: Source, *, yes: bool, as_json: bool) -> None:
    """Accept a peer whose metadata was made anew (a replaced disk or server).

    Run it on the node that survived. The next peer that holds the key is taken for the other node.
    """
    with _client(source) as client:
        facts = client.call("state")
        loss = "Whoever connects next with this mirror's key becomes the other node."
        _confirm(loss, "Accept a new peer?", yes=yes)
        done = _command(client, facts, "accept-peer")
    _tell(done, "accept-peer: the next peer is taken", as_json=as_json)


@engine_group.command("events")
@config_options
@json_option
def events(source: Source, *, as_json: bool) -> None:
    """Print what happened, then follow what happens, until interrupted or the engine ends.

    Each line has the event's number and its time since the engine started.
    """
    with _client(source) as client:
        for event in client.events():
            click.echo(json.dumps(event) if as_json else _event_text(event))


def _client(source: Source) -> ControlClient:
    config = source.load(with_key=False)
    return ControlClient(config.control_socket, COMMAND_TIMEOUT_S)


def _command(
    client: ControlClient, facts: dict[str, Any], name: str, **args: object
) -> dict[str, Any]:
    """Send a command bound to the engine and role that `facts` (its state) describe."""
    instance, epoch = facts.get("instance"), facts.get("epoch")
    return client.call(
        name,
        instance=instance if isinstance(instance, str) else None,
        epoch=epoch if isinstance(epoch, int) else None,
        **args,
    )


def _simple(source: Source, name: str, done: str, *, as_json: bool) -> None:
    with _client(source) as client:
        answer = _command(client, client.call("state"), name)
    _tell(answer, done, as_json=as_json)


def _tell(answer: dict[str, Any], done: str, mode: str = "", *, as_json: bool) -> None:
    """Say that it was done, and what the node is now; `mode` in other words than the state's."""
    if as_json:
        print_json(answer)
        return
    now = f" (now {answer['role']}, {mode or mode_of(answer)})" if "role" in answer else ""
    click.echo(printable(f"{done}{now}"))


def _confirm(loss: str, question: str, *, yes: bool) -> None:
    """Name the loss, always; ask where somebody can answer, refuse where nobody can."""
    click.echo(loss, err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nobody is there to confirm this; add --yes if it is meant")
    if not click.confirm(question, err=True):
        raise RefusedError("not confirmed; nothing was done")


def _event_text(event: dict[str, Any]) -> str:
    kind, at_ms = event.get("event", "?"), event.get("at_ms")
    known = {"event", "number", "at_ms"}
    facts = ", ".join(f"{key}={value}" for key, value in event.items() if key not in known)
    at_s = f"{at_ms / 1000:.3f} s" if isinstance(at_ms, int) else "?"
    text = f"{event.get('number', '?')}  {at_s}  {kind}" + (f": {facts}" if facts else "")
    question = event.get("question")
    hint = f"\n    {QUESTIONS[question]}" if question in QUESTIONS else ""
    return printable(text) + hint
