"""A cache of a test's own, in which the loops are compiled already: that takes half a minute of a core."""

from pathlib import Path

from kilobatch.data.files import cache_root

COMPILED = (cache_root() / "numba").absolute()  # of the tests, before one of them moves its cache


def own_cache(folder: Path) -> str:
    """Makes the folder, empty but for a link to the compiled loops. Returns its path, for KILOBATCH_CACHE."""
    COMPILED.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "numba").exists():
        (folder / "numba").symlink_to(COMPILED)
    return str(folder)
