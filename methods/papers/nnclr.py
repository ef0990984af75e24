"""NNCLR: Dwibedi et al. 2021, arxiv.org/abs/2104.14548; no code of the authors is public.

Eq. 2 and 3, NN(z, Q) the key of the queue nearest to z, p = g(z+) the prediction of the image's other view:
L_i = -log( exp(NN(z_i, Q) p_i / tau) / sum over k of exp(NN(z_i, Q) p_k / tau) ), k over the batch; algorithm 1 takes
both views as z, halves the sum, and pushes z of the first one.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import batch_info_nce
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import MLP, unit

QUEUE = QueueOptions(length=98_304)


class NNCLR(Method):
    """The nearest neighbour of a view finds the prediction of its image's other view among those of the global batch.

    temperature: tau, which similarities are divided by. queue: of projections, whose nearest ones stand for a view.
    dim: numbers of a projection; width: of the projector's hidden layers; hidden: of the predictor's.
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        queue: QueueOptions = QUEUE,
        dim: Annotated[int, Field(gt=0)] = 256,
        width: Annotated[int, Field(gt=0)] = 2048,
        hidden: Annotated[int, Field(gt=0)] = 4096,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.projector = MLP([encoder.features, width, width, dim], encoder.norm, last_affine=True)
        self.predictor = MLP([dim, hidden, dim], encoder.norm, last_norm=False, last_bias=True)
        self.queue = Queue(queue, dim)

    def embed(self, batch: Batch) -> Tensors:
        projector = nn.Sequential(self.encoder, self.projector)
        z = [projector(view) for view in batch.views[0].unbind(1)]  # norms see one view
        return {"z": torch.stack(z, 1), "p": torch.stack([self.predictor(x) for x in z], 1)}  # (N, V, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = unit(z["z"].detach()).unbind(1)
        p1, p2 = unit(z["p"]).unbind(1)
        return (self.neighbours_loss(z1, p2) + self.neighbours_loss(z2, p1)) / 2

    def neighbours_loss(self, z: Tensor, p: Tensor) -> Tensor:
        """The mean of eq. 3 over this rank's rows. z, p (n, D): unit projections, which get no gradient, and the unit
        predictions of the other view, which get that of all ranks' rows."""
        return batch_info_nce(self.queue.hardest(z, 1)[:, 0], p, self.temperature)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.queue.push(unit(z["z"][:, 0]))
