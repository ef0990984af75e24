"""Regression of one unit vector by another, BYOL's and SimSiam's, and what tells whether it collapses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.methods.networks.heads import unit


def cosine_to(target: Tensor, p: Tensor) -> Tensor:
    """The mean cosine of p (n, D) with target (n, D), which gets no gradient."""
    return (unit(p) * unit(target.detach())).sum(1).mean()


def centre_and_residual(z: Tensor, p: Tensor) -> dict[str, float]:
    """How the regression keeps from collapse: Zhang et al. 2022, arxiv.org/abs/2203.16262, section 3.

    z: projections, p: predictions, (m, D) each, of the same rows, which are taken to the unit sphere: a row is the
    centre o, their mean, and a residual r. `centre` is |o|, without the 1 / sqrt(m) that it has by chance, and
    `residual` the root of the mean |r|^2: 1 and 0 where all rows are one. `decentring` is the cosine of o_z - o_p, what
    a predictor adds to the gradient, with o_p: below 0 it drives rows from the centre. `correlation` is the mean
    magnitude of the correlations of two dimensions of z.
    """
    z, p = unit(z).double(), unit(p).double()
    rows, o_z, o_p = len(z), z.mean(0), p.mean(0)
    centre = ((rows * o_z.square().sum() - 1) / (rows - 1)).clamp(0, 1)
    extra = F.cosine_similarity(o_z - o_p, o_p, dim=0)
    values = {"centre": centre.sqrt(), "residual": (1 - centre).sqrt(), "decentring": extra}
    if z.shape[1] > 1:
        values["correlation"] = mean_correlation(z - o_z)
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True))


def mean_correlation(x: Tensor) -> Tensor:
    """The mean |correlation| of two different columns of x (m, D), which has mean 0; constant columns have none."""
    x = F.normalize(x, dim=0)
    correlations = (x.T @ x).abs_()
    return (correlations.sum() - correlations.diagonal().sum()) / (x.shape[1] * (x.shape[1] - 1))
