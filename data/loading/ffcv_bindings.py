"""FFCV, imported without its side effects, and its two C functions for compiled code. Import FFCV from here only."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import llvmlite.binding
import numpy as np
import torch
from numba import types
from numba.core import config


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """FFCV sets torch's number of threads when it is imported and when a loader is made; this sets it back."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """FFCV compiles a typed dictionary at import, seconds in every process, for decoders that we do not use."""
    name = "DISABLE_JIT"  # numba sets its options where type checkers do not see them
    disabled = getattr(config, name)
    setattr(config, name, True)
    try:
        yield
    finally:
        setattr(config, name, disabled)


with torch_threads_kept(), nothing_compiled():
    import ffcv.libffcv
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State

__all__ = [
    "Compiler",
    "EpochIterator",
    "FfcvLoader",
    "Operation",
    "PipelineSpec",
    "State",
    "imdecode",
    "resize",
    "torch_threads_kept",
]


READ_ONLY = types.Array(types.uint8, 1, "C", readonly=True)


def _state_type(_: OSCacheManager) -> types.Type:
    """Of a mapped file, where its allocations begin, how long they are."""
    return types.Tuple([READ_ONLY, types.uint64[::1], types.uint64[::1]])


def _compile_reader(manager: OSCacheManager) -> Callable[..., Any]:
    """As FFCV's, for the bytes of one allocation."""

    def read(address: Any, state: Any) -> Any:
        return state[0][address : address + state[2][np.searchsorted(state[1], address)]]

    return Compiler.compile(read, READ_ONLY(types.uint64, manager.state_type))


# FFCV's own, asked by each loader that is made, sets mutable to False on the one object that is `uint8[::1]` for all of
# numba. That changes its hash, and no table of compiled code finds a signature with it any more: a KeyError, at times.
setattr(OSCacheManager, "state_type", property(_state_type))  # noqa: B010
setattr(OSCacheManager, "compile_reader", _compile_reader)  # noqa: B010


def external(name: str, result: types.Type, *arguments: types.Type) -> Callable[..., Any]:
    """A C function of FFCV's library, to be called by compiled code.

    It is bound by name when code is loaded: an address in the code would be stale in the next process's copy of it.
    """
    symbol = f"ffcv_{name}"
    llvmlite.binding.add_symbol(symbol, ctypes.cast(ffcv.libffcv.lib[name], ctypes.c_void_p).value)
    return cast(Callable[..., Any], types.ExternalFunction(symbol, result(*arguments)))


# JPEG to RGB: 0, or -1 after an error or a warning
imdecode = external(
    "imdecode",
    types.int32,
    *(types.uintp, types.uint64, types.uint32, types.uint32),  # file: address, bytes; height, width
    *(types.uintp, types.uint32, types.uint32),  # pixels: address; height, width
    *(types.uint32, types.uint32, types.uint32, types.uint32, types.uint32, types.uint32),  # offset, scale, crop, flip
)

# OpenCV's resize, INTER_AREA, of a part of an RGB image
resize = external(
    "resize",
    types.void,
    *(types.int64, types.int64, types.int64, types.int64),  # unused; image: address, height, width
    *(types.int64, types.int64, types.int64, types.int64),  # part: rows from, to; columns from, to
    *(types.int64, types.int64, types.int64),  # result: address, height, width
)
