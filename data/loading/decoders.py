"""The FFCV decoders of this project: one decodes each image once and makes all of its views, one reads the labels.

FFCV compiles its decoders anew in every process, which takes 5 to 10 s; these call loops whose compiled code is kept on
disk. A result's memory is not reused while anybody holds it; FFCV's results are overwritten by the next batches.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.beton import describe_sample, verify_beton
from kilobatch.data.beton_note import sample_checksums
from kilobatch.data.errors import UserError
from kilobatch.data.loading.buffer_pool import BufferPool
from kilobatch.data.loading.decode_crop import NOT_INTACT, crop_by_patch, crop_bytes, crop_plan_of, crop_planar
from kilobatch.data.loading.ffcv_bindings import Operation, State
from kilobatch.data.loading.image_table import ImageTable, build_table, one_image_table
from kilobatch.data.numba_jit import first_call
from kilobatch.data.sources.image_files import BrokenImage, read_image
from kilobatch.data.views.groups import ViewGroups, groups_of, pixels_of_views

COMPILING = Lock()
COMPILED: set[Callable[..., object]] = set()  # the loops that this process has called
PARTS = 4  # tasks per thread and batch: images take unequal time


def compile_once(function: Callable[..., object], call: Callable[[], object]) -> None:
    """Makes a call of a compiled loop that does nothing, so that it is compiled: numba's first call is not safe in
    several threads at once."""
    with COMPILING:
        with nullcontext() if function in COMPILED else first_call(function):
            call()
        COMPILED.add(function)


@dataclass(frozen=True)
class BatchRequest:
    """A batch to be made. It is passed to FFCV as its "batch indices", of which FFCV uses only the length.

    index: of the samples, (n,); names: what their views are drawn by, (n,); see sampling.sample_names.
    """

    epoch: int
    step: int
    index: NDArray[np.int64]
    names: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)


class ViewDecoder(Operation):
    """Decoder of an RGBImageField: BatchRequest -> of each group of views (N, V, 3, size, size), on `device`.

    For a CPU they are augmented and normalised, float32; for an accelerator cropped and flipped, uint8, to be augmented
    there. A view depends on the image and (seed, epoch, name, view) alone. With `central` above 0 it is the central
    square of that fraction of the shorter side, not flipped. All groups lie in one buffer, which is filled by one
    decoding of each image, and copied at once.
    """

    def __init__(self, beton: Path, views: ViewGroups, seed: int, central: float, threads: int, device: torch.device):
        super().__init__()
        self.info = verify_beton(beton)
        self.beton, self.groups, self.device = beton, groups_of(views), device
        self.elements = [3 * pixels_of_views(group) for group in self.groups]  # of an image
        self.crop_plan = crop_plan_of(self.groups, seed, central)
        self.planar = device.type == "cpu"
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views") if threads > 1 else None
        self.table: ImageTable | None = None
        self.buffers: BufferPool | None = None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return previous_state, None

    def generate_code(self) -> Callable[..., tuple[Tensor, ...]]:
        return self.decode

    def decode(
        self, request: BatchRequest, _memory: None, rows: np.ndarray, storage: tuple[np.ndarray, ...]
    ) -> tuple[Tensor, ...]:
        """rows: this field's metadata; storage: the mapped file, the starts of its allocations, their sizes."""
        if self.table is None:
            self.table = build_table(self.beton, rows, *storage, checksum=sample_checksums(self.info))
        out = self.output(len(request))
        failed = np.zeros(len(request), np.uint8)
        self.make_views(self.table, request.epoch, request.index, request.names, out.numpy(), failed)
        for i in np.flatnonzero(failed).tolist():
            if failed[i] == NOT_INTACT:
                where = describe_sample(self.beton, self.info, int(request.index[i]))
                raise UserError(
                    f"{self.beton} is damaged: the bytes of {where} have changed (their CRC-32C differs); convert it "
                    "again, or copy it again"
                )
            self.decode_with_pillow(i, request, out.numpy())
        return self.groups_in(out if self.planar else out.to(self.device, non_blocking=True), len(request))

    def output(self, images: int) -> Tensor:
        """Room for the views of a batch, flat: float32, or uint8, which is pinned if it is copied to a GPU."""
        shape = (images * sum(self.elements),)
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        if self.buffers is None or self.buffers.shape != shape:
            self.buffers = BufferPool(shape, np.float32 if self.planar else np.uint8)
        return self.buffers.borrow()

    def groups_in(self, out: Tensor, images: int) -> tuple[Tensor, ...]:
        """What `output` has been filled with, as (images, V, 3, size, size) of each group, in the same memory."""
        parts = zip(self.groups, out.split([images * elements for elements in self.elements]), strict=True)
        if self.planar:
            return tuple(x.view(images, group.count, 3, group.size, group.size) for group, x in parts)
        return tuple(x.view(images, group.count, group.size, group.size, 3).movedim(4, 2) for group, x in parts)

    def make_views(
        self,
        table: ImageTable,
        epoch: int,
        index: NDArray[np.int64],
        names: NDArray[np.int64],
        out: np.ndarray,
        failed: np.ndarray,
        at: int = 0,
    ) -> None:
        """Fills in `out`, flat as of `output`, the views of images `index`, numbers `at` and following of the batch;
        divided over the threads."""
        augmented = crop_by_patch if self.groups[0].by_patch else crop_planar
        loop = partial(augmented if out.dtype == np.float32 else crop_bytes, table, self.crop_plan, epoch)
        compile_once(loop.func, lambda: loop(index[:0], names[:0], 0, out, failed[:0]))
        if self.pool is None:
            loop(index, names, at, out, failed)
            return
        parts = min(len(index), PARTS * self.threads)
        edges = [len(index) * part // parts for part in range(parts + 1)]

        def make_part(begin: int, end: int) -> None:
            loop(index[begin:end], names[begin:end], at + begin, out, failed[begin:end])

        for _ in self.pool.map(make_part, edges, edges[1:]):
            pass

    def decode_with_pillow(self, i: int, request: BatchRequest, out: np.ndarray) -> None:
        """Fills in the views of the batch's image i, where libjpeg gave an error or a warning, if Pillow reads the
        file; else raises UserError."""
        assert self.table is not None
        sample = int(request.index[i])
        start, size = int(self.table.start[sample]), int(self.table.size[sample])
        where = f"{self.beton}, sample {sample}"
        try:
            pixels = read_image(self.table.storage[start : start + size].tobytes(), where)
        except BrokenImage as error:
            named = str(error).replace(where, f"{self.beton}, {describe_sample(self.beton, self.info, sample)}", 1)
            raise UserError(f"{named}; the file is damaged: convert it again") from error
        table = one_image_table(pixels, sample)
        one = slice(i, i + 1)
        self.make_views(table, request.epoch, request.index[one], request.names[one], out, np.zeros(1, np.uint8), at=i)


class Labels(Operation):
    """Decoder of an IntField: BatchRequest -> labels, sample indices and names, (N,) int64 on `device`; and the
    request."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return previous_state, None

    def generate_code(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, BatchRequest]]:
        return self.decode

    def decode(
        self, request: BatchRequest, _memory: None, labels: np.ndarray, _storage: object
    ) -> tuple[Tensor, Tensor, Tensor, BatchRequest]:
        columns = labels[request.index], request.index, request.names
        label, index, names = (torch.from_numpy(column).to(self.device) for column in columns)
        return label, index, names, request
