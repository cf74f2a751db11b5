"""The commands that ask the controller: status, reasons, events; its switches, its configuration.

Owns: the exit codes of `status --quiet`, and when a watch ends. Must never decide anything that the
controller decides. The orders are in `orders`.

`nbdmirror status --quiet` ends with the code of the role (`ROLE_CODES`), 5 when no controller
answers, 6 when there is no such mirror. Everything else ends with the codes of nbdmirror/errors.py.
"""

import json
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.live import Live

from nbdmirror.control_client import ControlClient
from nbdmirror.errors import ConfigError, NbdMirrorError, UnreachableError
from nbdmirror_cli.engine import _confirm as confirm
from nbdmirror_cli.options import (
    Source,
    Wanted,
    config_options,
    error_facts,
    json_option,
    late_config_options,
    print_json,
)
from nbdmirror_cli.orders import ORDER_TIMEOUT_S, ORDERS, controller, yes_option
from nbdmirror_cli.status_view import (
    Facts,
    Screen,
    event_line,
    explanation,
    explanation_view,
    parts,
    plan_view,
    status_view,
    summary,
    switches_text,
    word,
)
from nbdmirror_cli.view import printable

ROLE_CODES: Final = {"STOP": 0, "WAIT": 1, "ALONE": 2, "PRIM": 3, "SECOND": 4}
NO_CONTROLLER: Final = 5
UNKNOWN_MIRROR: Final = 6
WATCH_S: Final = 1.0


# --- status ---------------------------------------------------------------------------------------


@click.command("status")
@late_config_options
@click.option("--watch", is_flag=True, help="Go on showing it, each second, until interrupted.")
@click.option(
    "-q", "--quiet", is_flag=True, help="Print the role alone, and end with its exit code."
)
@json_option
def status(wanted: Wanted, *, watch: bool, quiet: bool, as_json: bool) -> int:
    """Show role, readiness, peer, data, service, checkers and the promise in force.

    \b
    Exit codes with --quiet:
      0 STOP   1 WAIT   2 ALONE   3 PRIM   4 SECOND
      5 no controller answers   6 there is no such mirror

    Without --quiet: 0 if the controller answered. --watch redraws a terminal; without one it prints
    a line for each change, and with --json an object in one line each second.
    """
    if quiet and (watch or as_json):
        raise click.UsageError("--quiet prints one word, once; leave out --watch and --json")
    if quiet:
        return _quiet(wanted)
    with controller(wanted.source()) as client:
        facts = client.call("status")
        if watch:
            _watch(client, facts, as_json=as_json)
        elif as_json:
            print_json(facts)
        else:
            Screen().print(status_view(facts))
    return 0


def _quiet(wanted: Wanted) -> int:
    try:
        source = wanted.source()
    except ConfigError:
        return UNKNOWN_MIRROR  # none is configured, or several are and none was named
    if _is_missing(source.path):
        return UNKNOWN_MIRROR
    try:
        with controller(source) as client:
            facts = client.call("status")
    except UnreachableError:
        return NO_CONTROLLER
    role = word(facts, "role")
    click.echo(role)
    code = facts.get("exit_code")
    newer = code if isinstance(code, int) and 0 <= code <= 255 else NbdMirrorError.exit_code
    return ROLE_CODES.get(role, newer)


def _is_missing(path: Path) -> bool:
    try:
        return not path.exists()
    except OSError:
        return False  # not to be seen; what that means is told when it is read


def _watch(client: ControlClient, facts: Facts, *, as_json: bool) -> None:
    """Show the status until interrupted, or until nobody reads any more."""
    if as_json or not sys.stdout.isatty():
        _watch_lines(client, facts, as_json=as_json)
        return
    with Live(status_view(facts), console=Screen(), auto_refresh=False) as live:
        live.refresh()
        while _somebody_reads(WATCH_S):
            try:
                live.update(status_view(client.call("status")), refresh=True)
            except UnreachableError as error:
                # It may be restarted; who watches wants to see it come back.
                live.update(printable(str(error)), refresh=True)


def _watch_lines(client: ControlClient, facts: Facts, *, as_json: bool) -> None:
    began_s, told = time.monotonic(), ""
    line = json.dumps(facts) if as_json else summary(facts)
    while True:
        if as_json:
            click.echo(line)
        elif line != told:
            click.echo(f"{time.monotonic() - began_s:9.1f} s  {line}")
            told = line
        if not _somebody_reads(WATCH_S):
            return
        try:
            facts = client.call("status")
            line = json.dumps(facts) if as_json else summary(facts)
        except UnreachableError as error:
            known = error_facts("UnreachableError", str(error), error.exit_code)
            line = json.dumps(known) if as_json else printable(str(error))


def _somebody_reads(wait_s: float) -> bool:
    """Wait; False as soon as the other end of standard output is closed."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        threading.Event().wait(wait_s)  # captured by a program that has us inside
        return True
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are always told
    return not poll.poll(wait_s * 1000)


@click.command("explain")
@config_options
@json_option
def explain(source: Source, *, as_json: bool) -> None:
    """Say why this node has its role, why it is not ready, and what to type."""
    with controller(source) as client:
        facts = client.call("status")
    if as_json:
        print_json(explanation(facts))
    else:
        Screen().print(explanation_view(facts))


# --- switches -------------------------------------------------------------------------------------


def _switch_group(name: str, about: str, on: str, off: str) -> click.Group:
    """The group `name` with its two commands. The switch is kept until it is thrown again."""

    @click.group(name, help=about)
    def group() -> None:
        """Its help is given above."""

    def add(word_: str, about_: str, *, state: bool) -> None:
        @group.command(word_, help=about_)
        @config_options
        @json_option
        def throw(source: Source, *, as_json: bool) -> None:
            with controller(source, ORDER_TIMEOUT_S) as client:
                answer = client.call("switch", name=name, on=state)
            if as_json:
                print_json(answer)
                return
            click.echo(word(answer, "done") or f"{name} {word_}")
            click.echo(f"now {switches_text(answer)}")

    add("on", on, state=True)
    add("off", off, state=False)
    return group


checkers_group = _switch_group(
    "checkers",
    "Whether the checkers of this node act. The switch stays, also over a restart.",
    "Let the checkers watch and act again.",
    "Let no checker act, for example while the application is maintained by hand.",
)
failover_group = _switch_group(
    "failover",
    "Whether this node may take over by itself. The switch stays, also over a restart.",
    "Let this node take over by itself when the other one is lost.",
    "Let this node never take over by itself; `nbdmirror prim` still makes it primary.",
)
boot_group = _switch_group(
    "boot",
    "Whether this node starts with its server. The switch stays.",
    "Start this node when its server starts.",
    "Let this node stay stopped when its server starts, until `nbdmirror start`.",
)


# --- events and configuration ---------------------------------------------------------------------


@click.command("events")
@config_options
@click.option(
    "--since", type=click.IntRange(min=0), default=0, help="Only events after this number."
)
@click.option("--no-follow", is_flag=True, help="End after what has happened so far.")
@json_option
def events(source: Source, *, since: int, no_follow: bool, as_json: bool) -> None:
    """Print what happened, then follow what happens, until interrupted or the controller ends.

    Each line has the event's number and its time since the controller started.
    """
    bound_s = ORDER_TIMEOUT_S if no_follow else None
    with controller(source) as client:
        for event in client.events(since=since, timeout_s=bound_s, follow=not no_follow):
            click.echo(json.dumps(event) if as_json else event_line(event))


@click.command("apply")
@config_options
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@yes_option
@json_option
def apply(source: Source, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Let the controller read the configuration again and use what has changed.

    Shows first, key by key, what changes online, what needs a restart of the controller, and what
    is not possible; then asks.
    """
    with controller(source, ORDER_TIMEOUT_S) as client:
        answer = client.call("reload", dry_run=True)
        plan = parts(answer, "plan")
        if plan and not dry_run:
            for line in _plan_lines(plan) if as_json else ():
                click.echo(line, err=True)
            if not as_json:
                Screen().print(plan_view(plan))
            confirm(f"changes: {len(plan)}", "Use the new configuration?", yes=yes)
            answer = client.call("reload", dry_run=False)
        elif plan and not as_json:
            Screen().print(plan_view(plan))
    if as_json:
        print_json(answer)
    else:
        click.echo(word(answer, "done") if plan else "the configuration has not changed")


def _plan_lines(plan: list[Facts]) -> Iterator[str]:
    for each in plan:
        old, new = word(each, "old") or "-", word(each, "new") or "-"
        yield f"{word(each, 'key')}: {old} -> {new}: {word(each, 'how')}"


COMMANDS: Final[tuple[click.Command, ...]] = (
    *(status, explain, *ORDERS, checkers_group, failover_group, boot_group, events, apply),
)
