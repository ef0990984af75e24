"""Walks of this process: a folder that has not changed since is not walked through again."""

import hashlib
import os
import sys
from pathlib import Path

from kilobatch.data.sources.open_cache import RecentlyRead
from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.walk import Walk, walk, walk_tree

SETTLED = 2_000_000_000  # ns: a folder changed later than this before a walk may change again at the same time stamp
LONGEST = 600  # s; the content of files and what links lead to may change without their folder's time of change


_walks = RecentlyRead()


def walk_once(root: Path, tree: bool | None = None) -> Walk:
    """As walk or, with `tree` as mixed_splits, as walk_tree, but one of this process's last few walks where none of its
    folders has changed for as long.

    A launcher counts images and classes, converts and looks for names: each would walk through a million files.
    """
    root = root.absolute()
    return _walks.get(
        (root, tree),
        lambda: walk(root) if tree is None else walk_tree(root, tree),
        lambda found: _state(root, found.folders),
        SETTLED,
        LONGEST,
    )


def _state(root: Path, folders: PathList) -> tuple[bytes, int]:
    """A digest of the folders' identity and times of change; and the latest of these, in ns."""
    digest, latest = hashlib.sha256(), 0
    for path in folders:
        try:
            stat = os.stat(f"{root}/{path}")  # noqa: PTH116 - faster than Path.stat
        except OSError:
            return b"", sys.maxsize  # it has gone: such a state is never kept
        digest.update(f"{stat.st_dev} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
        latest = max(latest, stat.st_ctime_ns)
    return digest.digest(), latest
