"""Sharded and replicated queues compared with one process, on any number of ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.options import QueueOptions, share
from kilobatch.methods.memories.queue import Queue
from tests.helpers.plain_queue import dealt, pairs, plain, rows, start
from tests.helpers.process_groups import run_ranks

BATCH, DIM = 24, 6
STEPS = 11  # at 48 keys, one wrap-around takes 2 steps
LENGTHS = (48, 50)  # a multiple of the batch; one that neither the batch nor 3 or 4 ranks divide
TEMPERATURES = (0.2, 0.02)
PLACEMENTS = ("sharded", "replicated")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch's queries and keys."""
    return pairs(BATCH, DIM, seed=step)


def own_part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x


def loss_and_gradient(memory: Queue, step: int, temperature: float) -> tuple[Tensor, Tensor]:
    q, k = (own_part(x) for x in batch(step))
    q = q.clone().requires_grad_()
    loss = info_nce(q, k, memory, temperature)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


def history(length: int, **options: str) -> list[dict[str, Any]]:
    """Before each push: this rank's keys, and losses and gradients by temperature."""
    torch.manual_seed(0)
    memory = Queue(QueueOptions.model_validate({"length": length, **options}), DIM).double()
    results = []
    for step in range(STEPS):
        by_temperature = {temperature: loss_and_gradient(memory, step, temperature) for temperature in TEMPERATURES}
        results.append({"keys": memory.filled().clone(), "losses": by_temperature})
        memory.push(own_part(batch(step)[1]))
    return results


def histories() -> dict[Any, list[dict[str, Any]]]:
    results: dict[Any, list[dict[str, Any]]] = {
        (length, placement): history(length, placement=placement) for length in LENGTHS for placement in PLACEMENTS
    }
    results["empty"] = history(48, placement="sharded", start="empty")
    results["bf16"] = history(48, placement="sharded", dtype="bf16")
    return results


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, list[dict[str, Any]]]]:
    return [histories()] if request.param == 1 else run_ranks(request.param, histories, timeout=300)


def check_losses(results: list[dict[str, Any]], step: int, keys: list[Tensor]) -> None:
    """results: of each rank, at this step; keys: of the whole queue."""
    for temperature in TEMPERATURES:
        q, k = batch(step)
        q.requires_grad_()
        expected = plain(q, k, torch.stack(keys), temperature)
        losses = torch.stack([rank["losses"][temperature][0] for rank in results])
        got = torch.cat([rank["losses"][temperature][1] for rank in results]) / len(results)
        want = torch.autograd.grad(expected, q)[0]
        assert abs(losses.mean() - expected) <= 1e-12 * expected
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_first_in_first_out_queue_through_five_wraps(placement: str, ranks: list[dict[Any, Any]]) -> None:
    fifo = start(48, DIM)
    for step in range(STEPS):
        results = [rank[48, placement][step] for rank in ranks]
        keys = torch.cat([rank["keys"] for rank in (results if placement == "sharded" else results[:1])])
        assert rows(keys) == rows(fifo)
        check_losses(results, step, fifo)
        fifo = (fifo + list(batch(step)[1]))[-48:]
    assert STEPS > 5 * 48 // BATCH


def test_uneven_shards_keep_each_ranks_newest(ranks: list[dict[Any, Any]]) -> None:
    world = len(ranks)
    shards = dealt(start(50, DIM), world)
    for step in range(STEPS):
        results = [rank[50, "sharded"][step] for rank in ranks]
        assert [rows(rank["keys"]) for rank in results] == [rows(shard) for shard in shards]
        check_losses(results, step, [key for shard in shards for key in shard])
        parts = batch(step)[1].chunk(world)
        shards = [
            (old + list(new))[-share(50, r, world) :] for r, (old, new) in enumerate(zip(shards, parts, strict=True))
        ]
    assert world == 1 or len({len(shard) for shard in shards}) == (1 if world == 2 else 2)


def test_replicated_queues_are_the_same_on_all_ranks(ranks: list[dict[Any, Any]]) -> None:
    fifo = start(50, DIM)
    for step in range(STEPS):
        for rank in ranks:
            assert rows(rank[50, "replicated"][step]["keys"]) == rows(fifo)
        fifo = (fifo + list(batch(step)[1]))[-50:]


def test_an_empty_start_fills_from_all_ranks(ranks: list[dict[Any, Any]]) -> None:
    fifo: list[Tensor] = []
    for step in range(STEPS):
        results = [rank["empty"][step] for rank in ranks]
        assert rows(torch.cat([rank["keys"] for rank in results])) == (rows(fifo) if fifo else [])
        if fifo:
            check_losses(results, step, fifo)
        fifo = (fifo + list(batch(step)[1]))[-48:]


def test_shards_start_with_different_keys(ranks: list[dict[Any, Any]]) -> None:
    shards = [rank[48, "sharded"][0]["keys"] for rank in ranks]
    assert [len(shard) for shard in shards] == [48 // len(ranks)] * len(ranks)
    assert len({tuple(row) for shard in shards for row in shard.tolist()}) == 48


def test_halves_are_stored(ranks: list[dict[Any, Any]]) -> None:
    for step in range(4, STEPS):
        keys = torch.cat([rank["bf16"][step]["keys"] for rank in ranks])
        exact = torch.cat([rank[48, "sharded"][step]["keys"] for rank in ranks])
        assert_close(keys, exact, rtol=2**-8, atol=0)
