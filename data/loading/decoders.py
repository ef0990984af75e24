"""The FFCV decoders of this package: one decodes each image once and cuts all of its views, one reads the labels.

FFCV compiles decoders anew in every process, 5 to 10 s; these call loops that were compiled once and lie on disk.
Every result is in memory that is its own while anybody holds it, unlike FFCV's, which the next batches overwrite.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.augment.cpu.augment import scratch_length
from kilobatch.data.errors import Refusal
from kilobatch.data.loading.buffer_pool import Buffers
from kilobatch.data.loading.decode_crop import JPEG, RAW, Shape, Stored, cut_bytes, cut_planar
from kilobatch.data.loading.ffcv_bindings import Operation, State
from kilobatch.data.numba_jit import Bytes
from kilobatch.data.sources.image_files import BrokenImage, read
from kilobatch.data.views.options import Views

COMPILING = Lock()
PARTS = 4  # tasks per thread and batch: images take unequal time


@dataclass(frozen=True)
class Work:
    """One batch to be made: FFCV's "batch indices", of which it asks nothing but the length."""

    epoch: int
    step: int
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)


class CutViews(Operation):
    """Decoder of an RGBImageField: Work -> (N, V, 3, size, size) views on `device`.

    For a CPU they are augmented and normalised float32; for an accelerator the cut and flipped uint8, to be augmented
    there. A view depends on (seed, epoch, sample, view) alone. With `central` above 0 it is that fraction of the
    shorter side, from the middle, and not flipped.
    """

    def __init__(self, beton: Path, views: Views, seed: int, central: float, threads: int, device: torch.device):
        super().__init__()
        self.beton, self.views, self.device = beton, views, device
        # one type of each, or the loops would be compiled once more
        self.shape = Shape(views.plans(), int(seed), float(central), int(scratch_length(views)))
        self.planar = device.type == "cpu"
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views") if threads > 1 else None
        self.stored: Stored | None = None
        self.buffers: Buffers | None = None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return previous_state, None

    def generate_code(self) -> Callable[..., Tensor]:
        return self.decode

    def decode(self, work: Work, _memory: None, rows: np.ndarray, storage: tuple[np.ndarray, ...]) -> Tensor:
        """rows: this field's metadata; storage: the mapped file, where its allocations begin, how long they are."""
        if self.stored is None:
            self.stored = locate(self.beton, rows, *storage)
        out = self.memory(len(work))
        failed = np.zeros(len(work), np.bool_)
        self.cut(self.stored, work.epoch, work.index, out.numpy(), failed)
        for i in np.flatnonzero(failed):
            self.cut_alone(int(i), work, out.numpy())
        return out if self.planar else out.to(self.device, non_blocking=True).permute(0, 1, 4, 2, 3)

    def memory(self, images: int) -> Tensor:
        """(images, V, 3, size, size) float32, or (images, V, size, size, 3) uint8: pinned if it will be copied."""
        size, count = self.views.size, self.views.count
        shape = (images, count, 3, size, size) if self.planar else (images, count, size, size, 3)
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        if self.buffers is None or self.buffers.shape != shape:
            self.buffers = Buffers(shape, np.float32 if self.planar else np.uint8)
        return self.buffers.lend()

    def cut(self, stored: Stored, epoch: int, index: NDArray[np.int64], out: np.ndarray, failed: np.ndarray) -> None:
        """Fills `out`, in parts over the threads."""
        loop = partial(cut_planar if out.dtype == np.float32 else cut_bytes, stored, self.shape, epoch)
        with COMPILING:  # numba's first call is not safe in several threads at once
            loop(index[:0], out[:0], failed[:0])
        if self.pool is None:
            loop(index, out, failed)
            return
        parts = min(len(index), PARTS * self.threads)
        edges = [len(index) * part // parts for part in range(parts + 1)]
        slices = [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]
        for _ in self.pool.map(lambda part: loop(index[part], out[part], failed[part]), slices):
            pass

    def cut_alone(self, i: int, work: Work, out: np.ndarray) -> None:
        """Row i, which libjpeg complained of, with Pillow as the judge of whether the file is whole."""
        assert self.stored is not None
        sample = int(work.index[i])
        start, size = int(self.stored.start[sample]), int(self.stored.size[sample])
        try:
            pixels = read(self.stored.storage[start : start + size].tobytes(), f"{self.beton}, sample {sample}")
        except BrokenImage as error:
            raise Refusal(f"{error}; the file is damaged: convert it again") from error
        alone = single(pixels, sample)
        self.cut(alone, work.epoch, work.index[i : i + 1], out[i : i + 1], np.zeros(1, np.bool_))


class Labels(Operation):
    """Decoder of an IntField: Work -> labels (N,) and sample indices (N,), int64, on `device`, and the work itself."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return previous_state, None

    def generate_code(self) -> Callable[..., tuple[Tensor, Tensor, Work]]:
        return self.decode

    def decode(self, work: Work, _memory: None, labels: np.ndarray, _storage: object) -> tuple[Tensor, Tensor, Work]:
        index = torch.from_numpy(work.index)
        return torch.from_numpy(labels[work.index]).to(self.device), index.to(self.device), work


def locate(beton: Path, rows: np.ndarray, file: Bytes, begins: np.ndarray, sizes: np.ndarray) -> Stored:
    """Where each image lies. Raises Refusal for a file whose tables contradict each other, which FFCV would not."""
    start = rows["data_ptr"].astype(np.int64)
    at = np.searchsorted(begins, rows["data_ptr"])
    height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    mode = np.ascontiguousarray(rows["mode"])
    sound = len(begins) > 0 and bool((at < len(begins)).all())
    if sound:
        size = sizes[at].astype(np.int64)
        whole = (begins[at] == rows["data_ptr"]) & (start >= 0) & (size >= 0) & (start + size <= len(file))
        shaped = (height > 0) & (width > 0) & np.where(mode == RAW, size == 3 * height * width, mode == JPEG)
        if (whole & shaped).all():
            storage = np.asarray(file)
            storage.setflags(write=False)
            return Stored(storage, start, size, height, width, mode)
    raise Refusal(f"{beton} is damaged: its tables do not fit its {len(file):,} bytes; convert it again")


def single(pixels: Bytes, sample: int) -> Stored:
    """An image in memory, (H, W, 3), as sample number `sample`, the others being nowhere."""
    storage = np.ascontiguousarray(pixels).reshape(-1)
    storage.setflags(write=False)

    def column(value: int, dtype: type = np.int64) -> np.ndarray:
        return np.full(sample + 1, value, dtype)

    height, width = pixels.shape[:2]
    return Stored(storage, column(0), column(storage.size), column(height), column(width), column(RAW, np.uint8))
