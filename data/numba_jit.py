"""Compiles inner loops with numba: they release the interpreter lock, and their machine code is kept on disk."""

import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import numba
import numpy as np
from numba.core import config
from numba.core.caching import CacheImpl, UserProvidedCacheLocator
from numpy.typing import NDArray

from kilobatch.data.files import cache_root, lock_file

Integer = int | np.integer[Any]
Real = float | np.floating[Any]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

DATA_FOLDER = Path(__file__).parent
FILES_OF_CONSTANTS = ("views/columns.py", "views/vector_instructions.py")  # compiled into functions of other files

Function = TypeVar("Function", bound=Callable[..., object])


def cache_folder() -> Path:
    """The folder of the compiled loops, one for each state of the source files that they are made from.

    numba discards cached code when the function's own file changes, but not when another file changes whose functions
    or constants were compiled into it; so the folder's name is a digest of all files in data/ that have compiled
    functions, and of those whose constants these use.
    """
    sources = hashlib.sha256()
    for path in sorted(DATA_FOLDER.rglob("*.py")):
        text = path.read_bytes()
        name = path.relative_to(DATA_FOLDER).as_posix()
        if b"kilobatch.data.numba_jit" in text or name in ("numba_jit.py", *FILES_OF_CONSTANTS):
            sources.update(name.encode() + text)
    return cache_root() / "numba" / sources.hexdigest()[:16]


class SourceFolderLocator(UserProvidedCacheLocator):
    """Names the cached code of a source file by its folder within data/.

    numba's own locators take a hash of the file's path. Each run has a snapshot of the code at a path of its own, which
    would then be compiled anew, for half a minute. cache_folder() already keeps versions apart, so the path need not.
    """

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        return "-".join(("data", *Path(py_file).parent.relative_to(DATA_FOLDER).parts))

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return super().from_function(py_func, py_file) if Path(py_file).is_relative_to(DATA_FOLDER) else None


# numba creates the attributes of its config module as it runs, so a type checker does not see them: hence setattr.
if "NUMBA_CACHE_DIR" not in os.environ:
    setattr(config, "CACHE_DIR", str(cache_folder()))  # noqa: B010
if "NUMBA_CACHE_LOCATOR_CLASSES" not in os.environ:
    locators = [f"{__name__}.{SourceFolderLocator.__name__}", *(own.__name__ for own in CacheImpl._locator_classes)]
    setattr(config, "CACHE_LOCATOR_CLASSES", ",".join(locators))  # noqa: B010

# A function inherits each option that it does not set itself from the caller that compiled it first, and that compiled
# form is kept for all callers. So all options are set here: the bits of a draw must not depend on the first caller.
# The entry for C programs, a fifth of the time that compiling takes, is called by nobody and left out.
COMMON: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "no_cfunc_wrapper": True,
}


def exact(function: Function) -> Function:
    """Compiles with IEEE arithmetic: for random draws, whose bits must equal those of the batched form."""
    return cast(Function, numba.njit(**COMMON, fastmath=False)(function))


def fast(function: Function) -> Function:
    """Compiles with reassociation and fused multiply-add: for pixels. No NaN or infinity may occur."""
    return cast(Function, numba.njit(**COMMON, fastmath=True)(function))


@contextmanager
def first_call(function: Callable[..., object]) -> Iterator[None]:
    """Encloses a process's first call of a compiled function, which compiles it where the cache has no code for it.

    Of the processes that share a cache one compiles at a time, and those after it load what it has kept: eight ranks
    would else compile the same loops side by side, on processors that they share.
    """
    folder = Path(cast(str, getattr(config, "CACHE_DIR")))  # noqa: B009, see above
    if not any(folder.glob(f"*/*.{function.__name__}-*.nbi")):
        print("compiling the loader's loops for this machine, once: about half a minute", file=sys.stderr, flush=True)
    if (lock := _opened(folder)) is None:
        yield
        return
    with lock:
        lock_file(lock, wait=True)
        yield


def _opened(folder: Path) -> TextIO | None:
    """The file to lock; None where the cache cannot be written, and every process compiles for itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ".lock").open("w")
    except (PermissionError, FileExistsError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return None
