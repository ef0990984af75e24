"""CRC-32C: the standard's check values, and a plain loop over bits."""

import numpy as np
import pytest

from kilobatch.data.crc32c import BLOCK, POLYNOMIAL, crc32c, word_by_tables


def plain(data: bytes, checksum: int = 0xFFFFFFFF) -> int:
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ POLYNOMIAL * (checksum & 1)
    return checksum


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_the_values_of_the_standard(data: bytes, expected: int):
    """RFC 3720, section B.4."""
    assert crc32c(np.frombuffer(data, np.uint8)) == expected


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24 * BLOCK - 1, 24 * BLOCK, 24 * BLOCK + 13, 2 * 24 * BLOCK + 8])
@pytest.mark.parametrize("skip", [0, 3])
def test_any_length_and_place_gives_the_same_as_a_loop_over_bits(length: int, skip: int):
    data = np.random.default_rng(length).integers(0, 256, skip + length, np.uint8)[skip:]
    assert crc32c(data) == plain(data.tobytes()) ^ 0xFFFFFFFF


def test_a_word_by_tables_is_eight_bytes():
    for word in np.random.default_rng(0).integers(0, 2**64, 20, np.uint64):
        assert word_by_tables(np.uint32(word >> np.uint64(5)), word) == plain(
            word.tobytes(), int(np.uint32(word >> np.uint64(5)))
        )
