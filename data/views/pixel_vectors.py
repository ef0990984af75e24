"""Vector instructions on pixels of three bytes, for the compiled loops that resize: 16 bytes at a time.

Addresses are plain numbers. Results are rounded to the nearest, halves up.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kilobatch.data.numba_jit import Integer
from kilobatch.data.views.byte_vectors import (
    ARCHITECTURE,
    BYTES,
    I8,
    I16,
    I32,
    call,
    constant,
    joined,
    load,
    load_address,
    plus,
    shuffle,
    splat,
    store,
    vector,
)

FRACTION = 15  # bits of the weights of `mix_rows` and `mix_pixels`
FINE_BITS = 7  # after the point between `mix_pixels` and `mix_rows`
WEIGHT_BITS = 22  # of the weights of `filter_rows` and `filter_pixels`, as Pillow's; a product takes 16 bits at a time
LOW_BITS = 8  # of a weight's low part
WINDOW = 16  # bytes that `mix_pixels` may pick from, and that `filter_pixels` reads past a pixel at most
NOTHING = 0x80  # the pick that gives zero
NEIGHBOURS = [0, 3, 1, 4, 2, 5, 6, 7]  # two pixels of three bytes, as pairs of bytes

# LLVM's names of three instructions, where it does not choose them by itself; other processors go without
PICK = {"x86_64": "llvm.x86.ssse3.pshuf.b.128", "aarch64": "llvm.aarch64.neon.tbl1.v16i8"}.get(ARCHITECTURE)
SCALE = {"x86_64": "llvm.x86.ssse3.pmul.hr.sw.128", "aarch64": "llvm.aarch64.neon.sqrdmulh.v8i16"}.get(ARCHITECTURE)
ADD_PRODUCTS = {"x86_64": "llvm.x86.sse2.pmadd.wd"}.get(ARCHITECTURE)


def _mix(builder: Any, both: Sequence[Any], weight: Any) -> Any:
    """(8,) int16: first + (second - first) * weight."""
    first, second = both
    difference = builder.sub(second, first)
    if SCALE:
        return builder.add(first, call(builder, SCALE, first.type, difference, weight))
    wide = vector(I32, 8)
    product = builder.mul(builder.sext(difference, wide), builder.sext(weight, wide))
    rounded = builder.add(product, constant(I32, 8, 1 << FRACTION - 1))
    return builder.add(first, builder.trunc(builder.ashr(rounded, constant(I32, 8, FRACTION)), first.type))


def _products(builder: Any, pairs: Any, weights: Any) -> Any:
    """(8,) int16 each -> (4,) int32, the sums of the products of two neighbours."""
    wide = vector(I32, 4)
    if ADD_PRODUCTS:
        return call(builder, ADD_PRODUCTS, wide, pairs, weights)
    first, second = (
        builder.mul(*(builder.sext(shuffle(builder, of, of, lanes), wide) for of in (pairs, weights)))
        for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])
    )
    return builder.add(first, second)


def _pick(builder: Any, window: Any, picks: Any) -> Any:
    """Byte i of the result is byte picks[i] of the window, or zero for NOTHING."""
    if PICK:
        return call(builder, PICK, window.type, window, picks)
    picked = constant(I8, 16, 0)
    for lane in range(16):
        pick = builder.extract_element(picks, I32(lane))
        byte = builder.extract_element(window, builder.zext(builder.and_(pick, I8(15)), I32))
        byte = builder.select(builder.icmp_signed("<", pick, I8(0)), I8(0), byte)
        picked = builder.insert_element(picked, byte, I32(lane))
    return picked


def _to_bytes(builder: Any, sums: list[Any]) -> Any:
    """Four times (4,) int32 in [0, 255] -> (16,) bytes."""
    halves = [joined(builder, sums[i : i + 2]) for i in (0, 2)]
    return builder.trunc(joined(builder, halves), vector(I8, 16))


def _add_products(builder: Any, sums: Sequence[Any], pairs: Any, weights: Sequence[Any]) -> list[Any]:
    """Sums of the high and of the low products, (4,) int32 each, and those of (8,) bytes by their weights."""
    pairs = builder.zext(pairs, vector(I16, 8))
    return [builder.add(sum_, _products(builder, pairs, part)) for sum_, part in zip(sums, weights, strict=True)]


def _rounded(builder: Any, sums: Sequence[Any]) -> Any:
    """(4,) int32 in [0, 255] of the sums of high and of low products; what is below 0 or above 255 is cut off."""
    high, low = sums
    low = builder.add(low, constant(I32, 4, 1 << WEIGHT_BITS - 1))
    whole = builder.add(builder.shl(high, constant(I32, 4, LOW_BITS)), low)
    whole = builder.ashr(whole, constant(I32, 4, WEIGHT_BITS))
    for predicate, bound in (("<", 0), (">", 255)):
        limit = constant(I32, 4, bound)
        whole = builder.select(builder.icmp_signed(predicate, whole, limit), limit, whole)
    return whole


def _loop_of_sums(builder: Any, pairs: Any, add: Callable[[Any, list[list[Any]]], list[list[Any]]]) -> list[Any]:
    """Four sums that `add(pair, sums)` makes larger for each pair in turn, rounded."""
    zero = constant(I32, 4, 0)
    kept = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(4)]
    with cgutils.for_range(builder, pairs) as loop:
        sums = add(loop.index, [[builder.load(part) for part in parts] for parts in kept])
        for parts, values in zip(kept, sums, strict=True):
            for part, value in zip(parts, values, strict=True):
                builder.store(value, part)
    return [_rounded(builder, [builder.load(part) for part in parts]) for parts in kept]


def _weights(builder: Any, words: Any, lanes: Sequence[int]) -> list[Any]:
    """Of the words in these lanes, two weights each, vectors (8,) int16 of the two in turn."""
    return [builder.bitcast(shuffle(builder, words, words, [lane] * 4), vector(I16, 8)) for lane in lanes]


def _mix_rows(_typing: object, to: Any, first: Any, second: Any, weight: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, first, second, weight = values
        weight = splat(builder, weight, 8)
        halves = []
        for half in range(2):
            both = [load(builder, plus(builder, row, 16 * half), I16, 8) for row in (first, second)]
            rounded = builder.add(_mix(builder, both, weight), constant(I16, 8, 1 << FINE_BITS - 1))
            halves.append(builder.lshr(rounded, constant(I16, 8, FINE_BITS)))
        store(builder, builder.trunc(joined(builder, halves), vector(I8, BYTES)), to)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.int16), generate


def _mix_pixels(
    _typing: object, to: Any, row: Any, windows: Any, picks: Any, weights: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, row, windows, picks, weights = values
        next_pixel, fine = ir.Constant(vector(I8, 16), [3, 0] * 8), constant(I16, 8, FINE_BITS)
        for half in range(2):
            window = load(builder, builder.add(row, load_address(builder, windows, half)), I8, WINDOW)
            left = load(builder, plus(builder, picks, 16 * half), I8, 16)
            both = [
                builder.shl(builder.bitcast(_pick(builder, window, which), vector(I16, 8)), fine)
                for which in (left, builder.add(left, next_pixel))
            ]
            weight = load(builder, plus(builder, weights, 16 * half), I16, 8)
            store(builder, _mix(builder, both, weight), plus(builder, to, 16 * half))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _interleaved(builder: Any, first: Any, second: Any, quarter: int) -> Any:
    """(8,): the bytes of a quarter of two rows in turn."""
    return shuffle(builder, first, second, [4 * quarter + i // 2 + BYTES * (i % 2) for i in range(8)])


def _filter_rows(
    _typing: object, to: Any, rows: Any, at: Any, weights: Any, pairs: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, rows, at, weights, pairs = values

        def add(pair: Any, sums: list[list[Any]]) -> list[list[Any]]:
            of_pair = builder.add(rows, builder.mul(pair, pair.type(16)))
            first, second = (
                load(builder, builder.add(load_address(builder, of_pair, row), at), I8, BYTES) for row in range(2)
            )
            words = load(builder, builder.add(weights, builder.mul(pair, pair.type(8))), I32, 2)
            both = _weights(builder, words, (0, 1))
            return [
                _add_products(builder, of, _interleaved(builder, first, second, quarter), both)
                for quarter, of in enumerate(sums)
            ]

        store(builder, _to_bytes(builder, _loop_of_sums(builder, pairs, add)), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _filter_four_rows(
    _typing: object, to: Any, first: Any, second: Any, third: Any, fourth: Any, weights: Any, more_weights: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, *rows, weights, more_weights = values
        lines = [load(builder, row, I8, BYTES) for row in rows]
        two = (_weights(builder, builder.bitcast(words, vector(I32, 2)), (0, 1)) for words in (weights, more_weights))
        first, second = two
        sums = []
        for quarter in range(4):
            zero = [constant(I32, 4, 0)] * 2
            of_first = _add_products(builder, zero, _interleaved(builder, lines[0], lines[1], quarter), first)
            of_both = _add_products(builder, of_first, _interleaved(builder, lines[2], lines[3], quarter), second)
            sums.append(_rounded(builder, of_both))
        store(builder, _to_bytes(builder, sums), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, types.int64, types.int64), generate


def _without_fourth_byte(builder: Any, pixels: Any) -> Any:
    return shuffle(builder, pixels, pixels, [4 * (i // 3) + i % 3 for i in range(12)] + [0] * 4)


def _filter_pixels(
    _typing: object, to: Any, row: Any, starts: Any, weights: Any, pairs: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, row, starts, weights, pairs = values
        sources = [builder.add(row, load_address(builder, starts, pixel)) for pixel in range(4)]

        def add(pair: Any, sums: list[list[Any]]) -> list[list[Any]]:
            made = []
            for pixel, of in enumerate(sums):
                both = load(builder, builder.add(sources[pixel], builder.mul(pair, pair.type(6))), I8, 8)
                of_pair = builder.add(pair, builder.mul(pairs, pairs.type(pixel)))
                words = load(builder, builder.add(weights, builder.mul(of_pair, pairs.type(8))), I32, 2)
                neighbours = shuffle(builder, both, both, NEIGHBOURS)
                made.append(_add_products(builder, of, neighbours, _weights(builder, words, (0, 1))))
            return made

        four = _to_bytes(builder, _loop_of_sums(builder, pairs, add))
        store(builder, _without_fourth_byte(builder, four), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _filter_pixels_by_four(
    _typing: object, to: Any, row: Any, starts: Any, weights: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, row, starts, weights = values
        sums = []
        for pixel in range(4):
            window = load(builder, builder.add(row, load_address(builder, starts, pixel)), I8, WINDOW)
            words, of = load(builder, plus(builder, weights, 16 * pixel), I32, 4), [constant(I32, 4, 0)] * 2
            for pair in range(2):
                neighbours = shuffle(builder, window, window, [6 * pair + lane for lane in NEIGHBOURS])
                of = _add_products(builder, of, neighbours, _weights(builder, words, (2 * pair, 2 * pair + 1)))
            sums.append(_rounded(builder, of))
        store(builder, _without_fourth_byte(builder, _to_bytes(builder, sums)), to)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


# mix_rows(to, first, second, weight): BYTES bytes between those of two rows of `mix_pixels`
mix_rows = cast(Callable[[Integer, Integer, Integer, Integer], None], intrinsic(_mix_rows))
# mix_pixels(to, row, windows, picks, weights): BYTES numbers, int16, FINE_BITS of them after the point. Each half lies
# between the bytes that its eight picks name in its window, windows[half] bytes from `row` on, and those three further.
# windows: (2,) int64; picks: (16, 2) uint8, the second of each NOTHING; weights: (16,) int16
mix_pixels = cast(Callable[[Integer, Integer, Integer, Integer, Integer], None], intrinsic(_mix_pixels))
# filter_rows(to, rows, at, weights, pairs): BYTES bytes, weighted sums of those of 2 * pairs rows from byte `at` on.
# rows: their addresses; weights: (pairs, 2, 2) int16, of each pair the high parts and the low parts
filter_rows = cast(Callable[[Integer, Integer, Integer, Integer, Integer], None], intrinsic(_filter_rows))
# filter_pixels(to, row, starts, weights, pairs): four pixels, and four bytes without meaning; weighted sums of
# 2 * pairs pixels each, the first of them starts[i] bytes from `row` on. starts: (4,) int64; weights: (4, pairs, 2, 2)
filter_pixels = cast(Callable[[Integer, Integer, Integer, Integer, Integer], None], intrinsic(_filter_pixels))
# filter_four_rows(to, first, second, third, fourth, weights, more_weights): as filter_rows with two pairs; the weights
# of each are one number
filter_four_rows = cast(
    Callable[[Integer, Integer, Integer, Integer, Integer, Integer, Integer], None], intrinsic(_filter_four_rows)
)
# filter_pixels_by_four(to, row, starts, weights): as filter_pixels with two pairs; reads WINDOW bytes for each pixel
filter_pixels_by_four = cast(Callable[[Integer, Integer, Integer, Integer], None], intrinsic(_filter_pixels_by_four))
