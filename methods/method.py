"""What the trainer asks of a method."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from data.batch import Batch

Tensors = Mapping[str, Tensor]  # every tensor leads with the sample axis, so that chunks concatenate


class Method(nn.Module):
    """A paper: its networks, its equation and its memories.

    A loss is the mean over this rank's own samples; the engine averages gradients over ranks; together that is the
    gradient of the global mean. No rank, device, dtype or chunk appears in a method's file.
    """

    views: ClassVar[int | None] = None  # how many of each image it takes; None: any number
    encoder: nn.Module  # what is kept when training ends
    own_buffers: frozenset[str] = frozenset()  # names of the buffers that differ by rank: checkpoints keep every rank's

    def forward(self, views: Tensor) -> Tensors:
        return self.embed(views)

    def embed(self, views: Tensor) -> Tensors:
        """views (N, V, 3, H, W) -> outputs that carry gradient. Called chunk by chunk; never detaches."""
        raise NotImplementedError

    def target(self, views: Tensor) -> Tensors:
        """views (N, V, 3, H, W) -> outputs without gradient (momentum encoder, teacher). Called chunk by chunk."""
        return {}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        """The paper's equation: mean over this rank's own samples. Stop-gradients stand here."""
        raise NotImplementedError

    def update(self, z: Tensors, t: Tensors, batch: Batch, progress: float) -> None:
        """After the optimizer's step: moving averages, queues, banks. progress runs from 0 to 1 over the training."""

    def represent(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, D) features that evaluators read."""
        return self.encoder(images)
