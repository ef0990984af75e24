"""SimCLR as its authors wrote it (google-research/simclr: objective.py, model_util.py), line by line in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods.losses.contrastive import clip_loss, nt_xent
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import ProjectionHead
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions

LARGE_NUM = 1e9


def add_contrastive_loss(hidden: Tensor, temperature: float) -> Tensor:
    """objective.py on one replica. Gives loss_a + loss_b: two means over n anchors, twice the mean over 2n."""
    hidden1, hidden2 = F.normalize(hidden, dim=-1).chunk(2)
    n = len(hidden1)
    labels = F.one_hot(torch.arange(n), 2 * n).double()
    masks = F.one_hot(torch.arange(n), n).double()
    logits_aa = hidden1 @ hidden1.T / temperature - masks * LARGE_NUM
    logits_bb = hidden2 @ hidden2.T / temperature - masks * LARGE_NUM
    logits_ab = hidden1 @ hidden2.T / temperature
    logits_ba = hidden2 @ hidden1.T / temperature
    loss_a = F.cross_entropy(torch.cat([logits_ab, logits_aa], 1), labels)
    loss_b = F.cross_entropy(torch.cat([logits_ba, logits_bb], 1), labels)
    return loss_a + loss_b


def test_loss_and_gradient_are_the_authors() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(60, 24, dtype=torch.float64, requires_grad=True)
    for temperature in (0.02, 0.1, 0.5, 1.0):
        theirs = add_contrastive_loss(hidden, temperature) / 2
        ours = nt_xent(hidden[:30], hidden[30:], temperature)
        assert_close(ours, theirs, rtol=1e-12, atol=0)
        (want,) = torch.autograd.grad(theirs, hidden)
        (got,) = torch.autograd.grad(ours, hidden)
        assert (got - want).norm() <= 1e-12 * want.norm()


def test_head_is_the_authors() -> None:
    """model_util.projection_head: dense without bias, norm, ReLU; dense without bias, norm that only scales."""
    torch.manual_seed(0)
    head = ProjectionHead(32, 32, 8, "local").double()
    first, last = (m for m in head.modules() if isinstance(m, nn.Linear))
    h = torch.randn(16, 32, dtype=torch.float64)

    def batch_norm(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    assert_close(head(h), batch_norm(batch_norm(h @ first.weight.T).relu() @ last.weight.T))
    assert sorted(p.shape for p in head.parameters()) == [(8,), (8, 32), (32,), (32,), (32, 32)]


def learner(temperature: float = 0.2, **options: Any) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(4, "local"), temperature=temperature, dim=8, learn_temperature=True, **options)


@pytest.mark.parametrize("loss", ["nt_xent", "clip"])
def test_a_learnt_temperature_is_trained_without_decay_shown_and_kept(loss: str) -> None:
    method = learner(loss=loss)
    optimizer = build_optimizer(OptimizerOptions(name="lars", lr=1.0, scaling="none", weight_decay=0.1), method, 8)
    plain = next(group for group in optimizer.param_groups if "log_scale" in group["names"])
    assert (plain["weight_decay"], plain["adapt"]) == (0, False)
    z = {"z": F.normalize(torch.randn(16, 2, 8), dim=-1)}
    before = method.scalars()["temperature"]
    assert before == pytest.approx(0.2)
    value = method.loss(z, {}, make_batch(torch.empty(16), torch.arange(16), torch.zeros(16)))
    fixed = {"nt_xent": nt_xent, "clip": clip_loss}[loss]
    temperature = torch.tensor(0.2, requires_grad=True)
    expected = fixed(*z["z"].unbind(1), temperature)
    assert_close(value, expected)
    assert method.log_scale is not None
    value.backward()
    expected.backward()
    assert temperature.grad is not None
    assert_close(method.log_scale.grad, -0.2 * temperature.grad[None])  # tau = e^-t
    for p in method.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    after = method.scalars()["temperature"]
    assert after > before  # views that are not alike ask for less contrast
    other = learner(0.5, loss=loss)
    other.load_state_dict(method.state_dict())
    assert other.scalars()["temperature"] == after


def test_a_learnt_temperature_ends_at_a_hundredth() -> None:
    method = learner()
    assert method.log_scale is not None
    with torch.no_grad():
        method.log_scale.fill_(5.0)
    assert method.scalars()["temperature"] == pytest.approx(0.01)
    assert isinstance(method.temperature, Tensor)
    (gradient,) = torch.autograd.grad(method.temperature, method.log_scale)
    assert gradient.item() == pytest.approx(-0.01)  # so that it can come back
    with pytest.raises(UserError, match=r"0.005.*there or above.*learn_temperature=false"):
        learner(0.005)


def test_a_fixed_temperature_is_no_parameter() -> None:
    method = SimCLR(ConvNet(4, "local"), temperature=0.2, dim=8)
    assert method.scalars() == {} and "log_scale" not in method.state_dict()
