"""What `nbdmirror apply` says of the changes that it made."""

import os
from pathlib import Path

import pytest

from nbdmirror.config import load
from nbdmirror.controller.reload import config_id, facts_of, how, shared_facts, told


@pytest.mark.parametrize(
    ("online", "later", "sentence"),
    [
        (1, 0, "1 change is in force"),
        (0, 0, "0 changes are in force"),
        (2, 1, "2 changes are in force, 1 waits for a restart"),
        (1, 3, "1 change is in force, 3 wait for a restart"),
    ],
)
def test_changes_are_counted_in_words(online: int, later: int, sentence: str) -> None:
    """Breaks in the field: "1 changes are in force" makes a reader look for the others."""
    assert told(online, later) == sentence


def test_the_nodes_need_not_have_the_same_user(tmp_path: Path) -> None:
    """Breaks in the field: two servers whose users have other names are called different, and a
    node is not started; or a change of the user is called in force when it is not.
    """
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_bytes(os.urandom(32))
    found = []
    for name in ("", "one", "other"):
        path = tmp_path / "demo.toml"
        path.write_text(
            f'mirror = "demo"\nkey_file = "{tmp_path / "key"}"\narbiter = "none"\n'
            '[node.alpha]\nid = 1\naddress = "10.1.0.1:7789"\n'
            '[node.beta]\nid = 2\naddress = "10.1.0.2:7789"\n'
            f'[engine]\nuser = "{name}"\n'
        )
        found.append(load(path, "alpha", with_key=False))
    assert len({config_id(each) for each in found}) == 1
    assert not [key for key in shared_facts(found[0]) if "user" in key and "engine" in key]
    assert [facts_of(each)["engine.user"] for each in found] == ['""', '"one"', '"other"']
    assert how("engine.user").startswith("restart the engine: ")
    assert how("engine.threads").startswith("restart the node: ")


def test_the_nodes_compare_what_has_to_be_the_same_for_tls(tmp_path: Path) -> None:
    """Breaks in the field: `tls` differs, and the status of neither node says that the files do."""
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(bytes(32))
    lines = ['mirror = "demo"', f'key_file = "{key}"', 'arbiter = "none"']
    for number, name in enumerate(("alpha", "beta"), 1):
        lines += [f"[node.{name}]", f"id = {number}", f'address = "10.1.0.{number}:7789"']
    facts = []
    for tls in ("off", "on"):
        path = tmp_path / f"{tls}.toml"
        path.write_text("\n".join([*lines, "[engine]", f'tls = "{tls}"']))
        facts.append(facts_of(load(path, "alpha")))
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"engine.tls"}
    assert how("engine.tls").startswith("restart the node")
