"""Vector instructions on bytes and pixels for compiled loops: 16 bytes at a time.

numba has no vectors of bytes, and LLVM makes none of loops over pixels of three bytes; so these are written in LLVM's
language, for any processor. Addresses are plain numbers. Results are rounded to the nearest, halves up.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kilobatch.data.numba_jit import Integer

BYTES = 16  # made by each call
FRACTION = 15  # bits of the weights of `mix_rows` and `mix_pixels`
WEIGHT_BITS = 22  # of the weights of `filter_rows` and `filter_pixels`, as Pillow's; a product takes 16 bits at a time
LOW_BITS = 8  # of a weight's low part
WINDOW = 16  # bytes that `mix_pixels` may pick from, and that `filter_pixels` reads past a pixel at most
NOTHING = 0x80  # the pick that gives zero

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
NEIGHBOURS = [0, 3, 1, 4, 2, 5, 6, 7]  # two pixels of three bytes, as pairs of bytes

# LLVM's names of three instructions, where it does not choose them by itself; other processors go without
ARCHITECTURE = llvmlite.binding.get_default_triple().partition("-")[0]
PICK = {"x86_64": "llvm.x86.ssse3.pshuf.b.128", "aarch64": "llvm.aarch64.neon.tbl1.v16i8"}.get(ARCHITECTURE)
SCALE = {"x86_64": "llvm.x86.ssse3.pmul.hr.sw.128", "aarch64": "llvm.aarch64.neon.sqrdmulh.v8i16"}.get(ARCHITECTURE)
ADD_PRODUCTS = {"x86_64": "llvm.x86.sse2.pmadd.wd"}.get(ARCHITECTURE)


def _vector(kind: ir.IntType, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def _constant(kind: ir.IntType, lanes: int, value: int) -> Any:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _load(builder: Any, address: Any, kind: ir.IntType, lanes: int) -> Any:
    value = builder.load(builder.inttoptr(address, _vector(kind, lanes).as_pointer()))
    value.align = 1
    return value


def _load_address(builder: Any, address: Any, number: int) -> Any:
    return builder.load(builder.inttoptr(_plus(builder, address, 8 * number), address.type.as_pointer()))


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _shuffle(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(_vector(I32, len(lanes)), lanes))


def _plus(builder: Any, address: Any, constant: int) -> Any:
    return builder.add(address, address.type(constant))


def _joined(builder: Any, both: Sequence[Any]) -> Any:
    first, second = both
    return _shuffle(builder, first, second, list(range(2 * first.type.count)))


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(_vector(value.type, lanes), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, value, I32(0)), undefined, [0] * lanes)


def _call(builder: Any, instruction: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, instruction), arguments)


def _mix(builder: Any, both: Sequence[Any], weight: Any) -> Any:
    """(8,) int16: first + (second - first) * weight."""
    first, second = both
    difference = builder.sub(second, first)
    if SCALE:
        return builder.add(first, _call(builder, SCALE, first.type, difference, weight))
    wide = _vector(I32, 8)
    product = builder.mul(builder.sext(difference, wide), builder.sext(weight, wide))
    rounded = builder.add(product, _constant(I32, 8, 1 << FRACTION - 1))
    return builder.add(first, builder.trunc(builder.ashr(rounded, _constant(I32, 8, FRACTION)), first.type))


def _products(builder: Any, pairs: Any, weights: Any) -> Any:
    """(8,) int16 each -> (4,) int32, the sums of the products of two neighbours."""
    wide = _vector(I32, 4)
    if ADD_PRODUCTS:
        return _call(builder, ADD_PRODUCTS, wide, pairs, weights)
    first, second = (
        builder.mul(*(builder.sext(_shuffle(builder, of, of, lanes), wide) for of in (pairs, weights)))
        for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])
    )
    return builder.add(first, second)


def _pick(builder: Any, window: Any, picks: Any) -> Any:
    """Byte i of the result is byte picks[i] of the window, or zero for NOTHING."""
    if PICK:
        return _call(builder, PICK, window.type, window, picks)
    picked = _constant(I8, 16, 0)
    for lane in range(16):
        pick = builder.extract_element(picks, I32(lane))
        byte = builder.extract_element(window, builder.zext(builder.and_(pick, I8(15)), I32))
        byte = builder.select(builder.icmp_signed("<", pick, I8(0)), I8(0), byte)
        picked = builder.insert_element(picked, byte, I32(lane))
    return picked


def _to_bytes(builder: Any, sums: list[Any]) -> Any:
    """Four times (4,) int32 in [0, 255] -> (16,) bytes."""
    halves = [_joined(builder, sums[i : i + 2]) for i in (0, 2)]
    return builder.trunc(_joined(builder, halves), _vector(I8, 16))


class _Sums:
    """Weighted sums of bytes, (4,), that grow by a pair of pixels at a time."""

    def __init__(self, builder: Any):
        self.builder = builder
        zero = _constant(I32, 4, 0)
        self.parts = [cgutils.alloca_once_value(builder, zero) for _ in range(2)]  # of weights' high and low parts

    def add(self, pairs: Any, weights: list[Any]) -> None:
        """pairs: (8,) bytes; weights: the high parts of two in turn, and the low parts, (8,) int16 each."""
        pairs = self.builder.zext(pairs, _vector(I16, 8))
        for total, weight in zip(self.parts, weights, strict=True):
            product = _products(self.builder, pairs, weight)
            self.builder.store(self.builder.add(self.builder.load(total), product), total)

    def result(self) -> Any:
        """The sums, rounded and cut to [0, 255], int32."""
        builder = self.builder
        high, low = (builder.load(part) for part in self.parts)
        low = builder.add(low, _constant(I32, 4, 1 << WEIGHT_BITS - 1))
        sums = builder.add(builder.shl(high, _constant(I32, 4, LOW_BITS)), low)
        sums = builder.ashr(sums, _constant(I32, 4, WEIGHT_BITS))
        for predicate, bound in (("<", 0), (">", 255)):
            limit = _constant(I32, 4, bound)
            sums = builder.select(builder.icmp_signed(predicate, sums, limit), limit, sums)
        return sums


def _two_weights(builder: Any, address: Any) -> list[Any]:
    """The high parts of a pair's weights in turn, and the low parts, (8,) int16 each."""
    parts = (_load(builder, _plus(builder, address, 4 * part), I32, 1) for part in range(2))
    return [
        builder.bitcast(_splat(builder, builder.extract_element(part, I32(0)), 4), _vector(I16, 8)) for part in parts
    ]


def _mix_rows(_typing: object, to: Any, first: Any, second: Any, weight: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, first, second, weight = values
        weight = _splat(builder, weight, 8)
        halves = []
        for half in range(2):
            rows = [_load(builder, _plus(builder, row, 8 * half), I8, 8) for row in (first, second)]
            halves.append(_mix(builder, [builder.zext(row, _vector(I16, 8)) for row in rows], weight))
        _store(builder, builder.trunc(_joined(builder, halves), _vector(I8, BYTES)), to)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.int16), generate


def _mix_pixels(
    _typing: object, to: Any, row: Any, windows: Any, picks: Any, weights: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, row, windows, picks, weights = values
        halves, next_pixel = [], ir.Constant(_vector(I8, 16), [3, 0] * 8)
        for half in range(2):
            window = _load(builder, builder.add(row, _load_address(builder, windows, half)), I8, WINDOW)
            left = _load(builder, _plus(builder, picks, 16 * half), I8, 16)
            pixels = [
                builder.bitcast(_pick(builder, window, which), _vector(I16, 8))
                for which in (left, builder.add(left, next_pixel))
            ]
            halves.append(_mix(builder, pixels, _load(builder, _plus(builder, weights, 16 * half), I16, 8)))
        _store(builder, builder.trunc(_joined(builder, halves), _vector(I8, BYTES)), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _filter_rows(
    _typing: object, to: Any, rows: Any, at: Any, weights: Any, pairs: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, rows, at, weights, pairs = values
        sums = [_Sums(builder) for _ in range(4)]
        with cgutils.for_range(builder, pairs) as loop:
            of_pair = builder.add(rows, builder.mul(loop.index, loop.index.type(16)))
            first, second = (
                _load(builder, builder.add(_load_address(builder, of_pair, row), at), I8, BYTES) for row in range(2)
            )
            both = _two_weights(builder, builder.add(weights, builder.mul(loop.index, loop.index.type(8))))
            for quarter, part in enumerate(sums):
                lanes = [4 * quarter + i // 2 + BYTES * (i % 2) for i in range(8)]
                part.add(_shuffle(builder, first, second, lanes), both)
        _store(builder, _to_bytes(builder, [part.result() for part in sums]), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.intp), generate


def _filter_pixels(
    _typing: object, to: Any, row: Any, starts: Any, weights: Any, pairs: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, row, starts, weights, pairs = values
        sums = [_Sums(builder) for _ in range(4)]
        sources = [builder.add(row, _load_address(builder, starts, pixel)) for pixel in range(4)]
        with cgutils.for_range(builder, pairs) as loop:
            for pixel, part in enumerate(sums):
                both = _load(builder, builder.add(sources[pixel], builder.mul(loop.index, loop.index.type(6))), I8, 8)
                of_pair = builder.add(loop.index, builder.mul(pairs, pairs.type(pixel)))
                address = builder.add(weights, builder.mul(of_pair, pairs.type(8)))
                part.add(_shuffle(builder, both, both, NEIGHBOURS), _two_weights(builder, address))
        four = _to_bytes(builder, [part.result() for part in sums])
        _store(builder, _shuffle(builder, four, four, [4 * (i // 3) + i % 3 for i in range(12)] + [0] * 4), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.intp), generate


def _copy(_typing: object, to: Any, source: Any, length: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, source, length = values
        pointer = I8.as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(to, pointer), builder.inttoptr(source, pointer), length, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _find(_typing: object, source: Any, byte: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(_context: Any, builder: Any, _signature: object, values: Any) -> Any:
        source, byte = values
        equal = builder.icmp_unsigned("==", _load(builder, source, I8, BYTES), _splat(builder, byte, BYTES))
        return builder.zext(builder.cttz(builder.bitcast(equal, I16), ir.IntType(1)(0)), source.type)

    return types.intp(types.intp, types.uint8), generate


Operation = Callable[..., None]
# mix_rows(to, first, second, weight): BYTES bytes between those of two rows
mix_rows = cast(Operation, intrinsic(_mix_rows))
# mix_pixels(to, row, windows, picks, weights): BYTES bytes. Each half lies between the bytes that its eight picks name
# in its window, windows[half] bytes from `row` on, and those three bytes further.
# windows: (2,) int64; picks: (16, 2) uint8, the second of each NOTHING; weights: (16,) int16
mix_pixels = cast(Operation, intrinsic(_mix_pixels))
# filter_rows(to, rows, at, weights, pairs): BYTES bytes, weighted sums of those of 2 * pairs rows from byte `at` on.
# rows: their addresses; weights: (pairs, 2, 2) int16, of each pair the high parts and the low parts
filter_rows = cast(Operation, intrinsic(_filter_rows))
# filter_pixels(to, row, starts, weights, pairs): four pixels, and four bytes without meaning; weighted sums of
# 2 * pairs pixels each, the first of them starts[i] bytes from `row` on. starts: (4,) int64; weights: (4, pairs, 2, 2)
filter_pixels = cast(Operation, intrinsic(_filter_pixels))
# copy_bytes(to, source, length)
copy_bytes = cast(Operation, intrinsic(_copy))
# find_byte(source, byte): which of BYTES bytes is the first of this value; BYTES if none is
find_byte = cast(Callable[..., Integer], intrinsic(_find))
