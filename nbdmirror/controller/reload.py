"""A changed configuration, while the controller runs: what would change, and what can at once.

Owns the comparison and the list of keys that take effect online. Must never apply half of what can
be applied, or anything of a file with a mistake in it.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from blake3 import blake3
from pydantic import BaseModel

from nbdmirror.config import Config, load
from nbdmirror.core.cluster.body import PIECE_CHARS, PIECES_MAX, Body, Piece
from nbdmirror.core.messages import printable
from nbdmirror.errors import RefusedError

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

# The first part of the keys that take effect at once.
ONLINE: Final = frozenset({"takeover", "preferred", "ping", "application", "checkers"})
ONLINE_KEYS: Final = frozenset({"controller.actions_max", "controller.actions_window_h"})
FIXED: Final = frozenset({"mirror", "key_file", "arbiter", "me", "peer", "device"})
CONFIG_ID_CHARS: Final = 16
DIGEST_CONTEXT: Final = "nbdmirror configuration 1"
COMMANDS: Final = frozenset({"application", "checkers"})
# What each node has for itself, although the file is the same otherwise.
OWN_KEYS: Final = frozenset({"engine.user"})
DIFFERENCE_CHARS_MAX: Final = 400


def facts_of(config: Config) -> dict[str, str]:
    """The configuration as flat text, each key with its value; without the key itself."""
    parts: dict[str, Any] = {
        "mirror": config.mirror,
        "key_file": str(config.key_file),
        "arbiter": config.arbiter.word,
        "takeover": config.takeover,
        "preferred": config.preferred,
        "device": config.device,
        "engine": config.engine,
        "ping": config.ping,
        "etcd": config.etcd,
        "s3": config.s3,
        "azure-blob": config.azure_blob,
        "controller": config.controller,
        "mount": config.mount,
        "application": config.application,
        "virtual_addresses": list(config.virtual_addresses),
        "checkers": list(config.checkers),
        "export.tcp": str(config.export_tcp) if config.export_tcp else None,
    }
    for node in sorted((config.me, config.peer), key=lambda each: each.id):
        parts[f"node.{node.name}"] = {
            "id": node.id,
            "address": str(node.address),
            "heartbeats": [str(each) for each in node.heartbeats],
            "probe": str(node.probe) if node.probe else None,
            "data_dir": str(node.data_dir),
            "run_dir": str(node.run_dir),
        }
    return dict(flat("", parts))


def shared_facts(config: Config) -> dict[str, str]:
    """Of these what the files of both nodes have to say alike."""
    return {key: value for key, value in facts_of(config).items() if key not in OWN_KEYS}


def flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Rows of (dotted key, JSON)."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flat(f"{prefix}.{key}" if prefix else key, each)
        return
    if isinstance(value, list):
        value = [
            each.model_dump(mode="json", exclude_defaults=True)
            if isinstance(each, BaseModel)
            else each
            for each in value
        ]
    yield prefix, json.dumps(value, sort_keys=True, default=str)


def config_id(config: Config) -> str:
    """What both nodes have in common when their files say the same."""
    text = json.dumps(shared_facts(config), sort_keys=True)
    return blake3(text.encode()).hexdigest()[:CONFIG_ID_CHARS]


class Comparison:
    """The configurations of two nodes, carried over by heartbeats, a piece in each.

    Heartbeats are not encrypted, and a command may hold a password: of those only a keyed digest
    is said, so that two can be found to differ and not be read.
    """

    def __init__(self, facts: dict[str, str], key: bytes) -> None:
        secret = blake3(key, derive_key_context=DIGEST_CONTEXT).digest()
        self._facts = {
            name: blake3(value.encode(), key=secret).hexdigest()[:CONFIG_ID_CHARS]
            if name.partition(".")[0] in COMMANDS
            else value
            for name, value in facts.items()
        }
        facts = self._facts
        text = json.dumps(facts, sort_keys=True)
        size = PIECE_CHARS
        self._pieces = [text[at : at + size] for at in range(0, len(text), size)][:PIECES_MAX]
        self._next = 0
        self._theirs: dict[int, str] = {}
        self._of = ("", 0)
        self.differences: list[str] = []

    def piece(self) -> Piece:
        """The next one to say."""
        index, count = self._next, len(self._pieces)
        self._next = (index + 1) % count
        return Piece(index=index, count=count, text=self._pieces[index])

    def take(self, body: Body) -> None:
        """What the peer's heartbeat brings; `differences` is new when all of it is there."""
        piece = body.piece
        if piece is None:
            if self._of != (body.config, 0):
                self._of, self._theirs, self.differences = (body.config, 0), {}, []
            return
        if self._of != (body.config, piece.count):
            self._of, self._theirs = (body.config, piece.count), {}
        self._theirs[piece.index] = piece.text
        if len(self._theirs) == piece.count:
            self.differences = self._compared("".join(self._theirs[n] for n in range(piece.count)))

    def _compared(self, text: str) -> list[str]:
        try:
            theirs = json.loads(text)
        except (ValueError, RecursionError):
            return []
        if not isinstance(theirs, dict):
            return []
        keys = sorted({*self._facts, *map(str, theirs)})
        return [
            self._difference(key, theirs) for key in keys if self._facts.get(key) != theirs.get(key)
        ]

    def _difference(self, key: str, theirs: dict[str, Any]) -> str:
        if key.partition(".")[0] in COMMANDS:
            return f"{key}: is another one there"
        here, there = self._facts.get(key, "not set"), theirs.get(key, "not set")
        return printable(f"{key}: here {here}, there {there}")[:DIFFERENCE_CHARS_MAX]


def plan_of(conductor: "Conductor", *, dry_run: bool) -> dict[str, Any]:
    """What the file says now against what is in force; applied unless `dry_run`.

    Raises:
        ConfigError: the file has mistakes. RefusedError: it has become another mirror's.
    """
    old = conductor.config
    new = load(old.source, old.me.name)
    before, after = facts_of(old), facts_of(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    plan = [
        {"key": key, "old": before.get(key, ""), "new": after.get(key, ""), "how": how(key)}
        for key in keys
    ]
    impossible = [row["key"] for row in plan if row["how"].startswith("not possible")]
    if not dry_run and impossible:
        raise RefusedError(
            f"{', '.join(impossible)}: cannot be changed in a mirror that exists; nothing was "
            "applied; undo that in the file"
        )
    if dry_run:
        return {"plan": plan, "done": "nothing was changed"}
    # What the two files say is compared: a node that waits for its restart has the same file.
    conductor.reconfigure(merged(old, new), config_id(new))
    later = sum(row["how"] != "online" for row in plan)
    return {"plan": plan, "done": told(len(plan) - later, later)}


def told(online_count: int, later_count: int) -> str:
    """What became of the changes, in one sentence."""
    done = "1 change is" if online_count == 1 else f"{online_count} changes are"
    if not later_count:
        return f"{done} in force"
    return f"{done} in force, {later_count} {'waits' if later_count == 1 else 'wait'} for a restart"


def how(key: str) -> str:
    """When a changed key takes effect."""
    first = key.partition(".")[0]
    if first in ONLINE or key in ONLINE_KEYS:
        return "online"
    if first == "arbiter":
        return "not possible by `apply`: `nbdmirror arbiter move` on both nodes, in sync"
    if first in FIXED or key.endswith(".id"):
        return "not possible: fixed when the mirror was created"
    if key == "engine.user":
        return "restart the engine: `nbdmirror stop`, then `nbdmirror start`"
    if first in {"engine", "export"}:
        return "restart the node: `nbdmirror stop`, then the controller, then `nbdmirror start`"
    return "restart the controller"


def merged(old: Config, new: Config) -> Config:
    """What can take effect now, with the rest as it was."""
    limits = old.controller.model_copy(
        update={
            "actions_max": new.controller.actions_max,
            "actions_window_h": new.controller.actions_window_h,
        }
    )
    return replace(
        old,
        takeover=new.takeover,
        preferred=new.preferred,
        ping=new.ping,
        application=new.application,
        checkers=new.checkers,
        controller=limits,
        # Read from the file by whoever starts an engine; from here on it is no change any more.
        engine=old.engine.model_copy(update={"user": new.engine.user}),
    )
