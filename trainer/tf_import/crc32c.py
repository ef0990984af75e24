"""CRC-32C (Castagnoli), the checksum in TensorFlow's checkpoints."""

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Bytes, Integer, exact

POLYNOMIAL = 0x82F63B78  # bits reversed
Words = NDArray[np.uint32]


def _tables() -> Words:
    """(8, 256): row k holds what each value of a byte adds to the register once k more bytes have followed it."""
    tables = np.zeros((8, 256), np.uint32)
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = register >> 1 ^ np.where(register & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    tables[0] = register
    for k in range(1, 8):
        tables[k] = tables[k - 1] >> 8 ^ tables[0][tables[k - 1] & 255]
    return tables


TABLES = _tables()


@exact
def _register(data: Bytes, tables: Words) -> Integer:
    low = np.uint32(0xFFFFFFFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):  # eight bytes at a time: the first four are combined with the register
        low ^= (
            np.uint32(data[i])
            | np.uint32(data[i + 1]) << 8
            | np.uint32(data[i + 2]) << 16
            | np.uint32(data[i + 3]) << 24
        )
        low = np.uint32(
            tables[7, low & 255]
            ^ tables[6, low >> 8 & 255]
            ^ tables[5, low >> 16 & 255]
            ^ tables[4, low >> 24]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
    for i in range(whole, len(data)):
        low = np.uint32(low >> 8 ^ tables[0, (low ^ data[i]) & 255])
    return low ^ np.uint32(0xFFFFFFFF)


def crc32c(data: bytes | memoryview | Bytes) -> int:
    return int(_register(np.frombuffer(data, np.uint8), TABLES))


def masked_crc32c(data: bytes | memoryview | Bytes) -> int:
    """The CRC as it is stored with its data: rotated by 15 bits, plus a constant (LevelDB's crc32c.h)."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
