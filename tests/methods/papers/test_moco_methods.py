import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.moco import MoCo
from kilobatch.methods.papers.moco_v3 import MoCoV3
from kilobatch.trainer.monitor.embedding_metrics import collapse, measure

QUEUE = QueueOptions(length=20)


def batch(samples: int = 8) -> Batch:
    views = torch.randn(samples, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return make_batch(views, torch.arange(samples), torch.zeros(samples, dtype=torch.int64))


def flipped(batch: Batch) -> Batch:
    return make_batch(batch.views[0].flip(1), batch.index, batch.label)


def moco(shuffle: bool = False, symmetric: bool = False) -> MoCo:
    torch.manual_seed(0)
    return MoCo(ConvNet(2, "local"), queue=QUEUE, dim=6, shuffle=shuffle, symmetric=symmetric)


def loss(method: MoCo | MoCoV3, of: Batch) -> Tensor:
    return method.loss(method.embed(of), method.target(of), of)


def test_symmetric_is_the_mean_of_both_directions() -> None:
    whole, one_way = moco(symmetric=True), moco()
    both = (loss(one_way, batch()) + loss(one_way, flipped(batch()))) / 2
    assert_close(loss(whole, batch()), both)
    assert (loss(one_way, batch()) - loss(one_way, flipped(batch()))).abs() > 1e-3


def test_a_step_leaves_its_keys_in_the_queue_and_no_gradient_in_the_momentum_encoder() -> None:
    for symmetric in (False, True):
        method, of = moco(symmetric=symmetric), batch()
        z, t = method.embed(of), method.target(of)
        method.loss(z, t, of).backward()
        assert not t["k"].requires_grad
        assert all(p.grad is None for p in method.momentum_encoder.parameters())
        assert all(p.grad is not None for p in [*method.encoder.parameters(), *method.head.parameters()])
        nn.init.ones_(method.get_parameter("head.0.bias"))
        method.update(z, t, of)
        newest = method.queue.keys[: len(t["k"]) * t["k"].shape[1]]
        keys = t["k"].flatten(0, 1)
        assert_close(newest[newest[:, 0].argsort()], keys[keys[:, 0].argsort()])
        followed = method.momentum_encoder.get_parameter("network.1.0.bias")
        assert followed.max() > 1e-4, "one thousandth of the way to the new bias"


def test_the_monitor_measures_queries_with_their_keys() -> None:
    for method, shape in ((moco(), (8, 2, 6)), (moco(symmetric=True), (8, 4, 6))):
        measured = method.measured(method.embed(batch()), method.target(batch()))
        assert measured.shape == shape
        assert collapse(measure(measured)) is None
        assert collapse(measure(torch.ones_like(measured)))
    v3 = MoCoV3(ConvNet(2), dim=6, hidden=10)
    measured = v3.measured(v3.embed(batch()), v3.target(batch()))
    assert measured is not None and measured.shape == (8, 2, 6)


def test_moco_v3_normalises_each_view_by_itself() -> None:
    """As the authors' separate forwards do: a view's embedding does not depend on the other view."""
    method = MoCoV3(ConvNet(2), dim=6, hidden=10)
    q = method.embed(batch())["q"]
    assert_close(q.flip(1), method.embed(flipped(batch()))["q"])
    changed = batch()
    changed.views[0][:, 1] *= 3
    assert_close(q[:, 0], method.embed(changed)["q"][:, 0])


def test_shuffle_is_refused_where_it_does_nothing() -> None:
    with pytest.raises(UserError, match="encoder.norm is 'global'.*encoder.norm=local or method.shuffle=false"):
        MoCo(ConvNet(2, "global"), queue=QUEUE, shuffle=True)
    with pytest.raises(UserError, match="one worker has nobody to shuffle with.*use more workers"):
        moco(shuffle=True).target(batch())
    assert "method.shuffle" in moco(shuffle=True).whole_batch and not moco().whole_batch
