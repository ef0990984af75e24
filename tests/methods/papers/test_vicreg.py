"""VICReg against the authors' code (facebookresearch/vicreg, main_vicreg.py) and lightly's, in one process, fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.vicreg import VICReg


def vicreg(**options: Any) -> VICReg:
    torch.manual_seed(0)
    return VICReg(ConvNet(2), **{"dim": 6, "hidden": 10, **options})


def batch(samples: int = 12) -> Batch:
    return make_batch(torch.randn(samples, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))


def embeddings(samples: int = 40, dim: int = 6) -> Tensor:
    """Standard deviations on both sides of 1."""
    both = torch.randn(samples, 3, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ((both[:, :1] + both[:, 1:] / 2 + 3) * torch.linspace(0.3, 2, dim)).requires_grad_()


def loss(z: Tensor, **options: Any) -> Tensor:
    return vicreg(**options).loss({"z": z}, {}, batch(2))


def theirs(z: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """VICReg.forward on one GPU."""
    x, y = z.unbind(1)
    repr_loss = F.mse_loss(x, y)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    std_x, std_y = torch.sqrt(x.var(dim=0) + 0.0001), torch.sqrt(y.var(dim=0) + 0.0001)
    std_loss = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    cov_loss = torch.zeros((), dtype=torch.float64)
    for view in (x, y):
        cov = (view.T @ view) / (len(view) - 1)
        off = cov.flatten()[:-1].view(len(cov) - 1, len(cov) + 1)[:, 1:].flatten()
        cov_loss = cov_loss + off.pow(2).sum().div(len(cov))
    return invariance * repr_loss + variance * std_loss + covariance * cov_loss


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (3.0, 0.5, 7.0), (25.0, 0.0, 0.0)])
def test_loss_and_gradient_are_the_authors(weights: tuple[float, float, float]) -> None:
    z = embeddings()
    want = theirs(z, *weights)
    got = loss(z, **dict(zip(("invariance", "variance", "covariance"), weights, strict=True)))
    assert_close(got, want, rtol=1e-12, atol=0)
    ours, reference = (torch.autograd.grad(x, z)[0] for x in (got, want))
    assert (ours - reference).norm() <= 1e-12 * reference.norm()


def test_loss_and_gradient_are_lightlys() -> None:
    """On one rank. On several, lightly gathers rows, while here sums of their products cross ranks."""
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed: its loss is not compared")
    z = embeddings()
    want, got = lightly.VICRegLoss()(*z.unbind(1)), loss(z)
    assert_close(got, want, rtol=1e-6, atol=0)
    ours, reference = (torch.autograd.grad(x, z)[0] for x in (got, want))
    assert (ours - reference).norm() <= 1e-6 * reference.norm()


def test_the_loss_of_a_collapsed_embedding() -> None:
    """All constant: standard deviations of the root of 1e-4, and nothing else."""
    assert loss(torch.ones(20, 2, 50, dtype=torch.float64)).item() == pytest.approx(25 * (1 - 0.01))


def test_halves_are_computed_in_fp32() -> None:
    """The invariance, too: the difference of two views in bf16 would have an error of 1e-3."""
    z = embeddings().detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(z)
    assert got.dtype == torch.float32
    assert_close(got.double(), theirs(z.double(), 25, 25, 1), rtol=1e-5, atol=0)


def test_each_view_is_normalised_by_itself() -> None:
    """As in the authors' two forwards: a view's embedding does not depend on the other view."""
    method, images = vicreg(), batch()
    z = method.embed(images)["z"]
    changed = batch()
    changed.views[0][:, 1] *= 3
    assert_close(z[:, 0], method.embed(changed)["z"][:, 0])
    assert z.shape == (12, 2, 6)


def test_the_projector_ends_in_a_linear_layer() -> None:
    method = vicreg()
    linear = [module for module in method.projector if isinstance(module, nn.Linear)]
    assert [tuple(module.weight.shape) for module in linear] == [(10, 16), (10, 10), (6, 10)]
    assert method.projector[-1] is linear[-1] and method.groups() == ()
