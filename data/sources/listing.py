"""Listing of one folder of images: its folders, its files, and what is passed over by its name or its kind."""

import errno
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.sources.formats import IMAGE_SUFFIXES, recognise
from kilobatch.data.sources.path_names import in_one_order
from kilobatch.data.sources.splits import Shape

HIDDEN = "hidden files"
# Folders that systems, network disks and archives leave behind: thumbnails, waste bins, resource forks.
SYSTEM_FOLDERS = ("@eaDir", "@__thumb", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "lost+found")
SYSTEM_FOLDERS_ANY_CASE = ("$recycle.bin", "system volume information")
SYSTEM_FILES_ANY_CASE = {"thumbs.db": "Thumbs.db", "ehthumbs.db": "Thumbs.db", "desktop.ini": "desktop.ini"}
NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)  # what a link that leads nowhere gives
TRIED_TOGETHER = 64  # files for one task of a thread
THREADS = 16  # they wait for a disk, often a network's
SHAPE_TRIES = 20  # files of unknown suffix by whose content a folder is known to hold images


@dataclass
class Listing:
    """What lies directly in a folder, names in order. folders: with the target's real path where it is a link;
    files: True where the suffix says an image, or it is a link that leads nowhere, False where the content has to;
    broken: such links; passed_over: files, by reason; set_aside: folders whose files are passed over, with the
    reason."""

    folders: dict[str, str | None] = field(default_factory=dict)
    files: dict[str, bool] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    passed_over: Counter[str] = field(default_factory=Counter)
    set_aside: dict[str, str] = field(default_factory=dict)


def list_folder(path: str) -> Listing:
    """Raises UserError where the folder cannot be read."""
    found = Listing()
    folders: list[str] = []
    links: dict[str, str] = {}
    files: dict[str, bool] = {}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                reason = _reason_by_name(name)
                if reason is None and entry.is_file(follow_symlinks=False):
                    files[name] = _suffix(name) in IMAGE_SUFFIXES
                elif entry.is_dir(follow_symlinks=False):
                    if reason is None:
                        folders.append(name)
                    else:
                        found.set_aside[name] = reason
                elif reason is not None:
                    found.passed_over[reason] += 1
                elif entry.is_symlink():
                    _add_link(entry, found, links, files)
                else:  # opening a pipe or a device would wait for ever
                    found.passed_over["not regular files"] += 1
    except OSError as error:
        raise cannot_be_read(path, error) from error
    found.folders = {name: links.get(name) for name in in_one_order([*folders, *links])}
    found.files = {name: files[name] for name in in_one_order(files)}
    return found


def shape_of(path: str) -> Shape:
    """What a folder holds, for choose_split. Looks further down only until an image is found."""
    top = list_folder(path)
    images = _has_image(path, top)
    waiting = [os.path.join(path, name) for name, link in top.folders.items() if link is None]  # noqa: PTH118
    below = False
    while waiting and not below:
        folder = waiting.pop()
        listing = list_folder(folder)
        below = _has_image(folder, listing)
        waiting += [os.path.join(folder, name) for name, link in listing.folders.items() if link is None]  # noqa: PTH118
    return Shape(tuple(top.folders), images, below)


def cannot_be_read(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk")


def recognise_all(paths: list[str]) -> list[str | None]:
    """For each file why it is passed over; None where Pillow reads it, or it is gone by now, as reading it will say.
    Raises UserError where one cannot be read."""

    def task(some: list[str]) -> list[str | None]:
        return [_recognise(path) for path in some]

    parts = [paths[i : i + TRIED_TOGETHER] for i in range(0, len(paths), TRIED_TOGETHER)]
    if len(parts) < 2:
        return task(paths)
    with ThreadPoolExecutor(min(THREADS, len(parts))) as pool:
        return [reason for some in pool.map(task, parts) for reason in some]


def _recognise(path: str) -> str | None:
    try:
        return recognise(Path(path))
    except OSError as error:
        if error.errno in NOWHERE:
            return None
        raise cannot_be_read(path, error) from error


def _reason_by_name(name: str) -> str | None:
    """Why an entry of this name is passed over, with all that is in it."""
    if name.startswith("."):
        return HIDDEN
    if name in SYSTEM_FOLDERS:
        return f"files in {name}"
    if (lower := name.lower()) in SYSTEM_FOLDERS_ANY_CASE:
        return f"files in {name}"
    return SYSTEM_FILES_ANY_CASE.get(lower)


def _add_link(entry: os.DirEntry[str], found: Listing, links: dict[str, str], files: dict[str, bool]) -> None:
    """Sorts a link by what it leads to. A link that leads nowhere is taken for an image that is absent, unless its
    suffix is that of another kind of file."""
    name, suffix = entry.name, _suffix(entry.name)
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno not in NOWHERE:
            raise cannot_be_read(entry.path, error) from error
        if suffix in IMAGE_SUFFIXES or not _of_other_kind(suffix):
            files[name] = True
            found.broken.add(name)
        else:
            found.passed_over[f"links that lead nowhere ({suffix})"] += 1
        return
    if stat.S_ISDIR(mode):
        links[name] = os.path.realpath(entry.path)
    elif stat.S_ISREG(mode):
        files[name] = suffix in IMAGE_SUFFIXES
    else:
        found.passed_over["not regular files"] += 1


def _suffix(name: str) -> str:
    stem, dot, end = name.rpartition(".")
    return f".{end.lower()}" if stem and dot else ""


def _of_other_kind(suffix: str) -> bool:
    """Whether a suffix is one; in "Canis sp. 2" or "v1.0" the dot is a part of the name."""
    return suffix[1:].isalnum() and suffix.isascii() and not suffix[1:].isdigit() and len(suffix) <= 6


def _has_image(path: str, listing: Listing) -> bool:
    if any(known and name not in listing.broken for name, known in listing.files.items()):
        return True
    others = [name for name, known in listing.files.items() if not known][:SHAPE_TRIES]
    return any(_recognise(f"{path}/{name}") is None for name in others)
