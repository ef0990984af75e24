"""Source folder:PATH: a folder with one folder of images per class, or with images alone."""

import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kilobatch.data.errors import UserError
from kilobatch.data.sources.encoded_files import (
    EncodedFiles,
    describe_absent,
    digest_of_files,
    read_file_of_source,
    stat_of_source,
)
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.listing import NOWHERE, Listing, cannot_be_read, list_folder, shape_of
from kilobatch.data.sources.path_names import composed, existing_path, printable
from kilobatch.data.sources.splits import Shape, Split, choose_split, likely_splits, refuse_splits_again, split_folders
from kilobatch.data.sources.walk import NO_CLASS, Walk, also_passed_over
from kilobatch.data.sources.walk_cache import walk_once


class Folder(EncodedFiles):
    """Classes are the names of PATH's folders, in order; their images may lie in folders further down. Images beside
    which there is no folder are all of one class.

    Where PATH holds folders that are named after splits, that of the split is read (splits.py). path: the folder that
    is read. passed_over: how many files below it are no images of a class, by reason. Links that lead nowhere are
    images that are broken, and have the label -1 where they lie in no class folder.
    Raises UserError where there is no image, or a class folder without an image.
    """

    def __init__(self, path: Path, split: Split):
        path = existing_path(path)
        self.path = folder_of_split(path, split, "folder")
        walk = walk_once(self.path)
        _refuse_empty(self.path, walk)
        self.classes = folder_names(self.path, walk.classes, "folder")
        self.passed_over: Mapping[str, int] = dict(walk.passed_over.most_common())
        self._files, self._labels = walk.files, walk.labels

    def fingerprint(self) -> str:
        """A digest of all names, sizes, inodes and times of change, and of how many files are passed over."""
        digest = digest_of_files(self.path, self._files)
        digest.update(repr(sorted(self.passed_over.items())).encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        path = self.path / self._files[i]
        if self._labels[i] != NO_CLASS:
            return read_file_of_source(path)
        name = printable(str(path))
        stat_of_source(path)
        raise BrokenImage(f"{name} was a link that leads nowhere when the folder was read; start again")


def _refuse_no_folder(path: Path, scheme: str) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in NOWHERE:
            raise cannot_be_read(path, error) from error
        if os.path.islink(path):  # noqa: PTH114 - False, too, for a name that is too long
            raise UserError(
                f"{scheme}:{path} {describe_absent(path, error)}; mount its disk, mend the link, or give another folder"
            ) from None
        near = Path(str(path).strip())
        hint = f" (but there is '{near}', without the space)" if near != path and os.path.exists(near) else ""  # noqa: PTH110
        raise UserError(
            f"{scheme}:{path}: there is no such folder{hint}; give one that holds images, or a folder of images per "
            "class"
        ) from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{scheme}:{path} is a file, not a folder; give the folder that holds it")


def folder_of_split(path: Path, split: Split, scheme: str) -> Path:
    """The folder that is read for a split of this folder. scheme: of the source, for messages. Raises UserError as
    choose_split, and where it is no folder."""
    _refuse_no_folder(path, scheme)
    top = list_folder(str(path))
    for name, its in split_folders([*top.folders, *top.broken]).items():
        if name in top.broken and its == split:
            raise UserError(
                f"{scheme}:{path} has no {split} images: {name} is a link to {os.path.realpath(path / name)}, which "
                "does not exist; mount its disk or mend the link"
            )
    chosen = choose_split(path, split, _shapes(path, top), scheme)
    if chosen is None:
        _refuse_likely_splits(path, top, scheme)
        return path
    within = list_folder(str(path / chosen))
    refuse_splits_again(path / chosen, within.folders, _shapes(path / chosen, within), scheme)
    return path / chosen


def _refuse_likely_splits(path: Path, top: Listing, scheme: str) -> None:
    likely = likely_splits(top.folders)
    others = [shape_of(str(path / name)) for name in top.folders if likely and name not in likely]
    if likely and not any(shape.images or shape.images_below for shape in others):
        shown = ", ".join(printable(name) for name in likely[:5])
        raise UserError(
            f"{scheme}:{path} has images in {len(likely):,} folders alone, which are named as splits are ({shown}) and "
            f"would be its classes; give one of them, such as {scheme}:{path / likely[0]}, or rename them"
        )


def _shapes(path: Path, listing: Listing) -> dict[str, Shape]:
    """What the folders in this one hold, or nothing where none is named after a split."""
    if not split_folders(listing.folders):
        return {}
    return {name: shape_of(str(path / name)) for name in listing.folders}


def _refuse_empty(path: Path, walk: Walk) -> None:
    others = also_passed_over(walk.passed_over)
    if not walk.classes:
        if len(walk.files):
            others = f" ({len(walk.files):,} links in it lead nowhere, such as {printable(walk.files[0])})"
        raise UserError(
            f"folder:{path} has no images{others}; give a folder that holds images, or a folder of images per class"
        )
    images = np.bincount(walk.labels[walk.labels != NO_CLASS], minlength=len(walk.classes))
    empty = [printable(walk.classes[i]) for i in np.flatnonzero(images == 0)]
    if empty:
        raise UserError(
            f"folder:{path}: class folder '{empty[0]}' has no images"
            + (f" (nor have {len(empty) - 1:,} others)" if len(empty) > 1 else "")
            + f"{others}; fill or remove it"
        )


def folder_names(path: Path, folders: list[str], scheme: str) -> list[str]:
    """Names of classes, of the folders that they lie in. scheme: of the source. Raises UserError where two
    folders' names become one, as those that differ by their Unicode form alone."""
    names = [printable(composed(folder)) for folder in folders]
    for name, count in Counter(names).most_common(1):
        if count > 1:
            both = " and ".join(ascii(folder) for folder, other in zip(folders, names, strict=True) if other == name)
            raise UserError(
                f"{scheme}:{path}: the class folders {both} have the same name, '{name}', once it is written in one "
                "Unicode form; rename one, or put their images together"
            )
    return names
