"""Asks an operator for what the options do not say.

Owns the questions and when nothing may be asked. Must never choose what has no proposal.
"""

from typing import Any, Final

import click

from nbdmirror.config import format_size
from nbdmirror.creation import Plan
from nbdmirror_cli.options import SizeType
from nbdmirror_cli.view import printable

_NEEDED: Final = ("address", "peer_name", "peer_address")


class Questions:
    """Asks for what the options do not say; with --yes nothing is asked."""

    def __init__(self, chosen: dict[str, Any]) -> None:
        self._chosen = chosen
        self._silent: bool = chosen["yes"]
        self._err: bool = chosen["as_json"]  # standard output is for the program that reads it

    def require_what_cannot_be_proposed(self) -> None:
        """Raises UsageError with all that is missing, where nothing can be asked."""
        needed = [*_NEEDED, *([] if self._chosen["adopt"] else ["size"])]
        missing = [each for each in needed if self._chosen[each] is None]
        if self._silent and missing:
            options = ", ".join(f"--{each.replace('_', '-')}" for each in missing)
            raise click.UsageError(f"--yes asks nothing, and these are missing: {options}")

    def __call__(self, key: str, text: str, default: str | None = None) -> str:
        """A name or an address."""
        value = self._chosen[key]
        if value is None:
            value = default if self._silent else self._prompt(text, default)
        return str(value)

    def _prompt(self, text: str, default: Any = None, **more: Any) -> Any:
        return click.prompt(text, default=default, err=self._err, **more)

    def size(self) -> int:
        """Bytes."""
        given = self._chosen["size"]
        return int(self._prompt('Size, like "10GiB"', type=SizeType()) if given is None else given)

    def optional(self, key: str, text: str) -> str | None:
        """None if it is not wanted."""
        value = self._chosen[key]
        if value is None and not self._silent:
            value = self._prompt(f"{text} (empty: none)", "", show_default=False)
        return value or None

    def several(self, key: str, text: str) -> tuple[str, ...]:
        """What is given, or one that is asked for."""
        if given := self._chosen[key]:
            return tuple(given)
        value = (
            None if self._silent else self._prompt(f"{text} (empty: none)", "", show_default=False)
        )
        return (value,) if value else ()

    def number(self, key: str, text: str, proposal: int) -> int:
        """A number that has a proposal."""
        value = self._chosen[key]
        if value is None:
            value = proposal if self._silent else self._prompt(text, proposal, type=int)
        return int(value)

    def say(self, text: str) -> None:
        """A remark on a question."""
        click.echo(printable(text), err=self._err)

    def confirm(self, plan: Plan) -> None:
        """Show what will be made and ask. Raises Abort."""
        if self._silent:
            return
        size = "as the file" if plan.size_bytes is None else format_size(plan.size_bytes)
        self.say(
            f"Mirror {plan.mirror}, {size}: this node is {plan.node} ({plan.address}), the other "
            f"one {plan.peer} ({plan.peer_address}); arbiter {plan.arbiter}, probe port "
            f"{plan.probe_port}."
        )
        click.confirm("Make it?", default=True, abort=True, err=self._err)
