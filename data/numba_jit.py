"""How this package compiles its inner loops: numba, without the interpreter lock, machine code kept on disk."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import config
from numba.core.caching import CacheImpl, UserProvidedCacheLocator
from numpy.typing import NDArray

Whole = int | np.integer[Any]
Real = float | np.floating[Any]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

FOLDER = Path(__file__).parent

Function = TypeVar("Function", bound=Callable[..., object])


def cache_folder() -> Path:
    """Where compiled loops are kept: one folder per state of the files that have any.

    numba throws away kept code when the function's own file changes, but not when a file does whose functions were
    inlined into it; so the folder's name is a digest of all of them.
    """
    sources = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.py")):
        text = path.read_bytes()
        if b"kilobatch.data.numba_jit" in text or path.samefile(__file__):
            sources.update(str(path.relative_to(FOLDER)).encode() + text)
    root = os.environ.get("KILOBATCH_CACHE") or Path.home() / ".cache" / "kilobatch"
    return Path(root) / "numba" / sources.hexdigest()[:16]


class Wherever(UserProvidedCacheLocator):
    """numba keeps code under a hash of its source's path: a run's snapshot of these files, each at a path of its own,
    would be compiled anew for half a minute. cache_folder() tells versions apart already, so the folder's name will do.
    """

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        return "-".join(("data", *Path(py_file).parent.relative_to(FOLDER).parts))

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return super().from_function(py_func, py_file) if Path(py_file).is_relative_to(FOLDER) else None


# numba makes this module's attributes as it runs, so a type checker does not see them
if "NUMBA_CACHE_DIR" not in os.environ:
    setattr(config, "CACHE_DIR", str(cache_folder()))  # noqa: B010
if "NUMBA_CACHE_LOCATOR_CLASSES" not in os.environ:
    others = [locator.__name__ for locator in CacheImpl._locator_classes]
    setattr(config, "CACHE_LOCATOR_CLASSES", ",".join([f"{__name__}.{Wherever.__name__}", *others]))  # noqa: B010

# A callee inherits each option that it does not set itself from whichever caller compiled it first, and that form is
# kept for all. So each is set here: the bits of a draw must not depend on who asked first.
COMMON: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "boundscheck": False}


def exact(function: Function) -> Function:
    """Compiled with IEEE arithmetic: for draws, whose bits the batched twin repeats."""
    return cast(Function, numba.njit(**COMMON, fastmath=False)(function))


def fast(function: Function) -> Function:
    """Compiled with reassociation and fused multiply-add: for pixels. No NaN or infinity may occur in it."""
    return cast(Function, numba.njit(**COMMON, fastmath=True)(function))
