"""The configuration: what is accepted, and that every mistake is told at once."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror import config
from nbdmirror.config import KEYS, Config, format_size, load, parse_size
from nbdmirror.config_fields import Address, parse_address
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.errors import ConfigError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
GOOD = """
mirror = "demo"
key_file = "{key}"
arbiter = "none"
[node.alpha]
id = 1
address = "10.1.0.1:7789"
[node.beta]
id = 2
address = "[fd00::2]:7789"
"""


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key file as it should be."""
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o600)
    return path


def write(key: Path, text: str = GOOD) -> Path:
    """A configuration file beside the key."""
    path = key.parent / "demo.toml"
    path.write_text(text.replace("{key}", str(key)))
    return path


def mistakes(key: Path, text: str, node: str = "alpha") -> list[str]:
    """The lines of the report, without its headline."""
    with pytest.raises(ConfigError) as caught:
        load(write(key, text), node)
    return str(caught.value).split("\n- ")[1:]


def test_the_smallest_file_gets_every_default(key: Path) -> None:
    """If this fails, the configuration of the documentation does not start a mirror."""
    config = load(write(key), "alpha")
    assert (config.mirror, config.arbiter, config.key) == ("demo", ArbiterKind.NONE, b"k" * 32)
    assert (config.me.name, config.me.id, config.peer.name, config.peer.id) == (
        *("alpha", 1),
        *("beta", 2),
    )
    assert config.peer.address == Address("fd00::2", 7789)
    assert config.data_file == Path("/var/lib/nbdmirror/demo/data")
    assert config.metadata_file == Path("/var/lib/nbdmirror/demo/meta")
    assert config.control_socket == Path("/run/nbdmirror/demo/engine.sock")
    assert (config.export_unix, config.export_tcp) == (Path("/run/nbdmirror/demo/nbd.sock"), None)
    assert (config.device.extent, config.device.region) == (4096, 4 << 20)
    assert (config.engine.on_freeze, config.engine.resync_rate) == ("ask", 0)


def test_each_node_sees_itself(key: Path) -> None:
    """If this fails, a node dials itself, or both use the paths of one."""
    text = GOOD + 'data_dir = "/srv/beta"\nrun_dir = "/run/beta"\n[paths]\ndata_dir = "/srv/all"\n'
    alpha, beta = (load(write(key, text), name) for name in ("alpha", "beta"))
    assert (alpha.me, alpha.peer) == (beta.peer, beta.me)
    assert alpha.data_file == Path("/srv/all/data")
    assert beta.data_file == Path("/srv/beta/data")
    assert beta.export_unix == Path("/run/beta/nbd.sock")


def test_the_key_is_never_shown(key: Path) -> None:
    """If this fails, the shared secret ends up in a log."""
    assert "kkkk" not in repr(load(write(key), "alpha"))
    key.write_bytes(b"k" * 31)
    assert "kkkk" not in " ".join(mistakes(key, GOOD))


def test_a_client_needs_no_key(key: Path) -> None:
    """If this fails, asking for the state needs the right to read the secret."""
    path = write(key)
    key.unlink()
    assert load(path, "alpha", with_key=False).key == b""


def test_the_host_name_chooses_the_node(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a node started without --node takes the part of the other one."""
    for host in ("Beta", "beta.example.net"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert load(write(key)).me.name == "beta"
    monkeypatch.setattr(socket, "gethostname", lambda: "gamma")
    with pytest.raises(ConfigError, match=r"no table \[node.gamma\].*alpha, beta.*--node"):
        load(write(key))


def test_every_mistake_is_in_one_report(key: Path) -> None:
    """If this fails, an operator finds the second mistake only after the next restart."""
    text = """
mirror = "Demo"
key_file = "{key}"
colour = "red"
[node.alpha]
id = 0
address = "db1:7789"
[node.beta]
id = 0
adress = "10.1.0.2:7789"
data_dir = "here"
[device]
extent = "5KiB"
[engine]
threads = true
resync_rate = "1KiB"
on_freeze = "never"
flush_bytes = "64MB"
freeze_limit_ms = 1600
[export]
tcp = "127.0.0.1"
"""
    key.chmod(0o640)
    found = mistakes(key, text)
    expected = [
        'mirror = "Demo": not a name',
        "arbiter: is not set",
        "node.alpha.id = 0:",
        'node.alpha.address = "db1:7789": host names are not looked up',
        "node.beta.id = 0:",
        "node.beta.address: is not set",
        'node.beta.data_dir = "here":',
        "node.beta.adress: unknown key; did you mean address?",
        'device.extent = "5KiB": not a power of two; expected 4KiB to 1MiB',
        "engine.threads = true: not a whole number; expected",
        'engine.flush_bytes = "64MB":',
        'engine.resync_rate = "1KiB": slower than one resync block',
        "engine.freeze_limit_ms = 1600: a freeze would end before it begins",
        'engine.on_freeze = "never":',
        'export.tcp = "127.0.0.1": the port is missing',
        "colour: unknown key; known here: mirror, key_file, arbiter, takeover",
        "node: both have id = 0",
        f'key_file = "{key}": its mode is 0640, expected 0600 or 0400',
    ]
    missing = [each for each in expected if not any(line.startswith(each) for line in found)]
    assert not missing, found
    assert len(found) == len(expected), found


def test_a_lease_is_over_before_the_silence(key: Path) -> None:
    """If this fails, each take-over takes longer than promised, and nobody knows why."""
    engine, controller = "[engine]\nread_lease_ms = {}\n", "[controller]\nsilence_ms = {}\n"
    assert load(write(key), "alpha").engine.read_lease_ms == 1000
    assert load(write(key, GOOD + engine.format(1223)), "alpha").engine.read_lease_ms == 1223
    (found,) = mistakes(key, GOOD + engine.format(1224))
    assert found.startswith("engine.read_lease_ms = 1224: with a margin")
    assert found.endswith("expected at most 1223")
    load(write(key, GOOD + engine.format(2000) + controller.format(3000)), "alpha")
    for beyond in (299, 120_001, '"1s"'):
        found = mistakes(key, GOOD + engine.format(beyond) + controller.format(120_000))[0]
        assert "expected 300 to 120000" in found or "not a whole number" in found
    (found,) = mistakes(key, GOOD + '[engine]\nreads = "never"\n')
    assert '"lease" or "confirm"' in found


@pytest.mark.parametrize(
    "line", ["", 'arbiter = "ETCD"\n', 'arbiter = "azure_blob"\n', "arbiter = 3\n"]
)
def test_the_arbiter_is_explained_not_chosen(key: Path, line: str) -> None:
    """If this fails, somebody runs without protection from split brain and does not know it."""
    (found,) = mistakes(key, GOOD.replace('arbiter = "none"\n', line))
    assert found.startswith("arbiter")
    for word in ('"none"', '"ping"', '"etcd"', '"s3"', '"azure-blob"', "promise (c)"):
        assert word in found


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (('"10.1.0.1:7789"', '"[fd00::2]:7789"'), "both have address"),
        (('"10.1.0.1:7789"', '"0.0.0.0:7789"'), "the other node dials"),
        (('"10.1.0.1:7789"', '"10.1.0.1:0"'), "a port is"),
        (('"10.1.0.1:7789"', '"10.1.0.1:65536"'), "a port is"),
        (('"[fd00::2]:7789"', '"fd00::2:7789"'), "brackets"),
        (("id = 2", "id = 256"), "expected 1 to 255"),
        (("id = 2", 'id = "2"'), "expected 1 to 255"),
        (("[node.beta]", '[node."Be ta"]'), "not a node's name"),
        (('"{key}"', '"relative"'), "begins with /"),
        (('"[fd00::2]:7789"', '"[fd00::2]:7789"\n[export]\ntcp="127.0.0.1:7789"'), "another port"),
        (('"[fd00::2]:7789"', f'"[fd00::2]:7789"\n[export]\nunix="/{"x" * 107}"'), "no longer"),
    ],
)
def test_each_wrong_value_is_refused(key: Path, change: tuple[str, str], part: str) -> None:
    """If this fails, a typing error becomes a mirror that cannot meet its peer."""
    found = mistakes(key, GOOD.replace(*change))
    assert any(part in line for line in found), found


@pytest.mark.parametrize(
    ("unix", "said"),
    [
        ("{key}", "that is key_file, too"),
        ("{key}/../key", "that is key_file, too"),
        ("{dir}/linked/key", "that is key_file, too"),
        ("{dir}/demo.toml", "that is this file, too"),
        ("{dir}/data/data", "that is data, too"),
        ("{dir}/data/meta", "that is meta, too"),
        ("{dir}/run/engine.sock", "that is engine.sock in run_dir, too"),
        ("{dir}/run/launcher.lock", "that is launcher.lock in run_dir, too"),
        ("{dir}/data/meta/nbd.sock", "lies beneath meta"),
        ("{dir}/data", "lies beneath it"),
        ("{dir}/run", "lies beneath it"),
        ("{dir}/data/nbd.sock", "lies in the data_dir"),
        ("{dir}/precious", "no socket has that name"),
    ],
)
def test_no_socket_replaces_a_file(key: Path, unix: str, said: str) -> None:
    """Breaks in the field: the start of an engine removes the key, or all of the data."""
    directory = key.parent
    (directory / "precious").touch()
    (directory / "linked").symlink_to(directory)
    name = unix.replace("{key}", str(key)).replace("{dir}", str(directory))
    paths = f'[paths]\ndata_dir = "{directory}/data"\nrun_dir = "{directory}/run"\n'
    found = mistakes(key, f'{GOOD}{paths}[export]\nunix = "{name}"\n')
    assert any(said in line and name in line for line in found), found
    found = mistakes(key, GOOD.replace("{key}", f"{directory}/run/engine.sock") + paths)
    assert any("that is key_file, too" in line for line in found), found


def test_a_socket_of_an_earlier_engine_is_no_mistake(key: Path) -> None:
    """If this fails, a mirror does not start again after its engine was killed."""
    run_dir = Path(tempfile.mkdtemp(prefix="nbdm-"))
    text = f'{GOOD}[paths]\nrun_dir = "{run_dir}"\n'
    try:
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(run_dir / "nbd.sock"))
        assert load(write(key, text), "alpha").export_unix == run_dir / "nbd.sock"
        (run_dir / "engine.sock").touch()
        (found,) = mistakes(key, text)
        assert "engine.sock" in found
        assert "no socket" in found
        # Whoever only asks is told by the socket itself.
        assert load(write(key, text), "alpha", with_key=False).key == b""
    finally:
        shutil.rmtree(run_dir)


@pytest.mark.parametrize("node", ["alpha", "beta"])
def test_names_of_sockets_are_short_enough(key: Path, node: str) -> None:
    """If this fails, an engine ends at its start with an errno, on the other node at that."""
    base = "/" + "r" * 94  # 95 bytes; controller.sock makes it 111, engine.sock 107
    found = mistakes(key, f'{GOOD}run_dir = "{base}"\n', node)
    (line,) = found
    assert line.startswith("controller.sock in run_dir is")
    assert "111 bytes" in line
    assert len(mistakes(key, f'{GOOD}run_dir = "{base}r"\n', node)) == 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_are_two_nodes(key: Path, count: int) -> None:
    """If this fails, a third node is silently left out, or one node waits for nobody."""
    head = GOOD.partition("[node.alpha]")[0]
    tables = "".join(
        f'[node.n{n}]\nid = {n + 1}\naddress = "10.1.0.{n + 1}:7789"\n' for n in range(count)
    )
    found = mistakes(key, head + tables, "n0")
    assert any("exactly two" in line for line in found), found


def test_what_is_no_toml_names_the_line(key: Path) -> None:
    """If this fails, a forgotten quote is a riddle."""
    with pytest.raises(ConfigError, match="line 3, column"):
        load(write(key, '\nmirror = "demo"\nkey_file = \n'), "alpha")
    path = write(key)
    path.write_bytes(b"mirror = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(path, "alpha")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(key.parent / "missing.toml", "alpha")


def test_a_weak_key_is_refused(key: Path) -> None:
    """If this fails, anybody on the network, or any user of the host, can join the mirror."""
    for content, mode, part in (
        (b"k" * 31, 0o600, "length"),
        (b"k" * 4097, 0o600, "length"),
        (b"k" * 32, 0o604, "mode is 0604"),
        (b"k" * 32, 0o700, "mode is 0700"),
    ):
        key.write_bytes(content)
        key.chmod(mode)
        (found,) = mistakes(key, GOOD)
        assert part in found
    key.unlink()
    (found,) = mistakes(key, GOOD)
    assert "no such file" in found
    assert "head -c 32" in found
    (key.parent / "real").write_bytes(b"k" * 32)
    key.symlink_to("real")
    (found,) = mistakes(key, GOOD)
    assert "symbolic link" in found
    assert "head -c" not in found
    key.unlink()
    os.mkfifo(key)
    (found,) = mistakes(key, GOOD)
    assert "no plain file" in found
    assert "device" not in found
    assert "head -c" not in found
    (found,) = mistakes(key, GOOD.replace("{key}", "relative"))
    assert found.startswith('key_file = "relative": a path is text')


def test_a_key_that_may_not_be_read_is_not_to_be_made_anew(key: Path, require_root: None) -> None:
    """If this fails, somebody makes a second key because the text says so."""
    key.parent.chmod(0o700)
    os.seteuid(12345)
    try:
        with pytest.raises(ConfigError) as caught:
            config._read_key(key)
    finally:
        os.seteuid(0)
    assert "user 12345 may not read it" in str(caught.value)
    assert "head -c" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("[::1]:7789", "[0:0:0:0:0:0:0:1]:7789"),
        ("[fd00::2]:7789", "[FD00::0:2]:7789"),
        ("10.1.0.1:7789", "[::ffff:10.1.0.1]:7789"),
    ],
)
def test_an_address_is_the_same_in_every_spelling(key: Path, one: str, other: str) -> None:
    """If this fails, a node waits for itself."""
    text = GOOD.replace("[fd00::2]:7789", other).replace("10.1.0.1:7789", one)
    (found,) = mistakes(key, text)
    assert "both have address" in found
    assert one in found
    assert other in found


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("threads = 1979-05-27", "engine.threads = 1979-05-27: not a whole number; expected"),
        ("threads = [1]", "engine.threads = a list: not a whole number; expected"),
        ("threads = 65", "engine.threads = 65: too large; expected"),
        ("on_freeze = true", 'engine.on_freeze = true: none of the words; expected "ask" or'),
        ("lock_memory = 1", "engine.lock_memory = 1: neither true nor false; expected true or"),
        (r'"xy\u001b[2Jxy" = 1', r'engine."xy\u001b[2Jxy": unknown key; known here'),
        (r'"a\u009b2Jb" = 1', 'engine."a?2Jb": unknown key;'),
        (r'on_freeze = "\u001b[2J\u202e"', r'engine.on_freeze = "\u001b[2J?": none of the words'),
        (f'on_freeze = "{"x" * 5000}"', "none of the words"),
    ],
)
def test_values_are_told_as_the_file_has_them(key: Path, more: str, said: str) -> None:
    """If this fails, an operator reads Python, or a file steers the terminal of who checks it."""
    (found,) = mistakes(key, f"{GOOD}[engine]\n{more}\n")
    assert said in found
    assert all(each.isprintable() for each in found)
    assert len(found) < 1000


@pytest.mark.parametrize("name", ["alpha", '"\\u001b[2J"'])
def test_what_should_be_a_table_is_told_so(key: Path, name: str) -> None:
    """If this fails, the report speaks of the program's classes."""
    head = GOOD.partition("[node.alpha]")[0]
    found = mistakes(key, f"{head}engine = 3\n[node]\n{name} = 5\nbeta = 6\n", "beta")
    assert "engine = 3: not a table; expected a table [engine]" in found
    assert "node.beta = 6: not a table; expected a table [node.beta]" in found
    assert all(each.isprintable() for line in found for each in line)
    assert "Section" not in "".join(found)
    (found_one,) = mistakes(key, "node = 1\n" + head, "beta")
    assert found_one.startswith("node = 1: not a table; expected")


def test_a_key_of_another_user_is_refused(key: Path, require_root: None) -> None:
    """If this fails, another user of the host chooses the key."""
    os.chown(key, 12345, 12345)
    (found,) = mistakes(key, GOOD)
    assert "belongs to user 12345" in found


@given(st.integers(0, 2**50))
def test_sizes_read_back(size: int) -> None:
    """If this fails, `config show` prints a size that means another one in the file."""
    text = format_size(size)
    assert parse_size(int(text) if text.isdecimal() else text) == size


@pytest.mark.parametrize("text", ["", "4KB", "-1KiB", "1.5GiB", "KiB", "9" * 21, True, None, 1.0])
def test_a_wrong_size_is_no_size(text: object) -> None:
    """If this fails, "4KB" means what its writer did not mean."""
    with pytest.raises(ValueError, match="a size is"):
        parse_size(text)


@given(st.ip_addresses(), st.integers(1, 65_535))
def test_addresses_read_back(ip: object, port: int) -> None:
    """If this fails, an IPv6 address that is printed cannot be written into the file."""
    address = Address(str(ip), port)
    assert parse_address(str(address)) == address


def test_the_documentation_lists_every_key() -> None:
    """If this fails, operators configure by a table that is not what the program does."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    documented = [line for line in lines if line.startswith("| `") and line.count("|") == 6]
    documented = [line for line in documented if line.split("`")[1] not in {"none", "ping"}]
    assert documented == [
        f"| `{info.key}` | {info.default} | {info.unit} | {info.expected} | {info.meaning} |"
        for info in KEYS.values()
    ]


def test_the_example_of_the_documentation_is_right(key: Path) -> None:
    """If this fails, the first thing that an operator copies is refused."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    config = load(write(key, text.replace("/etc/nbdmirror/demo.key", "{key}")), "alpha")
    assert isinstance(config, Config)
