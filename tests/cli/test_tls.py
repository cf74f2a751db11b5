"""`nbdmirror tls`, and what `doctor` and `config` say of certificates."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmirror import certificate
from nbdmirror.config import load
from nbdmirror.errors import ConfigError
from nbdmirror_cli.doctor import FAIL, OK, WARN
from nbdmirror_cli.main import run
from nbdmirror_cli.view import protection_text
from tests.cli.conftest import FakeEngine
from tests.support.certificates import Authority, Issued

Write = Callable[..., None]


class Shell:
    """Runs command lines for alpha and keeps what they print."""

    def __init__(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base = base
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        code = run([*words, "-c", str(self.base / "demo.toml"), "--node", "alpha"])
        self.out, self.err = self._capsys.readouterr()
        assert "PRIVATE" not in self.out + self.err
        return code

    def json(self, *words: str) -> dict[str, object]:
        """What a command says to a program."""
        self(*words, "--json")
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def doctor(self) -> tuple[str, str, str]:
        """State, finding and remedy about the certificate."""
        self("doctor", "--json")
        (found,) = [e for e in json.loads(self.out)["checks"] if e["name"] == "certificate"]
        return found["state"], found["what"], found["remedy"]


@pytest.fixture
def shell(base: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A command line, for a mirror with TLS whose files are not made yet."""
    write(base)
    return Shell(base, capsys)


def write(base: Path, **more: str) -> None:
    """The configuration with TLS, and with more keys of it."""
    path = base / "demo.toml"
    text = path.read_text().partition("[engine]")[0]
    keys = {"tls": "on", **more}
    lines = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    path.write_text(f"{text}[engine]\n{lines}")


def use(base: Path, issued: Issued, **more: str) -> None:
    """The configuration names a certificate."""
    write(base, tls_certificate=issued.cert_file, tls_key=issued.key_file, **more)


def test_made_with_the_files_shown_and_replaced(shell: Shell) -> None:
    """Breaks in the field: nobody can say which certificate a node has, or give it another one."""
    assert shell("metadata", "create", "--size", "1MiB") == 0
    path = shell.base / "alpha" / "tls.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    first = shell.json("tls", "show")
    assert set(first) == {
        "tls", "own", "path", "fingerprint", "subject", "issuer", "not_before", "not_after",
        "days_left", "remark",
    }  # fmt: skip
    assert (first["tls"], first["own"], first["remark"]) == ("on", True, "")
    assert shell("tls", "show") == 0
    for fact in ("fingerprint", "subject", "not_after"):
        assert str(first[fact]) in shell.out
    assert shell("tls", "create") == 13
    assert "--force" in shell.err
    assert shell.json("tls", "show") == first
    made = shell.json("tls", "create", "--force")
    assert made["fingerprint"] != first["fingerprint"]
    assert shell.json("tls", "show") == made
    assert shell.doctor()[0] == OK


def test_made_by_the_command(shell: Shell) -> None:
    """Breaks in the field: the command asks for files that are not there yet without a word."""
    assert shell("tls", "show") == 13
    assert "nbdmirror tls create" in shell.err
    assert shell("tls", "create") == 11
    assert "No such file or directory" in shell.err
    assert shell.doctor()[:1] == (OK,)
    (shell.base / "alpha").mkdir()
    assert shell("tls", "create") == 0
    assert "fingerprint (SHA-256)" in shell.out
    assert "not in use" not in shell.out
    path = shell.base / "demo.toml"
    path.write_text(path.read_text().replace('tls = "on"', 'tls = "off"'))
    assert shell("tls", "create", "--force") == 0
    assert "not in use" in shell.out


def test_no_certificate_without_tls(shell: Shell) -> None:
    """Breaks in the field: a file that nobody asked for, and that scanners complain of."""
    path = shell.base / "demo.toml"
    path.write_text(path.read_text().partition("[engine]")[0])
    assert shell("metadata", "create", "--size", "1MiB") == 0
    assert sorted(each.name for each in (shell.base / "alpha").iterdir()) == ["data", "meta"]


def test_a_creation_that_fails_leaves_no_certificate(shell: Shell) -> None:
    """Breaks in the field: half a creation stays behind."""
    (shell.base / "alpha").mkdir()
    (shell.base / "alpha" / "meta").symlink_to(shell.base / "elsewhere" / "meta")
    assert shell("metadata", "create", "--size", "1MiB") != 0
    assert not (shell.base / "alpha" / "tls.pem").exists()


def test_a_named_certificate_is_not_made_and_not_replaced(shell: Shell) -> None:
    """Breaks in the field: the certificate of an authority is overwritten, or beside it another one
    is made that nobody uses.
    """
    authority = Authority(shell.base / "ca")
    issued = authority.issue("alpha")
    use(shell.base, issued, tls_ca=authority.ca_file)
    assert shell("metadata", "create", "--size", "1MiB") == 0
    assert not (shell.base / "alpha" / "tls.pem").exists()
    assert shell("tls", "create", "--force") == 13
    assert issued.cert_file in shell.err
    found = shell.json("tls", "show")
    assert (found["own"], found["subject"]) == (False, "CN=alpha")
    assert shell.doctor()[0] == OK
    assert shell("config", "check") == 0
    engine = shell.json("config", "show")["engine"]
    assert isinstance(engine, dict)
    assert (engine["tls"], engine["tls_certificate"]) == ("on", issued.cert_file)
    assert shell("config", "show") == 0
    assert issued.key_file in shell.out


@pytest.mark.parametrize(("by_ca", "state"), [(True, FAIL), (False, WARN)])
def test_one_that_has_run_out_is_told(shell: Shell, by_ca: bool, state: str) -> None:
    """Breaks in the field: the certificate runs out, and the first sign is that the nodes do not
    find together after a restart.
    """
    authority = Authority(shell.base / "ca")
    more = {"tls_ca": authority.ca_file} if by_ca else {}
    use(shell.base, authority.issue("alpha", expired=True), **more)
    found, what, remedy = shell.doctor()
    assert found == state
    assert "expired" in what
    assert ("the peer refuses it" in what) == by_ca
    assert "restart the node" in remedy
    assert shell("config", "check") == 0
    assert "expired" in shell.out
    assert any("expired" in str(each) for each in shell.json("config", "check")["remarks"])  # type: ignore[attr-defined]  # a list


def test_one_that_runs_out_soon_is_told(tmp_path: Path) -> None:
    """Breaks in the field: as above, a month too late."""
    made = certificate.make(tmp_path / "tls.pem", "demo", "alpha", replace=False)
    soon = certificate.Certificate(**{**made.as_dict(), "days_left": 29})
    assert soon.expires_soon
    assert not soon.expired
    assert "expires in 29 days" in certificate.remark(soon, own=True, believed_by_ca=False)
    later = certificate.Certificate(**{**made.as_dict(), "days_left": 30})
    assert certificate.remark(later, own=True, believed_by_ca=True) == ""


def test_a_key_that_others_can_read_is_told(shell: Shell) -> None:
    """Breaks in the field: whoever reads the key can take the listener's place in TLS."""
    assert shell("metadata", "create", "--size", "1MiB") == 0
    (shell.base / "alpha" / "tls.pem").chmod(0o644)
    state, what, _ = shell.doctor()
    assert state == FAIL
    assert "its mode is 0644" in what
    authority = Authority(shell.base / "ca")
    issued = authority.issue("alpha")
    use(shell.base, issued)
    Path(issued.key_file).chmod(0o640)
    assert shell("config", "check") == 11
    assert f'engine.tls_key = "{issued.key_file}": its mode is 0640' in shell.err


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"tls_certificate": "/c"}, "engine.tls_key: is not set, and engine.tls_certificate is"),
        ({"tls_key": "/k"}, "engine.tls_certificate: is not set, and engine.tls_key is"),
        ({"tls_ca": "/a"}, "the peer would refuse"),
        ({"tls": "yes"}, 'engine.tls = "yes": none of the words; expected "off" or "on"'),
        ({"tls_certificate": "c", "tls_key": "/k"}, "expected an absolute path"),
        ({"tls_certificate": "/none/c", "tls_key": "/none/k"}, 'engine.tls_key = "/none/k"'),
    ],
)
def test_keys_that_do_not_fit_are_told(base: Path, keys: dict[str, str], told: str) -> None:
    """Breaks in the field: the engine finds out, one mistake at a time."""
    write(base, **keys)
    with pytest.raises(ConfigError) as caught:
        load(base / "demo.toml", "alpha")
    assert told in " ".join(str(caught.value).split())


def test_files_that_are_not_used_are_not_asked_for(base: Path) -> None:
    """Breaks in the field: TLS is turned off to get a mirror going, and its files still stop it."""
    write(base, tls="off", tls_certificate="/none/c", tls_key="/none/k")
    assert load(base / "demo.toml", "alpha").engine.tls == "off"


def test_one_file_for_two_things_is_refused(base: Path) -> None:
    """Breaks in the field: a new certificate of the node's own replaces its data."""
    data = f"{base}/alpha/data"
    write(base, tls_certificate=data, tls_key=data)
    with pytest.raises(ConfigError, match=r"that is data, too"):
        load(base / "demo.toml", "alpha")


def test_the_state_says_what_guards_a_session(base: Path, engine: FakeEngine, shell: Shell) -> None:
    """Breaks in the field: TLS is configured, and nobody can see whether it is in use."""
    engine.state["session"] = {
        "number": "00ff", "phase": "synced", "integrity": "crc", "tls": "TLSv1.3 TLS_AES",
    }  # fmt: skip
    assert shell("engine", "state") == 0
    assert "crc, TLSv1.3 TLS_AES" in " ".join(shell.out.split())
    assert protection_text({"integrity": "mac", "tls": ""}) == "mac"
    assert protection_text({}) == ""
