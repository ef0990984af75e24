"""libtiff's errors and warnings, of which Pillow hears none: of a damaged fax it shows other pictures.

The library is the one that Pillow is linked with. Without a handler it writes its errors to stderr; Pillow switches the
handler of warnings off.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from PIL import _imaging

LONGEST = 300  # characters of a message
LARGEST = 1 << 30  # bytes of a strip, more than which a fax has only where its header is damaged
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # place, format, va_list
# The same after a file's handle and a pointer of the user's; returns whether no other handler has to be called.
_FileHandler = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p
)


@contextmanager
def hearing_errors(hear: Callable[[str], None]) -> Iterator[None]:
    """Calls `hear` with each error of libtiff, in the thread that decodes."""
    library = _library()
    if library is None:
        yield
        return
    # The handler has to live as long as the library may call it.
    handler = _Handler(lambda place, form, arguments: hear(_message(place, form, arguments)))
    before = library.TIFFSetErrorHandler(ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        library.TIFFSetErrorHandler(before)


def fax_problem(data: bytes) -> str | None:
    """The first error or warning in the strips of a TIFF's first picture; None, too, where libtiff is older than 4.5,
    whose handlers are all threads' and Pillow's."""
    library = _library()
    if library is None or not hasattr(library, "TIFFOpenOptionsSetWarningHandlerExtR"):
        return None
    problems: list[str] = []

    def hear(_file: int, _user: int, place: bytes | None, form: bytes, arguments: int) -> int:
        if (place or b"").startswith(b"Fax"):  # not of fields in the file's directory
            problems.append(_message(place, form, arguments))
        return 1

    handler = _FileHandler(hear)
    options = ctypes.c_void_p(library.TIFFOpenOptionsAlloc())
    library.TIFFOpenOptionsSetErrorHandlerExtR(options, handler, None)
    library.TIFFOpenOptionsSetWarningHandlerExtR(options, handler, None)
    file = os.memfd_create("fax")
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    handle = ctypes.c_void_p(library.TIFFFdOpenExt(file, b"fax", b"r", options))
    library.TIFFOpenOptionsFree(options)
    if not handle:
        os.close(file)
        return None  # what is wrong with it Pillow says
    size = library.TIFFStripSize(handle)
    if 0 < size <= LARGEST:
        strip = ctypes.create_string_buffer(size)
        for i in range(library.TIFFNumberOfStrips(handle)):
            read = library.TIFFReadEncodedStrip(handle, ctypes.c_uint32(i), strip, ctypes.c_ssize_t(size))
            if problems or read < 0:
                break
    library.TIFFClose(handle)  # and the file
    return problems[0] if problems else None


def _message(place: bytes | None, form: bytes, arguments: int) -> str:
    text = ctypes.create_string_buffer(LONGEST)
    ctypes.CDLL(None).vsnprintf(text, LONGEST, form, ctypes.c_void_p(arguments))
    return b": ".join(part for part in (place, text.value) if part).decode(errors="replace")


@cache
def _library() -> ctypes.CDLL | None:
    """Pillow's own library, by which that libtiff is found which it is linked with; None where it has none."""
    library = ctypes.CDLL(_imaging.__file__)
    if not hasattr(library, "TIFFSetErrorHandler"):
        return None
    library.TIFFSetErrorHandler.restype = ctypes.c_void_p
    library.TIFFSetErrorHandler.argtypes = [ctypes.c_void_p]
    library.TIFFStripSize.restype = library.TIFFReadEncodedStrip.restype = ctypes.c_ssize_t
    library.TIFFNumberOfStrips.restype = ctypes.c_uint32
    if hasattr(library, "TIFFOpenOptionsAlloc"):
        library.TIFFOpenOptionsAlloc.restype = library.TIFFFdOpenExt.restype = ctypes.c_void_p
    return library
