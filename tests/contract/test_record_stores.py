"""One record, three dialects: what every store of an arbiter has to do, against real servers."""

import asyncio
import base64
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from nbdmirror.arbiters.conditional import ConditionalStore, Expected
from nbdmirror.arbiters.port import IDENTITY_BYTES, Held
from nbdmirror.core.record import NOBODY, RECORD_BYTES_MAX, encode
from nbdmirror.errors import ArbiterError
from tests.support.http_proxy import (
    Answer,
    HttpProxy,
    answering_all,
    answering_writes,
    losing_writes,
    slowly,
    without_conditions,
)
from tests.support.record_stores import G2, G3, KINDS, Kind, Scene, run
from tests.support.stores import Server

pytestmark = [
    pytest.mark.slow,
    # aiohttp gives back a connection whose request was given up at the wrong moment, and complains.
    pytest.mark.filterwarnings(
        "ignore:.*Connection.__del__:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each dialect in turn."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def shared(kind: Kind) -> Iterator[Server]:
    """A server for all tests that leave it as it is."""
    with kind.serve() as server:
        yield server


@pytest.fixture
def scene(kind: Kind, shared: Server, tmp_path: Path) -> Scene:
    """A mirror of its own in the shared server."""
    return Scene(kind, shared, tmp_path)


@pytest.fixture
def own(kind: Kind, tmp_path: Path) -> Iterator[Scene]:
    """A mirror in a server of its own, to be ill-treated."""
    with kind.serve() as server:
        yield Scene(kind, server, tmp_path)


@pytest.fixture
def proxy(scene: Scene) -> Iterator[HttpProxy]:
    """A proxy in front of the shared server."""
    with HttpProxy(scene.server.url) as made:
        yield made


async def created(scene: Scene, store: ConditionalStore) -> Held:
    """The first record of the mirror, written and read."""
    assert await store.swap(None, scene.first())
    return await there(store)


async def there(store: ConditionalStore) -> Held:
    """What the store holds."""
    held = await store.read()
    assert held is not None
    return held


# --- what a store does ----------------------------------------------------------------------------


def test_a_record_is_made_once(scene: Scene) -> None:
    """Breaks in the field: two nodes that create a mirror's record both own it."""

    async def main() -> None:
        async with scene.opened() as one, scene.opened(node_id=2) as other:
            assert await one.read() is None
            assert await one.swap(None, scene.first())
            assert not await other.swap(None, scene.first())
            held = await there(other)
            assert held.record == scene.first()
            assert held == await there(one)

    run(main())


def test_a_swap_is_seen_by_the_other_node(scene: Scene) -> None:
    """Breaks in the field: the loser of a claim reads the old record and goes on."""

    async def main() -> None:
        async with scene.opened() as one, scene.opened(node_id=2) as other:
            held = await created(scene, one)
            joint = scene.joint(held.record)
            assert await other.swap(await there(other), joint)
            now = await there(one)
            assert now.record == joint
            assert now.version != held.version

    run(main())


def test_a_stale_swap_is_a_clear_no(scene: Scene) -> None:
    """Breaks in the field: the second claim overwrites the first, and both nodes go on."""

    async def main() -> None:
        async with scene.opened() as store:
            held = await created(scene, store)
            assert await store.swap(held, held.record.next(G2, 1))
            assert not await store.swap(held, held.record.next(G3, 2))
            assert (await there(store)).record == held.record.next(G2, 1)

    run(main())


def test_of_two_swaps_at_once_one_is_done(scene: Scene) -> None:
    """Breaks in the field: both nodes claim when the link is cut, and both win."""

    async def main() -> None:
        async with scene.opened() as one, scene.opened(node_id=2) as other:
            held = await created(scene, one)
            for _ in range(10):
                claims = held.record.next(G2, 1), held.record.next(G3, 2)
                won = await asyncio.gather(one.swap(held, claims[0]), other.swap(held, claims[1]))
                assert sorted(won) == [False, True]
                held = await there(other)
                assert held.record == claims[won.index(True)]

    run(main())


def test_a_delayed_swap_is_never_done(scene: Scene) -> None:
    """Breaks in the field: a claim that was held up on its way is done after all was settled."""

    async def main() -> None:
        async with scene.opened() as store:
            seen = [await created(scene, store)]
            for _ in range(3):
                assert await store.swap(seen[-1], scene.joint(seen[-1].record))
                seen.append(await there(store))
            # The same generation and owner as before, but for the counter.
            for old in seen[:-1]:
                assert not await store.swap(old, old.record.next(G3, 2))
            assert not await store.swap(None, scene.first())
            assert await there(store) == seen[-1]

    run(main())


def test_the_identity_is_that_of_the_place(scene: Scene) -> None:
    """Breaks in the field: two nodes take two stores for one, each asks its own, and both win."""

    async def main() -> None:
        async with scene.opened() as one, scene.opened(node_id=2, timeout_ms=9000) as other:
            identity = await one.identity()
            assert len(identity) == IDENTITY_BYTES
            assert await one.identity() == await other.identity() == identity
        another = Scene(scene.kind, scene.server, scene.directory)
        found = {identity}
        for opened in (
            another.opened(),
            scene.opened(prefix="b/"),
            scene.opened(mirror="c"),
        ):
            async with opened as store:
                found.add(await store.identity())
        assert len(found) == 4

    run(main())


# --- proof ----------------------------------------------------------------------------------------


def test_a_proof_leaves_the_record(scene: Scene) -> None:
    """Breaks in the field: the proof of every minute changes who may go on."""

    async def main() -> None:
        async with scene.opened() as one, scene.opened(node_id=2) as other:
            held = await created(scene, one)
            for store in (one, other, one):
                held = await store.prove(held)
                assert held.record == scene.first()
                assert held == await there(store)
            assert await one.swap(held, scene.joint(held.record))

    run(main())


def test_a_proof_after_the_other_nodes_is_one(scene: Scene) -> None:
    """Breaks in the field: two nodes prove in the same minute, and one of them warns of nothing."""

    async def main() -> None:
        async with scene.opened() as one, scene.opened(node_id=2) as other:
            held = await created(scene, one)
            await other.prove(held)
            assert (await one.prove(held)).record == held.record
            assert await one.swap(await there(one), scene.joint(held.record))
            with pytest.raises(ArbiterError, match="the record changed while it was proved"):
                await other.prove(held)

    run(main())


def test_a_store_without_conditions_is_no_arbiter(scene: Scene, proxy: HttpProxy) -> None:
    """Breaks in the field: a server that ignores conditions lets two nodes win."""

    async def main() -> None:
        async with (
            scene.opened() as direct,
            scene.opened(proxy.url, **signed(scene, "sas")) as store,
        ):
            held = await created(scene, direct)
            proxy.plan = without_conditions
            with pytest.raises(ArbiterError, match="must not be used as arbiter"):
                await store.prove(held)
            # The record itself was never given to it.
            assert await there(direct) == held
            assert all("proof-1" in each for each in map(written_key, proxy.writes))

    run(main())


def test_a_store_that_is_slow_and_well_is_proven(scene: Scene, proxy: HttpProxy) -> None:
    """Breaks in the field: a store in another region answers each request in time, and a node that
    could claim there warns for ever.
    """

    async def main() -> None:
        async with (
            scene.opened() as direct,
            scene.opened(proxy.url, timeout_ms=1000, **signed(scene, "sas")) as store,
        ):
            held = await created(scene, direct)
            assert await there(store) == held
            proxy.plan = slowly(0.3)
            began = monotonic()
            assert (await store.prove(held)).record == held.record
            assert monotonic() - began > 1.0, "longer than one request may take"

    run(main())


def signed(scene: Scene, how: str) -> dict[str, Any]:
    """Credentials under which a proxy can change what it passes on."""
    return {"signed": how} if scene.kind is KINDS["azure-blob"] else {}


def written_key(request: Any) -> str:
    """Which key a write names."""
    if request.method == "PUT":
        return str(request.path)
    put = json.loads(request.body)["success"][0]["request_put"]
    return base64.b64decode(put["key"]).decode()


# --- answers that are none ------------------------------------------------------------------------


def test_a_lost_answer_is_settled_by_reading(scene: Scene, proxy: HttpProxy) -> None:
    """Breaks in the field: a node that won believes that it lost, or a library sends twice."""

    async def main() -> None:
        async with scene.opened(proxy.url) as store:
            held = await created(scene, store)
            await there(store)  # a kept connection would be used again for the next request
            proxy.plan, before = losing_writes, len(proxy.writes)
            claim = held.record.next(G2, 1)
            with pytest.raises(ArbiterError, match="demo"):
                await store.swap(held, claim)
            assert len(proxy.writes) == before + 1
            assert (await there(store)).record == claim

    run(main())


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (409, b"<Error><Code>ConditionalRequestConflict</Code></Error>"),
        (409, b"{}"),
        (412, b""),
        (404, b""),
        (500, b"<Error><Code>InternalError</Code></Error>"),
        (503, b""),
        (307, b""),
        (301, b"<Error><Code>PermanentRedirect</Code></Error>"),
        (400, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>x-1</Region></Error>"),
        (403, b""),
    ],
)
def test_an_answer_that_is_neither_yes_nor_no(
    scene: Scene, proxy: HttpProxy, status: int, body: bytes
) -> None:
    """Breaks in the field: an overloaded store, or a box before it, is taken for a yes or a no."""

    async def main() -> None:
        async with scene.opened(proxy.url) as store, scene.opened() as direct:
            held = await created(scene, direct)
            await there(store)
            headers = [("Location", f"{proxy.url}/elsewhere")] if 300 <= status < 400 else []
            proxy.plan = answering_writes(Answer(status, body, headers))
            with pytest.raises(ArbiterError, match="demo") as caught:
                await store.swap(held, held.record.next(G2, 1))
            assert len(proxy.writes) == 1
            # A client that waits to try again would end by the time.
            assert "no answer within" not in str(caught.value)
            assert await there(direct) == held

    run(main())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "no JSON|something empty"),
        (b"\xff{", "no JSON"),
        (b'{"format": 2}', "format"),
        (b"x" * (RECORD_BYTES_MAX + 1), "bytes"),
        (b"x" * 700_000, "bytes"),
    ],
)
def test_what_is_no_record_is_not_believed(scene: Scene, content: bytes, part: str) -> None:
    """Breaks in the field: whoever may write to the store stops or frees a node."""

    async def main() -> None:
        async with scene.opened() as store:
            assert await store._put(store._place.key, None, content)
            with pytest.raises(ArbiterError, match=part) as caught:
                await store.read()
            assert store.where in str(caught.value)

    run(main())


def test_another_mirrors_record_is_not_believed(scene: Scene) -> None:
    """Breaks in the field: a copied record of another mirror decides about this one."""

    async def main() -> None:
        other = Scene(scene.kind, scene.server, scene.directory)
        spaced = encode(scene.first()).replace(b" ", b"")
        for content, part in ((encode(other.first()), "that of mirror"), (spaced, "the form")):
            async with scene.opened(mirror=part[-4:]) as store:
                assert await store._put(store._place.key, None, content)
                with pytest.raises(ArbiterError, match=part):
                    await store.read()

    run(main())


@pytest.mark.parametrize(
    ("status", "body"), [(200, b""), (200, b"{}"), (404, b""), (403, b""), (500, b""), (302, b"")]
)
def test_no_answer_is_no_empty_store(
    scene: Scene, proxy: HttpProxy, status: int, body: bytes
) -> None:
    """Breaks in the field: what listens in the store's place makes a node believe that no record
    is there, and it makes one of its own.
    """

    async def main() -> None:
        async with scene.opened(proxy.url) as store:
            await created(scene, store)
            proxy.plan = answering_all(Answer(status, body, [("Location", f"{proxy.url}/x")]))
            with pytest.raises(ArbiterError, match="demo"):
                await store.read()

    run(main())


# --- stores that are not there --------------------------------------------------------------------


async def fails(store: ConditionalStore, held: Held) -> list[str]:
    """What each call says that has to ask the store."""
    texts = []
    for call in (store.read(), store.swap(held, held.record.next(G2, NOBODY)), store.prove(held)):
        with pytest.raises(ArbiterError) as caught:
            await call
        texts.append(str(caught.value))
    return texts


def test_a_store_that_stopped_is_no_answer(own: Scene) -> None:
    """Breaks in the field: no store is taken for an empty one, or the call never ends."""

    async def main() -> None:
        async with own.opened() as store:
            held = await created(own, store)
            own.server.stop()
            assert all("demo" in text for text in await fails(store, held))

    run(main())


def test_a_store_that_froze_is_no_answer(own: Scene) -> None:
    """Breaks in the field: a store that takes connections and says nothing stops the node, too."""

    async def main() -> None:
        async with own.opened() as store, own.opened(timeout_ms=300) as hasty:
            held = await created(own, store)
            await there(hasty)
            with own.server.frozen():
                for text in await fails(hasty, held):
                    assert "no answer within 300 ms" in text or "no member answers" in text
            await there(store)

    run(main())
    gc.collect()  # here, and not in the test of another file


def test_a_store_that_lost_everything_holds_nothing(own: Scene) -> None:
    """Breaks in the field: after a restore nobody is told that the record is gone."""

    async def main() -> None:
        async with own.opened() as store:
            held = await created(own, store)
            own.server.restart_empty()
            assert await store.read() is None
            assert not await store.swap(held, held.record.next(G2, 1))
            assert await store.read() is None
            with pytest.raises(ArbiterError):
                await store.prove(held)

    run(main())


@pytest.mark.parametrize("kind", ["s3", "azure-blob"], indirect=True)  # etcd has no such places
def test_a_place_that_is_missing_is_no_empty_one(scene: Scene) -> None:
    """Breaks in the field: a mistyped bucket is an arbiter in which everybody wins."""

    async def main() -> None:
        async with scene.opened() as store, scene.opened(**scene.kind.elsewhere) as wrong:
            held = await created(scene, store)
            for text in await fails(wrong, held):
                assert "no-such-" in text
                assert "correct" in text
            with pytest.raises(ArbiterError):
                await wrong.swap(None, scene.first())

    run(main())


def test_a_name_that_nobody_knows_is_no_answer(scene: Scene) -> None:
    """Breaks in the field: a name server that is down holds up the controller."""

    async def main() -> None:
        async with scene.opened("http://store.invalid:1", timeout_ms=1000) as store:
            with pytest.raises(ArbiterError, match=r"store\.invalid"):
                await store.read()

    run(main())


def test_a_call_without_a_condition_is_impossible(scene: Scene) -> None:
    """Breaks in the field: one forgotten condition, and a claim is always won."""

    async def main() -> None:
        async with scene.opened() as store:
            await created(scene, store)
            for wrong in (None, Expected(store.WRONG_VERSION, encode(scene.first()))):
                assert not await store._put(store._place.key, wrong, b"x")
            assert (await there(store)).record == scene.first()

    run(main())
