"""DeepCluster-v2 trains as its authors' code does, written line by line in fp64 and one process; on any ranks, and
resumed within an epoch or between two, it does the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import KMEANS, child
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.deepcluster_v2 import NONE, DeepClusterV2
from tests.helpers.process_groups import run_ranks

IMAGES, SAMPLES, STEPS, EPOCHS, COUNTS, ROUNDS, TAU, LR = 40, 12, 3, 3, (6, 5, 4), 4, 0.1, 0.5
CLEAN = torch.randn(IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def batch(step: int) -> Batch:
    """The global batch. An epoch shows 36 of 40 images, others each time."""
    epoch, within = divmod(step, STEPS)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
    index = order[within * SAMPLES : (within + 1) * SAMPLES]
    generator = torch.Generator().manual_seed(100 + step)
    large = CLEAN[index, None] + torch.randn(SAMPLES, 2, 3, 12, 12, generator=generator, dtype=torch.float64)
    small = large[:, :1, :, 2:10, 2:10].repeat(1, 3, 1, 1, 1) * torch.rand(SAMPLES, 3, 1, 1, 1, generator=generator)
    return make_batch([large, small], index, clock=Clock(step, EPOCHS * STEPS, STEPS))


def method() -> DeepClusterV2:
    torch.manual_seed(0)
    own = DeepClusterV2(ConvNet(2, "global"), temperature=TAU, prototypes=COUNTS, rounds=ROUNDS, dim=6, hidden=10)
    own.prepare(DataFacts(IMAGES, 1))
    return own.double()


class CleanFeatures:
    """EpochFeatures of this rank's block of CLEAN."""

    def __init__(self, of: nn.Module) -> None:
        self.of = of

    def __call__(self, embed: Callable[[Tensor], Tensor], size: int | None = None) -> tuple[Tensor, Tensor]:
        own = torch.arange(IMAGES).tensor_split(collectives.world_size())[collectives.rank()]
        self.of.eval()
        with torch.no_grad():
            rows = embed(CLEAN[own]).float()
        self.of.train()
        return own, rows

    def go_on(self, work: str, done: int, total: int) -> None:
        assert done <= total


def trained(own: DeepClusterV2, first: int = 0, last: int = EPOCHS * STEPS) -> list[float]:
    """The losses of plain training steps over ranks, from step `first` to before step `last`."""
    optimizer, losses = torch.optim.SGD(own.parameters(), LR), list[float]()
    for step in range(first, last):
        if step % STEPS == 0:
            own.before_epoch(step // STEPS, CleanFeatures(own))
        part = batch(step).chunks(collectives.world_size())[collectives.rank()]
        z = own.embed(part)
        loss = own.loss(z, {}, part)
        optimizer.zero_grad()
        loss.backward()
        for p in own.parameters():
            p.grad = collectives.mean(p.grad) if p.grad is not None else None
        optimizer.step()
        own.update({name: x.detach() for name, x in z.items()}, {}, part)
        losses.append(collectives.mean(loss.detach()).item())
    return losses


def lloyd(rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The authors' cluster_memory of one process: spherical, and an empty cluster keeps its centroid."""
    centroids = start.clone()
    for _ in range(ROUNDS):
        assigned = (rows @ centroids.T).max(1).indices
        for k in range(len(centroids)):
            if (assigned == k).any():
                centroids[k] = F.normalize(rows[assigned == k].mean(0), dim=0)
    return centroids, (rows @ centroids.T).max(1).indices


class Reference:
    """The authors' loop: banks in the order in which images were seen, -100 for all others."""

    def __init__(self, own: DeepClusterV2) -> None:
        self.own = own
        self.index, (_, rows) = torch.arange(IMAGES), CleanFeatures(own)(self.projected)
        self.bank = torch.stack([rows, rows]).double()

    def projected(self, images: Tensor) -> Tensor:
        return F.normalize(self.own.head(self.own.encoder(images)), dim=1)

    def cluster(self, epoch: int) -> tuple[list[Tensor], Tensor]:
        centroids, assignments = list[Tensor](), torch.full((len(COUNTS), IMAGES), -100)
        order = self.index.argsort()  # our draw counts images in their order
        for head, k in enumerate(COUNTS):
            drawn = child(torch.arange(len(order)), KMEANS, epoch * len(COUNTS) + head, 0).argsort()[:k]
            rows = self.bank[head % 2]
            found, assigned = lloyd(rows, rows[order[drawn]])
            centroids.append(found)
            assignments[head, self.index] = assigned
        return centroids, assignments

    def train(self) -> tuple[list[float], list[Tensor]]:
        optimizer, losses, found = torch.optim.SGD(self.own.parameters(), LR), list[float](), list[Tensor]()
        for epoch in range(EPOCHS):
            centroids, assignments = self.cluster(epoch)
            found.append(assignments)
            index, bank = list[Tensor](), list[Tensor]()
            for step in range(epoch * STEPS, (epoch + 1) * STEPS):
                of = batch(step)
                large = self.own.encoder(of.views[0].transpose(0, 1).flatten(0, 1))  # crop by crop, as they have it
                small = self.own.encoder(of.views[1].transpose(0, 1).flatten(0, 1))
                z = F.normalize(self.own.head(torch.cat([large, small])), dim=1)
                loss = torch.zeros((), dtype=torch.float64)
                for centroid, assigned in zip(centroids, assignments, strict=True):
                    targets = assigned[of.index].repeat(5)
                    loss = loss + F.cross_entropy(z @ centroid.T / TAU, targets, ignore_index=-100) / len(COUNTS)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                index.append(of.index)
                bank.append(z[: 2 * SAMPLES].detach().unflatten(0, (2, SAMPLES)))
                losses.append(loss.item())
            self.index, self.bank = torch.cat(index), torch.cat(bank, 1)
        return losses, found


def test_it_trains_as_the_authors() -> None:
    ours, theirs = method(), Reference(method())
    found = []
    losses = list[float]()
    for epoch in range(EPOCHS):
        losses += trained(ours, epoch * STEPS, (epoch + 1) * STEPS)
        found.append(ours.clusters.clone())
    want, clusters = theirs.train()
    assert (clusters[0] >= 0).all() and all((of == -100).sum() == 3 * (IMAGES - STEPS * SAMPLES) for of in clusters[1:])
    for one, other in zip(found, clusters, strict=True):
        assert torch.equal(one.long(), other)
    assert losses == pytest.approx(want, rel=1e-6)  # centroids are rounded to 2^-23
    for name, p in theirs.own.named_parameters():
        assert_close(ours.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def on_ranks(first: int, state: dict[str, Tensor] | None) -> dict[str, Any]:
    own = method()
    if state:
        own.load_state_dict(state)
    losses = trained(own, first)
    return {"losses": losses, **{name: x for name, x in own.state_dict().items() if not name.startswith("banks")}}


def test_ranks_change_nothing() -> None:
    whole = on_ranks(0, None)
    found = run_ranks(3, on_ranks, 0, None)[0]
    assert torch.equal(found["clusters"], whole["clusters"]) and torch.equal(found["seen"], whole["seen"])
    for name, x in whole.items():
        assert_close(found[name], x, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_a_resumed_run_goes_on_with_its_clusters_and_banks(step: int) -> None:
    whole, begun = on_ranks(0, None), method()
    trained(begun, 0, step)
    rest = on_ranks(step, copy.deepcopy(begun.state_dict()))
    assert rest.pop("losses") == whole.pop("losses")[step:]
    assert all(torch.equal(x, whole[name]) for name, x in rest.items())


def test_a_batch_of_images_in_no_cluster_has_no_loss() -> None:
    own, of = method(), batch(0)
    own.clusters.fill_(NONE)
    z = {name: x.detach().requires_grad_() for name, x in own.embed(of).items()}
    loss = own.loss(z, {}, of)
    (gradient,) = torch.autograd.grad(loss, z["z"])
    assert loss == 0 and not gradient.any()


def test_the_share_of_clusters_in_use() -> None:
    own = method()
    own.clusters.zero_()
    own.clusters[:, :10] = NONE
    assert own.scalars() == {"clusters_used": pytest.approx(3 / sum(COUNTS)), "left_out": pytest.approx(0.25)}


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="6 clusters for 5 images"):
        method().prepare(DataFacts(5, 1))
