"""Losses on the correlation of an embedding's dimensions: Barlow Twins' terms and VICReg's, over all ranks' samples.

Both need a D x D matrix of the global batch. A rank makes its samples' part of it, and one all-reduce adds the parts.
With the sum each rank has the whole gradient of its own samples in closed form, so the backward sends nothing.
Each is the gradient of the one loss of the global batch, times the number of ranks, since the engine averages
gradients over ranks; otherwise it would be as many times too small.

Before the matrix comes a small sum of moments, 4 D or 2 D numbers of both views together. With it rows are centred
before they are multiplied. Products of rows that are not centred would lose (mean / std)^2 of fp32's precision where
the mean is taken off afterwards, and in fp64 they would be twice the traffic. The moments themselves are fp64, as in
methods/networks/batch_norm.py.

The samples' embeddings could be gathered instead. Where the global batch N is less than D / 2 those are fewer numbers:
2 N D, and no rank would need a D x D matrix. That is not done: one form serves any N and D, and at D = 8192 the matrix
(268 MB) is less than half of the gradients that each step averages anyway (0.7 GB with a ResNet-50).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives

BARLOW_EPSILON = 1e-5  # of torch's BatchNorm, by which the authors standardise
VICREG_EPSILON = 1e-4  # below the root of a variance: facebookresearch/vicreg, main_vicreg.py


def cross_correlation(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Barlow Twins' terms (Zbontar et al. 2021, eq. 1): sum_i (1 - C_ii)^2 and sum_ij C_ij^2 over i != j, with C the
    cross-correlation of x and y over the samples of all ranks (eq. 2).

    x, y: (n, D), two views of this rank's n images, the same n on every rank, of any floating type; halves are computed
    in fp32, whatever autocast says. They are standardised here as the authors do it, by the biased variance plus 1e-5.
    Returns two scalars, the same on every rank. The average over ranks of the parameters' gradients is the gradient of
    the terms of the global batch.

    Memory is O(D^2 + n D). A rank sends D^2 + 4 D numbers, in the forward alone. Raises UserError for views of
    different shapes, fewer than two images, and unequal n (on an accelerator in a process group's first call alone).
    """
    _check_arguments("cross_correlation", x, y)
    return _CrossCorrelation.apply(_full(x), _full(y))


def variance_and_covariance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """VICReg's variance and covariance terms (Bardes et al. 2022, eq. 1 and 4), each summed over the two views:
    v = 1/D sum_j max(0, 1 - sqrt(Cov_jj + 1e-4)) and c = 1/D sum_ij Cov_ij^2 over i != j, with Cov the covariance over
    the samples of all ranks, N - 1 in its denominator.

    x, y and the rest as for cross_correlation, but nothing is standardised, and a rank sends 2 D^2 + 2 D numbers.
    """
    _check_arguments("variance_and_covariance", x, y)
    return _VarianceCovariance.apply(torch.stack([_full(x), _full(y)]))


class _CrossCorrelation(Function):
    """With u = 2 off C, but 2 on (C_ii - 1) on the diagonal, the gradient of the terms by C, where on and off are the
    gradients by the terms; x^ and y^ the standardised rows and r the reciprocal standard deviations:

    dx_n = r_x / N (u y^_n - x^_n rowsum(C u)),  dy_n = r_y / N (u^T x^_n - y^_n colsum(C u))

    The second parts are the gradient through the standard deviations. That through the means is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            count = len(x) * collectives.world_size()
            wide = torch.stack([x, y]).double()  # (2, n, D)
            mean, square = collectives.all_reduce_small(torch.stack([wide.sum(1), wide.square().sum(1)])) / count
            scale = (square - mean.square()).clamp(min=0).add(BARLOW_EPSILON).rsqrt()  # (2, D)
            x_hat, y_hat = ((wide - mean[:, None]) * scale[:, None]).to(x.dtype)
            c = collectives.all_reduce_sum(x_hat.T @ y_hat).div_(count)  # (D, D)
            diagonal = c.diagonal().clone()
            # Sums of squares of rows and columns, without a second D x D matrix; the backward needs them again.
            rows, columns = (torch.linalg.vector_norm(c, dim=d).square_() for d in (1, 0))
            ctx.save_for_backward(x_hat, y_hat, c, scale.to(x.dtype), rows, columns)
            return (diagonal - 1).square().sum(), (rows - diagonal.square()).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, y_hat, c, scale, rows, columns = ctx.saved_tensors
        on, off = grads
        with torch.autocast(x_hat.device.type, enabled=False):
            # u = 2 off C + diag(own), so that u itself is never made.
            own = 2 * on * (c.diagonal() - 1) - 2 * off * c.diagonal()
            through_rows = 2 * off * rows + c.diagonal() * own  # rowsum(C u)
            through_columns = 2 * off * columns + c.diagonal() * own
            dx = (2 * off * y_hat) @ c.T + y_hat * own - x_hat * through_rows
            dy = (2 * off * x_hat) @ c + x_hat * own - y_hat * through_columns
            scale = scale / len(x_hat)  # ranks / N: see the module
            return dx.mul_(scale[0]), dy.mul_(scale[1])


class _VarianceCovariance(Function):
    """With centred rows z~ and s_j = sqrt(Cov_jj + 1e-4), the gradient of each view is

    dz_n = 1 / (N - 1) (4 c / D (Cov z~_n - diag(Cov) z~_n) - v / D [s < 1] / s z~_n),

    where v and c are the gradients by the two terms.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (2, n, D)."""
        with torch.autocast(z.device.type, enabled=False):
            count, dim = z.shape[1] * collectives.world_size(), z.shape[2]
            wide = z.double()
            mean = collectives.all_reduce_small(wide.sum(1)) / count
            centred = (wide - mean[:, None]).to(z.dtype)
            covariance = collectives.all_reduce_sum(centred.mT @ centred).div_(count - 1)  # (2, D, D)
            variance = covariance.diagonal(dim1=1, dim2=2)
            std = (variance + VICREG_EPSILON).sqrt()
            ctx.save_for_backward(centred, covariance, std)
            squares = torch.linalg.vector_norm(covariance, dim=2).square_()
            return F.relu(1 - std).sum() / dim, (squares - variance.square()).sum() / dim

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        centred, covariance, std = ctx.saved_tensors
        v, c = grads
        with torch.autocast(centred.device.type, enabled=False):
            n, dim, ranks = centred.shape[1], centred.shape[2], collectives.world_size()
            own = 4 * c * covariance.diagonal(dim1=1, dim2=2) + v * (std < 1) / std  # (2, D)
            dz = (4 * c * centred) @ covariance - centred * own[:, None]
            return dz.mul_(ranks / (dim * (n * ranks - 1)))


def _full(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check_arguments(loss: str, x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or x.shape != y.shape:
        raise UserError(f"{loss} takes two views of one shape (n, D); got {tuple(x.shape)} and {tuple(y.shape)}")
    collectives.refuse_unequal(len(x), "pairs of views", x.device)
    if len(x) * collectives.world_size() < 2:
        raise UserError(f"{loss} needs two images to have a variance; got {len(x)} on {collectives.world_size()} ranks")
