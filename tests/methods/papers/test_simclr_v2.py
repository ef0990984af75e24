"""SimCLRv2 in the plainest code, fp64 and one process, through several steps of training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import ProjectionHead
from kilobatch.methods.papers.simclr_v2 import SimCLRV2
from tests.methods.papers.test_simclr import add_contrastive_loss

STEPS, SAMPLES, DIM, KEYS, MOMENTUM, TEMPERATURE, LR = 6, 8, 6, 20, 0.9, 0.2, 0.05


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(SAMPLES, 2, 3, 12, 12, generator=generator, dtype=torch.float64)
    return make_batch(views, torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64))


def make(queue: QueueOptions | None) -> SimCLRV2:
    torch.manual_seed(0)
    encoder = ConvNet(2)
    return SimCLRV2(encoder, temperature=TEMPERATURE, dim=DIM, hidden=10, queue=queue, momentum=MOMENTUM).double()


def train(method: SimCLRV2) -> list[Tensor]:
    """The losses of STEPS steps of plain gradient descent."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], LR)
    losses = []
    for step in range(STEPS):
        t, z = method.target(batch(step)), method.embed(batch(step))
        loss = method.loss(z, t, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update(
            {name: x.detach() for name, x in z.items()}, t, batch(step).replaced(clock=Clock(step, STEPS, STEPS))
        )
        losses.append(loss.detach())
    return losses


def with_keys(z1: Tensor, z2: Tensor, keys: list[Tensor]) -> Tensor:
    """Anchor by anchor: the positive's share of the batch's other views and the keys."""
    u = F.normalize(torch.cat([z1, z2]), dim=1)
    losses = []
    for i, anchor in enumerate(u):
        others = [j for j in range(len(u)) if j != i]
        e = torch.cat([u[others] @ anchor, torch.stack(keys) @ anchor]).div(TEMPERATURE).exp()
        positive = others.index((i + len(z1)) % len(u))
        losses.append(-(e[positive] / e.sum()).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_the_memory_holds_a_moving_averages_keys_as_further_negatives(placement: str) -> None:
    """The queue wraps twice in the middle of a batch."""
    method = make(QueueOptions.model_validate({"length": KEYS, "placement": placement}))
    assert method.queue
    online, keys = copy.deepcopy(method.online()), list(method.queue.keys.clone())
    memory = copy.deepcopy(online)
    optimizer = torch.optim.SGD(online.parameters(), LR)
    for step, loss in enumerate(train(method)):
        with torch.no_grad():
            new = F.normalize(memory(batch(step).views[0][:, 1]), dim=1)
        z1, z2 = online(batch(step).views[0].transpose(0, 1).flatten(0, 1)).chunk(2)
        want = with_keys(z1, z2, keys)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        with torch.no_grad():
            for averaged, p in zip(memory.parameters(), online.parameters(), strict=True):
                averaged.mul_(MOMENTUM).add_((1 - MOMENTUM) * p)
        keys = (keys + list(new))[-KEYS:]
        assert_close(loss, want, rtol=1e-9, atol=0)
    assert_close(sorted(method.queue.keys.tolist()), sorted(torch.stack(keys).tolist()), rtol=1e-9, atol=1e-9)


def test_without_a_memory_it_is_simclr_on_three_layers() -> None:
    method = make(None)
    online = copy.deepcopy(method.online())
    optimizer = torch.optim.SGD(online.parameters(), LR)
    for step, loss in enumerate(train(method)):
        want = add_contrastive_loss(online(batch(step).views[0].transpose(0, 1).flatten(0, 1)), TEMPERATURE) / 2
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        assert_close(loss, want, rtol=1e-9, atol=0)
    assert {name.split(".")[0] for name in method.state_dict()} == {"encoder", "head"}
    assert isinstance(method.head, ProjectionHead) and method.head.hidden_count == 2
