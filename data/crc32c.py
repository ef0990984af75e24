"""CRC-32C (Castagnoli) in compiled code, by the processor's own instruction where it has one."""

from collections.abc import Callable
from typing import Any, cast

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kilobatch.data.numba_jit import Bytes, Integer, exact

POLYNOMIAL = 0x82F63B78  # reflected
ALL_ONES = np.uint32(0xFFFFFFFF)


def _tables() -> np.ndarray:
    """(8, 256) uint32: row k is what a byte adds to the checksum that is followed by k more bytes of the same word."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(POLYNOMIAL), first >> 1)
    rows = [first]
    for _ in range(7):
        rows.append(rows[-1] >> 8 ^ first[rows[-1] & 0xFF])
    return np.stack(rows)


TABLES = _tables()
BLOCK = 128  # words of each of three streams: the instruction's result takes three cycles, and one may begin in each


def _shifts() -> np.ndarray:
    """(4, 256) uint32: what byte k of a checksum adds to the checksum that is followed by BLOCK words of zeros."""
    checksums = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    for _ in range(8 * BLOCK):
        checksums = checksums >> 8 ^ TABLES[0][checksums & 0xFF]
    return checksums


SHIFTS = _shifts()


def _instruction() -> str | None:
    """LLVM's name of this processor's instruction for eight bytes; None: it has none."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("sse4.2"):
        return "llvm.x86.sse42.crc32.64.64"
    return "llvm.aarch64.crc32cx" if features.get("crc") else None


INSTRUCTION = _instruction()


@exact
def _byte(checksum: Integer, byte: Integer) -> Integer:
    return np.uint32(checksum >> np.uint32(8)) ^ TABLES[0, (checksum ^ np.uint32(byte)) & np.uint32(0xFF)]


@exact
def word_by_tables(checksum: Integer, word: Integer) -> Integer:
    """The checksum after eight more bytes, little-endian in `word`; without the instruction."""
    mixed = np.uint64(word) ^ np.uint64(checksum)
    result = np.uint32(0)
    for k in range(8):
        result ^= TABLES[7 - k, (mixed >> np.uint64(8 * k)) & np.uint64(0xFF)]
    return result


@intrinsic
def _word_by_instruction(_context: Any, _checksum: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        checksum, word = arguments
        long, short = ir.IntType(64), ir.IntType(32)
        wide = str(INSTRUCTION).startswith("llvm.x86")  # there the checksum is passed, and returned, in 64 bits
        kind = ir.FunctionType(long if wide else short, [long if wide else short, long])
        function = builder.module.globals.get(INSTRUCTION) or ir.Function(builder.module, kind, INSTRUCTION)
        result = builder.call(function, [builder.zext(checksum, long) if wide else checksum, word])
        return builder.trunc(result, short) if wide else result

    return types.uint32(types.uint32, types.uint64), generate


_word = cast(Callable[..., Integer], _word_by_instruction if INSTRUCTION else word_by_tables)


@exact
def _shift(checksum: Integer) -> Integer:
    """The checksum after BLOCK words of zeros."""
    result = np.uint32(0)
    for k in range(4):
        result ^= SHIFTS[k, (checksum >> np.uint32(8 * k)) & np.uint32(0xFF)]
    return result


@exact
def crc32c(data: Bytes) -> Integer:
    """The checksum of contiguous bytes (n,)."""
    checksum = ALL_ONES
    whole = len(data) // 8
    words = data[: 8 * whole].view(np.uint64)
    done = whole - whole % (3 * BLOCK)
    for start in range(0, done, 3 * BLOCK):
        second, third = np.uint32(0), np.uint32(0)
        streams = words[start : start + 3 * BLOCK].reshape(3, BLOCK)
        for i in range(BLOCK):
            checksum = np.uint32(_word(checksum, streams[0, i]))
            second = np.uint32(_word(second, streams[1, i]))
            third = np.uint32(_word(third, streams[2, i]))
        checksum = np.uint32(_shift(np.uint32(_shift(checksum)) ^ second)) ^ third
    for i in range(done, whole):
        checksum = np.uint32(_word(checksum, words[i]))
    for i in range(8 * whole, len(data)):
        checksum = np.uint32(_byte(checksum, data[i]))
    return np.uint32(~checksum)
