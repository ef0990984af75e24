"""Arrays that end where memory ends: to read one byte behind them ends the process."""

import ctypes
import mmap

import numpy as np

from kilobatch.data.numba_jit import Bytes

NO_ACCESS = 0  # PROT_NONE


def guarded(array: Bytes) -> Bytes:
    """A copy of a contiguous array, in front of a page that may not be read."""
    pages = -(-array.nbytes // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    copy = np.frombuffer(memory, np.uint8)[: (pages - 1) * mmap.PAGESIZE]
    libc = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(copy.ctypes.data + copy.nbytes)
    assert libc.mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) == 0
    copy = copy[copy.nbytes - array.nbytes :].reshape(array.shape)
    copy[:] = array
    return copy  # which keeps the mapping
