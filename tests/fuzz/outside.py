"""Parsers of datagrams, texts and commands: heartbeats, the control socket, tokens, configurations.

Owns their seeds and seals, and one real engine in this process for the commands: what a line does
to a stand-in says little about an engine.
"""

import asyncio
import base64
import json
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Generator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, cast

from nbdmirror import admin, config
from nbdmirror import token_exchange as tokens
from nbdmirror.config_fields import Address
from nbdmirror.control import ControlServer
from nbdmirror.core.checks import keyed_hash
from nbdmirror.core.cluster import body, heartbeat
from nbdmirror.core.cluster.heartbeat import Ends, Link, Packet
from nbdmirror.engine import Engine
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    PeerProtocolError,
    PeerRefusedError,
    RefusedError,
)  # fmt: skip
from nbdmirror.jsonlines import parse
from nbdmirror.limits import MIB
from tests.fuzz.mutate import by_fields, changed_json, changed_lines
from tests.fuzz.parser import Parser

ID: Final = b"m" * 16
ANSWER_S: Final = 60.0
DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

# --- heartbeats --------------------------------------------------------------------------------

HEART_KEY: Final = heartbeat.derive_mac_key(bytes(range(32)))
NONCE: Final = b"n" * 16


def packet(**changes: Any) -> bytes:
    """What the peer would send."""
    values: dict[str, Any] = {
        "mirror_id": ID, "node_id": 2, "link": 0, "nonce": b"o" * 16, "seq": 5,
        "echo_nonce": NONCE, "echo_seq": 2, "echo_held_us": 100, "body": b'{"v":1}',
    } | changes  # fmt: skip
    return heartbeat.encode(HEART_KEY, Packet(**values))


def heartbeat_seeds() -> Sequence[bytes]:
    """Datagrams that count, and some that do not."""
    return [packet(), packet(echo_nonce=bytes(16)), packet(body=b""), packet(node_id=1)]


def sealed_datagram(data: bytes) -> bytes:
    """The MAC, and the length of the body where there is room to say it."""
    signed = data[: -heartbeat.MAC_BYTES]
    if len(signed) >= heartbeat._HEADER_BYTES:
        count = (len(signed) - heartbeat._HEADER_BYTES) % (1 << 16)
        at = heartbeat._BODY_BYTES_AT
        signed = signed[:at] + count.to_bytes(2, "big") + signed[at + 2 :]
    return signed + keyed_hash(HEART_KEY, signed)


def feed_datagram(data: bytes) -> bool:
    """A refused datagram is counted and changes nothing that is heard."""
    link = Link(Ends(HEART_KEY, ID, 1, 2, NONCE), 0, 1500)
    link.packet(1, b"", 0.0)
    link.packet(2, b"", 10.0)
    taken = link.take(data, 20.0)
    if taken is None:
        assert link.newest is None
        assert link.heard_ms is None
        heartbeat.decode(HEART_KEY, data)
        return False
    assert link.newest is not None
    assert (link.newest.node_id, link.newest.mirror_id, link.newest.body) == (2, ID, taken)
    link.packet(3, taken, 30.0)
    return True


def body_seeds() -> Sequence[bytes]:
    """One that says little and one that says everything."""
    full = body.Body(
        v=1, role="PRIM", readiness="ready", reason="because", wanted=True, engine=True,
        primary=True, candidate=2, facts_id="ab", facts_seen="cd", swap_to=1, service="up",
        data_state="uptodate", config="0f", piece=body.Piece(index=1, count=3, text="x = 1"),
        ask=body.Ask(id="1a", generation="ff"), please="1", refused="2", done="3",
        answer=body.Answer(id="2b", stay=True, session="3", reason="so"),
        word=body.Word(id="3c", generation="ee", session="4"),
    )  # fmt: skip
    return [body.encode(full), body.encode(body.Body())]


def feed_body(data: bytes) -> bool:
    """What is accepted can be said again, shows nothing that steers a terminal, and is bounded."""
    taken = body.decode(data)
    assert taken.reason.isprintable()
    assert len(body.encode(taken)) <= heartbeat.BODY_BYTES_MAX
    body.peer_of(taken, heard=True)
    return True


# --- the control socket ------------------------------------------------------------------------

COMMANDS: Final = (
    *("promote", "demote", "alone", "claim", "claimed", "confirm-joint", "recorded", "seen"),
    *("named", "reconnected", "resync", "drain", "discard", "give-up", "kept-discard"),
    *("kept-limit", "accept-peer", "stay", "leave", "peer-left", "state", "attach", "relay"),
)
ARGUMENTS: Final[dict[str, Any]] = {
    "generation": "0f" * 16, "counter": 1, "won": True, "reachable": True, "force": False,
    "session": "1f", "payload": "00ff", "bytes": 4096, "keep": True,
}  # fmt: skip


class Answers:
    """As much of a stream's writer as an answer needs."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.data += data

    async def drain(self) -> None:
        """Nothing waits."""


class Commanded:
    """A real engine without nbdkit, and a control server in front of it. Made once a process."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nm"))
        key = self.root / "key"
        key.touch(0o600)
        key.write_bytes(bytes(32))
        host = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(254) + 1}"
        text = f'mirror = "demo"\nkey_file = "{key}"\narbiter = "none"\n[device]\n' + "".join(
            f'[node.{name}]\nid = {n}\naddress = "{host}.{n}:7789"\n'
            f'data_dir = "{self.root / name}"\nrun_dir = "{self.root / name}"\n'
            for n, name in ((1, "alpha"), (2, "beta"))
        )
        path = self.root / "demo.toml"
        path.write_text(text)
        for name in ("alpha", "beta"):
            (self.root / name).mkdir(mode=0o700)
        loaded = config.load(path, "alpha")
        admin.create(loaded, MIB, join=False, adopt=False, sparse=True)
        self.engine = Engine(loaded)
        self.engine.start()
        self.server = ControlServer(self.engine)

    def answer(self, line: bytes) -> dict[str, Any]:
        """What the engine answers."""
        writer = Answers()
        asked = self.server._answer(1, line, cast("asyncio.StreamWriter", writer))
        going_on = asyncio.run_coroutine_threadsafe(asked, self.engine.loop).result(ANSWER_S)
        assert going_on
        assert writer.data.endswith(b"\n")
        assert writer.data.count(b"\n") == 1, "not one line"
        said: dict[str, Any] = json.loads(writer.data)
        return said


@cache
def commanded() -> Commanded:
    """The one of this process; its files go with the directory of the run."""
    return Commanded()


def forget_engine() -> None:
    """Remove the files of the engine of this process, which ends now."""
    if commanded.cache_info().currsize:
        shutil.rmtree(commanded().root, ignore_errors=True)


NOW: Final = "NOW"


def control_seeds() -> Sequence[bytes]:
    """Every command; instance and epoch are put in when it is fed, where it says NOW."""
    return [
        json.dumps(
            {"id": 1, "command": each, "instance": NOW, "epoch": NOW, "args": ARGUMENTS}
        ).encode()
        for each in COMMANDS
    ]


def feed_control(data: bytes) -> bool:
    """Each line has one answer, and none of them is an accident inside the engine."""
    line = data.replace(b"\n", b" ")
    try:
        request = parse(line)
        # An engine that stops ends its process, and one that tells events does so for ever.
        if request["command"] in ("stop", "events"):
            return False
    except RefusedError:
        request = {}
    there = commanded()
    for name, now in (
        ("instance", there.engine.instance.hex()),
        ("epoch", there.engine.node.epoch),
    ):
        if request.get(name) == NOW:
            request[name] = now
            line = json.dumps(request).encode()
    said = there.answer(line)
    error = said.get("error")
    if error is None:
        return True
    assert "inside the engine" not in error["reason"], error["reason"]
    assert error["kind"].endswith("Error")
    return False


def changed_command(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """Mostly the arguments: in a request of another form none of them is looked at."""
    if rng.random() < 0.5:
        tree = json.loads(rng.choice(control_seeds()))
        changed = changed_json(rng, json.dumps(ARGUMENTS).encode(), [b"{}"])
        return json.dumps(tree).encode().replace(json.dumps(ARGUMENTS).encode(), changed)
    return changed_json(rng, data, pool)


# --- tokens and the exchange -------------------------------------------------------------------

SECRET: Final = bytes(range(16))


def token_seeds() -> Sequence[bytes]:
    """A token with an address of each kind."""
    made = [tokens.Token(Address(h, 7790), SECRET) for h in ("10.0.0.1", "fd00::2")]
    return [each.text().encode() for each in made]


def sealed_token(data: bytes) -> bytes:
    """The checksum of what the characters say."""
    plain = "".join(c for c in data.decode("latin-1").upper() if c in tokens_alphabet())
    try:
        raw = base64.b32decode(plain + "=" * (-len(plain) % 8))
    except ValueError:
        return data
    content = raw[: -tokens.CRC_BYTES]
    return tokens._base32(content + tokens._crc(content)).encode() if content else data


def tokens_alphabet() -> str:
    """What a token is made of."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def feed_token(data: bytes) -> bool:
    """What is accepted is spelled in one way only."""
    text = data.decode("utf-8", "replace")
    token = tokens.parse_token(text)
    assert tokens.parse_token(token.text()) == token
    return True


OFFER: Final = tokens.Offer(
    mirror="demo", inviter="alpha", configuration='mirror = "demo"\n', key="ab" * 32,
    size_bytes=MIB, sparse=True,
)  # fmt: skip
KINDS: Final = tuple(tokens.Kind)
SENDERS: Final = {
    tokens.Kind.WELCOME: b"inviter", tokens.Kind.ACCEPT: b"joiner",
    tokens.Kind.OFFER: b"inviter", tokens.Kind.OUTCOME: b"joiner",
}  # fmt: skip


def exchange_seeds() -> Sequence[bytes]:
    """Which message is another one, whether it is sealed with the right key, and what it says.

    Of a sealed message (from WELCOME on) the plain text.
    """
    plain = {
        tokens.Kind.OFFER: OFFER.model_dump_json().encode(),
        tokens.Kind.OUTCOME: tokens.Outcome(node="beta").model_dump_json().encode(),
        tokens.Kind.HELLO: tokens.MAGIC + b"j" * 32,
        tokens.Kind.CHALLENGE: tokens.MAGIC + b"i" * 32,
    }
    return [
        bytes((place, seal)) + plain.get(kind, b"p" * 32 + b"demo")
        for place, kind in enumerate(KINDS)
        for seal in (0, 1)
    ]


def feed_exchange(data: bytes) -> bool:
    """One message of one exchange is what somebody made up; nothing comes of it."""
    kind, seal, said = (data[0], data[1], data[2:]) if len(data) > 1 else (1, 0, b"")
    target = KINDS[kind % len(KINDS)]
    given = _talk(target, said, sealed=bool(seal & 1))
    honest = said == OFFER.model_dump_json().encode()
    if given is not None and not honest:
        assert given.mirror == "demo", "another mirror than the one that was proven"
    return given is not None


def _talk(target: tokens.Kind, said: bytes, *, sealed: bool) -> tokens.Offer | None:
    """Both sides talk; one message is exchanged for another one on the way."""
    sides: list[Generator[Any, Any, None]] = [
        tokens.joining(SECRET, b"j" * 32), tokens.inviting(SECRET, b"i" * 32, OFFER)
    ]  # fmt: skip
    steps = [next(side) for side in sides]
    offer: tokens.Offer | None = None
    for _ in range(64):
        for who in (0, 1):
            step, other = steps[who], steps[1 - who]
            answer: Any = None
            if isinstance(step, tokens.Send):
                if not (isinstance(other, tokens.Receive) and other.kind == step.kind):
                    continue
                frame = step.frame
                if step.kind == target:
                    frame = _another(step, said, sides[1 - who], sealed=sealed)
                count = tokens.body_bytes(frame[: tokens.HEADER_BYTES], other.kind)
                assert count <= tokens.OFFER_BYTES_MAX
                steps[1 - who] = sides[1 - who].send(frame[tokens.HEADER_BYTES :][:count])
            elif isinstance(step, tokens.Receive):
                continue
            elif isinstance(step, tokens.Offer):
                offer, answer = step, tokens.Outcome(node="beta")
            try:
                steps[who] = sides[who].send(answer)
            except StopIteration:
                return offer
    return offer


def _another(step: tokens.Send, said: bytes, hearer: Any, *, sealed: bool) -> bytes:
    """The message that is sent instead: with a right header; sealed if that is asked for.

    What the one who hears it knows is what a right seal is made from.
    """
    text = said
    if sealed and step.kind in SENDERS:
        talk, sender = hearer.gi_frame.f_locals["talk"], SENDERS[step.kind]
        nonce = (talk._counts[sender] + 1).to_bytes(12, "big")
        text = talk._keys[sender].encrypt(nonce, said, talk._transcript.digest())
    return tokens._HEADER.pack(step.kind, len(text)) + text


def changed_message(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """Now and then another place of the exchange, else what is said there."""
    if rng.random() < 0.1:
        return rng.choice(pool)[:2] + data[2:]
    return data[:2] + changed_json(rng, data[2:], [each[2:] for each in pool])


# --- configuration -----------------------------------------------------------------------------


@cache
def config_file() -> Path:
    """Where the inputs are put; one for each process."""
    return Path(tempfile.mkdtemp(prefix="nm")) / "fuzz.toml"


def forget_config() -> None:
    """Remove it."""
    if config_file.cache_info().currsize:
        shutil.rmtree(config_file().parent, ignore_errors=True)


@cache
def config_seeds() -> Sequence[bytes]:
    """Every example of the documentation, whole and joined to the smallest file."""
    blocks = DOCUMENT.read_text(encoding="utf-8").split("```toml\n")[1:]
    texts = [block.partition("```")[0] for block in blocks]
    smallest = (
        'mirror = "demo"\nkey_file = "/etc/nbdmirror/demo.key"\narbiter = "none"\n'
        '[node.alpha]\nid = 1\naddress = "10.1.0.1:7789"\n'
        '[node.beta]\nid = 2\naddress = "[fd00::2]:7789"\n'
    )
    whole = [*texts, smallest, *(smallest + text for text in texts)]
    return [text.encode() for text in whole if _is_toml(text)]


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def feed_config(data: bytes) -> bool:
    """Every mistake is told, in lines that no terminal takes for orders."""
    path = config_file()
    path.write_bytes(data)
    try:
        config.load(path, "alpha", with_key=False)
    except ConfigError as error:
        shown = str(error).replace("\n", "")
        assert shown.isprintable(), "what the file holds steers the terminal"
        assert len(shown) < 1 << 20
        raise
    return True


CLEAN_UP: Final = (forget_engine, forget_config)
PARSERS: Final = (
    Parser("heartbeat", heartbeat_seeds, feed_datagram,
           (AuthenticationError, PeerRefusedError, PeerProtocolError), sealed_datagram,
           by_fields([(0, 4), (4, 4), (8, 1), (9, 16), (25, 1), (26, 1), (27, 16), (43, 8),
                      (51, 16), (67, 8), (75, 4), (79, 2), (81, 8)]), weight=3),
    Parser("heartbeat-body", body_seeds, feed_body, (PeerProtocolError,), mutate=changed_json,
           weight=3),
    Parser("control", control_seeds, feed_control, (RefusedError,), mutate=changed_command,
           weight=2),
    Parser("token", token_seeds, feed_token, (ConfigError,), sealed_token, weight=2),
    Parser("token-exchange", exchange_seeds, feed_exchange,
           (AuthenticationError, PeerProtocolError), mutate=changed_message, weight=2),
    Parser("configuration", config_seeds, feed_config, (ConfigError,), mutate=changed_lines,
           weight=2),
)  # fmt: skip
