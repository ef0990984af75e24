"""libjpeg-turbo's verdict on a JPEG file: an error, a warning of damaged data, or none.

Pillow drops libjpeg's warnings, after which half of an image may be grey. The library is the one that FFCV's own links,
which decodes in training; it is found without importing FFCV, which takes seconds.
"""

import ctypes
import sysconfig
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FATAL = 1  # tjGetErrorCode: no image, or not all of it; 0: a warning
RGB, CMYK = 0, 11  # TJPF_RGB, TJPF_CMYK
OF_FOUR = (3, 4)  # TJCS_CMYK, TJCS_YCCK
REDUCTION = 8  # decoding to an eighth reads all data, and spares most of the arithmetic


class JpegVerdict(NamedTuple):
    """problem: libjpeg's words, None if it decodes as it should; fatal: whether there is no whole image at all."""

    width: int
    height: int
    problem: str | None
    fatal: bool


def judge_jpeg(data: NDArray[np.uint8]) -> JpegVerdict:
    """Decodes a JPEG file, (bytes,). Any number of threads may call it at once."""
    library, handle = _library(), _handle()
    width, height = ctypes.c_int(), ctypes.c_int()
    unused, colours = ctypes.byref(ctypes.c_int()), ctypes.c_int()
    data = np.ascontiguousarray(data)
    address, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_ulong(len(data))
    failed = library.tjDecompressHeader3(
        handle, address, size, ctypes.byref(width), ctypes.byref(height), unused, ctypes.byref(colours)
    )
    if not failed:
        columns, rows = (-(-side.value // REDUCTION) for side in (width, height))
        channels, form = (4, CMYK) if colours.value in OF_FOUR else (3, RGB)
        out = np.empty((rows, columns, channels), np.uint8)
        pixels = ctypes.c_void_p(out.ctypes.data)
        failed = library.tjDecompress2(handle, address, size, pixels, columns, 0, rows, form, 0)
    if not failed:
        return JpegVerdict(width.value, height.value, None, False)
    problem = library.tjGetErrorStr2(handle).decode(errors="replace")
    return JpegVerdict(width.value, height.value, problem, library.tjGetErrorCode(handle) == FATAL)


_thread = threading.local()


def _handle() -> ctypes.c_void_p:
    """This thread's decoder, which it keeps until the process ends."""
    if not hasattr(_thread, "handle"):
        _thread.handle = ctypes.c_void_p(_library().tjInitDecompress())
    return _thread.handle


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec("ffcv")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    library = ctypes.CDLL(str(folder / f"_libffcv{sysconfig.get_config_var('EXT_SUFFIX')}"))
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library
