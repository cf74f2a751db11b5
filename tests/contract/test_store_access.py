"""Who may ask the store of an arbiter, and which member answers: each dialect's own ways."""

import base64
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import BlobClient

from nbdmirror.arbiters.choose import open_store
from nbdmirror.arbiters.conditional import ConditionalStore, Expected
from nbdmirror.arbiters.etcd import EtcdStore
from nbdmirror.config import load
from nbdmirror.core.record import Record, encode
from nbdmirror.errors import ArbiterError
from tests.support.certificates import Authority
from tests.support.http_proxy import (
    Answer,
    HttpProxy,
    Request,
    answering_writes,
    losing_all,
    losing_writes,
)
from tests.support.record_stores import G1, G2, KINDS, Scene, credentials, run, secret_file
from tests.support.stores import (
    ACCOUNT,
    ACCOUNT_KEY,
    BUCKET,
    CONTAINER,
    S3,
    SECRET_KEY,
    Azurite,
    Etcd,
    Server,
    free_port,
    sas,
)

pytestmark = pytest.mark.slow
PASSWORD = "a password that is shown to nobody"


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    """An etcd that lets everybody in."""
    with Etcd() as server:
        yield server


@pytest.fixture(scope="module")
def azurite() -> Iterator[Azurite]:
    """An account in Azurite."""
    with Azurite() as server:
        yield server


@pytest.fixture(scope="module")
def guarded() -> Iterator[Etcd]:
    """An etcd with users: `root`, `mirror` with the right to nbdmirror/, and `guest` with none."""
    with Etcd() as server:
        for name in ("root", "mirror", "guest"):
            ask(server, "auth/user/add", {"name": name, "password": PASSWORD})
        for name in ("root", "mirror"):
            ask(server, "auth/role/add", {"name": name})
            ask(server, "auth/user/grant", {"user": name, "role": name})
        right = {
            "permType": "READWRITE",
            "key": base64.b64encode(b"nbdmirror/").decode(),
            "range_end": base64.b64encode(b"nbdmirror0").decode(),
        }
        ask(server, "auth/role/grant", {"name": "mirror", "perm": right})
        ask(server, "auth/enable", {})
        yield server


def ask(server: Server, path: str, question: dict[str, Any]) -> None:
    """One request to etcd, as an operator sends it."""
    request = urllib.request.Request(f"{server.url}/v3/{path}", json.dumps(question).encode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, None, 60):
        pass


def rewrite(path: str, text: str) -> None:
    """Give a file another content."""
    Path(path).write_text(text)


def scene_of(server: Server, directory: Path) -> Scene:
    """A mirror in that server."""
    kinds = {Etcd: "etcd", S3: "s3", Azurite: "azure-blob"}
    return Scene(KINDS[kinds[type(server)]], server, directory)


async def refused(store: ConditionalStore, record: Record, part: str, secret: str) -> None:
    """Reading and writing end with an error that says what to do, and no secret."""
    for call in (store.read(), store.swap(None, record)):
        with pytest.raises(ArbiterError, match=part) as caught:
            await call
        assert secret not in str(caught.value)
        assert secret not in repr(caught.value.__cause__)


# --- etcd -----------------------------------------------------------------------------------------


def test_etcd_with_users(guarded: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: an etcd with authentication cannot be used, or the password is shown."""
    scene = scene_of(guarded, tmp_path)
    right: dict[str, Any] = {
        "user": "mirror",
        "password_file": secret_file(tmp_path, f"{PASSWORD}\n"),
    }
    wrong: dict[str, Any] = {**right, "password_file": secret_file(tmp_path, PASSWORD[:-1])}
    guest: dict[str, Any] = {**right, "user": "guest"}

    async def main() -> None:
        async with scene.opened(**wrong) as store:
            await refused(store, scene.first(), "etcd.password_file", PASSWORD[:-1])
        async with scene.opened() as store:
            await refused(store, scene.first(), "set etcd.user and", PASSWORD)
        async with scene.opened(**guest) as store:
            await refused(store, scene.first(), "give the user", PASSWORD)
        async with scene.opened(**right) as store:
            assert await store.swap(None, scene.first())
            held = await store.read()
            assert held is not None
            assert (await store.prove(held)).record == scene.first()

    run(main())


def test_a_lapsed_token_is_fetched_anew(guarded: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: five minutes after its last claim a node cannot claim any more."""
    scene = scene_of(guarded, tmp_path)
    password_file = secret_file(tmp_path, PASSWORD)

    async def main() -> None:
        with HttpProxy(guarded.url) as proxy:
            async with scene.opened(proxy.url, user="mirror", password_file=password_file) as store:
                assert isinstance(store, EtcdStore)
                for call in (store.read, lambda: store.swap(None, scene.first()), store.read):
                    store._token = "lapsed.1"
                    assert await call() != False  # noqa: E712 - None or what is held
                # Refused, and then once under the new token.
                assert len(proxy.writes) == 2
                proxy.plan = answering_writes(Answer(401, b'{"code": 16}'))
                with pytest.raises(ArbiterError, match="HTTP 401"):
                    await store.swap(None, scene.first())
                assert len(proxy.writes) == 4

    run(main())


def test_etcd_with_certificates(tmp_path: Path) -> None:
    """Breaks in the field: anybody answers in the store's place, or may write to it."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    server, client = ours.issue("server"), ours.issue("client")
    more = [
        *("--cert-file", server.cert_file, "--key-file", server.key_file),
        *("--client-cert-auth", "--trusted-ca-file", ours.ca_file),
    ]
    right: dict[str, Any] = {
        "ca_file": ours.ca_file,
        "cert_file": client.cert_file,
        "key_file": client.key_file,
    }

    async def main(scene: Scene) -> None:
        async with scene.opened(**right) as store:
            assert await store.swap(None, scene.first())
            assert await store.read() is not None
        stranger = theirs.issue("client")
        keys: dict[str, Any] = {"cert_file": stranger.cert_file, "key_file": stranger.key_file}
        for wrong in ({**right, **keys}, {"ca_file": ours.ca_file}, {**right, "ca_file": None}):
            async with scene.opened(**wrong) as store:
                with pytest.raises(ArbiterError, match="demo"):
                    await store.read()
        async with scene.opened(**{**right, "key_file": ours.ca_file}) as store:
            with pytest.raises(ArbiterError, match=r"look at etcd\.ca_file"):
                await store.read()

    with Etcd(more, scheme="https") as etcd:
        run(main(scene_of(etcd, tmp_path)))


def test_a_renewed_certificate_is_taken(tmp_path: Path) -> None:
    """Breaks in the field: a node whose certificate ran out needs a restart to claim."""
    ours = Authority(tmp_path / "ours")
    server, client = ours.issue("server"), ours.issue("client", expired=True)
    more = [
        *("--cert-file", server.cert_file, "--key-file", server.key_file),
        *("--client-cert-auth", "--trusted-ca-file", ours.ca_file),
    ]
    right: dict[str, Any] = {
        "ca_file": ours.ca_file,
        "cert_file": client.cert_file,
        "key_file": client.key_file,
    }

    async def main(scene: Scene) -> None:
        async with scene.opened(**right) as store:
            with pytest.raises(ArbiterError):
                await store.read()
            fresh = ours.issue("client")
            fresh.replace(client)
            with pytest.raises(ArbiterError):  # the failure makes it look again
                await store.read()
            assert await store.read() is None

    with Etcd(more, scheme="https") as etcd:
        run(main(scene_of(etcd, tmp_path)))


def test_the_next_member_is_asked_where_nothing_was_sent(etcd: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: one dead member of three, and no node can claim."""
    scene = scene_of(etcd, tmp_path)
    endpoints = [f"http://127.0.0.1:{free_port()}", "http://store.invalid:1", etcd.url]

    async def main() -> None:
        async with scene.opened(endpoints=endpoints) as store, scene.opened() as direct:
            assert await store.swap(None, scene.first())
            assert await store.read() == await direct.read()
            assert await store.identity() == await direct.identity()

    run(main())


def test_a_swap_is_sent_to_one_member(etcd: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: the second member refuses what the first one did."""
    scene = scene_of(etcd, tmp_path)

    async def main() -> None:
        with HttpProxy(etcd.url) as first, HttpProxy(etcd.url) as second:
            async with scene.opened(endpoints=[first.url, second.url]) as store:
                for plan in (losing_all, losing_writes):
                    first.plan = plan
                    with pytest.raises(ArbiterError, match="what was sent may have been done"):
                        await store.swap(None, scene.first())
                    assert not second.writes
                first.plan = losing_all  # a read goes on to the next one
                held = await store.read()
                assert held is not None
                assert held.record == scene.first()
                assert len(second.requests) == 1
                # From now on the one that answered comes first.
                await store.read()
                assert len(second.requests) == 2

    run(main())


def test_a_member_that_hangs_does_not_take_all_the_time(etcd: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: one frozen member of two, and a read has no time left for the other."""
    scene, over = scene_of(etcd, tmp_path), threading.Event()

    def hanging(_request: Request, _send: Callable[[Request], Answer]) -> None:
        over.wait(60)

    async def main() -> None:
        with HttpProxy(etcd.url) as first:
            first.plan = hanging
            try:
                async with scene.opened(endpoints=[first.url, etcd.url], timeout_ms=4000) as store:
                    assert await store.read() is None
            finally:
                over.set()

    run(main())


def test_endpoints_of_two_clusters_are_one_too_many(etcd: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: each node asks another cluster, and both win."""
    scene = scene_of(etcd, tmp_path)

    async def main(other: Etcd) -> None:
        with HttpProxy(etcd.url) as proxy:
            async with scene.opened(proxy.url) as store, scene.opened(other.url) as strange:
                identity = await store.identity()
                assert identity != await strange.identity()
                assert await store.read() is None
                proxy.target = proxy.target._replace(netloc=f"127.0.0.1:{other.port}")
                with pytest.raises(ArbiterError, match="expected endpoints of one cluster"):
                    await store.read()
                assert await store.identity() != identity
                assert await store.read() is None

    with Etcd(token="another-cluster") as other:
        run(main(other))


def test_a_revision_that_is_given_again_is_not_enough(etcd: Etcd, tmp_path: Path) -> None:
    """Breaks in the field: after a restore an old claim finds its revision under another record."""
    scene = scene_of(etcd, tmp_path)

    async def main() -> None:
        async with scene.opened() as store:
            assert await store.swap(None, scene.first())
            held = await store.read()
            assert held is not None
            other = Expected(held.version, encode(Record(scene.mirror_id, 1, G2, 1)))
            assert not await store._put(store._place.key, other, b"x")
            assert await store.read() == held

    run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"null",
        b"[" * 2_000,
        b'{"succeeded": true}',
        b'{"header": {}, "succeeded": true}',
        b'{"header": {"cluster_id": "1"}, "succeeded": true}',
        b'{"header": {"cluster_id": "1"}, "responses": [{}]}',
        b'{"header": {"cluster_id": "1"}, "succeeded": "no"}',
        b" " * 10_000,
    ],
)
def test_only_etcd_says_yes_or_no(etcd: Etcd, tmp_path: Path, body: bytes) -> None:
    """Breaks in the field: a login page is taken for "no", and a winner steps back."""
    scene = scene_of(etcd, tmp_path)

    async def main() -> None:
        with HttpProxy(etcd.url) as proxy:
            proxy.plan = answering_writes(Answer(200, body))
            async with scene.opened(proxy.url) as store:
                with pytest.raises(ArbiterError, match="demo"):
                    await store.swap(None, scene.first())

    run(main())


# --- S3 -------------------------------------------------------------------------------------------


def test_s3_with_wrong_credentials(tmp_path: Path) -> None:
    """Breaks in the field: a node without the right to the bucket takes it for an empty one."""

    async def main(scene: Scene) -> None:
        async with scene.opened() as store:
            await refused(store, scene.first(), "correct the credentials", SECRET_KEY)
        for content, part in (("", "default"), ("[default\n", "credentials")):
            file = secret_file(tmp_path, content)
            async with scene.opened(credentials_file=file) as store:
                await refused(store, scene.first(), part, SECRET_KEY)
        async with scene.opened(profile="missing") as store:
            await refused(store, scene.first(), "missing", SECRET_KEY)

    with S3(has_users=True) as server:
        run(main(scene_of(server, tmp_path)))


def test_s3_takes_the_named_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks in the field: a variable of somebody's shell decides under whose name a node asks."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMTHEENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    file = secret_file(tmp_path, credentials("FIRST") + credentials("SECOND", "other"))

    def signer(request: Request) -> str:
        return dict(request.headers)["Authorization"].partition("Credential=")[2].split("/")[0]

    async def main(scene: Scene) -> None:
        with HttpProxy(scene.server.url) as proxy:
            chosen: list[dict[str, Any]] = [{}, {"profile": "other"}]
            for changes in chosen:
                async with scene.opened(proxy.url, credentials_file=file, **changes) as store:
                    await store.read()
            assert [signer(request) for request in proxy.requests] == ["FIRST", "SECOND"]

            # A key that was taken back, and its successor in the same file.
            def plan(request: Request, send: Callable[[Request], Answer]) -> Answer:
                return Answer(403) if signer(request) == "FIRST" else send(request)

            proxy.plan = plan
            async with scene.opened(proxy.url, credentials_file=file) as store:
                for _ in range(3):
                    with pytest.raises(ArbiterError, match="correct the credentials"):
                        await store.read()
                rewrite(file, credentials("THIRD"))
                assert await store.read() is None

    with S3() as server:
        run(main(scene_of(server, tmp_path)))


# --- Azure ----------------------------------------------------------------------------------------


def test_azure_with_wrong_credentials(azurite: Azurite, tmp_path: Path) -> None:
    """Breaks in the field: a node without the right to the blob takes it for a missing one."""
    scene = scene_of(azurite, tmp_path)
    wrong_key = base64.b64encode(b"another key").decode()

    async def main() -> None:
        async with scene.opened(key_file=secret_file(tmp_path, wrong_key)) as store:
            await refused(store, scene.first(), "correct azure-blob.key_file", wrong_key)
        async with scene.opened(key_file=secret_file(tmp_path, "abc")) as store:
            await refused(store, scene.first(), "expected one in base64", "abc")
        async with scene.opened(key_file=secret_file(tmp_path, "two\nlines")) as store:
            await refused(store, scene.first(), "more than one", "two")

    run(main())


def test_azure_with_a_signature(azurite: Azurite, tmp_path: Path) -> None:
    """Breaks in the field: a signature that ran out needs a restart, or is shown in a message."""
    scene = scene_of(azurite, tmp_path)
    old = sas(expired=True)
    file = secret_file(tmp_path, f"?{old}\n")

    async def main() -> None:
        async with scene.opened(sas_file=file) as store:
            await refused(store, scene.first(), r"renew azure-blob\.sas_file", old.split("sig=")[1])
            rewrite(file, sas())
            assert await store.swap(None, scene.first())
            held = await store.read()
            assert held is not None
            assert (await store.prove(held)).record == scene.first()

    run(main())


def test_a_leased_blob_is_no_clear_no(azurite: Azurite, tmp_path: Path) -> None:
    """Breaks in the field: a lease, which has the status of a lost race, makes both nodes lose."""
    scene = scene_of(azurite, tmp_path)

    async def main() -> None:
        async with scene.opened() as store:
            assert await store.swap(None, scene.first())
            held = await store.read()
            assert held is not None
            blob = BlobClient(
                azurite.account_url,
                CONTAINER,
                store._place.key,
                credential={"account_name": ACCOUNT, "account_key": ACCOUNT_KEY},
            )
            with blob:
                blob.acquire_lease(60)
                with pytest.raises(ArbiterError, match="break it"):
                    await store.swap(held, scene.joint(held.record))

    run(main())


# --- the choice -----------------------------------------------------------------------------------

HEAD = """
mirror = "demo"
key_file = "{key}"
arbiter = "{arbiter}"
[node.alpha]
id = 1
address = "10.1.0.1:7789"
[node.beta]
id = 2
address = "10.1.0.2:7789"
"""


@pytest.mark.parametrize("arbiter", KINDS)
def test_the_configured_store_is_opened(arbiter: str, tmp_path: Path) -> None:
    """Breaks in the field: the configuration opens no store, or another one."""
    mirror_id = b"m" * 16
    key = secret_file(tmp_path, "k" * 32)

    async def main(server: Server) -> None:
        tables = {
            "etcd": f'endpoints = ["{server.url}"]\nprefix = "/mirrors/"',
            "s3": f'endpoint = "{server.url}"\nbucket = "{BUCKET}"\n'
            f'credentials_file = "{secret_file(tmp_path, credentials())}"',
            "azure-blob": f'account_url = "{server.url}/{ACCOUNT}/"\ncontainer = "{CONTAINER}"\n'
            f'key_file = "{secret_file(tmp_path, ACCOUNT_KEY)}"',
        }
        text = HEAD.format(key=key, arbiter=arbiter) + f"[{arbiter}]\n{tables[arbiter]}\n"
        (tmp_path / "demo.toml").write_text(text + "timeout_ms = 10000\n")
        identities = []
        for node in ("alpha", "beta"):
            store = open_store(load(tmp_path / "demo.toml", node), mirror_id)
            assert f"demo-{mirror_id.hex()}.json" in store.where
            assert await store.swap(None, Record(mirror_id, 1, G1, 1)) is (node == "alpha")
            held = await store.read()
            assert held is not None
            await store.prove(held)
            identities.append(await store.identity())
            await store.close()
        assert identities[0] == identities[1]

    with KINDS[arbiter].serve() as server:
        run(main(server))


def test_no_library_is_imported_that_is_not_asked_for() -> None:
    """Breaks in the field: every controller pays the time and memory of stores it does not use."""
    code = (
        "import sys, nbdmirror.arbiters.choose, nbdmirror.controller.daemon, nbdmirror.engine\n"
        "print(*sorted({'botocore', 'aiobotocore', 'azure'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
