"""Three instructions on vectors: the processor's own, where LLVM does not choose them by itself, else plain steps."""

from collections.abc import Callable
from typing import Any

import llvmlite.binding

from kilobatch.data.views.byte_vectors import ARCHITECTURE, I8, I16, I32, call, constant, joined, shuffle, vector

FRACTION = 15  # bits after the point of the numbers that `scale` multiplies by
NOTHING = 0x80  # the pick that gives zero

# LLVM's names, by the bytes of a vector.
_WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx2"))
PICK = {"x86_64": {16: "llvm.x86.ssse3.pshuf.b.128"}, "aarch64": {16: "llvm.aarch64.neon.tbl1.v16i8"}}
SCALE = {"x86_64": {16: "llvm.x86.ssse3.pmul.hr.sw.128"}, "aarch64": {16: "llvm.aarch64.neon.sqrdmulh.v8i16"}}
ADD_PRODUCTS = {"x86_64": {16: "llvm.x86.sse2.pmadd.wd"}}
if _WIDE:
    PICK["x86_64"][32] = "llvm.x86.avx2.pshuf.b"
    SCALE["x86_64"][32] = "llvm.x86.avx2.pmul.hr.sw"
    ADD_PRODUCTS["x86_64"][32] = "llvm.x86.avx2.pmadd.wd"


def pick(builder: Any, window: Any, picks: Any) -> Any:
    """Of each 16 bytes: byte i of the result is byte picks[i] of the window, or zero for NOTHING."""

    def plain(window: Any, picks: Any) -> Any:
        picked = constant(I8, 16, 0)
        for lane in range(16):
            which = builder.extract_element(picks, I32(lane))
            byte = builder.extract_element(window, builder.zext(builder.and_(which, I8(15)), I32))
            byte = builder.select(builder.icmp_signed("<", which, I8(0)), I8(0), byte)
            picked = builder.insert_element(picked, byte, I32(lane))
        return picked

    return _widest(builder, PICK, lambda lanes: vector(I8, lanes), plain, window, picks)


def scale(builder: Any, numbers: Any, by: Any) -> Any:
    """int16: the products, FRACTION bits less of them, rounded to the nearest."""

    def plain(numbers: Any, by: Any) -> Any:
        wide = vector(I32, 8)
        product = builder.mul(builder.sext(numbers, wide), builder.sext(by, wide))
        rounded = builder.add(product, constant(I32, 8, 1 << FRACTION - 1))
        return builder.trunc(builder.ashr(rounded, constant(I32, 8, FRACTION)), numbers.type)

    return _widest(builder, SCALE, lambda lanes: vector(I16, lanes), plain, numbers, by)


def add_products(builder: Any, numbers: Any, by: Any) -> Any:
    """int16 -> half as many int32, the sums of the products of two neighbours."""

    def plain(numbers: Any, by: Any) -> Any:
        wide = vector(I32, 4)
        first, second = (
            builder.mul(*(builder.sext(shuffle(builder, of, of, lanes), wide) for of in (numbers, by)))
            for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])
        )
        return builder.add(first, second)

    return _widest(builder, ADD_PRODUCTS, lambda lanes: vector(I32, lanes // 2), plain, numbers, by)


def _widest(
    builder: Any,
    names: dict[str, dict[int, str]],
    kind: Callable[[int], Any],
    plain: Callable[[Any, Any], Any],
    *arguments: Any,
) -> Any:
    """The instruction of the arguments' width; or, for each half of them, that of half the width."""
    lanes = arguments[0].type.count
    size = lanes * arguments[0].type.element.width // 8
    name = names.get(ARCHITECTURE, {}).get(size)
    if name:
        return call(builder, name, kind(lanes), *arguments)
    if size == 16:
        return plain(*arguments)
    half = lanes // 2
    parts = [[shuffle(builder, of, of, list(range(at, at + half))) for of in arguments] for at in (0, half)]
    return joined(builder, [_widest(builder, names, kind, plain, *part) for part in parts])
