"""BYOL, SimSiam and NNCLR: against lightly's losses, what their gradients reach, and the measures of a collapse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods.losses.cosine_regression import centre_and_residual, cosine_to
from kilobatch.methods.memories.momentum_encoder import rising
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.byol import BYOL
from kilobatch.methods.papers.nnclr import NNCLR
from kilobatch.methods.papers.simsiam import SimSiam

KEYS = 20


def batch(samples: int = 8, seed: int = 1) -> Batch:
    views = torch.randn(samples, 2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return make_batch(views, torch.arange(samples), torch.zeros(samples, dtype=torch.int64))


def byol() -> BYOL:
    torch.manual_seed(0)
    return BYOL(ConvNet(2), dim=6, hidden=10)


def siamese() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(ConvNet(2), dim=16, layers=2, hidden=8)


def neighbours() -> NNCLR:
    torch.manual_seed(0)
    return NNCLR(ConvNet(2), queue=QueueOptions(length=KEYS), dim=6, width=10, hidden=10)


METHODS: list[Callable[[], Method]] = [byol, siamese, neighbours]


@pytest.mark.parametrize("build", METHODS)
def test_views_are_normalised_by_themselves(build: Callable[[], Method]) -> None:
    method, of, changed = build(), batch(), batch()
    changed.views[0][:, 1] *= 3
    assert_close(method.embed(of)["p"][:, 0], method.embed(changed)["p"][:, 0])


@pytest.mark.parametrize("build", METHODS)
def test_gradients_reach_all_that_is_trained(build: Callable[[], Method]) -> None:
    method, of = build(), batch()
    z, t = method.embed(of), method.target(of)
    method.loss(z, t, of).backward()
    trained = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any(x.requires_grad for x in t.values())


def rows(seed: int) -> Tensor:
    return torch.randn(7, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_values_and_gradients_are_lightlys(name: str) -> None:
    theirs = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    p, z, of = rows(1), rows(2).detach(), batch()
    ours = byol().loss({"p": p}, {"z": z}, of) if name == "byol" else siamese().loss({"p": p, "z": z}, {}, of)
    one, other = theirs(p[:, 0], z[:, 1]), theirs(p[:, 1], z[:, 0])
    want = 4 + 2 * one + 2 * other if name == "byol" else (one + other) / 2
    assert_close(ours, want, rtol=1e-6, atol=1e-6)
    assert_close(torch.autograd.grad(ours, p), torch.autograd.grad(want, p), rtol=1e-6, atol=1e-6)


def test_nearest_neighbours_are_found_as_lightly_finds_them() -> None:
    """lightly's loss has the other predictions of the own view as negatives, too; so the neighbours are compared."""
    memory = pytest.importorskip("lightly.models.modules").NNMemoryBankModule(size=(KEYS, 6))
    method = neighbours()
    z = nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(3)), dim=1)
    memory(z, update=False)  # makes its bank
    memory.bank = method.queue.keys.clone()
    assert_close(method.queue.hardest(z, 1)[:, 0], memory(z, update=False))


def test_the_target_follows_after_the_step_and_the_queue_takes_the_first_view() -> None:
    method, of = byol(), batch()
    nn.init.ones_(method.get_parameter("projector.3.weight"))
    before = method.target_network.get_parameter("network.1.3.weight").clone()
    method.update(method.embed(of), method.target(of), of)
    moved = method.target_network.get_parameter("network.1.3.weight")
    assert_close(moved, before + (1 - before) * (1 - rising(0.996, of.clock.after)), rtol=1e-4, atol=1e-6)

    method = neighbours()
    z = method.embed(of)
    method.update(z, {}, of)
    assert_close(method.queue.keys[:8], nn.functional.normalize(z["z"][:, 0], dim=1))


def test_simsiam_keeps_its_predictors_rate() -> None:
    (group,) = siamese().groups()
    assert group.holds("predictor.0.weight") and not group.schedule
    assert not SimSiam(ConvNet(2), dim=16, hidden=8, fixed_predictor_lr=False).groups()


def test_centre_and_residual_tell_collapse() -> None:
    even = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    found = centre_and_residual(even, even + 0.1)
    assert found["centre"] < 0.02 and found["residual"] == pytest.approx(1, abs=0.01)  # by chance |o| is 0.016
    assert found["decentring"] == pytest.approx(-1, abs=0.1)  # predictions have a centre that projections have not
    one_point = centre_and_residual(torch.ones(50, 4) + 1e-4 * even[:50, :4], torch.ones(50, 4))
    assert one_point["centre"] == pytest.approx(1, abs=1e-4) and one_point["residual"] < 0.01
    together = torch.stack([even[:, 0], 2 * even[:, 0] + 0.01 * even[:, 1]], 1)
    assert centre_and_residual(together, together)["correlation"] > 0.9
    method, of = byol(), batch()
    assert method.scalars() == {}
    method.update(method.embed(of), method.target(of), of)
    assert set(method.scalars()) == {"centre", "residual", "decentring", "correlation"}


def test_the_target_gets_no_gradient() -> None:
    p, z = rows(1)[:, 0], rows(2)[:, 0]
    assert torch.autograd.grad(cosine_to(z, p), z, allow_unused=True)[0] is None
