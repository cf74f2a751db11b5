"""The commands as processes: what an operator gets who has everything wrong at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from nbdmirror.errors import ConfigError

COMMAND = Path(sys.executable).parent / "nbdmirror"
WRONG = """
mirror = "Demo"
key_file = "{key}"
colour = "red"
[node.alpha]
id = 1
address = "db1:7789"
[node.beta]
id = 1
adress = "10.1.0.2:7789"
run_dir = "{long}"
[device]
extent = "5KiB"
region = "3MiB"
[engine]
threads = 65
connections_max = "many"
ack_timeout_ms = 1
flush_bytes = "64MB"
resync_rate = "1KiB"
on_freeze = "never"
lock_memory = "yes"
[export]
unix = "nbd.sock"
tcp = "127.0.0.1"
[paths]
data_dir = 7
"""
# A mistake of each kind: unknown, missing, wrong type, unit, range, form; against each other; the
# key's length and mode.
MISTAKES = (
    "mirror = ", "arbiter: is not set", "colour: unknown key", "node.alpha.address = ",
    "node.beta.address: is not set", "node.beta.adress: unknown key; did you mean address?",
    "both have id = 1", "device.extent = ", "device.region = ", "engine.threads = ",
    "engine.connections_max = ", "engine.ack_timeout_ms = ", "engine.flush_bytes = ",
    "engine.resync_rate = ", "engine.on_freeze = ", "engine.lock_memory = ", "export.unix = ",
    "export.tcp = ", "paths.data_dir = ", "key_file",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("config", "check"), ("engine", "run"), ("metadata", "create", "--size", "8MiB")]
)
def test_every_mistake_in_one_report(base: Path, words: tuple[str, ...]) -> None:
    """Breaks in the field: an operator mends one line, starts again, and meets the next mistake,
    or an engine starts with half of what was meant.
    """
    key, path = base / "key", base / "wrong.toml"
    key.write_bytes(b"short")
    key.chmod(0o644)
    path.write_text(WRONG.replace("{key}", str(key)).replace("{long}", "/" + "x" * 200))
    done = subprocess.run(
        [COMMAND, *words, "-c", str(path), "--node", "alpha"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == ConfigError.exit_code, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert not [mistake for mistake in MISTAKES if mistake not in said], said
    assert "Traceback" not in said
    assert sorted(each.name for each in base.iterdir()) == ["demo.toml", "key", "wrong.toml"]
