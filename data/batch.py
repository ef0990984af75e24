"""The batch that a loader yields and a method reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch.

    views: (N, V, 3, H, W) floating, normalised; index: (N,) int64, the samples' places in the dataset;
    label: (N,) int64, -1 for an image without a label.
    """

    views: Tensor
    index: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def chunks(self, n: int) -> list["Batch"]:
        """Splits into n equal parts, in order. The recipe's validation has made sure that n divides len(self)."""
        parts = zip(self.views.chunk(n), self.index.chunk(n), self.label.chunk(n), strict=True)
        return [Batch(*part) for part in parts]
