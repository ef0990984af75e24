"""The FFCV decoder that reads the arrays which samples have beside image and label."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.beton import describe_sample, find_field
from kilobatch.data.beton_layout import allocation_of
from kilobatch.data.beton_note import BetonInfo, decode_checksums
from kilobatch.data.crc32c import crc32c
from kilobatch.data.errors import UserError
from kilobatch.data.loading.decoders import BatchRequest, compile_once
from kilobatch.data.loading.ffcv_bindings import Operation, State
from kilobatch.data.numba_jit import Bytes, exact


class FieldReader(Operation):
    """Decoder of an NDArrayField: BatchRequest -> (N, ...) on `device`, of the type and shape that the note states.

    Raises UserError where the note states no such field, and for a sample whose bytes have changed.
    """

    def __init__(self, beton: Path, info: BetonInfo, name: str, device: torch.device):
        super().__init__()
        note = find_field(beton, info, name)
        self.beton, self.info, self.device = beton, info, device
        self.name, self.dtype, self.shape = note.form
        self.bytes, self.checksum = note.form.bytes, decode_checksums(note.crc32c)
        self.places: tuple[Bytes, NDArray[np.int64]] | None = None  # the mapped file, and each sample's array in it

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return previous_state, None

    def generate_code(self) -> Callable[..., Tensor]:
        return self.decode

    def decode(
        self, request: BatchRequest, _memory: None, places: np.ndarray, storage: tuple[np.ndarray, ...]
    ) -> Tensor:
        """places: of all samples' arrays in the file; storage: the mapped file, its allocations' starts and sizes."""
        if self.places is None:
            self.places = self._checked(places, *storage)
        read = partial(copy_arrays, *self.places, self.checksum)
        out, failed = np.empty((len(request), self.bytes), np.uint8), np.zeros(len(request), np.uint8)
        compile_once(copy_arrays, lambda: read(request.index[:0], out[:0], failed[:0]))
        read(request.index, out, failed)
        for i in np.flatnonzero(failed).tolist():
            where = describe_sample(self.beton, self.info, int(request.index[i]))
            raise UserError(
                f"{self.beton} is damaged: the field '{self.name}' of {where} has changed (its CRC-32C differs); "
                "convert it again, or copy it again"
            )
        array = out.view(self.dtype).reshape(len(request), *self.shape)
        return torch.from_numpy(array).to(self.device)

    def _checked(
        self, places: np.ndarray, file: Bytes, starts: np.ndarray, sizes: np.ndarray
    ) -> tuple[Bytes, NDArray[np.int64]]:
        """The file and the places. Raises UserError where they do not fit it, which FFCV does not check."""
        start, found = places.astype(np.int64), allocation_of(places, starts, sizes)
        inside = (found >= 0) & (start >= 0) & (start + self.bytes <= len(file))
        if not (inside & (np.append(sizes, 0)[found] == self.bytes)).all():
            raise UserError(
                f"{self.beton} is damaged: its tables do not fit the field '{self.name}' of {self.bytes:,} bytes that "
                "its note states; convert it again"
            )
        storage = np.asarray(file)
        storage.setflags(write=False)
        return storage, start


@exact
def copy_arrays(
    storage: Bytes,
    start: NDArray[np.int64],
    checksum: NDArray[np.uint32],
    index: NDArray[np.int64],
    out: Bytes,
    failed: Bytes,
) -> None:
    """Copies the arrays of the samples `index` (n,) to out (n, bytes); `failed` (n,) gets 1 where they have changed."""
    for i in range(len(index)):
        data = storage[start[index[i]] : start[index[i]] + out.shape[1]]
        if crc32c(data) != checksum[index[i]]:
            failed[i] = 1
            continue
        for byte in range(out.shape[1]):
            out[i, byte] = data[byte]
