"""A pool of reusable memory: on a CPU, fresh pages cost as much time as augmenting a view into them."""

import weakref

import numpy as np
import torch
from torch import Tensor

MAX_SPARE = 6  # unused arrays that are kept: as many as a loader's batches ahead, one being made and two in use


class BufferPool:
    """Arrays of one shape, lent as tensors; an array returns when the last tensor that shares its memory is gone."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]):
        self.shape, self.dtype = shape, dtype
        self.spare: list[np.ndarray] = []

    def borrow(self) -> Tensor:
        """Lends an array, uninitialised."""
        array = self.spare.pop() if self.spare else np.empty(self.shape, self.dtype)
        lent = array.view()  # the tensor holds this view, which is therefore finalized when the tensor's memory is free
        weakref.finalize(lent, self.take_back, array).atexit = False
        return torch.from_numpy(lent)

    def take_back(self, array: np.ndarray) -> None:
        if len(self.spare) < MAX_SPARE:
            self.spare.append(array)
