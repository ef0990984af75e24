"""MoCo and MoCo v3 as their authors wrote them (facebookresearch/moco and moco-v3, moco/builder.py and main_moco.py),
line by line in fp64 and one process, through several steps of training.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Clock, make_batch
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import MLP
from kilobatch.methods.papers.moco import MoCo
from kilobatch.methods.papers.moco_v3 import MoCoV3

STEPS, SAMPLES, DIM, KEYS, MOMENTUM, TEMPERATURE, LR = 5, 8, 6, 24, 0.9, 0.2, 0.1


class TheirMoCo(nn.Module):
    """builder.py of v1 and v2 on one GPU, where nothing is shuffled."""

    queue: Tensor

    def __init__(self, encoder_q: nn.Module, queue: Tensor) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, copy.deepcopy(encoder_q)
        self.register_buffer("queue", queue)  # (dim, K)
        self.queue_ptr = 0

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                param_k.data = param_k.data * MOMENTUM + param_q.data * (1.0 - MOMENTUM)
            k = F.normalize(self.encoder_k(im_k), dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone()])
        logits = torch.cat([l_pos, l_neg], dim=1) / TEMPERATURE
        self.queue[:, self.queue_ptr : self.queue_ptr + len(k)] = k.T
        self.queue_ptr = (self.queue_ptr + len(k)) % self.queue.shape[1]
        return logits, torch.zeros(len(logits), dtype=torch.long)


class TheirMoCoV3(nn.Module):
    """builder.py of v3 on one GPU."""

    def __init__(self, base_encoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.base_encoder, self.momentum_encoder = base_encoder, copy.deepcopy(base_encoder)
        self.predictor = predictor

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = torch.einsum("nc,mc->nm", [q, k]) / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(logits))) * (2 * TEMPERATURE)

    def forward(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        q1, q2 = self.predictor(self.base_encoder(x1)), self.predictor(self.base_encoder(x2))
        with torch.no_grad():
            for param_b, param_m in zip(
                self.base_encoder.parameters(), self.momentum_encoder.parameters(), strict=True
            ):
                param_m.data = param_m.data * m + param_b.data * (1.0 - m)
            k1, k2 = self.momentum_encoder(x1), self.momentum_encoder(x2)
        return self.contrastive_loss(q1, k2) + self.contrastive_loss(q2, k1)


def views(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 2, 3, 12, 12, generator=generator, dtype=torch.float64)


def ours(method: Method) -> list[Tensor]:
    """Losses of STEPS steps of plain gradient descent."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], LR)
    losses = []
    for step in range(STEPS):
        batch = make_batch(views(step), torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64))
        t, z = method.target(batch), method.embed(batch)
        loss = method.loss(z, t, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update({name: x.detach() for name, x in z.items()}, t, batch.replaced(clock=Clock(step, STEPS, STEPS)))
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_moco_trains_as_its_authors(head: str, placement: str) -> None:
    """Their momentum encoder follows before it is used, ours after the step: the same, but before the first step."""
    torch.manual_seed(0)
    queue = QueueOptions.model_validate({"length": KEYS, "placement": placement})
    method = MoCo(
        ConvNet(2),
        queue=queue,
        temperature=TEMPERATURE,
        momentum=MOMENTUM,
        dim=DIM,
        head=head,  # pyright: ignore[reportArgumentType]
    ).double()
    network = nn.Sequential(copy.deepcopy(method.encoder), copy.deepcopy(method.head))
    theirs = TheirMoCo(network, method.queue.keys.T.clone())
    optimizer = torch.optim.SGD(theirs.encoder_q.parameters(), LR)
    for step, loss in enumerate(ours(method)):
        logits, labels = theirs(*views(step).unbind(1))
        want = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        assert_close(loss, want, rtol=1e-12, atol=0)
    assert_close(method.queue.keys, theirs.queue.T, rtol=1e-12, atol=1e-12)
    assert STEPS * SAMPLES > KEYS


def test_moco_v3_trains_as_its_authors() -> None:
    torch.manual_seed(0)
    method = MoCoV3(ConvNet(2), temperature=TEMPERATURE, momentum=MOMENTUM, dim=DIM, hidden=10).double()
    theirs = TheirMoCoV3(copy.deepcopy(method.online()), copy.deepcopy(method.predictor))
    parameters = [*theirs.base_encoder.parameters(), *theirs.predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, LR)
    for step, loss in enumerate(ours(method)):
        m = 1.0 - 0.5 * (1.0 + math.cos(math.pi * step / STEPS)) * (1.0 - MOMENTUM)  # adjust_moco_momentum
        want = theirs(*views(step).unbind(1), m)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        assert_close(loss, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("last_norm", [True, False])
def test_mlps_are_the_authors(last_norm: bool) -> None:
    """_build_mlp of 3 layers."""
    torch.manual_seed(0)
    mlp = MLP([12, 20, 20, 8], "local", last_norm=last_norm).double()
    theirs = nn.Sequential(
        *(nn.Linear(12, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(inplace=True)),
        *(nn.Linear(20, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(inplace=True)),
        nn.Linear(20, 8, bias=False),
        *([nn.BatchNorm1d(8, affine=False)] if last_norm else []),
    ).double()
    theirs.load_state_dict(mlp.state_dict(), strict=True)
    x = torch.randn(16, 12, dtype=torch.float64)
    assert_close(mlp(x), theirs(x))
    assert [name for name, _ in mlp.named_parameters()] == [name for name, _ in theirs.named_parameters()]
