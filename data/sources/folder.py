"""Source folder:PATH: a folder with one folder of images per class, or with images alone."""

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.deep_pixels import values_of
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, EncodedImage, encode_file, read_image
from kilobatch.data.sources.listing import NOWHERE, Listing, cannot_be_read, list_folder, shape_of
from kilobatch.data.sources.path_names import composed, escaped, existing_path, printable
from kilobatch.data.sources.splits import Shape, Split, choose_split, likely_splits, refuse_splits_again, split_folders
from kilobatch.data.sources.walk import NO_CLASS, Walk, describe_passed_over
from kilobatch.data.sources.walk_cache import walk_once

CHANGED = (*NOWHERE, errno.EISDIR)  # a file that was there when the folder was walked through, and no longer is


class Folder:
    """Classes are the names of PATH's folders, in order; their images may lie in folders further down. Images beside
    which there is no folder are all of one class.

    Where PATH holds folders that are named after splits, that of the split is read (splits.py). path: the folder that
    is read. passed_over: how many files below it are no images of a class, by reason. Links that lead nowhere are
    images that are broken.
    Raises UserError where there is no image, or a class folder without an image.
    """

    fields = Arrays.NO_FIELDS

    def __init__(self, path: Path, split: Split):
        path = existing_path(path)
        _refuse_no_folder(path)
        self.path = _split_folder(path, split)
        walk = walk_once(self.path)
        _refuse_empty(self.path, walk)
        self.classes = _class_names(self.path, walk.classes)
        self.passed_over: Mapping[str, int] = dict(walk.passed_over.most_common())
        self._files, self._labels = walk.files, walk.labels

    @property
    def names(self) -> list[str]:
        """Paths within the folder, each on one line: backslashes, control characters and bytes that are not UTF-8 are
        escaped, so that two names are never the same text."""
        return [escaped(file) for file in self._files]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(images,); -1 for a link that leads nowhere."""
        return self._labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        name, data = self._bytes(i)
        return read_image(data, name), int(self._labels[i])

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        name, data = self._bytes(i)
        return encode_file(data, name, encoding), int(self._labels[i])

    def deep_values(self, i: int) -> tuple[float, float] | None:
        try:
            return values_of(self._bytes(i)[1])
        except BrokenImage:
            return None

    def fingerprint(self) -> str:
        """A digest of all names, sizes, inodes and times of change, and of how many files are passed over.

        The inode and the time of the inode's change tell a file that was replaced by one of equal size and time.
        """
        digest = hashlib.sha256(str(self.path.resolve()).encode(errors="surrogateescape"))
        for file in self._files:
            try:
                of = os.stat(f"{self.path}/{file}")  # noqa: PTH116 - faster than Path.stat, for a million files
                state = f"{of.st_size}\t{of.st_mtime_ns}\t{of.st_ino}\t{of.st_ctime_ns}"
            except OSError as error:
                if error.errno not in NOWHERE:
                    raise cannot_be_read(printable(f"{self.path}/{file}"), error) from error
                state = "absent"
            digest.update(f"\n{file}\t{state}".encode(errors="surrogateescape"))
        digest.update(repr(sorted(self.passed_over.items())).encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        path = self.path / self._files[i]
        name = printable(str(path))
        try:
            if self._labels[i] != NO_CLASS:
                return name, path.read_bytes()
            path.stat()
        except OSError as error:
            if error.errno in CHANGED:
                raise BrokenImage(f"{name} {_describe_absent(path, error)}") from error
            raise cannot_be_read(name, error) from error  # the disk's fault, not the image's: never left out as broken
        raise BrokenImage(f"{name} was a link that leads nowhere when the folder was read; start again")


def _describe_absent(path: Path, error: OSError) -> str:
    if not os.path.islink(path):  # noqa: PTH114 - likewise
        return f"cannot be read: {error.strerror}; it was there when the folder was read"
    if error.errno == errno.ELOOP:
        return f"is a link to {printable(os.readlink(path))}, and by that to itself"  # noqa: PTH115 - keeps the form
    return f"is a link to {printable(os.path.realpath(path))}, which does not exist"


def _refuse_no_folder(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in NOWHERE:
            raise cannot_be_read(path, error) from error
        if os.path.islink(path):  # noqa: PTH114 - False, too, for a name that is too long
            raise UserError(
                f"folder:{path} {_describe_absent(path, error)}; mount its disk, mend the link, or give another folder"
            ) from None
        near = Path(str(path).strip())
        hint = f" (but there is '{near}', without the space)" if near != path and os.path.exists(near) else ""  # noqa: PTH110
        raise UserError(
            f"folder:{path}: there is no such folder{hint}; give one that holds images, or a folder of images per class"
        ) from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"folder:{path} is a file, not a folder; give the folder that holds it")


def _split_folder(path: Path, split: Split) -> Path:
    """The folder that is read for a split of this folder. Raises UserError as choose_split."""
    top = list_folder(str(path))
    for name, its in split_folders([*top.folders, *top.broken]).items():
        if name in top.broken and its == split:
            raise UserError(
                f"folder:{path} has no {split} images: {name} is a link to {os.path.realpath(path / name)}, which does "
                "not exist; mount its disk or mend the link"
            )
    chosen = choose_split(path, split, _shapes(path, top))
    if chosen is None:
        _refuse_likely_splits(path, top)
        return path
    within = list_folder(str(path / chosen))
    refuse_splits_again(path / chosen, within.folders, _shapes(path / chosen, within))
    return path / chosen


def _refuse_likely_splits(path: Path, top: Listing) -> None:
    likely = likely_splits(top.folders)
    others = [shape_of(str(path / name)) for name in top.folders if likely and name not in likely]
    if likely and not any(shape.images or shape.images_below for shape in others):
        shown = ", ".join(printable(name) for name in likely[:5])
        raise UserError(
            f"folder:{path} has images in {len(likely):,} folders alone, which are named as splits are ({shown}) and "
            f"would be its classes; give one of them, such as folder:{path / likely[0]}, or rename them"
        )


def _shapes(path: Path, listing: Listing) -> dict[str, Shape]:
    """What the folders in this one hold, or nothing where none is named after a split."""
    if not split_folders(listing.folders):
        return {}
    return {name: shape_of(str(path / name)) for name in listing.folders}


def _refuse_empty(path: Path, walk: Walk) -> None:
    others = f" (passed over: {describe_passed_over(walk.passed_over)})" if walk.passed_over else ""
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


def _class_names(path: Path, folders: list[str]) -> list[str]:
    """Raises UserError where two folders' names become one, as those that differ by their Unicode form alone."""
    names = [printable(composed(folder)) for folder in folders]
    for name, count in Counter(names).most_common(1):
        if count > 1:
            both = " and ".join(ascii(folder) for folder, other in zip(folders, names, strict=True) if other == name)
            raise UserError(
                f"folder:{path}: the class folders {both} have the same name, '{name}', once it is written in one "
                "Unicode form; rename one, or put their images together"
            )
    return names
