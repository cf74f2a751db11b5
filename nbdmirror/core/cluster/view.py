"""What a controller sees at one moment: its engine, its peer, what runs here, what was asked for.

Owns the shapes and how an engine's state becomes one of them. Everything here is a fact; what
follows from it is the policy's. Must never hold anything that the policy does not look at.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# What an engine recommends to whoever commands it by hand, and the order that does it here.
BY_HAND = "nbdmirror engine promote --force"
BY_ORDER = "nbdmirror prim --force"
NO_SESSION = ""
NEGOTIATING = "negotiating"
SYNCED = "synced"


class Role(StrEnum):
    """What users know."""

    STOP = "STOP"
    WAIT = "WAIT"
    ALONE = "ALONE"
    PRIM = "PRIM"
    SECOND = "SECOND"


class Readiness(StrEnum):
    """How far a role is what it says."""

    READY = "ready"
    TRANSIENT = "transient"
    NOT_READY = "not-ready"


class Service(StrEnum):
    """Application, mount, device and addresses, taken together."""

    DOWN = "down"
    ENTERING = "entering"
    UP = "up"
    LEAVING = "leaving"
    FAILED = "failed"  # what did come up of it is still there


class Verdict(StrEnum):
    """What the arbiter says about going on without the peer."""

    UNASKED = "unasked"
    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"  # asked, and no clear answer


class Standing(StrEnum):
    """Whom the record of an arbiter with a memory names, as far as it was read a moment ago."""

    UNREAD = "unread"
    MINE = "mine"
    NOBODY = "nobody"
    PEER = "peer"


class OrderKind(StrEnum):
    """What an operator or a checker may want of a running node."""

    PRIM = "prim"
    SWAP = "swap"
    RESTART = "restart"
    STOPSTART = "stopstart"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine's state, as far as decisions need it. `phase` is "" without a session.

    `asks`: clients wait, and nothing that is under way will end that. `met`: its last session was
    in sync, it ended, and nothing was decided over it since. `held`: a freeze is past its bound.
    `claim_unsettled`: it may have been won, and nobody is met before that is known.
    """

    instance: str
    epoch: int
    primary: bool
    data_state: str
    generation: str
    frozen: bool
    asks: bool
    right_alone: bool
    failed: str
    phase: str
    met: bool
    peer_primary: bool
    peer_attended: bool
    peer_outdated: bool
    promote_refusal: str
    was_primary: bool
    stop_first: bool
    split: bool
    refusal: str
    changing: str
    claim_unsettled: bool = False
    held: bool = False

    @property
    def synced(self) -> bool:
        """Whether both copies are equal and connected."""
        return self.phase == SYNCED


@dataclass(frozen=True, slots=True)
class Peer:
    """The peer's controller, as its newest heartbeat has it. All defaults: never heard.

    `heard`: a fresh one came within the silence. `candidate` is the node id that it would make
    primary, 0 for none; `facts_seen` is the `facts_id` of this node that it knew then.
    """

    heard: bool = False
    ever_heard: bool = False
    role: str = ""
    readiness: str = ""
    wanted: bool = False
    engine: bool = False
    primary: bool = False
    promotable: bool = False
    was_primary: bool = False
    passive: bool = False
    held_back: bool = False
    candidate: int = 0
    facts_id: str = ""
    facts_seen: str = ""
    swap_to: int = 0
    deposed: bool = False
    stop_both: bool = False
    service: str = Service.DOWN


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration and the operator's switches say.

    `memory`: the arbiter has one, so the right to serve alone comes from its record.
    """

    node_id: int
    peer_id: int
    peer_name: str = "the other node"
    preferred_id: int = 0
    preferred_last: bool = False
    takeover: bool = True
    failover: bool = True
    memory: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """One moment. `order` is what is being carried out, `order_from` who asked for it and why.

    `wanted`: the operator wants this node up. `stop_both`: the peer is to stop first, once nothing
    is written here any more, so that both copies end equal. `held_back`: why it may not be primary
    now, "" if it may. `engine_given_up`: why no engine is started any more. `spoken`: the words of
    leaving for the engine that died were tried. `asked_peer`: the peer was asked to leave in this
    freeze. `served`: it took the role, and has not given it up in order. `forced`: the order is to
    be carried out against what the metadata says. `hesitates`: the peer is silent, but not yet for
    so long that one which lives and serves would have asked the arbiter before this node.
    `gave_way`: this node stepped back for its peer, and the two have not met since.
    """

    settings: Settings
    wanted: bool = True
    stop_reason: str = ""
    stop_both: bool = False
    engine: Engine | None = None
    engine_given_up: str = ""
    died_serving: bool = False
    spoken: bool = True
    peer: Peer = field(default_factory=Peer)
    listening: bool = False
    served: bool = False
    service: Service = Service.DOWN
    service_reason: str = ""
    leftovers: bool = False
    before_down: str = ""
    verdict: Verdict = Verdict.UNASKED
    verdict_reason: str = ""
    asked_peer: bool = False
    held_back: str = ""
    order: OrderKind | None = None
    order_from: str = ""
    forced: bool = False
    hesitates: bool = False
    gave_way: bool = False
    record: Standing = Standing.UNREAD
    record_reason: str = ""
    swap_to: int = 0
    facts_id: str = ""


def engine_of(state: Mapping[str, Any]) -> Engine:
    """The view of an engine from the answer to `state`; a field that is missing is its zero."""
    session = state.get("session") or {}
    flags = state.get("flags") or []
    return Engine(
        instance=str(state.get("instance", "")),
        epoch=int(state.get("epoch", 0)),
        primary=state.get("role") == "primary",
        data_state=str(state.get("data_state", "")),
        generation=str(state.get("generation", "")),
        frozen=bool(state.get("frozen")),
        asks=state.get("question") == "frozen",
        right_alone=bool(state.get("right_alone")),
        failed=str(state.get("failed", "")),
        phase=str(session.get("phase", "")),
        met=bool(state.get("last_session")),
        peer_primary=bool(session.get("peer_primary")),
        peer_attended=bool(session.get("peer_attended")),
        peer_outdated="peer_outdated" in flags,
        promote_refusal=str(state.get("promote_refusal", "")).replace(BY_HAND, BY_ORDER),
        was_primary="was_primary" in flags,
        stop_first=bool(state.get("stop_first")),
        split="split" in flags,
        refusal=str(state.get("refusal", "")).replace(BY_HAND, BY_ORDER),
        changing=str(state.get("changing", "")),
        claim_unsettled=bool(state.get("claim_unsettled")),
        held=bool(state.get("held")),
    )
