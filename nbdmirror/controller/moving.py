"""A running mirror moves to another arbiter: `nbdmirror arbiter move`, typed on both nodes.

Owns the order, each part of which can be the last one for a while (tests/model/moving.py): the old
record says "moved", so nobody claims from it any more; the record in the new store is made; this
node stores that it asks the new one. The first two are done by whichever node comes first. Must
never begin unless both nodes are in sync, or let a node ask the new store before the old one is
closed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.arbiters.choose import open_store
from nbdmirror.arbiters.port import RecordStore
from nbdmirror.config import Config, load
from nbdmirror.controller.reload import facts_of
from nbdmirror.controller.scribe import drive
from nbdmirror.core.cluster.body import BRIEF_CHARS_MAX
from nbdmirror.core.cluster.claiming import Claimant
from nbdmirror.core.cluster.view import SYNCED
from nbdmirror.core.superblock import ARBITER_IDENTITY_BYTES, ArbiterKind
from nbdmirror.errors import ArbiterError, NbdMirrorError, RefusedError

if TYPE_CHECKING:
    from nbdmirror.controller.conductor import Conductor

State = dict[str, Any]
ABOUT: Final = frozenset({"arbiter", "ping", "etcd", "s3", "azure-blob"})
PROOFS_MAX: Final = 3
NO_STORE: Final = bytes(ARBITER_IDENTITY_BYTES).hex()


@dataclass(frozen=True, slots=True)
class Situation:
    """What a move depends on. `peer_asks`: the peer's heartbeat says that it asks the new store."""

    state: State
    new: Config
    identity: str
    in_sync: bool
    peer_asks: bool
    old_is_gone: bool


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
    store = open_store(new, c.scribe.mirror_id) if new.arbiter.has_memory else None
    try:
        identity = (await store.identity()).hex() if store is not None else NO_STORE
        said = c.peer_body.arbiter if c.peer_body is not None and c.peer_heard() else ""
        s = Situation(
            state=state,
            new=new,
            identity=identity,
            in_sync=(state.get("session") or {}).get("phase") == SYNCED,
            peer_asks=said == arbiter_of(new.arbiter.word, identity),
            old_is_gone=old_is_gone,
        )
        return await moved(c, s, store)
    finally:
        if store is not None:
            await store.close()


async def moved(c: "Conductor", s: Situation, store: RecordStore | None) -> str:
    """Close, make, adopt: each only if what it depends on is so."""
    word = s.new.arbiter.word
    if (s.state.get("arbiter"), s.state.get("arbiter_identity")) == (word, s.identity):
        await c.rearm(s.new)
        return f"this node asks {word} already"
    await close_old(c, s)
    counter = await make_new(c, s, store) if store is not None else 0
    # What the old one still has on its way must not reach an engine that asks the new one.
    await c.scribe.close()
    try:
        await c.command(
            "move-arbiter", arbiter=word, identity=s.identity, counter=counter, meet=s.peer_asks
        )
    except NbdMirrorError:
        await c.rearm(c.config)
        raise
    await c.rearm(s.new)
    if s.peer_asks:
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


async def close_old(c: "Conductor", s: Situation) -> None:
    """Let nobody claim from the old record any more. Raises RefusedError, ArbiterError."""
    if s.peer_asks:
        return  # the peer has closed it, before it asked the new one
    asks = ArbiterKind.of_word(str(s.state.get("arbiter")))
    if asks.has_memory and not s.old_is_gone:
        await c.scribe.close_record(in_sync=s.in_sync)
    elif not s.in_sync:
        raise RefusedError(
            "arbiter move: the nodes are not in sync; each would ask another one meanwhile"
        )


async def make_new(c: "Conductor", s: Situation, store: RecordStore) -> int:
    """Make the new record, or find it; its counter."""
    claimant = Claimant(c.scribe.mirror_id, c.config.me.id)
    path = claimant.move_in(s.state, in_sync=s.in_sync, peer_asks=s.peer_asks)
    outcome = await drive(path, store, no_command)
    if not outcome.won:
        raise RefusedError(f"arbiter move: {store.where}: {outcome.reason}")
    return await proven(store)


async def proven(store: RecordStore) -> int:
    """The counter of a record that this node could claim. The peer may write it as it is meanwhile:
    it does so at the beginning of each life of its controller, and after its own move.

    Raises:
        ArbiterError: it could not, or something else writes there again and again.
    """
    for tries_left in reversed(range(PROOFS_MAX)):
        held = await store.read()
        if held is None:
            raise ArbiterError(f"{store.where}: the record was removed as soon as it was made")
        try:
            return (await store.prove(held)).record.counter
        except ArbiterError:
            if not tries_left or await store.read() == held:
                raise
    raise AssertionError


async def no_command(name: str, _args: State) -> State:
    """Nothing of the move in a store is for the engine."""
    raise AssertionError(name)
