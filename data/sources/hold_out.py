"""Held-out part of a source: each image is in it or not by a hash of its own, whatever other images there are.

So an image that was trained on is never held out later, when others were added, and one that was held out is never
trained on. Shares are those of coins that each image tosses: of 1,000 images of a class 5 % are 50, give or take 7.
Of a class of two images or more, one at least is in each part: where the hashes leave one part empty, the image of
the lowest hash, or of the highest, goes there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import EncodedImage
from kilobatch.data.sources.path_list import MadeNames
from kilobatch.data.sources.specs import Source

SUFFIX = "_held_out"  # of the second file's name: train.beton, train_held_out.beton


class _PartNames(MadeNames):
    """Some of the names of a source's images."""

    def __init__(self, names: Sequence[str], rows: NDArray[np.int64]) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return self._names[int(self._rows[i])]


class SourcePart:
    """Some images of a source, by their numbers, ascending."""

    def __init__(self, source: Source, rows: NDArray[np.int64], passed_over: Mapping[str, int]) -> None:
        self._source, self._rows = source, rows
        self.classes, self.passed_over = source.classes, passed_over
        self.fields: Mapping[str, NDArray] = {name: array[rows] for name, array in source.fields.items()}
        self.labels: NDArray[np.int64] = source.labels[rows]
        self.names = None if source.names is None else _PartNames(source.names, rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        return self._source[int(self._rows[i])]

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        return self._source.encode(int(self._rows[i]), encoding)

    def deep_values(self, i: int) -> tuple[float, float] | None:
        return self._source.deep_values(int(self._rows[i]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._source.fingerprint().encode() + self._rows.tobytes()).hexdigest()


def split_source(source: Source, share: float, seed: int) -> tuple[SourcePart, SourcePart]:
    """The images to train on, and those that are held out: about `share` of each class. What the source has passed over
    counts for the first. Raises UserError where one part would be empty."""
    held = held_out_images(image_hashes(source, seed), source.labels, share)
    if held.all() or not held.any():
        raise UserError(
            f"--hold-out {share:.4g} of {len(source):,} images leaves no image {'out' if held.any() else 'in'}; give "
            "another share, or more images"
        )
    return (
        SourcePart(source, np.flatnonzero(~held), source.passed_over),
        SourcePart(source, np.flatnonzero(held), {}),
    )


def held_out_images(hashes: NDArray[np.uint64], labels: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """(images,) whether each is held out, by its hash. labels: -1 for an image without one: all these are one class
    more."""
    held = hashes < np.uint64(min(share * 2.0**64, 2.0**64 - 2048))
    order = np.lexsort((hashes, labels))  # by class, and within one by hash
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min(initial=0) - 1))
    for members in np.split(order, starts[1:]) if len(order) else []:
        if len(members) > 1:
            held[members[0]], held[members[-1]] = True, False
    return held


def image_hashes(source: Source, seed: int) -> NDArray[np.uint64]:
    """(images,) a number of 64 bits for each, by the seed and its name or, where images have none, its pixels: images
    of the same pixels then are on the same side."""
    names, found = source.names, np.empty(len(source), np.uint64)
    for i in range(len(source)):
        data = source[i][0].tobytes() if names is None else names[i].encode()
        digest = hashlib.blake2b(data, digest_size=8, salt=seed.to_bytes(8, "little"))
        found[i] = int.from_bytes(digest.digest(), "little")
    return found


def held_out_path(out: Path) -> Path:
    """Where the held-out part of a file of this name is written."""
    return out.with_name(f"{out.stem}{SUFFIX}{out.suffix}")


def parse_share(text: str) -> float:
    """A share as 5% or 0.05. Raises UserError for another text, and for one that leaves nothing in or out."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1
    if not 0 < share < 1:
        raise UserError(f"--hold-out is '{text}'; give a share of the images such as 5% or 0.05")
    return share
