"""A running mirror moves to another arbiter: `nbdmirror arbiter move`, typed on both nodes.

Owns the order, each part of which can be the last one for a while (tests/model/moving.py): the old
record says "moved", so nobody claims from it any more; the record in the new store is made; this
node stores that it asks the new one. The first two are done by whichever node comes first. Must
never begin unless both nodes are in sync, or let a node ask the new store before the old one is
closed.
"""

from typing import TYPE_CHECKING, Any, Final

from nbdmirror.arbiters.choose import open_store
from nbdmirror.config import Config, load
from nbdmirror.controller.reload import facts_of
from nbdmirror.controller.scribe import drive
from nbdmirror.core.cluster.body import BRIEF_CHARS_MAX
from nbdmirror.core.cluster.claiming import Claimant
from nbdmirror.core.cluster.view import SYNCED
from nbdmirror.core.superblock import ARBITER_IDENTITY_BYTES, ArbiterKind
from nbdmirror.errors import ArbiterError, RefusedError

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

State = dict[str, Any]
ABOUT: Final = frozenset({"arbiter", "ping", "etcd", "s3", "azure-blob"})
NO_STORE: Final = bytes(ARBITER_IDENTITY_BYTES).hex()


async def move(c: "Conductor", *, old_is_gone: bool) -> str:
    """Ask the arbiter that the configuration file names now; returns what was done.

    `old_is_gone`: its record cannot be closed, because the store is gone for good. If it is not, a
    node that still asks it may be let go on by it.

    Raises:
        ConfigError: the file has mistakes. RefusedError: it changes more than the arbiter, or the
        nodes are not in sync. ArbiterError: a store cannot be asked; type it again.
    """
    new = load(c.config.source, c.config.me.name)
    require_only_the_arbiter(c.config, new)
    state = c.engine_state
    if state is None:
        raise RefusedError("arbiter move: the engine is not running; `nbdmirror start` first")
    word = new.arbiter.word
    await close_old(c, new, state, old_is_gone=old_is_gone)
    identity, counter = await make_new(c, new, state)
    if (state.get("arbiter"), state.get("arbiter_identity")) == (word, identity):
        await c.rearm(new)
        return f"this node asks {word} already"
    said = c.peer_body.arbiter if c.peer_body is not None else ""
    there = said == arbiter_of(word, identity)
    await c.command("move-arbiter", arbiter=word, identity=identity, counter=counter, meet=there)
    await c.rearm(new)
    if there:
        return f"both nodes ask {word} now"
    return f"this node asks {word} now; type it on {c.config.peer.name}, too"


def arbiter_of(word: str, identity: str) -> str:
    """What a node says of its arbiter in heartbeats: kind, and which one of that kind."""
    return f"{ArbiterKind.of_word(word):02x}{identity}"[:BRIEF_CHARS_MAX]


def require_only_the_arbiter(old: Config, new: Config) -> None:
    """Raises RefusedError with every other key that the file changes."""
    before, after = facts_of(old), facts_of(new)
    keys = {key for key in {**before, **after} if before.get(key) != after.get(key)}
    others = sorted(key for key in keys if key.partition(".")[0] not in ABOUT)
    if others:
        raise RefusedError(
            f"arbiter move: the file changes {', '.join(others)}, too; one thing at a time: "
            "`nbdmirror apply`, or undo that"
        )


async def close_old(c: "Conductor", new: Config, state: State, *, old_is_gone: bool) -> None:
    """Let nobody claim from the old record any more. Raises RefusedError, ArbiterError."""
    in_sync = (state.get("session") or {}).get("phase") == SYNCED
    asked = state.get("arbiter") == c.config.arbiter.word
    if c.config.arbiter.has_memory and asked and not old_is_gone:
        await c.scribe.close_record(in_sync=in_sync)
    elif not in_sync and state.get("arbiter") != new.arbiter.word:
        raise RefusedError(
            "arbiter move: the nodes are not in sync; each would ask another one meanwhile"
        )


async def make_new(c: "Conductor", new: Config, state: State) -> tuple[str, int]:
    """Make the new record, or find it; the identity of its store, and its counter."""
    if not new.arbiter.has_memory:
        return NO_STORE, 0
    mirror_id = c.scribe.mirror_id
    store = open_store(new, mirror_id)
    try:
        identity = (await store.identity()).hex()
        claimant = Claimant(mirror_id, c.config.me.id)
        outcome = await drive(claimant.move_in(state), store, no_command)
        if not outcome.won:
            raise RefusedError(f"arbiter move: {store.where}: {outcome.reason}")
        held = await store.read()
        if held is None:
            raise ArbiterError(f"{store.where}: the record was removed as soon as it was made")
        held = await store.prove(held)
    finally:
        await store.close()
    return identity, held.record.counter


async def no_command(name: str, _args: State) -> State:
    """Nothing of the move in a store is for the engine."""
    raise AssertionError(name)
