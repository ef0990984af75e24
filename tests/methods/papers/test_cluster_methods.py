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
from kilobatch.methods.papers.hcsc import HCSC
from kilobatch.methods.papers.moco import MoCo
from kilobatch.methods.papers.pcl import PCL

IMAGES, PER_EPOCH = 40, 2
Kind = type[PCL] | type[HCSC]
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


def made(kind: Kind, clusters: tuple[int, ...] = (7, 4)) -> PCL | HCSC:
    torch.manual_seed(0)
    return kind(ConvNet(2, "local"), clusters=clusters, warmup_epochs=1, queue=QueueOptions(length=30), dim=6).eval()


def prepared(kind: Kind) -> PCL | HCSC:
    method = made(kind)
    method.prepare(DataFacts(IMAGES, 2, (20, 20)))
    return method


@pytest.fixture(params=[PCL, HCSC])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def batch(step: int) -> Batch:
    return make_batch(PIXELS[:8], clock=Clock(step, 10, PER_EPOCH))


def loss(method: MoCo, of: Batch) -> Tensor:
    return method.loss(method.embed(of), method.target(of), of)


def test_until_the_warm_up_ends_it_is_moco(kind: Kind) -> None:
    method, features = prepared(kind), WholeData()
    method.before_epoch(0, features)
    assert not features.calls
    torch.manual_seed(0)
    moco = MoCo(ConvNet(2, "local"), queue=QueueOptions(length=30), dim=6).eval()
    assert_close(loss(method, batch(1)), loss(moco, batch(1)))
    method.before_epoch(1, features)
    assert features.calls
    assert loss(method, batch(2)) - loss(moco, batch(2)) > 0.5


def test_clusters_are_of_the_momentum_encoders_features() -> None:
    method = prepared(PCL)
    assert isinstance(method, PCL)
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.zero_()
    method.before_epoch(1, WholeData())
    rows = torch.nn.functional.normalize(method.momentum_encoder(PIXELS[:, 0]), dim=1)
    for prototypes, count in zip(method.prototypes(), (7, 4), strict=True):
        assert len(prototypes.assignment.unique()) == count
        assert_close(prototypes.centroids.norm(dim=1), torch.ones(count))
        assert abs(prototypes.phi.mean() - 0.2) < 1e-6
        means = torch.stack([rows[prototypes.assignment == k].mean(0) for k in range(count)])
        nearest = (rows[:, None] - means[None]).norm(dim=2).argmin(1)
        assert nearest.tolist() == prototypes.assignment.tolist()


def test_a_hierarchy_clusters_the_prototypes_of_the_level_below() -> None:
    method = prepared(HCSC)
    assert isinstance(method, HCSC)
    method.before_epoch(1, WholeData())
    below, above = method.hierarchy.prototypes()
    parents = method.hierarchy.parents(0)
    assert len(parents) == 7 and len(parents.unique()) == 4
    assert above.assignment.tolist() == parents[below.of(torch.arange(IMAGES))].tolist()
    means = torch.stack([below.centroids[parents == k].mean(0) for k in range(4)])
    assert_close(above.centroids, torch.nn.functional.normalize(means, dim=1), rtol=0, atol=1e-5)


def test_work_that_is_ended_changes_nothing(kind: Kind) -> None:
    whole = WholeData()
    prepared(kind).before_epoch(1, whole)
    for stop in (1, whole.calls // 2, whole.calls):
        method = prepared(kind)
        before = {name: x.clone() for name, x in method.state_dict().items()}
        with pytest.raises(Told):
            method.before_epoch(1, WholeData(stop))
        assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())


def test_a_checkpoint_holds_the_epochs_clusters(kind: Kind) -> None:
    method, other = prepared(kind), prepared(kind)
    method.before_epoch(1, WholeData())
    assert loss(method, batch(3)) != loss(other, batch(3))
    other.load_state_dict(method.state_dict())
    assert_close(loss(method, batch(3)), loss(other, batch(3)), rtol=0, atol=0)


def test_more_clusters_than_images_are_refused_before_the_training(kind: Kind) -> None:
    method = made(kind, clusters=(41, 5))
    with pytest.raises(UserError, match=r"method.clusters has 41, more than the 40 images of data.train; use fewer"):
        method.prepare(DataFacts(IMAGES, 2, (20, 20)))
    method.prepare(DataFacts(0, 2))  # as where it is only loaded


def test_a_hierarchy_that_grows_is_refused() -> None:
    with pytest.raises(UserError, match=r"method.clusters is \[4, 7\].*give numbers that fall"):
        made(HCSC, clusters=(4, 7))
