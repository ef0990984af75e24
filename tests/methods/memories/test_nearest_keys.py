"""The nearest keys of the whole queue, and extra keys in addition to it, on any number of ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import HALF_WAY
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.mochi import MoCHi
from tests.helpers.plain_queue import pairs, start, unit
from tests.helpers.process_groups import run_ranks

BATCH, DIM, LENGTH = 12, 6, 50  # which 3 and 4 do not divide
COUNTS = (1, 7, 20, 50)  # more than a rank of three or four holds, and all
FURTHER = 5


def own_part(x: Tensor) -> Tensor:
    return x.chunk(collectives.world_size())[collectives.rank()]


def queue(**options: Any) -> Queue:
    torch.manual_seed(0)
    return Queue(QueueOptions.model_validate({"length": LENGTH, "placement": "sharded", **options}), DIM).double()


def queries() -> tuple[Tensor, Tensor]:
    return pairs(BATCH, DIM, seed=7)


def computed() -> dict[Any, Tensor]:
    q, k = (own_part(x) for x in queries())
    results: dict[Any, Tensor] = {("hardest", count): queue().hardest(q, count) for count in COUNTS}
    for temperature in (0.2, 0.02):
        query = q.clone().requires_grad_()
        loss = info_nce(query, k, queue(), temperature, own_part(unit(BATCH, FURTHER, DIM, seed=9)))
        results["loss", temperature], results["gradient", temperature] = (
            loss.detach(),
            *torch.autograd.grad(loss, query),
        )
    filling = queue(start="empty")
    results["empty"] = filling.hardest(q, 20)
    filling.push(k)
    results["filling"] = filling.hardest(q, 20)
    return results


@pytest.fixture(scope="module", params=[1, 3])  # 2 and 4: in the parity table
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, Tensor]]:
    return [computed()] if request.param == 1 else run_ranks(request.param, computed, timeout=300)


def joined(ranks: list[dict[Any, Tensor]], name: Any) -> Tensor:
    return torch.cat([rank[name] for rank in ranks])


def nearest(q: Tensor, keys: Tensor, count: int) -> Tensor:
    return keys[(q @ keys.T).argsort(1, descending=True)[:, :count]]


@pytest.mark.parametrize("count", COUNTS)
def test_the_hardest_are_those_of_the_whole_queue(count: int, ranks: list[dict[Any, Tensor]]) -> None:
    keys = torch.stack(start(LENGTH, DIM))
    assert torch.equal(joined(ranks, ("hardest", count)), nearest(queries()[0], keys, count))


def test_fewer_while_the_queue_fills(ranks: list[dict[Any, Tensor]]) -> None:
    q, k = queries()
    assert joined(ranks, "empty").shape == (BATCH, 0, DIM)
    assert torch.equal(joined(ranks, "filling"), nearest(q, k, 20))


@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_extra_keys_count_in_addition_to_the_queue(temperature: float, ranks: list[dict[Any, Tensor]]) -> None:
    q, k = queries()
    keys, further = torch.stack(start(LENGTH, DIM)), unit(BATCH, FURTHER, DIM, seed=9)
    q.requires_grad_()
    negatives = torch.cat([q @ keys.T, torch.einsum("nd,nsd->ns", q, further)], 1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64))
    want = torch.autograd.grad(expected, q)[0]
    loss = torch.stack([rank["loss", temperature] for rank in ranks]).mean()
    got = joined(ranks, ("gradient", temperature)) / len(ranks)
    assert abs(loss - expected) <= 1e-12 * expected
    assert (got - want).norm() <= 1e-12 * want.norm()


def test_a_further_key_nearer_than_all_does_not_overflow() -> None:
    q = unit(1, DIM, seed=1, dtype=torch.float32).requires_grad_()
    loss = info_nce(q, -q.detach(), queue().float(), 0.01, q.detach()[:, None])
    assert_close(loss, torch.tensor(200.0), rtol=1e-5, atol=0)


def mochi(**options: Any) -> MoCHi:
    torch.manual_seed(0)
    return MoCHi(ConvNet(2), queue=QueueOptions(length=LENGTH), dim=DIM, **{"hard": 10, **options})


def test_mixed_negatives_are_unit_lie_between_and_are_nearer_than_keys() -> None:
    method = mochi(mixed=40, with_query=30).double()
    q = queries()[0]
    synthetic = method.synthetic(q, torch.arange(BATCH))
    assert synthetic.shape == (BATCH, 70, DIM)
    assert_close(synthetic.norm(dim=2), torch.ones(BATCH, 70, dtype=torch.float64))
    hardest = method.queue.hardest(q, 10)
    near = torch.einsum("nd,nsd->ns", q, synthetic)
    tenth = torch.einsum("nd,nd->n", q, hardest[:, -1])
    assert (near[:, 40:] > tenth[:, None]).all()  # towards the query, from a key that is nearer than that
    assert near.max() < 1 - 1e-6
    assert not torch.allclose(synthetic, method.synthetic(q, torch.arange(BATCH) + BATCH))


def test_nothing_is_mixed_before_the_start() -> None:
    from tests.methods.papers.test_moco_methods import batch, loss

    late, never, at_once = (mochi(mixed=8, with_query=4, start=start) for start in (0.5, 1.0, 0.0))
    of = batch().replaced(clock=HALF_WAY)
    assert loss(late, of) == loss(never, of) != loss(at_once, of)
    for method in (late, never):
        method.update(method.embed(of), method.target(of), of)
    assert loss(late, of) > loss(never, of)  # with more negatives


def test_more_hard_keys_than_the_queue_has_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.hard 51 .* 50 keys"):
        mochi(hard=51)
