"""SwAV: when its queues take part. They fill from an epoch on, and are used once they are full."""

import pytest
import torch

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.papers.swav import SwAV

SAMPLES = 8


def swav(queue: QueueOptions | None) -> SwAV:
    torch.manual_seed(0)
    return SwAV(ConvNet(2), prototypes=5, dim=6, hidden=10, queue=queue, queue_epoch=1)


def batch_of(step: int) -> Batch:
    """Two steps are an epoch."""
    views = torch.randn(SAMPLES, 2, 3, 12, 12, generator=torch.Generator().manual_seed(step))
    return make_batch(views, clock=Clock(step=step, steps=20, per_epoch=2))


def loss_at(method: SwAV, step: int) -> float:
    batch = batch_of(step)
    z = method.embed(batch)
    loss = method.loss(z, {}, batch).item()
    method.update(z, {}, batch)
    return loss


def test_queues_fill_from_their_epoch_on_and_are_used_once_they_are_full() -> None:
    with_queues, without = swav(QueueOptions(length=3 * SAMPLES)), swav(None)
    held: list[list[int]] = []
    different: list[bool] = []
    for step in range(7):
        held.append([len(queue.filled()) for queue in with_queues.memories()])
        different.append(loss_at(with_queues, step) != loss_at(without, step))
    # Steps 0 and 1 are before the epoch; steps 2 to 4 fill the queues, which step 5 is the first to use.
    assert held == [[rows, rows] for rows in (0, 0, 0, 8, 16, 24, 24)]
    assert different == [False] * 5 + [True] * 2


def test_scalars_tell_whether_predictions_differ_by_image() -> None:
    method, batch = swav(None), batch_of(0)
    assert method.scalars() == {}
    z = method.embed(batch)
    method.update(z, {}, batch)
    p = torch.softmax(unit(z["z"][:, 0]) @ unit(method.prototypes.weight).T / 0.1, 1)
    divergences = (p * (p / p.mean(0)).log()).sum(1)  # of each image's from their mean: the same by another formula
    assert method.scalars()["information"] == pytest.approx(divergences.mean().item(), rel=1e-5)
    method.update({"z": torch.ones(SAMPLES, 2, 6)}, {}, batch)
    assert method.scalars()["information"] == pytest.approx(0, abs=1e-6)
