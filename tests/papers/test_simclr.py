"""SimCLR as its authors wrote it (google-research/simclr: objective.py, model_util.py), line by line in fp64."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from methods.heads import ProjectionHead
from methods.losses import nt_xent

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
