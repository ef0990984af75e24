"""Source folder:PATH: a folder with one folder of images per class."""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.sources.image_files import EncodedImage, encode_file, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif")
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


class Folder:
    """Classes are the sorted names of PATH's folders; their images may lie in folders further down.

    Where PATH holds train/ and one of test/, val/, valid/ or validation/ and no other folder, the split's folder is
    read. Names that begin with a dot, and files without the suffix of an image, are ignored.
    Raises UserError where there is no image, no class folder, or a class folder without an image.
    """

    def __init__(self, path: Path, split: str):
        if not path.exists():
            raise UserError(f"folder:{path}: there is no such folder; give one that holds a folder of images per class")
        if not path.is_dir():
            raise UserError(f"folder:{path} is a file, not a folder; give the folder that holds a folder per class")
        self.path = _split_folder(path, split)
        names, loose = _entries(self.path)
        if not names:
            if loose:
                raise UserError(
                    f"folder:{self.path} has {len(loose):,} images but no class folders; move them into a folder per "
                    f"class (without classes: into one folder, for example {self.path / 'all'})"
                )
            raise UserError(f"folder:{self.path} has no images; give a folder that holds a folder of images per class")
        self.classes = [_printable(name) for name in names]
        self._files: list[str] = []  # relative to self.path
        labels: list[int] = []
        empty: list[str] = []
        for label, name in enumerate(names):
            found = _images(self.path, name)
            self._files += found
            labels += [label] * len(found)
            if not found:
                empty.append(name)
        if empty:
            raise UserError(
                f"folder:{self.path}: class folder '{empty[0]}' has no images"
                + (f" (nor have {len(empty) - 1:,} others)" if len(empty) > 1 else "")
                + f"; fill or remove it (image files end in {', '.join(SUFFIXES)})"
            )
        self._labels = np.array(labels, np.int64)

    @property
    def names(self) -> list[str]:
        """Paths within the folder, each on one line."""
        return [_printable(file).replace("\n", "\\n").replace("\r", "\\r") for file in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        name, data = self._bytes(i)
        return read_image(data, name), int(self._labels[i])

    def encode(self, i: int, max_side: int | None, quality: int) -> tuple[EncodedImage, int]:
        name, data = self._bytes(i)
        return encode_file(data, name, max_side, quality), int(self._labels[i])

    def fingerprint(self) -> str:
        """A digest of all names, sizes and times of change."""
        digest = hashlib.sha256(str(self.path.resolve()).encode(errors="surrogateescape"))
        for file in self._files:
            stat = os.stat(self.path / file)  # noqa: PTH116 - faster than Path.stat, for a million files
            digest.update(f"\n{file}\t{stat.st_size}\t{stat.st_mtime_ns}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        path = self.path / self._files[i]
        try:
            return _printable(str(path)), path.read_bytes()
        except OSError as error:  # the disk's error, not the image's: never skipped as a broken image
            raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from error


def _printable(name: str) -> str:
    """Escapes bytes that are not UTF-8: a file with such a name can be opened, but its name not printed or stored."""
    return name.encode("utf-8", "backslashreplace").decode()


def _split_folder(path: Path, split: str) -> Path:
    names = _entries(path)[0]
    of_test = [name for name in names if name in _SPLITS["test"]]
    if len(names) == 2 and "train" in names and len(of_test) == 1:
        return path / ("train" if split == "train" else of_test[0])
    return path


def _entries(path: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders, and of the images, that lie directly in `path`."""
    folders: list[str] = []
    images: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(SUFFIXES):
                    images.append(entry.name)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from error
    return sorted(folders), sorted(images)


def _images(root: Path, name: str, above: tuple[str, ...] = ()) -> list[str]:
    """All images in root/name and below, as paths relative to root. A link back to a folder above is not followed."""
    real = os.path.realpath(root / name)
    if real in above:
        return []
    folders, images = _entries(root / name)
    found = [f"{name}/{image}" for image in images]
    for folder in folders:
        found += _images(root, f"{name}/{folder}", (*above, real))
    return found
