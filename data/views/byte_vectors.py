"""Vectors in LLVM's language, and the instructions on bytes that compiled loops make with them.

numba has no vectors of bytes, and LLVM makes none of loops over pixels of three bytes. What is written here runs on any
processor. Addresses are plain numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kilobatch.data.numba_jit import Integer

BYTES = 16  # of a vector
ARCHITECTURE = llvmlite.binding.get_default_triple().partition("-")[0]

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


def vector(kind: ir.IntType, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def constant(kind: ir.IntType, lanes: int, value: int) -> Any:
    return ir.Constant(vector(kind, lanes), [value] * lanes)


def load(builder: Any, address: Any, kind: ir.IntType, lanes: int) -> Any:
    value = builder.load(builder.inttoptr(address, vector(kind, lanes).as_pointer()))
    value.align = 1
    return value


def load_address(builder: Any, address: Any, number: int) -> Any:
    return builder.load(builder.inttoptr(plus(builder, address, 8 * number), address.type.as_pointer()))


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def shuffle(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(vector(I32, len(lanes)), lanes))


def plus(builder: Any, address: Any, constant: int) -> Any:
    return builder.add(address, address.type(constant))


def joined(builder: Any, both: Sequence[Any]) -> Any:
    first, second = both
    return shuffle(builder, first, second, list(range(2 * first.type.count)))


def splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, I32(0)), undefined, [0] * lanes)


def call(builder: Any, instruction: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, instruction), arguments)


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
        equal = builder.icmp_unsigned("==", load(builder, source, I8, BYTES), splat(builder, byte, BYTES))
        return builder.zext(builder.cttz(builder.bitcast(equal, I16), ir.IntType(1)(0)), source.type)

    return types.intp(types.intp, types.uint8), generate


def _load_short(_typing: object, source: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(_context: Any, builder: Any, _signature: object, values: Any) -> Any:
        return builder.extract_element(load(builder, values[0], I16, 1), I32(0))

    return types.int16(types.intp), generate


# copy_bytes(to, source, length)
copy_bytes = cast(Callable[[Integer, Integer, Integer], None], intrinsic(_copy))
# find_byte(source, byte): which of BYTES bytes is the first of this value; BYTES if none is
find_byte = cast(Callable[[Integer, Integer], Integer], intrinsic(_find))
# load_short(source): a number, int16
load_short = cast(Callable[[Integer], Integer], intrinsic(_load_short))
