"""Two nodes whose engines run as users of their own, each as another one; controllers are root's.

What an attacker reaches is tried as whom the engine really runs as, by the kernel's word: where the
engine has its launcher's rights, so has the attacker. The tests share the two nodes; each begins
with alpha as primary and both in sync.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror.engine_user import Account
from tests.support.accounts import accounts, rights_of, way_for_users
from tests.support.cluster import Cluster, ClusterNode
from tests.support.nobody import attempts
from tests.support.pair import processes_of

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

BLOCK = 4096
MIB = 1 << 20
# What the test made, against what the product did.
PUBLIC = ("alpha.toml", "beta.toml", "alpha.log", "beta.log")


@pytest.fixture(scope="module")
def users() -> Iterator[dict[str, Account]]:
    """One for each node."""
    with accounts() as make:
        yield {name: make() for name in ("alpha", "beta")}


@pytest.fixture(scope="module")
def running(users: dict[str, Account]) -> Iterator[Cluster]:
    """Two running nodes."""
    with Cluster() as made:
        way_for_users(made.root, *(made.root / node.name for node in made.both))
        for node in made.both:
            give(node, users[node.name].name)
        yield made.start()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The same; alpha is primary."""
    hear(*running.both)
    if running.beta.status()["role"] == "PRIM":
        running.beta.order("swap")
    running.in_sync(running.alpha)
    return running


def hear(*nodes: ClusterNode) -> None:
    """Wait until both know that the other one is ready."""
    for node in nodes:
        node.wait(lambda s: s["peer"]["heard"] and s["peer"]["readiness"] == "ready", "the other")


def give(node: ClusterNode, name: str) -> None:
    """Write the engine's user into the file of a node."""
    text = node.config_path.read_text().partition("[engine]")[0]
    node.config_path.write_text(f'{text}[engine]\nuser = "{name}"\n')


def inside(node: ClusterNode) -> tuple[int, int]:
    """User and group of whoever breaks into the engine."""
    rights = rights_of(node.engine_pid())
    return int(rights["Uid"][1]), int(rights["Gid"][1])


def require_no_rights(node: ClusterNode, user: Account) -> None:
    """By the kernel's word."""
    rights = rights_of(node.engine_pid())
    assert rights["Uid"] == [str(user.uid)] * 4
    assert rights["Gid"] == [str(user.gid)] * 4
    assert rights["Groups"] == []
    assert rights["NoNewPrivs"] == ["1"]
    for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(rights[each][0], 16) == 0, each


def write(node: ClusterNode, first: int, count: int) -> None:
    """A block at each MiB, then a flush."""
    client = node.connect()
    for number in range(first, first + count):
        client.pwrite(bytes([number]) * BLOCK, number * MIB)
    client.flush()
    client.shutdown()


def test_the_engine_has_no_rights_left(cluster: Cluster, users: dict[str, Account]) -> None:
    """Breaks in the field: a mirror with a user serves at first, and not after a crash, a failover,
    a new controller or a resync; or the engine has its rights back after one of them.
    """
    alpha, beta = cluster.both
    write(alpha, 0, 4)
    for node in cluster.both:
        require_no_rights(node, users[node.name])
    killed = alpha.kill_engine()
    alpha.wait(lambda s: bool(s["engine"]) and s["engine"]["pid"] != killed, "a new engine")
    beta.is_now("PRIM", "ALONE")
    assert alpha.told("engine-ended"), "its controller spoke for it, in its metadata"
    assert alpha.config.metadata_file.stat().st_uid == users["alpha"].uid
    write(beta, 4, 4)
    cluster.in_sync(beta)
    for node in cluster.both:
        require_no_rights(node, users[node.name])
    engine = beta.engine_pid()
    beta.kill()
    beta.up()
    cluster.in_sync(beta)
    assert beta.engine_pid() == engine, "the next controller adopts it"
    assert not [each for each in beta.told("note") if "cannot be had" in each["reason"]]
    hear(beta)
    beta.order("swap")
    cluster.in_sync(alpha)
    write(alpha, 8, 4)
    cluster.assert_equal()
    with beta.data.open("rb") as file:
        file.seek(9 * MIB)
        assert file.read(BLOCK) == bytes([9]) * BLOCK


def test_who_is_inside_the_engine_reaches_its_own_two_files(cluster: Cluster) -> None:
    """Breaks in the field: a defect in the engine costs the server: its controller, its key, the
    data of other mirrors.
    """
    alpha = cluster.alpha
    alpha.order("switch", name="checkers", on=False)  # so that the controller's file is there
    # Each closed by itself: nothing hangs on the run directories.
    runs = [node.config.me.run_dir for node in cluster.both]
    paths = [path for path in (cluster.root, *cluster.root.rglob("*")) if path.name not in PUBLIC]
    names = {path.name for path in paths}
    assert {"controller.json", "controller.sock", "engine.sock", "nbd.sock", "meta", "key"} <= names
    pids = sorted({*processes_of(cluster.root), *(node.engine_pid() for node in cluster.both)})
    data_dir = alpha.config.me.data_dir
    own = {f"{verb} {data_dir / name}" for name in ("data", "meta") for verb in ("read", "write")}
    own |= {f"list {data_dir}", f"make in {data_dir}", f"signal {alpha.engine_pid()}"}
    for mode, more in ((0o700, set()), (0o755, {f"list {each}" for each in runs})):
        for each in runs:
            assert each.stat().st_mode & 0o777 == 0o700
            each.chmod(mode)
        try:
            done = set(attempts(paths, pids, inside(alpha)))
        finally:
            for each in runs:
                each.chmod(0o700)
        assert done == own | more
    # What root remembers beside the data, in a directory that is open to the engine.
    remembered = data_dir / "controller.json"
    before = remembered.stat()
    uid, gid = inside(alpha)
    for words in (("rm", "-f"), ("mv", "-t", "/tmp"), ("mv", "-f", data_dir / "made-by-nobody")):
        files = [*words, remembered]
        done_by = subprocess.run(
            files, user=uid, group=gid, extra_groups=[], cwd="/", capture_output=True, check=False
        )
        assert done_by.returncode != 0, files
    assert remembered.stat() == before
    cluster.in_sync(alpha)


def test_the_key_is_with_the_engine_and_nowhere_else(cluster: Cluster) -> None:
    """Breaks in the field: the way by which the key comes to an engine that may not read its file
    is open to whoever lists processes.
    """
    key = (cluster.root / "key").read_bytes()
    for node in cluster.both:
        process = Path("/proc") / str(node.engine_pid())
        for name in ("cmdline", "environ"):
            text = (process / name).read_bytes()
            assert key not in text
            assert key.hex().encode() not in text
        held = [str(each.readlink()) for each in (process / "fd").iterdir()]
        assert not [each for each in held if "memfd" in each]
        assert (process / "mem").stat().st_uid == 0, "no core, and nobody looks inside"


def test_a_start_that_cannot_be_is_told(cluster: Cluster, users: dict[str, Account]) -> None:
    """Breaks in the field: the engine of a user that is gone does not start, and nothing says why;
    or it starts as root instead.
    """
    beta = cluster.beta
    engine = beta.engine_pid()
    followed = beta.followers[-1]
    give(beta, "nobody-of-that-name")
    try:
        os.kill(engine, signal.SIGKILL)
        with followed.changed:
            said = lambda: "there is no such user" in str(followed.events[-20:])  # noqa: E731
            assert followed.changed.wait_for(said, 20.0), followed.events[-20:]
    finally:
        give(beta, users["beta"].name)
    beta.wait(lambda s: bool(s["engine"]) and s["engine"]["pid"] != engine, "a new engine")
    cluster.in_sync(cluster.alpha)
    require_no_rights(beta, users["beta"])


def test_an_engine_that_hangs_is_found_by_the_next_controller(cluster: Cluster) -> None:
    """Breaks in the field: a controller does not find the engine that hangs, because another
    process made its socket, and waits for it for ever.
    """
    beta = cluster.beta
    engine = beta.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    beta.kill()
    beta.up()
    beta.wait(lambda s: bool(s["engine"]) and s["engine"]["pid"] != engine, "a new engine")
    cluster.in_sync(cluster.alpha)


def test_a_mirror_loses_its_user_and_gets_one(cluster: Cluster, users: dict[str, Account]) -> None:
    """Breaks in the field: an existing mirror cannot be given a user, or never loses it again; or
    `apply` promises what does not happen.
    """
    beta, user = cluster.beta, users["beta"]
    for name, uid, mode in (("", 0, 0o700), (user.name, user.uid, 0o1770)):
        give(beta, name)
        (row,) = beta.order("reload", dry_run=False)["plan"]
        assert row["key"] == "engine.user"
        assert row["how"].startswith("restart the engine")
        assert beta.order("reload", dry_run=True)["plan"] == []
        beta.order("stop")
        beta.wait(lambda s: s["engine"] is None, "no engine")
        beta.order("start")
        cluster.in_sync(cluster.alpha)
        assert inside(beta)[0] == uid
        assert beta.data.stat().st_uid == uid
        assert beta.data.parent.stat().st_mode & 0o7777 == mode
