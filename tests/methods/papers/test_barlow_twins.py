"""Barlow Twins against the authors' code (facebookresearch/barlowtwins, main.py) and lightly's: one process, fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, make_batch
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.barlow_twins import BarlowTwins
from kilobatch.trainer.monitor.embedding_metrics import collapse, measure
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import scaled_lr

LAMBDA, GPUS = 0.0051, 32


def twins(**options: Any) -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(ConvNet(2), **{"dim": 6, "hidden": 10, **options})


def batch(samples: int = 12) -> Batch:
    return make_batch(torch.randn(samples, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))


def embeddings(samples: int = 40, dim: int = 6) -> Tensor:
    both = torch.randn(samples, 3, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (both[:, :1] + both[:, 1:] / 2 + 3).requires_grad_()


def loss(z: Tensor, **options: Any) -> Tensor:
    return twins(**options).loss({"z": z}, {}, batch(2))


def theirs(z1: Tensor, z2: Tensor) -> Tensor:
    """BarlowTwins.forward on one GPU."""
    bn = nn.BatchNorm1d(z1.shape[1], affine=False).double()
    c = bn(z1).T @ bn(z2) / len(z1)
    off = c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:].flatten()
    return (c.diagonal() - 1).pow(2).sum() + LAMBDA * off.pow(2).sum()


def test_loss_and_gradient_are_the_authors() -> None:
    z = embeddings()
    want = theirs(*z.unbind(1))
    for scale in (1.0, 0.1):
        got = loss(z, scale=scale)
        assert_close(got, scale * want, rtol=1e-12, atol=0)
        ours, reference = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (got, scale * want))
        assert (ours - reference).norm() <= 1e-12 * reference.norm()


def test_loss_and_gradient_are_lightlys() -> None:
    """On one rank. On several, lightly sums the cross-correlation over ranks, of rows standardised by each rank."""
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed: its loss is not compared")
    z = embeddings()
    want, got = lightly.BarlowTwinsLoss(lambda_param=LAMBDA)(*z.unbind(1)), loss(z)
    assert_close(got, want, rtol=1e-6, atol=0)
    ours, reference = (torch.autograd.grad(x, z)[0] for x in (got, want))
    assert (ours - reference).norm() <= 1e-6 * reference.norm()


def test_the_loss_of_collapsed_embeddings() -> None:
    """All constant: each C_ii is 0. All dimensions equal: each C_ij is 1."""
    dim = 50
    constant = torch.ones(20, 2, dim, dtype=torch.float64)
    assert loss(constant).item() == pytest.approx(dim)
    equal = torch.randn(20, 1, 1, dtype=torch.float64).expand(20, 2, dim)
    assert loss(equal).item() == pytest.approx(LAMBDA * dim * (dim - 1), rel=1e-3)


def test_each_view_is_normalised_by_itself() -> None:
    """As in the authors' two forwards: a view's embedding does not depend on the other view."""
    method, images = twins(), batch()
    z = method.embed(images)["z"]
    changed = batch()
    changed.views[0][:, 1] *= 3
    assert_close(z[:, 0], method.embed(changed)["z"][:, 0])
    assert z.shape == (12, 2, 6)


def test_the_projector_has_no_biases_and_ends_in_a_linear_layer() -> None:
    projector = twins().projector
    linear = [module for module in projector if isinstance(module, nn.Linear)]
    assert [tuple(module.weight.shape) for module in linear] == [(10, 16), (10, 10), (6, 10)]
    assert all(module.bias is None for module in linear) and projector[-1] is linear[-1]


def test_norms_and_biases_have_their_share_of_the_rate() -> None:
    method = twins(norms_lr=0.01)
    vectors = {name for name, p in method.named_parameters() if p.ndim == 1}
    assert {group.prefix for group in method.groups()} == vectors and vectors
    assert twins().groups() == ()
    for group in build_optimizer(resolve_recipe("barlow_twins_digits", []).optimizer, method, 256).param_groups:
        assert group["rule"].lr == (0.01 if set(group["names"]) <= vectors else 1)
        assert not set(group["names"]) & vectors or (not group["adapt"] and group["weight_decay"] == 0)


def test_the_recipe_steps_as_the_authors_whose_gradient_is_a_share_of_the_loss() -> None:
    """Their LARS, main.py, by gradients of 1 / 32, against the recipe's by whole ones, over several steps. They agree
    for weights and for norms."""
    recipe = resolve_recipe("barlow_twins_imagenet", [])
    method = twins(norms_lr=getattr(recipe.method, "norms_lr")).double()  # noqa: B009
    start = {name: p.detach().clone() for name, p in method.named_parameters()}
    base = scaled_lr(recipe.optimizer, recipe.data.batch)
    optimizer = build_optimizer(recipe.optimizer, method, recipe.data.batch)
    expected = {name: p.clone() for name, p in start.items()}
    momentum = {name: torch.zeros_like(p) for name, p in start.items()}
    for step in range(3):
        share = (step + 1) / 3  # of a warm-up, which tells where the rate stands
        for group in optimizer.param_groups:
            group["lr"] = share * base * group["rule"].lr  # as GroupRates sets it
        generator = torch.Generator().manual_seed(step)
        for name, p in method.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 1e-3
            w, update = expected[name], p.grad / GPUS
            if p.ndim > 1:
                update = update + 1e-6 * w
                update = update * (0.001 * w.norm() / update.norm())
            momentum[name] = 0.9 * momentum[name] + update
            rate = 0.2 if p.ndim > 1 else 0.0048
            expected[name] = w - share * rate * recipe.data.batch / 256 * momentum[name]
        optimizer.step()
    for name, p in method.named_parameters():
        moved = expected[name] - start[name]
        assert (p - expected[name]).norm() <= 1e-10 * moved.norm(), name


def test_the_monitor_measures_the_two_views() -> None:
    method = twins()
    measured = method.measured(method.embed(batch()), {})
    assert measured is not None and measured.shape == (12, 2, 6)
    assert collapse(measure(measured)) is None
    assert collapse(measure(torch.ones_like(measured)))
