"""What the documents quote of real programs: clients, and commands against real engines."""

import subprocess
from pathlib import Path

import pytest

from nbdmirror import admin
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "user-guide.md"
# The device does not matter: the client is declined before it looks for it.
CLIENTS = (
    ("nbdinfo", "{uri}"),
    ("nbdcopy", "{uri}", "null:"),
    ("qemu-io", "-f", "raw", "-c", "read 0 512", "{uri}"),
    ("qemu-img", "info", "{uri}"),
    ("nbd-client", "-unix", "{socket}", "/dev/null"),
)


def quoted() -> dict[str, str]:
    """The words of each client, by its name, from the table of the guide."""
    rows = GUIDE.read_text(encoding="utf-8").partition("| client | says |")[2].splitlines()
    words: dict[str, str] = {}
    for row in rows[2:]:
        if not row.startswith("|"):
            break
        names, said = row.strip("|").split("|")
        words |= {name.strip(" `"): said.strip(" `") for name in names.split(",")}
    return words


def test_clients_say_of_a_declined_export_what_the_guide_quotes(pair: Pair) -> None:
    """If this fails, an operator looks for a socket that is missing and finds that it is there."""
    words = quoted()
    for command in CLIENTS:
        uri, path = pair.beta.uri, str(pair.beta.config.export_unix)
        done = subprocess.run(
            [word.replace("{uri}", uri).replace("{socket}", path) for word in command],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode != 0, command
        assert words[command[0]] in said, (command, said)


def test_a_node_made_anew_names_where_it_is_accepted(pair: Pair) -> None:
    """If this fails, both nodes say "this node", and the operator accepts on the wrong one."""
    alpha, beta = pair.both
    beta.kill()
    beta.data.unlink()
    beta.config.metadata_file.unlink()
    admin.create(beta.config, pair.size, join=True, adopt=False, sparse=False)
    beta.start()
    wanted = f"accept it on node {alpha.config.me.id} with `nbdmirror engine accept-peer`"
    for node in (alpha, beta):
        node.wait_state(lambda state: wanted in state["refusal"], "told where to accept it")
