"""Imports FFCV without its side effects, and its JPEG decoder for compiled code. Import FFCV from here only."""

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
def keep_torch_threads() -> Iterator[None]:
    """Restores torch's number of threads, which FFCV changes when it is imported and when a loader is made."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def disable_jit() -> Iterator[None]:
    """Switches numba off: at import FFCV compiles a typed dictionary, for seconds, which only its own decoders use."""
    name = "DISABLE_JIT"  # numba creates its options as it runs, so type checkers do not see them
    disabled = getattr(config, name)
    setattr(config, name, True)
    try:
        yield
    finally:
        setattr(config, name, disabled)


with keep_torch_threads(), disable_jit():
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
    "keep_torch_threads",
]


READ_ONLY = types.Array(types.uint8, 1, "C", readonly=True)


def _state_type(_: OSCacheManager) -> types.Type:
    """The mapped file, the starts of its allocations, their sizes."""
    return types.Tuple([READ_ONLY, types.uint64[::1], types.uint64[::1]])


def _compile_reader(manager: OSCacheManager) -> Callable[..., Any]:
    """Compiles the function that reads the bytes of one allocation, as FFCV's own does."""

    def read(address: Any, state: Any) -> Any:
        return state[0][address : address + state[2][np.searchsorted(state[1], address)]]

    return Compiler.compile(read, READ_ONLY(types.uint64, manager.state_type))


# Each new loader reads FFCV's own state_type, which sets mutable to False on the one object that is `uint8[::1]` for
# all of numba. That changes the object's hash, so that compiled code with it in its signature is not found any more: a
# KeyError, at times.
setattr(OSCacheManager, "state_type", property(_state_type))  # noqa: B010
setattr(OSCacheManager, "compile_reader", _compile_reader)  # noqa: B010


def bind_c_function(name: str, result: types.Type, *arguments: types.Type) -> Callable[..., Any]:
    """Makes a C function of FFCV's library callable by compiled code.

    It is bound by name when the code is loaded: an address in the code would be wrong when the next process loads it
    from the cache.
    """
    symbol = f"ffcv_{name}"
    llvmlite.binding.add_symbol(symbol, ctypes.cast(ffcv.libffcv.lib[name], ctypes.c_void_p).value)
    return cast(Callable[..., Any], types.ExternalFunction(symbol, result(*arguments)))


# JPEG to RGB: 0, or -1 after an error or a warning
imdecode = bind_c_function(
    "imdecode",
    types.int32,
    *(types.uintp, types.uint64, types.uint32, types.uint32),  # file: address, bytes; height, width
    *(types.uintp, types.uint32, types.uint32),  # pixels: address; height, width
    *(types.uint32, types.uint32, types.uint32, types.uint32, types.uint32, types.uint32),  # offset, scale, crop, flip
)
