"""Walk through a folder of images: each file below it is taken, tried by content, or passed over for a reason."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.sources.listing import Listing, cannot_be_read, list_folder, recognise_all
from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.splits import refuse_mixed_splits, split_folders

OUTSIDE = "images outside the class folders"
ALL = "all"  # the class of images that lie in no class folder, where there is none
SAID = 12  # reasons; files that are numbered behind a dot have a suffix each
NO_CLASS = -1  # the label of a link that leads nowhere and lies in no class folder


@dataclass
class Walk:
    """All files below a folder. classes: names of the class folders, as on the disk, in order, or ALL; files: those
    taken, as paths in the folder; labels (files,): positions in classes, or NO_CLASS; passed_over: how many others, by
    reason; folders: all that were read."""

    classes: list[str] = field(default_factory=list)
    files: PathList = field(default_factory=PathList)
    labels: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    passed_over: Counter[str] = field(default_factory=Counter)
    folders: PathList = field(default_factory=PathList)


def walk(root: Path) -> Walk:
    """Walks through a folder that holds a folder for each class, or images and no folder.

    Every entry below it that is no folder is in `files` or counted in `passed_over`, so that the two add up to what is
    there. Files with an image's suffix are not opened. Links to folders are followed, but not back to a folder above.
    Raises UserError for a folder that cannot be read, and for splits within a class folder.
    """
    return _Walker(root).walk()


def walk_tree(root: Path, mixed_splits: bool) -> Walk:
    """As walk, but images outside the folders of the root are taken as well, with the label NO_CLASS. mixed_splits:
    whether a folder may hold splits."""
    return _Walker(root, whole=True, mixed_splits=mixed_splits).walk()


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """Counts and reasons, the most frequent first: "3 not images (.txt), 1 hidden files". Many become few, and the
    sum of the others."""
    reasons = Counter(passed_over).most_common()
    others = sum(count for _, count in reasons[SAID:])
    said = [f"{count:,} {reason}" for reason, count in reasons[:SAID]]
    return ", ".join(said + ([f"{others:,} for {len(reasons) - SAID:,} other reasons"] if others else []))


def also_passed_over(passed_over: Mapping[str, int]) -> str:
    """What was passed over, in brackets, for a message that there are no images; nothing where there is nothing."""
    return f" (passed over: {describe_passed_over(passed_over)})" if passed_over else ""


class _Walker:
    """One walk. Folders wait on a stack of its own: they may lie deeper than Python's."""

    def __init__(self, root: Path, whole: bool = False, mixed_splits: bool = False) -> None:
        self.root, self.found = root, Walk()
        self.whole, self.mixed_splits = whole, mixed_splits
        self.labels = array("i")
        self.untried: list[int] = []  # positions of files that are to be tried by content

    def walk(self) -> Walk:
        top = list_folder(str(self.root))
        self.found.classes = list(top.folders)
        self.found.folders.append("")
        if not (top.folders or self.whole):
            return self._without_classes(top)
        self._outside(top)
        above = (os.path.realpath(self.root),)
        waiting = [
            (name, label, link, above) for label, (name, link) in enumerate(top.folders.items())
        ]  # path in the root, label, target if it is a link, real paths of the folder above and of those before links
        waiting.reverse()
        while waiting:
            path, label, link, above = waiting.pop()
            if link is not None and _leads_back(link, above):
                self.found.passed_over["links back to a folder above"] += 1
                continue
            here = (*above, link) if link is not None else (*above[:-1], _below(above[-1], path))
            listing = list_folder(self._where(path))
            if not self.mixed_splits:
                self._refuse_mixed_splits(path, listing)
            self.found.folders.append(path)
            self._pass_over(path, listing)
            for name, known in listing.files.items():
                self._take(f"{path}/{name}", label, known)
            waiting += [(f"{path}/{name}", label, link, here) for name, link in reversed(listing.folders.items())]
        self.found.labels = np.array(self.labels, np.int32)
        return self._without_others()

    def _take(self, path: str, label: int, known: bool) -> None:
        if not known:
            self.untried.append(len(self.found.files))
        self.found.files.append(path)
        self.labels.append(label)

    def _without_classes(self, top: Listing) -> Walk:
        """Takes the files of a folder that holds no other: all are of one class, if an image is among them."""
        self._pass_over("", top)
        for name, known in top.files.items():
            self._take(name, NO_CLASS if name in top.broken else 0, known)
        self.found.labels = np.array(self.labels, np.int32)
        found = self._without_others()
        if np.any(found.labels == 0):
            found.classes, found.labels = [ALL], np.zeros_like(found.labels)
        return found

    def _outside(self, top: Listing) -> None:
        """Counts the files that lie in no class folder; a link that leads nowhere may have been one, and is taken."""
        self._pass_over("", top)
        if self.whole:
            for name, known in top.files.items():
                self._take(name, NO_CLASS, known)
            return
        others = [name for name, known in top.files.items() if not known]
        reasons = dict(zip(others, recognise_all([self._where(name) for name in others]), strict=True))
        for name in top.files:
            if name in top.broken:
                self._take(name, NO_CLASS, known=True)
            else:
                self.found.passed_over[reasons.get(name) or OUTSIDE] += 1

    def _pass_over(self, path: str, listing: Listing) -> None:
        self.found.passed_over += listing.passed_over
        for name, reason in listing.set_aside.items():
            files, closed = _count_below(self._where(f"{path}/{name}" if path else name))
            self.found.passed_over += Counter({reason: files, "folders of the system that may not be read": closed})

    def _refuse_mixed_splits(self, path: str, listing: Listing) -> None:
        named = list(split_folders(listing.folders))
        if named:
            alone = len(self.found.classes) == 1 and any(
                list_folder(self._where(f"{path}/{name}")).folders for name in named
            )
            refuse_mixed_splits(self.root, path, named, alone, "tree" if self.whole else "folder")

    def _without_others(self) -> Walk:
        """Tries the files whose suffix says nothing, and leaves out those that are no images."""
        reasons = recognise_all([self._where(self.found.files[i]) for i in self.untried])
        refused = {i: reason for i, reason in zip(self.untried, reasons, strict=True) if reason is not None}
        if refused:
            self.found.passed_over.update(refused.values())
            kept, files = np.ones(len(self.found.files), bool), PathList()
            kept[list(refused)] = False
            for i in np.flatnonzero(kept):
                files.append(self.found.files[int(i)])
            self.found.files, self.found.labels = files, self.found.labels[kept]
        return self.found

    def _where(self, path: str) -> str:
        return f"{self.root}/{path}"


def _below(folder: str, path: str) -> str:
    return f"{folder.rstrip('/')}/{path.rpartition('/')[2]}"


def _leads_back(target: str, above: Iterable[str]) -> bool:
    return any(folder == target or folder.startswith(target.rstrip("/") + "/") for folder in above)


def _count_below(path: str) -> tuple[int, int]:
    """How many entries below are no folders; and how many folders may not be read. Follows no links."""
    files = closed = 0
    waiting = [path]
    while waiting:
        try:
            for entry in _entries(waiting.pop()):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    files += 1
        except FileNotFoundError:  # another program works on its thumbnails or its waste bin
            continue
        except PermissionError:  # lost+found and the like belong to the administrator
            closed += 1
        except OSError as error:
            raise cannot_be_read(path, error) from error
    return files, closed


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        yield from entries
