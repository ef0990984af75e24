"""Vector instructions that weigh pixels of three bytes, for the compiled loops that resize.

Addresses are plain numbers. Results are rounded to the nearest, halves up. There are three kinds: mixtures of two
pixels, sums of few pixels in numbers of 16 bits, and sums of any number of them with the bits of Pillow's.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kilobatch.data.numba_jit import Integer
from kilobatch.data.views.byte_vectors import (
    BYTES,
    I8,
    I16,
    I32,
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
from kilobatch.data.views.vector_instructions import FRACTION, add_products, pick, scale

WIDE = 2 * BYTES  # bytes that `mix_rows` and `weigh_rows` make
FINE_BITS = 7  # after the point, between `mix_pixels` and `mix_rows`, and between `weigh_pixels` and `weigh_rows`
SHORT_BITS = 14  # of the weights of `weigh_rows` and `weigh_pixels`: bicubic ones at an edge are more than 1
WEIGHT_BITS = 22  # of the weights of `filter_rows` and `filter_pixels`, as Pillow's; a product takes 16 bits at a time
LOW_BITS = 8  # of a weight's low part
WINDOW = 16  # bytes that `mix_pixels` may pick from, and that others read past a pixel at most
NEIGHBOURS = [0, 3, 1, 4, 2, 5, 6, 7]  # two pixels of three bytes, as pairs of bytes
THREE_OF_FOUR = [0, 2, 4, 8, 10, 12]  # the low halves of three numbers of 32 bits in four, in numbers of 16


def _mix(builder: Any, both: Sequence[Any], weight: Any) -> Any:
    """int16: first + (second - first) * weight."""
    first, second = both
    return builder.add(first, scale(builder, builder.sub(second, first), weight))


def _within(builder: Any, numbers: Any, highest: int) -> Any:
    """The numbers, with those below 0 and above the highest cut off."""
    for predicate, bound in (("<", 0), (">", highest)):
        limit = constant(numbers.type.element, numbers.type.count, bound)
        numbers = builder.select(builder.icmp_signed(predicate, numbers, limit), limit, numbers)
    return numbers


def _shifted(builder: Any, numbers: Any, bits: int) -> Any:
    """The numbers with so many bits less, rounded."""
    kind, lanes = numbers.type.element, numbers.type.count
    rounded = builder.add(numbers, constant(kind, lanes, 1 << bits - 1))
    return builder.ashr(rounded, constant(kind, lanes, bits))


def _loop(builder: Any, times: Any, sums: Sequence[Any], add: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """Vectors that `add(i, sums)` changes for each i in turn, from these on."""
    kept = [cgutils.alloca_once_value(builder, start) for start in sums]
    with cgutils.for_range(builder, times) as loop:
        for part, value in zip(kept, add(loop.index, [builder.load(part) for part in kept]), strict=True):
            builder.store(value, part)
    return [builder.load(part) for part in kept]


def _mix_rows(_typing: object, to: Any, first: Any, second: Any, weight: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
        to, first, second, weight = values
        weight, halves = splat(builder, weight, BYTES), []
        for half in range(2):
            both = [load(builder, plus(builder, row, WIDE * half), I16, BYTES) for row in (first, second)]
            halves.append(_shifted(builder, _mix(builder, both, weight), FINE_BITS))
        store(builder, builder.trunc(joined(builder, halves), vector(I8, WIDE)), to)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.int16), generate


def _mix_pixels(builder: Any, to: Any, row: Any, windows: Any, picks: Any, weights: Any) -> None:
    next_pixel, fine = ir.Constant(vector(I8, WIDE), [3, 0] * BYTES), constant(I16, BYTES, FINE_BITS)
    halves = [load(builder, builder.add(row, load_address(builder, windows, i)), I8, WINDOW) for i in range(2)]
    window, left = joined(builder, halves), load(builder, picks, I8, WIDE)
    both = [
        builder.shl(builder.bitcast(pick(builder, window, which), vector(I16, BYTES)), fine)
        for which in (left, builder.add(left, next_pixel))
    ]
    store(builder, _mix(builder, both, load(builder, weights, I16, BYTES)), to)


def _weigh_rows(builder: Any, to: Any, rows: Any, at: Any, weights: Any, count: Any) -> None:
    def add(k: Any, sums: list[Any]) -> list[Any]:
        row = builder.add(load_address(builder, builder.add(rows, builder.mul(k, k.type(8))), 0), at)
        weight = load(builder, builder.add(weights, builder.mul(k, k.type(2))), I16, 1)
        weight = shuffle(builder, weight, weight, [0] * BYTES)
        halves = [load(builder, plus(builder, row, WIDE * half), I16, BYTES) for half in range(2)]
        return [builder.add(of, scale(builder, half, weight)) for of, half in zip(sums, halves, strict=True)]

    sums = _loop(builder, count, [constant(I16, BYTES, 0)] * 2, add)
    halves = [_within(builder, _shifted(builder, half, FINE_BITS + SHORT_BITS - FRACTION), 255) for half in sums]
    store(builder, builder.trunc(joined(builder, halves), vector(I8, WIDE)), to)


def _weigh_pixels(builder: Any, to: Any, row: Any, starts: Any, weights: Any, fours: Any) -> None:
    zero_byte = WIDE  # of a vector of zeros behind the windows
    pairs = [
        [
            index
            for window in range(2)
            for lane in NEIGHBOURS
            for index in (WINDOW * window + min(6 * pair + lane, WINDOW - 1), zero_byte)
        ]
        for pair in range(2)
    ]

    sources = [builder.add(row, load_address(builder, starts, pixel)) for pixel in range(4)]
    nothing = constant(I8, WIDE, 0)

    def add(four: Any, sums: list[Any]) -> list[Any]:
        made, of_four = [], builder.add(weights, builder.mul(four, four.type(4 * WIDE)))
        for half, of in enumerate(sums):
            two = [
                load(builder, builder.add(source, builder.mul(four, four.type(12))), I8, WINDOW)
                for source in sources[2 * half : 2 * half + 2]
            ]
            windows = joined(builder, two)
            for pair in range(2):
                numbers = builder.bitcast(shuffle(builder, windows, nothing, pairs[pair]), vector(I16, BYTES))
                by = load(builder, plus(builder, of_four, WIDE * (2 * half + pair)), I16, BYTES)
                of = builder.add(of, add_products(builder, numbers, by))
            made.append(of)
        return made

    sums = _loop(builder, fours, [constant(I32, 8, 0)] * 2, add)
    fine = [_within(builder, _shifted(builder, of, SHORT_BITS - FINE_BITS), 255 << FINE_BITS) for of in sums]
    halves = [builder.bitcast(of, vector(I16, BYTES)) for of in fine]
    lanes = [*THREE_OF_FOUR, *(BYTES + lane for lane in THREE_OF_FOUR), 0, 0, 0, 0]
    store(builder, shuffle(builder, halves[0], halves[1], lanes), to)


def _rounded(builder: Any, sums: Sequence[Any]) -> Any:
    """(4,) int32 in [0, 255] of the sums of high and of low products."""
    high, low = sums
    whole = builder.add(builder.shl(high, constant(I32, 4, LOW_BITS)), low)
    return _within(builder, _shifted(builder, whole, WEIGHT_BITS), 255)


def _sums_of_pairs(builder: Any, pairs: Any, add: Callable[[Any, int], tuple[Any, list[Any]]]) -> Any:
    """(16,) bytes: four vectors of sums of products, of bytes and weights that `add(pair, vector)` names."""

    def add_all(pair: Any, sums: list[Any]) -> list[Any]:
        made = []
        for of in range(4):
            numbers, weights = add(pair, of)
            numbers = builder.zext(numbers, vector(I16, 8))
            for sum_, part in zip(sums[2 * of : 2 * of + 2], weights, strict=True):
                made.append(builder.add(sum_, add_products(builder, numbers, part)))
        return made

    sums = _loop(builder, pairs, [constant(I32, 4, 0)] * 8, add_all)
    four = [_rounded(builder, sums[i : i + 2]) for i in range(0, 8, 2)]
    halves = [joined(builder, four[i : i + 2]) for i in (0, 2)]
    return builder.trunc(joined(builder, halves), vector(I8, BYTES))


def _weights(builder: Any, at: Any) -> list[Any]:
    """Two vectors (8,) int16, each of two weights in turn: of a pair the high parts, and the low parts."""
    words = load(builder, at, I32, 2)
    return [builder.bitcast(shuffle(builder, words, words, [lane] * 4), vector(I16, 8)) for lane in (0, 1)]


def _filter_rows(builder: Any, to: Any, rows: Any, at: Any, weights: Any, pairs: Any) -> None:
    def add(pair: Any, quarter: int) -> tuple[Any, list[Any]]:
        of_pair = builder.add(rows, builder.mul(pair, pair.type(16)))
        both = [load(builder, builder.add(load_address(builder, of_pair, row), at), I8, BYTES) for row in range(2)]
        in_turn = shuffle(builder, both[0], both[1], [4 * quarter + i // 2 + BYTES * (i % 2) for i in range(8)])
        return in_turn, _weights(builder, builder.add(weights, builder.mul(pair, pair.type(8))))

    store(builder, _sums_of_pairs(builder, pairs, add), to)


def _filter_pixels(builder: Any, to: Any, row: Any, starts: Any, weights: Any, pairs: Any) -> None:
    sources = [builder.add(row, load_address(builder, starts, pixel)) for pixel in range(4)]

    def add(pair: Any, pixel: int) -> tuple[Any, list[Any]]:
        both = load(builder, builder.add(sources[pixel], builder.mul(pair, pair.type(6))), I8, 8)
        of_pair = builder.add(pair, builder.mul(pairs, pairs.type(pixel)))
        by = _weights(builder, builder.add(weights, builder.mul(of_pair, pairs.type(8))))
        return shuffle(builder, both, both, NEIGHBOURS), by

    four = _sums_of_pairs(builder, pairs, add)
    store(builder, shuffle(builder, four, four, [4 * (i // 3) + i % 3 for i in range(12)] + [0] * 4), to)


_Five = Callable[[Integer, Integer, Integer, Integer, Integer], None]


def _of_five_addresses(emit: Callable[[Any, Any, Any, Any, Any, Any], None]) -> _Five:
    """The instruction that `emit` writes with a builder, for five addresses or numbers of that size."""

    def typing(_context: object, _a: Any, _b: Any, _c: Any, _d: Any, _e: Any) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, _signature: object, values: Any) -> Any:
            emit(builder, *values)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    typing.__name__ = typing.__qualname__ = emit.__name__
    return cast(_Five, intrinsic(typing))


# mix_rows(to, first, second, weight): WIDE bytes between those of two rows of `mix_pixels`
mix_rows = cast(Callable[[Integer, Integer, Integer, Integer], None], intrinsic(_mix_rows))
# mix_pixels(to, row, windows, picks, weights): BYTES numbers, int16, FINE_BITS of them after the point. Each half lies
# between the bytes that its eight picks name in its window, windows[half] bytes from `row` on, and those three further.
# windows: (2,) int64; picks: (16, 2) uint8, the second of each NOTHING; weights: (16,) int16
mix_pixels = _of_five_addresses(_mix_pixels)
# weigh_rows(to, rows, at, weights, count): WIDE bytes, weighted sums of those of `count` rows of `weigh_pixels` from
# byte `at` on. rows: their addresses; weights: (count,) int16
weigh_rows = _of_five_addresses(_weigh_rows)
# weigh_pixels(to, row, starts, weights, fours): four pixels as 12 numbers, int16, FINE_BITS of them after the point,
# and four numbers without meaning; weighted sums of 4 * fours pixels each, the first of them starts[i] bytes from `row`
# on. starts: (4,) int64; weights: (fours, 2, 2, 2, 4, 2) int16: of each two pixels the first two weights, for one and
# for the other, each four times; then the last two
weigh_pixels = _of_five_addresses(_weigh_pixels)
# filter_rows(to, rows, at, weights, pairs): BYTES bytes, weighted sums of those of 2 * pairs rows from byte `at` on.
# rows: their addresses; weights: (pairs, 2, 2) int16, of each pair the high parts and the low parts
filter_rows = _of_five_addresses(_filter_rows)
# filter_pixels(to, row, starts, weights, pairs): four pixels, and four bytes without meaning; weighted sums of
# 2 * pairs pixels each, the first of them starts[i] bytes from `row` on. starts: (4,) int64; weights: (4, pairs, 2, 2)
filter_pixels = _of_five_addresses(_filter_pixels)
