"""Methods with clusters of all images: what they make before an epoch, keep, and refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.moco import MoCo
from kilobatch.methods.papers.pcl import PCL

IMAGES, PER_EPOCH = 40, 2
PIXELS = torch.randn(IMAGES, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Told(Exception):
    pass


class WholeData:
    """Features of all images in one process. stop: ends the work on them at the so manyth call."""

    def __init__(self, stop: int = 0) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, embed: Callable[[Tensor], Tensor], size: int | None = None) -> tuple[Tensor, Tensor]:
        return torch.arange(IMAGES), embed(PIXELS[:, 0])

    def go_on(self, work: str, done: int, total: int) -> None:
        self.calls += 1
        assert 0 < done <= total and work.startswith("k-means of ")
        if self.calls == self.stop:
            raise Told


def pcl(warmup: int = 1, clusters: tuple[int, ...] = (4, 7)) -> PCL:
    torch.manual_seed(0)
    queue = QueueOptions(length=30)
    return PCL(ConvNet(2, "local"), clusters=clusters, warmup_epochs=warmup, queue=queue, dim=6, negatives=3).eval()


def prepared(warmup: int = 1) -> PCL:
    method = pcl(warmup)
    method.prepare(DataFacts(IMAGES, 2, (20, 20)))
    return method


def batch(step: int) -> Batch:
    return make_batch(PIXELS[:8], clock=Clock(step, 10, PER_EPOCH))


def loss(method: MoCo, of: Batch) -> Tensor:
    return method.loss(method.embed(of), method.target(of), of)


def test_until_the_warm_up_ends_it_is_moco() -> None:
    method, features = prepared(), WholeData()
    method.before_epoch(0, features)
    assert not features.calls
    torch.manual_seed(0)
    moco = MoCo(ConvNet(2, "local"), queue=QueueOptions(length=30), dim=6).eval()
    assert_close(loss(method, batch(1)), loss(moco, batch(1)))
    method.before_epoch(1, features)
    assert features.calls
    assert loss(method, batch(2)) - loss(moco, batch(2)) > 0.5


def test_clusters_are_of_the_momentum_encoders_features() -> None:
    method = prepared()
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.zero_()
    method.before_epoch(1, WholeData())
    rows = torch.nn.functional.normalize(method.momentum_encoder(PIXELS[:, 0]), dim=1)
    for prototypes, count in zip(method.prototypes(), (4, 7), strict=True):
        assert len(prototypes.assignment.unique()) == count
        assert_close(prototypes.centroids.norm(dim=1), torch.ones(count))
        assert abs(prototypes.phi.mean() - 0.2) < 1e-6
        means = torch.stack([rows[prototypes.assignment == k].mean(0) for k in range(count)])
        nearest = (rows[:, None] - means[None]).norm(dim=2).argmin(1)
        assert nearest.tolist() == prototypes.assignment.tolist()


def test_work_that_is_ended_changes_nothing() -> None:
    whole = WholeData()
    prepared().before_epoch(1, whole)
    for stop in (1, whole.calls // 2, whole.calls):
        method = prepared()
        before = {name: x.clone() for name, x in method.state_dict().items()}
        with pytest.raises(Told):
            method.before_epoch(1, WholeData(stop))
        assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())


def test_a_checkpoint_holds_the_epochs_clusters() -> None:
    method, other = prepared(), prepared()
    method.before_epoch(1, WholeData())
    assert loss(method, batch(3)) != loss(other, batch(3))
    other.load_state_dict(method.state_dict())
    assert_close(loss(method, batch(3)), loss(other, batch(3)), rtol=0, atol=0)


def test_more_clusters_than_images_are_refused_before_the_training() -> None:
    method = pcl(clusters=(5, 41))
    with pytest.raises(UserError, match=r"method.clusters has 41, more than the 40 images of data.train; use fewer"):
        method.prepare(DataFacts(IMAGES, 2, (20, 20)))
    method.prepare(DataFacts(0, 2))  # as where it is only loaded
