"""Memory that is used again: fresh pages cost a CPU as much time as augmenting a view into them."""

import weakref

import numpy as np
import torch
from torch import Tensor

SPARE = 6  # arrays kept while nobody uses them: a loader's batches ahead, one in work and two in use


class Buffers:
    """Arrays of one shape, lent as tensors; one comes back when the last tensor that shares its memory is gone."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]):
        self.shape, self.dtype = shape, dtype
        self.spare: list[np.ndarray] = []

    def lend(self) -> Tensor:
        """Uninitialised."""
        array = self.spare.pop() if self.spare else np.empty(self.shape, self.dtype)
        lent = array.view()  # the tensor holds this view, so that its end tells of the tensor's
        weakref.finalize(lent, self.take_back, array).atexit = False
        return torch.from_numpy(lent)

    def take_back(self, array: np.ndarray) -> None:
        if len(self.spare) < SPARE:
            self.spare.append(array)
