"""The parts of an embedding that is being made: which images each has, and their features in files with checksums.

Parts and their batches depend on the number of images alone, so that any number of workers computes the same bits.
Loads no torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors, write_whole
from kilobatch.trainer.checkpoint.exported_file import check_seal, seal

FORMAT = 1  # of parts: those of another are computed anew
PARTS = 64  # about so many, so that workers end at about the same time
SMALLEST, LARGEST = 64, 2048  # images in a part
BATCH = 256  # images, at most
FEATURES, WORK = "features", "work"


class EmbeddingWork(BaseModel):
    """The features that are asked for: of the images of a .beton, by the encoder of a checkpoint or an exported file.

    samples: the images; device, stall_minutes: of the workers; out: the file that is written in the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: Path
    encoder_sha256: str
    beton: Path
    images_sha256: str
    samples: int
    device: Literal["auto", "cpu", "cuda"]
    stall_minutes: float | None
    out: Path

    @property
    def rows(self) -> int:
        """Images in a part; the last one may have fewer."""
        rows = SMALLEST
        while rows < LARGEST and rows * PARTS < self.samples:
            rows *= 2
        return rows

    @property
    def batch(self) -> int:
        """Images that go through the network together; parts are made of whole batches."""
        return min(self.rows, BATCH)

    @property
    def parts(self) -> int:
        return -(-self.samples // self.rows)

    def images(self, part: int) -> NDArray[np.int64]:
        """The images of a part, ascending."""
        return np.arange(part * self.rows, min((part + 1) * self.rows, self.samples))

    def discard_damaged(self, folder: Path) -> None:
        """Removes the parts that are not whole, or of another work. Reads every byte: the launcher does so once, and
        workers then go by which files are there."""
        for part in set(range(self.parts)) - {*self.missing(folder)}:
            if not self._is_whole(folder, part):
                path = part_path(folder, part)
                with refusing_os_errors(path):
                    path.unlink()

    def missing(self, folder: Path) -> list[int]:
        """The parts that are not there, ascending."""
        there = {path.name for path in folder.glob("part-*")}
        return [part for part in range(self.parts) if part_path(folder, part).name not in there]

    def count_done(self, folder: Path, missing: list[int]) -> int:
        """The images of the parts that are there, where these were missing at the start."""
        waiting = {*missing} & {*self.missing(folder)}
        return self.samples - sum(len(self.images(part)) for part in waiting)

    def write(self, folder: Path, part: int, features: NDArray[np.float32]) -> None:
        """Writes a part, whole or not at all. features: (its images, D). Raises UserError where it cannot."""
        path, metadata = part_path(folder, part), {WORK: self._identity(part)}
        with refusing_os_errors(path):
            write_whole(path, seal(save({FEATURES: np.ascontiguousarray(features)}, metadata)))

    def read(self, folder: Path, part: int) -> NDArray[np.float32]:
        """The features of a part that is whole: (its images, D)."""
        with safe_open(part_path(folder, part), framework="numpy") as file:
            return file.get_tensor(FEATURES)

    def _identity(self, part: int) -> str:
        parts = [FORMAT, self.encoder_sha256, self.images_sha256, self.samples, self.rows, self.batch, part]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _is_whole(self, folder: Path, part: int) -> bool:
        path = part_path(folder, part)
        try:
            check_seal(path)
            with safe_open(path, framework="numpy") as file:
                shape = file.get_slice(FEATURES).get_shape()
                metadata = file.metadata() or {}
        except (UserError, SafetensorError, OSError):
            return False
        return metadata.get(WORK) == self._identity(part) and shape[0] == len(self.images(part))


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:06d}.safetensors"
