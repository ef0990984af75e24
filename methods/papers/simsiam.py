"""SimSiam: Chen, He, 2020, arxiv.org/abs/2011.10566; authors' code: github.com/facebookresearch/simsiam.

Eq. 1 and 2, D(p, z) = -cos(p, z), p = h(z): L = 1/2 D(p1, stopgrad(z2)) + 1/2 D(p2, stopgrad(z1)); algorithm 1.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.cosine_regression import centre_and_residual, cosine_to
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import MLP
from kilobatch.methods.parameter_groups import ParameterGroup


class SimSiam(Method):
    """A predictor makes the projection of the image's other view, through which no gradient goes: section 3.

    dim: numbers of a projection, and the width of the projector; layers: of the projector, whose last norm has no
    parameters: 3, on CIFAR-10 2. hidden: the width of the predictor's hidden layer. fixed_predictor_lr: whether the
    predictor keeps its rate while the others' falls by the schedule (table 1, and the authors' command).
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        dim: Annotated[int, Field(gt=0)] = 2048,
        layers: Annotated[int, Field(ge=1)] = 3,
        hidden: Annotated[int, Field(gt=0)] = 512,
        fixed_predictor_lr: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.fixed_predictor_lr = encoder, fixed_predictor_lr
        self.projector = MLP([encoder.features, *[dim] * layers], encoder.norm)
        self.predictor = MLP([dim, hidden, dim], encoder.norm, last_norm=False, last_bias=True)
        self.last: tuple[Tensor, Tensor] | None = None  # of the last step: projections and predictions, for scalars()

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup("predictor", schedule=False)] if self.fixed_predictor_lr else []

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0].unbind(1)
        z = [self.projector(self.encoder(view)) for view in views]  # norms see one view
        return {"z": torch.stack(z, 1), "p": torch.stack([self.predictor(x) for x in z], 1)}  # (N, V, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        p1, p2 = z["p"].unbind(1)
        return -(cosine_to(z2, p1) + cosine_to(z1, p2)) / 2

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.last = z["z"], z["p"]

    def scalars(self) -> dict[str, float]:
        return centre_and_residual(*(x.flatten(0, 1) for x in self.last)) if self.last else {}
