"""Barlow Twins: Zbontar et al., 2021, arxiv.org/abs/2103.03230; authors' code: github.com/facebookresearch/barlowtwins.

Eq. 1: L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2,
eq. 2: C_ij = sum_b zA_bi zB_bj / (sqrt(sum_b zA_bi^2) sqrt(sum_b zB_bj^2)), with z centred over the batch, that of all
ranks.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.decorrelation import cross_correlation
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import MLP
from kilobatch.methods.parameter_groups import ParameterGroup


class BarlowTwins(Method):
    """Makes the cross-correlation of two views' embeddings the identity: each dimension agrees with itself in the other
    view and says nothing of the others.

    off_diagonal: lambda, the weight of the correlations between dimensions. scale: of the whole loss; the paper's is 1.
    dim: numbers of a projection; hidden: the width of the projector's hidden layers; layers: of the projector.
    norms_lr: the share of the learning rate that norms and biases have.

    The authors' norms and biases have 0.0048 where weights have 0.2. But their gradient is 1 / W of the loss's on W
    GPUs, as their sum over ranks is outside autograd. LARS does not see that, norms and biases do. Here gradients are
    whole, so their share is 0.0048 / 0.2 / 32 = 7.5e-4, for the paper's 32 GPUs.
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        off_diagonal: Annotated[float, Field(ge=0)] = 0.0051,
        scale: Annotated[float, Field(gt=0)] = 1.0,
        dim: Annotated[int, Field(gt=0)] = 8192,
        hidden: Annotated[int, Field(gt=0)] = 8192,
        layers: Annotated[int, Field(ge=1)] = 3,
        norms_lr: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.off_diagonal, self.scale, self.norms_lr = encoder, off_diagonal, scale, norms_lr
        # The last norm is the standardisation within the loss.
        self.projector = MLP([encoder.features, *[hidden] * (layers - 1), dim], encoder.norm, last_norm=False)

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0].unbind(1)
        return {"z": torch.stack([self.projector(self.encoder(view)) for view in views], 1)}  # norms see one view

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        on, off = cross_correlation(*z["z"].unbind(1))  # of (N, D) each
        return self.scale * (on + self.off_diagonal * off)

    def groups(self) -> Sequence[ParameterGroup]:
        if self.norms_lr == 1:
            return ()
        vectors = [name for name, p in self.named_parameters() if p.ndim <= 1]
        return [ParameterGroup(name, lr=self.norms_lr) for name in vectors]
