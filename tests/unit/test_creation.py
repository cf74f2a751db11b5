"""The files of a new mirror: the text that is written, the ports that are proposed, all or none."""

import contextlib
import os
import shutil
import socket
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror import certificate, creation
from nbdmirror.config import Config, load
from nbdmirror.config_fields import Address
from nbdmirror.config_text import toml, with_key
from nbdmirror.core.superblock import DataState, Flags
from nbdmirror.creation import Place, Plan, Taken
from nbdmirror.errors import ConfigError, RefusedError, StoreError
from nbdmirror.token_exchange import Offer
from tests.contract.conftest import file_size_limit

MIB = 1 << 20
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
TEXT = """\
# a comment
mirror = "demo"
key_file = "/etc/nbdmirror/demo.key"   # the key
arbiter = "none"

[node."db.alpha"]   # with a dot
id = 1
address = "10.1.0.1:7789"

[node.beta]
id = 2
data_dir = "/old"
address = "10.1.0.2:7789"
[paths]
run_dir = "/run/x"
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: sockets are named in it."""
    path = Path(tempfile.mkdtemp(prefix="nbdm-"))
    yield path
    shutil.rmtree(path)


def plan(directory: Path, **more: Any) -> Plan:
    """The smallest mirror."""
    given: dict[str, Any] = {
        "mirror": "demo",
        "node": "alpha",
        "address": Address("127.0.0.1", 17789),
        "peer": "beta",
        "peer_address": Address("127.0.0.2", 17789),
        "arbiter": "none",
        "size_bytes": 2 * MIB,
        "data_dir": directory / "alpha",
        "run_dir": directory / "run",
    }
    return Plan(**{**given, **more})


def names(directory: Path) -> list[str]:
    """Everything below a directory."""
    return sorted(str(each.relative_to(directory)) for each in directory.rglob("*"))


def offer_of(config: Config, **more: Any) -> Offer:
    """What the first server sends of it."""
    text = config.source.read_text(encoding="utf-8")
    given: dict[str, Any] = {
        "mirror": config.mirror,
        "inviter": config.me.name,
        "configuration": text,
        "key": config.key.hex(),
        "size_bytes": 2 * MIB,
        "sparse": False,
    }
    return Offer(**{**given, **more})


# --- the text ------------------------------------------------------------------------------------


@given(WORD, st.lists(WORD, max_size=5))
def test_what_is_written_reads_as_it_was(word: str, words: list[str]) -> None:
    """Breaks in the field: an argument with a quote in it starts something else."""
    assert tomllib.loads(f"a = {toml(word)}\nb = {toml(words)}\n") == {"a": word, "b": words}


@pytest.mark.slow
@settings(max_examples=25)
@given(words=st.lists(WORD, min_size=1, max_size=5), port=st.integers(1, 65535))
def test_every_choice_is_in_force(words: list[str], port: int) -> None:
    """Breaks in the field: what the operator chose at creation is not what the mirror does."""
    directory = Path(tempfile.mkdtemp(prefix="nbdm-"))
    try:
        chosen = plan(
            directory,
            node="db1.alpha",
            arbiter="ping",
            ping_addresses=("10.0.0.1", "10.0.0.2"),
            mount_point="/srv/demo",
            start=("/usr/bin/start", *words),
            stop=("/usr/bin/stop", *words),
            virtual_addresses=("10.0.0.100/24", "fd00::9/64"),
            probe_port=port,
            heartbeats=((Address("10.9.0.1", 7789), Address("10.9.0.2", 7790)),),
        )
        config = creation.make(chosen, Place(directory / "etc")).config
    finally:
        shutil.rmtree(directory)
    assert (config.mirror, config.me.name, config.peer.name) == ("demo", "db1.alpha", "beta")
    assert (config.me.id, config.peer.id) == (1, 2)
    assert config.ping.addresses == ["10.0.0.1", "10.0.0.2"]
    assert (str(config.mount.point), str(config.probe)) == ("/srv/demo", f"0.0.0.0:{port}")
    assert config.application.start == ["/usr/bin/start", *words]
    assert config.application.stop == ["/usr/bin/stop", *words]
    assert [each.address for each in config.virtual_addresses] == ["10.0.0.100/24", "fd00::9/64"]
    assert list(map(str, config.me.heartbeats)) == ["127.0.0.1:17789", "10.9.0.1:7789"]
    assert list(map(str, config.peer.heartbeats)) == ["127.0.0.2:17789", "10.9.0.2:7790"]
    assert (config.me.data_dir, config.me.run_dir) == (directory / "alpha", directory / "run")


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ((), "key_file"),
        ((), "takeover"),
        (("node", "db.alpha"), "data_dir"),
        (("node", "beta"), "data_dir"),
        (("paths",), "run_dir"),
    ],
)
def test_one_key_is_changed_and_nothing_else(table: tuple[str, ...], key: str) -> None:
    """Breaks in the field: the second server's own path lands in the other node's table."""
    made = with_key(TEXT, table, key, "/new")
    expected: Any = tomllib.loads(TEXT)
    inner = expected
    for step in table:
        inner = inner[step]
    inner[key] = "/new"
    assert tomllib.loads(made) == expected
    assert "# a comment" in made
    assert abs(len(made.splitlines()) - len(TEXT.splitlines())) <= 1


def test_a_key_of_a_table_that_is_not_there(directory: Path) -> None:
    """Breaks in the field: the second server's user of the engine gets into no file."""
    made = with_key(TEXT, ("engine",), "user", "one")
    assert made.startswith(TEXT)
    assert tomllib.loads(made) == {**tomllib.loads(TEXT), "engine": {"user": "one"}}
    with pytest.raises(RefusedError, match='write `user = "one"` there'):
        with_key("engine = { threads = 1 }\n", ("engine",), "user", "one")


@pytest.mark.parametrize(
    "text",
    [
        'node.alpha = { id = 1 }\nkey_file = "k"\n',
        "[node]\nalpha = { id = 1 }\n",
        '[node.alpha]\ndata_dir = """\n/x\n"""\n',
    ],
)
def test_a_text_that_cannot_be_changed_for_sure_is_not(text: str) -> None:
    """Breaks in the field: a file that an operator wrote in another form is spoilt unseen."""
    with pytest.raises(RefusedError, match=r"write `data_dir = \"/new\"` there"):
        with_key(text, ("node", "alpha"), "data_dir", "/new")


# --- all files or none ---------------------------------------------------------------------------


def test_two_servers_belong_together(directory: Path) -> None:
    """Breaks in the field: the second server has another key or file, and the nodes refuse."""
    first = creation.make(plan(directory, sparse=True), Place(directory / "a"))
    place = Place(directory / "b", data_dir=directory / "beta", run_dir=directory / "run-b")
    second = creation.take(offer_of(first.config, sparse=True), place, None)
    assert second.config.key == first.config.key
    assert len(set(first.config.key)) > 8
    assert (second.config.me.name, second.config.peer.name) == ("beta", "alpha")
    assert second.config.me.data_dir == directory / "beta"
    assert second.superblock.mirror_id == first.superblock.mirror_id
    assert first.superblock.data_state is DataState.UPTODATE
    assert second.superblock.data_state is DataState.BLANK
    assert second.superblock.flags & Flags.SPARSE
    for name in ("a", "b"):
        modes = {each.name: each.stat().st_mode & 0o777 for each in (directory / name).iterdir()}
        assert modes == {"demo.toml": 0o644, "demo.key": 0o600}


def test_a_second_server_makes_a_certificate_of_its_own(directory: Path) -> None:
    """Breaks in the field: with `tls = "on"` a node that joins has the key of the first one's TLS,
    or none, and does not start.
    """
    first = creation.make(plan(directory), Place(directory / "a"))
    assert not first.config.tls_certificate.exists()
    text = first.config.source.read_text(encoding="utf-8") + '\n[engine]\ntls = "on"\n'
    place = Place(directory / "b", data_dir=directory / "beta", run_dir=directory / "run-b")
    second = creation.take(offer_of(first.config, configuration=text), place, None)
    assert second.config.tls_certificate == directory / "beta" / "tls.pem"
    assert certificate.read(second.config.tls_certificate).subject == "CN=beta,O=demo"


def test_with_the_same_directory_the_file_is_the_same(directory: Path) -> None:
    """Breaks in the field: the two nodes warn for ever that their configurations differ."""
    first = creation.make(plan(directory), Place(directory / "etc"))
    offer = offer_of(first.config)
    (directory / "etc").rename(directory / "first-server")
    (directory / "alpha").rename(directory / "first-data")
    second = creation.take(offer, Place(directory / "etc"), "beta")
    text = (directory / "first-server" / "demo.toml").read_bytes()
    assert second.config.source.read_bytes() == text


@pytest.mark.parametrize("name", ["demo.toml", "demo.key"])
def test_nothing_is_overwritten(directory: Path, name: str) -> None:
    """Breaks in the field: the key of a mirror that runs is gone."""
    first = creation.make(plan(directory), Place(directory / "a"))
    offer = offer_of(first.config)
    (directory / "b").mkdir()
    (directory / "b" / name).symlink_to("nowhere")
    before = names(directory)
    for _ in range(2):
        with pytest.raises(RefusedError, match=f"{name} exists and is not overwritten"):
            creation.take(offer, Place(directory / "b", directory / "beta"), None)
        with pytest.raises(RefusedError, match=f"{name} exists and is not overwritten"):
            creation.make(plan(directory, data_dir=directory / "c"), Place(directory / "b"))
    assert names(directory) == before
    assert (directory / "b" / name).is_symlink()


@pytest.mark.parametrize("limit", [16, 512, MIB, 3 * MIB])
def test_a_failure_at_any_step_leaves_nothing(directory: Path, limit: int) -> None:
    """Breaks in the field: the second try after a full disk is refused because of the first."""
    with file_size_limit(limit), pytest.raises((StoreError, ConfigError)):
        creation.make(plan(directory, size_bytes=8 * MIB), Place(directory / "etc" / "x"))
    assert names(directory) == []
    creation.make(plan(directory), Place(directory / "etc" / "x"))


def test_a_wrong_choice_leaves_nothing_and_every_mistake_is_told(directory: Path) -> None:
    """Breaks in the field: a configuration that cannot work is left for the next command."""
    wrong = plan(directory, start=("relative",), virtual_addresses=("10.0.0.1",))
    with pytest.raises(ConfigError) as caught:
        creation.make(wrong, Place(directory / "etc"))
    assert str(caught.value).startswith("nothing was made. ")
    assert "application.start" in str(caught.value)
    assert len(caught.value.mistakes) == 2
    assert names(directory) == []


def test_an_interrupt_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: Ctrl-C while the space is reserved leaves a rest that blocks."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        creation.make(plan(directory), Place(directory / "etc"))
    assert names(directory) == []


def test_the_second_server_is_the_one_that_is_free(directory: Path) -> None:
    """Breaks in the field: both servers are node alpha."""
    first = creation.make(plan(directory), Place(directory / "a"))
    place = Place(directory / "b", directory / "beta")
    for node in ("alpha", "gamma"):
        with pytest.raises(RefusedError, match="this server is beta"):
            creation.take(offer_of(first.config), place, node)
    for changes in ({"inviter": "gamma"}, {"configuration": "a = 1"}, {"configuration": "a ="}):
        with pytest.raises(ConfigError, match="configuration of"):
            creation.take(offer_of(first.config, **changes), place, None)
    assert not (directory / "b").exists()
    assert not (directory / "beta").exists()


# --- ports ---------------------------------------------------------------------------------------


def test_ports_of_other_mirrors_are_seen(directory: Path) -> None:
    """Breaks in the field: a second mirror of a server answers the probe of the first one."""
    etc = directory / "etc"
    creation.make(plan(directory, probe_port=19010), Place(etc))
    (etc / "broken.toml").write_text("a = ")
    (etc / "odd.toml").write_text('node = [1]\nprobe = "x"\n')
    (etc / "odder.toml").write_text("[node]\na = 1\n[node.b]\nheartbeats = 7\n")
    others = creation.taken(etc, "second")
    assert others.probe_ports[19010] == str(etc / "demo.toml")
    assert 9010 in others.probe_ports  # what a file without the key has
    assert others.peers[Address("127.0.0.2", 17789)] == str(etc / "demo.toml")
    assert 19010 not in creation.taken(etc, "demo").probe_ports
    with pytest.raises(RefusedError, match=r"19010 .*demo.toml.*next free one is 190\d\d"):
        creation.require_probe_port(19010, others)
    assert creation.free_probe_port(others, 19010) > 19010
    with pytest.raises(RefusedError, match=r"127.0.0.2:17789 is that of .*next free one is"):
        creation.require_peer_addresses([Address("127.0.0.2", 17789)], others)
    with pytest.raises(ConfigError, match="one node"):
        creation.require_peer_addresses([Address("0.0.0.0", 17789)], others)


def test_a_port_of_another_program_is_seen() -> None:
    """Breaks in the field: the controller of the new mirror cannot listen, and nobody was told."""
    nobody = Taken({}, {})
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RefusedError, match="another program"):
            creation.require_probe_port(port, nobody)
        assert creation.free_probe_port(nobody, port) != port


def test_the_second_server_refuses_a_port_that_it_has_given_away(directory: Path) -> None:
    """Breaks in the field: the mirror joins and its probe is never answered on this server."""
    first = creation.make(plan(directory, probe_port=19010), Place(directory / "a"))
    other = plan(directory, mirror="other", probe_port=19010, data_dir=directory / "other")
    creation.make(other, Place(directory / "b"))
    before = names(directory)
    with pytest.raises(RefusedError, match=r"19010 .*other.toml on this server.*nbdmirror invite"):
        creation.take(offer_of(first.config), Place(directory / "b", directory / "beta"), None)
    assert names(directory) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.0.1", ("10.1.0.1", None)),
        ("10.1.0.1:80", ("10.1.0.1", 80)),
        ("fd00::1", ("fd00::1", None)),
        ("[fd00::1]", ("fd00::1", None)),
        ("[fd00::1]:80", ("fd00::1", 80)),
    ],
)
def test_addresses_with_and_without_a_port(text: str, expected: tuple[str, int | None]) -> None:
    """Breaks in the field: the last group of an IPv6 address is taken for a port."""
    assert creation.endpoint(text) == expected


@pytest.mark.parametrize("text", ["", "db1", "db1:7789", "10.1.0.1:", "10.1.0.1:0", "10.1.0:1"])
def test_no_address(text: str) -> None:
    """Breaks in the field: a name server decides where the mirror listens."""
    with pytest.raises(ConfigError):
        creation.endpoint(text)


def test_an_address_of_this_machine() -> None:
    """Breaks in the field: the join warns of every address, or of none."""
    assert creation.on_this_machine(Address("127.0.0.77", 1))
    assert not creation.on_this_machine(Address("192.0.2.77", 1))


def test_the_loaded_file_is_what_was_written(directory: Path) -> None:
    """Breaks in the field: the next command finds another mirror than the one that was made."""
    made = creation.make(plan(directory), Place(directory / "etc"))
    assert load(directory / "etc" / "demo.toml", "alpha") == made.config
