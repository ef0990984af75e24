"""Sources whose images are encoded files, wherever these lie: on a disk, in archives, in columns of tables."""

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.deep_pixels import values_of
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, EncodedImage, encode_file, read_image
from kilobatch.data.sources.listing import NOWHERE, cannot_be_read
from kilobatch.data.sources.path_list import ImageNames, PathList
from kilobatch.data.sources.path_names import printable

if TYPE_CHECKING:
    from hashlib import _Hash

CHANGED = (*NOWHERE, errno.EISDIR)  # a file that was there when the folder was walked through, and no longer is


class EncodedFiles:
    """The part of a source that all sources of encoded files share. A subclass sets what is declared here, and has
    `_bytes` and `fingerprint`.

    classes: names of the classes; passed_over: what was found beside the images, by reason; _files: names of the
    images, (images,); _labels: positions in classes, or -1 for an image without a label, (images,).
    """

    fields = Arrays.NO_FIELDS
    passed_over: Mapping[str, int] = MappingProxyType({})
    classes: list[str]
    _files: PathList
    _labels: NDArray[np.int32]

    def _bytes(self, i: int) -> tuple[str, bytes]:
        """The name of image i for messages, and its file's content. Called by many threads. Raises BrokenImage where
        the image is absent, and UserError where it cannot be read."""
        raise NotImplementedError

    @property
    def names(self) -> ImageNames:
        """Names of the images, each on one line."""
        return ImageNames(self._files)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(images,); -1 for an image without a label."""
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


SEEN = "; it was there when the folder was read"


def read_file_of_source(path: Path, known: str = SEEN) -> tuple[str, bytes]:
    """A file's name for messages, and its content. known: why it was thought to be there, for the message about an
    absent one. Raises BrokenImage where it is absent, and UserError where it cannot be read: that is the disk's fault,
    not the image's, and it is never left out as broken."""
    try:
        return printable(str(path)), path.read_bytes()
    except OSError as error:
        raise _refusal(path, error, known) from error


def stat_of_source(path: Path) -> os.stat_result:
    """Raises as read_file_of_source."""
    try:
        return path.stat()
    except OSError as error:
        raise _refusal(path, error, SEEN) from error


def _refusal(path: Path, error: OSError, known: str) -> Exception:
    name = printable(str(path))
    if error.errno in CHANGED:
        return BrokenImage(f"{name} {describe_absent(path, error, known)}")
    return cannot_be_read(name, error)


def describe_absent(path: Path, error: OSError, known: str = SEEN) -> str:
    """Why a file that was named cannot be read, after its name."""
    if not os.path.islink(path):  # noqa: PTH114 - False, too, for a name that is too long
        return f"cannot be read: {error.strerror}{known}"
    if error.errno == errno.ELOOP:
        return f"is a link to {printable(os.readlink(path))}, and by that to itself"  # noqa: PTH115 - keeps the form
    return f"is a link to {printable(os.path.realpath(path))}, which does not exist"


def digest_of_files(root: Path, files: Iterable[str]) -> "_Hash":
    """A digest of the root's path and of all files' names, sizes, inodes and times of change.

    The inode and the time of the inode's change tell a file that was replaced by one of equal size and time. Raises
    UserError where a file cannot be looked at, other than one that is absent.
    """
    digest = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape"))
    for file in files:
        path = os.path.join(root, file)  # noqa: PTH118 - faster than Path, for a million files
        try:
            of = os.stat(path)  # noqa: PTH116 - likewise
            state = f"{of.st_size}\t{of.st_mtime_ns}\t{of.st_ino}\t{of.st_ctime_ns}"
        except OSError as error:
            if error.errno not in NOWHERE:
                raise cannot_be_read(printable(path), error) from error
            state = "absent"
        digest.update(f"\n{file}\t{state}".encode(errors="surrogateescape"))
    return digest
