"""NT-Xent with a queue's keys as further negatives, against autograd of the plainest code."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import nt_xent
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from tests.helpers.plain_queue import start, unit
from tests.helpers.process_groups import run_ranks
from tests.methods.losses.test_nt_xent import Largest, gradients, views

TEMPERATURES = (0.02, 0.2)  # with an online maximum, and plain exponentials
BATCH, DIM, KEYS = 12, 6, 31  # of all ranks


def plain(z1: Tensor, z2: Tensor, temperature: float | Tensor, keys: Tensor) -> Tensor:
    n = len(z1)
    u = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (u @ u.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(torch.cat([s, u @ keys.T / temperature], 1), torch.arange(2 * n).roll(n))


def queue(**options: Any) -> Queue:
    torch.manual_seed(0)
    return Queue(QueueOptions.model_validate({"length": KEYS, "placement": "sharded", **options}), DIM).double()


def worst(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_gradient_equal_autograd(n: int, temperature: float) -> None:
    z1, z2 = views(n, DIM)
    memory = queue(length=2500)  # more than two tiles
    ours, theirs = nt_xent(z1, z2, temperature, memory), plain(z1, z2, temperature, memory.keys)
    assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert worst(gradients(3 * ours, z1, z2), gradients(3 * theirs, z1, z2)) <= 1e-12


def test_learnable_temperature() -> None:
    z1, z2 = views(5, DIM)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(plain(z1, z2, temperature, queue().keys), (z1, z2, temperature))
    got = torch.autograd.grad(nt_xent(z1, z2, temperature, queue()), (z1, z2, temperature))
    for g, w in zip(got, want, strict=True):
        assert worst(g, w) <= 1e-12


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_empty_queue_adds_nothing(temperature: float) -> None:
    z1, z2 = views(4, DIM)
    ours, theirs = nt_xent(z1, z2, temperature, queue(start="empty")), nt_xent(z1, z2, temperature)
    assert_close(ours, theirs, rtol=1e-14, atol=0)
    assert worst(gradients(ours, z1, z2), gradients(theirs, z1, z2)) <= 1e-14


def test_a_tiny_loss_keeps_its_digits_in_fp32() -> None:
    z1, z2 = views(64, 128, torch.float32, alike=0.6)
    torch.manual_seed(0)
    memory = Queue(QueueOptions(length=512, placement="sharded"), 128)
    exact = plain(z1.double(), z2.double(), 0.02, memory.keys.double())
    assert exact < 1e-9
    assert abs(plain(z1, z2, 0.02, memory.keys).double() / exact - 1) > 0.5
    ours = nt_xent(z1, z2, 0.02, memory)
    assert abs(ours.double() / exact - 1) < 1e-4
    assert worst(gradients(ours, z1, z2).double(), gradients(exact, z1, z2).double()) < 1e-4


def test_no_matrix_of_all_rows_and_keys() -> None:
    z1, z2 = views(256, DIM, torch.float32)
    torch.manual_seed(0)
    memory = Queue(QueueOptions(length=8192, placement="sharded"), DIM)
    with Largest() as seen:
        nt_xent(z1, z2, 0.2, memory).backward()
    assert seen.elements <= 512 * 1024 < 512 * 8192  # a view of the keys has 8192 * 6


def steps() -> list[dict[float, tuple[Tensor, Tensor]]]:
    """This rank's losses and gradients by temperature, step by step; the queue wraps and has been random."""
    memory, by_step = queue(), []
    for step in range(6):
        z1, z2 = (x.chunk(collectives.world_size())[collectives.rank()].clone().requires_grad_() for x in pair(step))
        by_temperature = {}
        for temperature in TEMPERATURES:
            loss = nt_xent(z1, z2, temperature, memory)
            by_temperature[temperature] = loss.detach(), torch.stack(torch.autograd.grad(loss, (z1, z2)))
        by_step.append(by_temperature)
        memory.push(pair(100 + step)[0].chunk(collectives.world_size())[collectives.rank()])
    return by_step


def pair(step: int) -> tuple[Tensor, Tensor]:
    return unit(BATCH, DIM, seed=step), unit(BATCH, DIM, seed=step + 50)


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_are_one_process(ranks: int) -> None:
    """31 keys on 3 ranks: shares of 11 and 10, which keep each rank's newest."""
    by_step = [steps()] if ranks == 1 else run_ranks(ranks, steps)
    newest = start(KEYS, DIM)[::-1]
    shards = [newest[r::ranks][::-1] for r in range(ranks)]
    for step in range(6):
        for temperature in TEMPERATURES:
            z1, z2 = (x.requires_grad_() for x in pair(step))
            want = plain(z1, z2, temperature, torch.stack([key for shard in shards for key in shard]))
            got = [rank[step][temperature] for rank in by_step]
            assert abs(sum(loss for loss, _ in got) / ranks - want) <= 1e-12 * want
            # The engine averages gradients over ranks.
            gradient = torch.cat([g for _, g in got], 1).flatten(0, 1) / ranks
            assert worst(gradient, gradients(want, z1, z2)) <= 1e-12
        new = pair(100 + step)[0].chunk(ranks)
        shards = [(old + list(keys))[-len(old) :] for old, keys in zip(shards, new, strict=True)]
