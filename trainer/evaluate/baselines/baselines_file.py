"""Reads and writes baselines.json, the baselines of a run, and says them in words. Loads no torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from kilobatch.data.files import refusing_os_errors, write_whole

FILE = "baselines.json"


class Baselines(BaseModel):
    """The k-NN accuracies, from 0 to 1, that a trained encoder is compared with.

    key: a hash of all that they depend on; in_use: whether the training is compared with them, or `kilobatch eval`
    alone, which may ask for another k or other images. train_images, test_images: how many were used, of
    all_train_images and all_test_images; labels: how many the training learned from, None: it needs none, or had all.
    classes: those that a test image may have; reduced_to: the side to which images were reduced to be compared as raw
    pixels, None: they were not. pixels, untrained: the accuracies of raw pixels, and of the same network with the same
    seed before training.
    """

    key: str
    in_use: bool
    k: int
    temperature: float
    train_images: int
    test_images: int
    all_train_images: int
    all_test_images: int
    labels: int | None = None
    classes: int
    reduced_to: int | None = None
    pixels: float
    untrained: float

    @property
    def chance(self) -> float:
        """The accuracy of guessing a class."""
        return 1 / self.classes

    @property
    def sampled(self) -> bool:
        """Whether they are of a fixed sample of the images. The trained encoder is then asked on the same sample,
        too."""
        return (self.train_images, self.test_images) != (self.all_train_images, self.all_test_images)

    def values(self) -> dict[str, float]:
        """The values as metrics.jsonl has them, beside those of evaluators."""
        group = "knn_sample" if self.sampled else "knn"
        shares = {"pixels": self.pixels, "untrained": self.untrained, "chance": self.chance}
        return {f"{group}/{name}": share for name, share in shares.items()}

    def conditions(self) -> str:
        """The settings and the images of the k-NN, in words."""
        voting = describe_voting(self.k, self.temperature, self.train_images, self.all_train_images, self.labels)
        return f"{voting}; {_count(self.test_images, self.all_test_images)} test images"

    def shares(self, trained: float | None = None) -> str:
        """The accuracies in words, with that of the trained encoder where it is given."""
        shown = {} if trained is None else {"trained encoder": trained}
        pixels = "raw pixels" if self.reduced_to is None else f"raw pixels ({self.reduced_to} x {self.reduced_to})"
        shown |= {pixels: self.pixels, "untrained encoder": self.untrained, "chance": self.chance}
        return ", ".join(f"{name} {share:.2%}" for name, share in shown.items())


def describe_voting(k: int, temperature: float, images: int, whole: int, labels: int | None) -> str:
    """The settings of a k-NN, and the images whose labels vote, in words. images: of `whole` training images; labels:
    how many of these the training learned from, None: it needs none, or had all."""
    trained = "" if labels is None else f", where the training had {labels:,} labels"
    return f"k {k}, temperature {temperature:g}; {_count(images, whole)} training images with their labels{trained}"


def _count(images: int, whole: int) -> str:
    return f"{images:,}" if images == whole else f"a sample of {images:,} of {whole:,}"


def read_all_baselines(run: Path) -> list[Baselines]:
    """All baselines of a run; none where there is no file, or a damaged one: they are made again when needed."""
    try:
        return TypeAdapter(list[Baselines]).validate_json((run / FILE).read_bytes())
    except (OSError, ValidationError):
        return []


def read_baselines(run: Path) -> Baselines | None:
    """Those that the training is compared with; None where there are none."""
    return next((found for found in read_all_baselines(run) if found.in_use), None)


def write_all_baselines(run: Path, baselines: Sequence[Baselines]) -> None:
    """Writes the file as a whole. Raises UserError where that is not possible."""
    path = run / FILE
    with refusing_os_errors(path):
        write_whole(path, [json.dumps([each.model_dump() for each in baselines], indent=1).encode(), b"\n"])
