"""The tables of arbiters with a memory: what is accepted, and that each mistake is told at once."""

from pathlib import Path
from typing import Any

import pytest

from nbdmirror.config import load
from nbdmirror.config_arbiters import parse_account_url, parse_endpoint
from nbdmirror.core.superblock import ArbiterKind
from nbdmirror.errors import ConfigError

HEAD = """
mirror = "demo"
key_file = "{dir}/key"
arbiter = "{arbiter}"
[node.alpha]
id = 1
address = "10.1.0.1:7789"
[node.beta]
id = 2
address = "10.1.0.2:7789"
"""
ETCD = '[etcd]\nendpoints = ["http://127.0.0.1:2379"]\n'
S3 = '[s3]\nbucket = "witness"\n'
AZURE = (
    '[azure-blob]\naccount_url = "https://a1b.blob.core.windows.net"\ncontainer = "witness"\n'
    'key_file = "{dir}/secret"\n'
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a key, a secret, and a file that everybody may read."""
    for name, mode in (("key", 0o600), ("secret", 0o600), ("open", 0o644)):
        (tmp_path / name).write_bytes(b"k" * 32)
        (tmp_path / name).chmod(mode)
    (tmp_path / "linked").symlink_to("secret")
    return tmp_path


def write(directory: Path, arbiter: str, text: str) -> Path:
    """A configuration with these tables."""
    path = directory / "demo.toml"
    path.write_text((HEAD + text).replace("{dir}", str(directory)).replace("{arbiter}", arbiter))
    return path


def mistakes(directory: Path, arbiter: str, text: str) -> list[str]:
    """The lines of the report."""
    with pytest.raises(ConfigError) as caught:
        load(write(directory, arbiter, text), "alpha")
    return list(caught.value.mistakes)


@pytest.mark.parametrize("kind", ArbiterKind)
def test_a_kind_has_one_word(kind: ArbiterKind) -> None:
    """Breaks in the field: the word of the configuration is not the one that commands take."""
    assert ArbiterKind.of_word(kind.word) is kind
    assert "_" not in kind.word


@pytest.mark.parametrize(
    ("arbiter", "text"), [("etcd", ETCD), ("s3", S3), ("azure-blob", AZURE), ("none", ETCD + S3)]
)
def test_the_smallest_tables_are_taken(directory: Path, arbiter: str, text: str) -> None:
    """Breaks in the field: the documented configuration is refused."""
    config = load(write(directory, arbiter, text), "alpha")
    assert config.arbiter is ArbiterKind.of_word(arbiter)
    assert (config.etcd.prefix, config.s3.timeout_ms) == ("nbdmirror/", 1000)


def test_every_mistake_is_in_one_report(directory: Path) -> None:
    """Breaks in the field: an operator finds the second mistake after the next restart."""
    text = """
[etcd]
endpoints = ["http://10.1.0.9:2379", "http://10.1.0.9:2379/"]
prefix = "a//b"
ca_file = "ca"
user = "a b"
timeout_ms = 99
[s3]
endpoint = "ftp://a"
bucket = "a/b"
region = "EU"
profile = ""
regoin = "eu"
[azure-blob]
account_url = "https://user:secret@a"
container = "a--b"
"""
    expected = [
        "etcd.endpoints = a list: an address is there twice; expected",
        'etcd.prefix = "a//b": no part between two / is empty',
        'etcd.ca_file = "ca": a path is text',
        'etcd.user = "a b": not a name; expected',
        "etcd.timeout_ms = 99: too small; expected 100 to 10000",
        's3.endpoint = "ftp://a": it begins with http:// or https://; expected',
        's3.bucket = "a/b": not the name of a bucket; expected',
        's3.region = "EU": not the name of a region; expected',
        's3.profile = "": not a name; expected',
        "s3.regoin: unknown key; did you mean region?",
        'azure-blob.container = "a--b": not the name of a container; expected',
        "etcd.password_file: is not set, and etcd.user is",
    ]
    found = mistakes(directory, "none", text)
    rest = [line for line in found if not any(line.startswith(each) for each in expected)]
    assert len(found) == len(expected) + 2, found
    assert sorted(line.split(":")[0] for line in rest) == [
        'azure-blob.account_url = "https',
        "etcd.ca_file",  # set, beside addresses without TLS
    ]


@pytest.mark.parametrize(
    ("arbiter", "text", "starts"),
    [
        ("ping", "", ["ping.addresses: is not set"]),
        ("etcd", "", ["etcd.endpoints: is not set"]),
        ("s3", "", ["s3.bucket: is not set"]),
        ("etcd", "[etcd]\nendpoints = []\n", ["etcd.endpoints: is not set"]),
        (
            "azure-blob",
            "",
            ["azure-blob.account_url: is", "azure-blob.container: is", "azure-blob.key_file: is"],
        ),
        ("azure-blob", AZURE + 'sas_file = "{dir}/secret"\n', ["azure-blob.sas_file: is set"]),
        ("etcd", ETCD + 'cert_file = "{dir}/open"\n', ["etcd.key_file: is not", "etcd.cert_file"]),
        ("etcd", ETCD + 'password_file = "{dir}/secret"\n', ["etcd.user: is not set"]),
        ("s3", S3 + 'credentials_file = "{dir}/open"\n', ["s3.credentials_file = "]),
        ("s3", S3 + 'credentials_file = "{dir}/linked"\n', ["s3.credentials_file = "]),
        ("s3", S3 + 'credentials_file = "{dir}/none"\n', ["s3.credentials_file = "]),
        ("s3", S3 + 'ca_file = "{dir}/none"\n', ["s3.ca_file = "]),
        ("s3", S3 + 'credentials_file = "{dir}/demo.toml"\n', ["s3.cred", "s3.cred"]),
        ("s3", "s3 = 1\n", ["s3.bucket: is not set", "s3 = 1: not a table"]),
    ],
)
def test_what_a_store_needs(directory: Path, arbiter: str, text: str, starts: list[str]) -> None:
    """Breaks in the field: a mirror starts whose arbiter can never be asked."""
    if text == "s3 = 1\n":
        path = write(directory, arbiter, "")
        path.write_text(text + path.read_text())
        with pytest.raises(ConfigError) as caught:
            load(path, "alpha")
        found = list(caught.value.mistakes)
    else:
        found = mistakes(directory, arbiter, text)
    assert len(found) == len(starts), found
    assert all(any(line.startswith(start) for line in found) for start in starts), found


@pytest.mark.parametrize("host", ["10.1.0.9", "etcd.example.net", "[fd00::9]"])
def test_no_password_crosses_a_network_in_the_clear(directory: Path, host: str) -> None:
    """Breaks in the field: whoever listens may decide about the mirror."""
    text = f'[etcd]\nendpoints = ["{{}}://{host}:2379"]\nuser = "a"\n'.replace("{}", "http")
    more = 'password_file = "{dir}/secret"\n'
    (found,) = mistakes(directory, "etcd", text + more)
    assert found.startswith("etcd.password_file: would be sent over http://")
    load(write(directory, "etcd", text.replace("http:", "https:") + more), "alpha")
    load(write(directory, "etcd", text.replace(host, "127.0.0.1") + more), "alpha")


def test_a_client_of_the_controller_needs_no_secret(directory: Path) -> None:
    """Breaks in the field: asking for the state needs the right to read the store's key."""
    path = write(directory, "azure-blob", AZURE)
    (directory / "secret").unlink()
    assert load(path, "alpha", with_key=False).azure_blob.container == "witness"


@pytest.mark.parametrize(
    "spellings",
    [
        ("http://Host", "http://host:80", "http://HOST:80/", "http://host/"),
        ("https://[fd00::9]", "https://[FD00:0::9]:443"),
    ],
)
def test_an_address_has_one_spelling(spellings: tuple[str, ...]) -> None:
    """Breaks in the field: two nodes with the same store are told that they have two."""
    assert len({parse_endpoint(each) for each in spellings}) == 1
    with_account = {parse_account_url(f"{each.rstrip('/')}/account") for each in spellings}
    assert len(with_account) == 1


@pytest.mark.parametrize(
    "value",
    [
        *("", "host:1", "http://", "http://host/path/more", "http://host:0", "http://host:65536"),
        *("http://host?x", "http://host#x", "http://u@host", "http://0.0.0.0:1", "http://a b"),
        *("http://host:1?", "file:///etc/passwd", "http://-a", "http://" + "a" * 1100, 7, None),
    ],
)
def test_what_is_no_address_is_refused(value: Any) -> None:
    """Breaks in the field: a request goes where nobody meant it to go."""
    for parse in (parse_endpoint, parse_account_url):
        with pytest.raises(ValueError, match=r"\w"):
            parse(value)
