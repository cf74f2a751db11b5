"""The resync: interrupted, slowed down, of an adopted image, of a terabyte of nothing."""

import random
from collections.abc import Callable
from time import monotonic

import pytest

from nbdmirror import admin
from tests.support.fixtures import MakePair
from tests.support.load import Load
from tests.support.pair import Pair, State

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

TIB = 1 << 40


def adopted(pair: Pair) -> bytes:
    """Alpha adopts an image of random bytes, beta joins over garbage of its own."""
    image = random.Random(1).randbytes(pair.size)
    alpha, beta = pair.both
    alpha.config.me.data_dir.mkdir(mode=0o700)
    alpha.data.write_bytes(image)
    alpha.data.chmod(0o600)
    admin.create(alpha.config, None, join=False, adopt=True, sparse=False)
    beta.config.me.data_dir.mkdir(mode=0o700)
    beta.data.write_bytes(image[: pair.size // 2] + random.Random(2).randbytes(pair.size // 2))
    beta.data.chmod(0o600)
    admin.create(beta.config, None, join=True, adopt=True, sparse=False)
    return image


def dirty_at_most(count: int) -> Callable[[State], bool]:
    """Whether no more than `count` bytes are left to copy."""
    return lambda state: bool(state["dirty_bytes"] <= count)


def test_adopted_image_goes_to_the_joiner(make_pair: MakePair) -> None:
    """Breaks in the field: data that was there before the mirror is missing on the second node."""
    pair = make_pair()
    image = adopted(pair)
    alpha, beta = pair.both
    alpha.start()
    beta.start()
    pair.synced()
    done = alpha.wait_event("resync-finished")
    assert done["copied_bytes"] <= pair.size // 2 + (1 << 20), "equal halves are only compared"
    pair.stop()
    pair.assert_equal()
    assert alpha.data.read_bytes() == image


def test_interrupted_resync_goes_on_where_it_was(make_pair: MakePair) -> None:
    """Breaks in the field: a resync over a bad line never ends because it begins anew each time."""
    pair = make_pair(size=32 << 20, engine={"resync_rate": "8MiB"})
    adopted(pair)
    alpha, beta = pair.both
    alpha.start()
    for _ in range(3):
        before = alpha.last_event()
        beta.start()
        started = alpha.wait_event("resync-started", after=before)
        alpha.wait_state(dirty_at_most(started["bytes"] - (6 << 20)), "some of it is done")
        beta.kill()
        alpha.wait_event("session-lost", after=started["number"])
    remaining = alpha.state()["dirty_bytes"]
    assert remaining <= 32 << 20
    assert remaining < (32 - 12) << 20, f"{remaining} left: what was copied was forgotten"
    beta.start()
    pair.synced()
    pair.stop()
    pair.assert_equal()


def test_rate_limit_is_kept(make_pair: MakePair) -> None:
    """Breaks in the field: a resync takes the line or the disk from the application."""
    pair = make_pair(engine={"resync_rate": "8MiB"})
    adopted(pair)
    pair.alpha.start()
    pair.beta.start()
    began = monotonic()
    pair.synced()
    assert monotonic() - began > 16 / 8 * 0.7
    pair.stop()
    pair.assert_equal()


def test_full_resync_by_command(pair: Pair) -> None:
    """Breaks in the field: a copy that is suspected to be bad cannot be compared and repaired."""
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(100)
    load.stop()
    alpha.command("drain")
    with beta.data.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"rot" * 1000)
    seen = alpha.last_event()
    alpha.command("resync")
    done = alpha.wait_event("resync-finished", after=seen)
    pair.synced()
    assert done["examined_bytes"] >= pair.size
    assert done["copied_bytes"] <= 1 << 20
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_empty_tebibyte_is_in_sync_in_seconds(make_pair: MakePair) -> None:
    """Breaks in the field: a new big mirror reads a terabyte of zeros before it protects."""
    pair = make_pair(size=TIB).create(sparse=True)
    alpha, beta = pair.both
    alpha.start()
    alpha.command("promote")
    handle = alpha.connect()
    handle.pwrite(b"first", 0)
    handle.pwrite(b"last!", TIB - 5)
    beta.start()
    pair.synced()  # far longer than it takes, and far too short to read a terabyte
    assert alpha.wait_event("resync-finished")["copied_bytes"] <= 64 << 20
    handle.pwrite(b"after", TIB // 2)
    assert handle.pread(5, TIB - 5) == b"last!"
    handle.shutdown()
    pair.stop()
    for offset, text in ((0, b"first"), (TIB - 5, b"last!"), (TIB // 2, b"after")):
        for engine in pair.both:
            with engine.data.open("rb") as file:
                file.seek(offset)
                assert file.read(5) == text
