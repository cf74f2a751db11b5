"""Checksums and hashes against published values and against an independent implementation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.checks import crc32c, crc32c_reference, crcmod_is_compiled, keyed_hash

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc_matches_rfc_3720(data: bytes, expected: int) -> None:
    """A wrong polynomial: nodes of two versions take each other's frames and blocks for rot."""
    assert crc32c(data) == expected
    assert crc32c_reference(data) == expected


@given(st.binary(max_size=5000), SEEDS)
def test_both_implementations_agree(data: bytes, seed: int) -> None:
    """One of them is wrong on this processor: sound data is refused, or rot is accepted."""
    assert crc32c(data, seed) == crc32c_reference(data, seed)


@given(st.binary(max_size=3000), st.integers(0, 3000), SEEDS)
def test_crc_of_parts_is_crc_of_the_whole(data: bytes, cut: int, seed: int) -> None:
    """Checks over a header and a payload in two buffers differ from those over one buffer."""
    assert crc32c(data[cut:], crc32c(data[:cut], seed)) == crc32c(data, seed)


@given(st.binary(max_size=3000), st.integers(0, 64), SEEDS)
def test_crc_reads_any_buffer(data: bytes, skip: int, seed: int) -> None:
    """An unaligned slice of a receive buffer is checked wrongly and the session drops."""
    padded = bytearray(skip) + data
    view = memoryview(padded)[skip:]
    assert crc32c(view, seed) == crc32c_reference(data, seed)
    assert crc32c(bytearray(data), seed) == crc32c_reference(data, seed)


def test_crcmod_runs_as_c() -> None:
    """Installed without a compiler, crcmod is 100 times slower and nobody is told."""
    assert crcmod_is_compiled()


def test_keyed_hash_matches_the_published_vectors() -> None:
    """Two versions of the hash call equal blocks different, or worse, the other way round."""
    key = b"whats the Elvish word for friend"
    assert keyed_hash(key, b"").hex() == "92b2b75604ed3c761f9d6f62392c8a92"
    assert keyed_hash(key, b"\0").hex() == "6d7878dfff2f485635d39013278ae14f"


@given(st.binary(max_size=2000), st.binary(min_size=32, max_size=32))
def test_keyed_hash_depends_on_key_and_buffer_content_only(data: bytes, key: bytes) -> None:
    """A hash without its key lets whoever chooses the data make two blocks look equal."""
    digest = keyed_hash(key, data)
    assert len(digest) == 16
    assert keyed_hash(key, memoryview(bytearray(data))) == digest
    assert keyed_hash(bytes([key[0] ^ 1]) + key[1:], data) != digest


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_keyed_hash_takes_only_whole_keys(length: int) -> None:
    """A truncated key would be used silently."""
    with pytest.raises(AssertionError, match="32 bytes"):
        keyed_hash(bytes(length), b"")
