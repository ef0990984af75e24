"""SwAV: Caron et al. 2020, arxiv.org/abs/2006.09882; authors' code: github.com/facebookresearch/swav.

Eq. 2 and 4, with s = z C^T of unit rows and q = Sinkhorn(s / epsilon) of a view: each of the two large views gives the
others their targets, L = 1/2 sum over i of 1 / (V - 1) sum over v != i of -sum_k q_i,k log softmax(s_v / tau)_k.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.options import SINKHORN_EPSILON
from kilobatch.methods.losses.prototype_distillation import information
from kilobatch.methods.losses.sinkhorn import sinkhorn
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import SwAVHead, embed_views, unit
from kilobatch.methods.parameter_groups import ParameterGroup

LEAST_SHOWN, SHOWN = 8, 256  # images of rank 0 that scalars() are of: of few it says nothing


class SwAV(Method):
    """Views of an image predict each other's assignments to prototypes, which a batch uses equally: section 3.

    temperature: tau, which scores are divided by. prototypes: K; epsilon: of the assignments' entropy; rounds: of
    the Sinkhorn iteration. dim: numbers of a projection; hidden: the width of the head's hidden layer. freeze_epochs:
    before which the prototypes stay as they began. queue: projections of so many earlier images for each of the two
    large views, which are assigned along with the batch; null: none. queue_epoch: from which it fills; it is used once
    it is full.

    Prototypes are normalised where they are used; the authors overwrite them by their normalised rows before each step,
    which leaves the gradient along a row in.
    """

    views: ClassVar[int | None] = 2
    further_groups: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        prototypes: Annotated[int, Field(gt=1)] = 3000,
        epsilon: Annotated[float, Field(ge=SINKHORN_EPSILON)] = 0.05,
        rounds: Annotated[int, Field(ge=1)] = 3,
        dim: Annotated[int, Field(gt=0)] = 128,
        hidden: Annotated[int, Field(gt=0)] = 2048,
        freeze_epochs: Annotated[float, Field(ge=0)] = 1.0,
        queue: QueueOptions | None = None,
        queue_epoch: Annotated[int, Field(ge=0)] = 15,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.epsilon, self.rounds = encoder, temperature, epsilon, rounds
        self.freeze_epochs, self.queue_epoch = freeze_epochs, queue_epoch
        self.head = SwAVHead(encoder.features, hidden, dim, encoder.norm)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        empty = queue.model_copy(update={"start": "empty"}) if queue else None
        self.last: Tensor | None = None  # rows of the last step, for scalars()
        self.queues = nn.ModuleList([Queue(empty, dim) for _ in range(2)] if empty else [])

    def groups(self) -> Sequence[ParameterGroup]:
        # LARC adapts the steps of all tensors, biases and norms as well.
        return [ParameterGroup("prototypes", from_epoch=self.freeze_epochs, adapt=True), ParameterGroup("", adapt=True)]

    def embed(self, batch: Batch) -> Tensors:
        return {"z": embed_views(self.encoder, self.head, batch.views)}  # (N, V, D), the large views first

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        rows, prototypes = unit(z["z"]), unit(self.prototypes.weight)
        scores = rows @ prototypes.T  # (n, V, K)
        q = self.assignments(scores[:, :2].detach().transpose(0, 1), prototypes.detach())  # (2, n, K)
        log_p = F.log_softmax(scores / self.temperature, 2)
        # The sum over pairs of a target and another view, by the sum over all views less the target's own.
        towards = (q.sum(0)[:, None] * log_p).sum() - (q * log_p[:, :2].transpose(0, 1)).sum()
        return -towards / (2 * (scores.shape[1] - 1) * len(scores))

    def assignments(self, scores: Tensor, prototypes: Tensor) -> Tensor:
        """q (2, n, K) of scores (2, n, K); a full queue takes part."""
        full = [queue.filled().to(scores.dtype) for queue in self.memories() if queue.is_full()]
        more = torch.stack([rows @ prototypes.T for rows in full]) if full else None
        return sinkhorn(scores, self.epsilon, self.rounds, more)

    def memories(self) -> list[Queue]:
        """The queue of each large view; none without queues."""
        return [queue for queue in self.queues if isinstance(queue, Queue)]

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        if batch.clock.epoch >= self.queue_epoch:
            for view, queue in enumerate(self.memories()):
                queue.push(unit(z["z"][:, view]))
        self.last = z["z"][:SHOWN, 0]

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """information: of the predictions for rank 0's first views, with the prototypes as they are after the step."""
        if self.last is None or len(self.last) < LEAST_SHOWN:
            return {}
        p = (unit(self.last) @ unit(self.prototypes.weight).T / self.temperature).softmax(1)
        return {"information": float(information(p))}
