"""VICReg: Bardes, Ponce, LeCun, 2022, arxiv.org/abs/2105.04906; authors' code: github.com/facebookresearch/vicreg.

Eq. 6: L = lambda s(X, Y) + mu (v(X) + v(Y)) / 2 + nu (c(X) + c(Y)), with
s = mean over samples and dimensions of (X - Y)^2, v(Z) = 1/D sum_j max(0, 1 - sqrt(Var(Z_j) + 1e-4)),
c(Z) = 1/D sum_{i != j} Cov(Z)_ij^2. The half, and the mean over dimensions in s, are the authors' code's, not the
paper's.
"""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.decorrelation import variance_and_covariance
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import MLP


class VICReg(Method):
    """Draws the two views of an image together (invariance), keeps the standard deviation of each dimension at 1
    (variance) and dimensions uncorrelated (covariance): section 4.1.

    invariance: lambda, the weight of the views' squared difference; variance: mu, the weight of what standard
    deviations lack, in the mean over the two views; covariance: nu, the weight of the covariances, in their sum over
    the two views. dim: numbers of a projection; hidden: the width of the projector's hidden layers; layers: of the
    projector.

    Variance and covariance are those of the samples of all ranks. The authors' hidden layers have biases, which the
    norms after them take away again; here they have none.
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        invariance: Annotated[float, Field(ge=0)] = 25.0,
        variance: Annotated[float, Field(ge=0)] = 25.0,
        covariance: Annotated[float, Field(ge=0)] = 1.0,
        dim: Annotated[int, Field(gt=0)] = 8192,
        hidden: Annotated[int, Field(gt=0)] = 8192,
        layers: Annotated[int, Field(ge=1)] = 3,
    ) -> None:
        super().__init__()
        self.encoder, self.invariance, self.variance, self.covariance = encoder, invariance, variance, covariance
        self.projector = MLP([encoder.features, *[hidden] * (layers - 1), dim], encoder.norm, last_norm=False)

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0].unbind(1)
        return {"z": torch.stack([self.projector(self.encoder(view)) for view in views], 1)}  # norms see one view

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        x, y = z["z"].unbind(1)  # (N, D) each
        v, c = variance_and_covariance(x, y)  # sums over the two views
        return self.invariance * F.mse_loss(x.to(v.dtype), y.to(v.dtype)) + self.variance * v / 2 + self.covariance * c
