"""Walks of this process: a folder that has not changed since is not walked through again."""

import hashlib
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.walk import Walk, walk, walk_tree

KEPT = 4  # walks; a recipe has two
SETTLED = 2_000_000_000  # ns: a folder changed later than this before a walk may change again at the same time stamp
LONGEST = 600  # s; the content of files and what links lead to may change without their folder's time of change


class _Kept(NamedTuple):
    walk: Walk
    state: bytes
    started: float


_walks: OrderedDict[tuple[Path, bool | None], _Kept] = OrderedDict()


def walk_once(root: Path, tree: bool | None = None) -> Walk:
    """As walk or, with `tree` as mixed_splits, as walk_tree, but one of this process's last few walks where none of its
    folders has changed for as long.

    A launcher counts images and classes, converts and looks for names: each would walk through a million files.
    """
    root = root.absolute()
    kept = _walks.get((root, tree))
    if kept is not None:
        if time.monotonic() - kept.started < LONGEST and _state(root, kept.walk.folders)[0] == kept.state:
            return kept.walk
        del _walks[root, tree]
    started, now = time.monotonic(), time.time_ns()
    found = walk(root) if tree is None else walk_tree(root, tree)
    state, changed = _state(root, found.folders)
    if changed < now - SETTLED:
        _walks[root, tree] = _Kept(found, state, started)
        while len(_walks) > KEPT:
            _walks.popitem(last=False)
    return found


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
