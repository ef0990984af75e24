"""A global batch of 4096 images on one machine: 8 ranks of 512 against one rank in 8 chunks, exactly."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import scaling
from kilobatch.data.batch import Batch
from kilobatch.methods import collectives as across
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.costs.collective_time import Link, seconds, sent
from kilobatch.trainer.parity import PlainEngine
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

IMAGES, RANKS, SIDE = 4096, 8, 4


class Tiny(Encoder):
    """(N, 3, 4, 4) -> (N, 6), through a norm over what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm = 6, "local"
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 2), norm.BatchNorm(4, "local"), nn.Tanh(), nn.Flatten())
        self.last = nn.Linear(4 * 9, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(images))


def step(chunks: int) -> dict[str, Any]:
    """On all ranks together: the loss, the gradients and the running statistics, in fp64."""
    torch.manual_seed(0)
    method = SimCLR(Tiny(), temperature=0.1, dim=8).double()
    views = torch.randn(IMAGES, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = Batch(views, torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64))
    mine = whole.chunks(across.size())[across.rank()]
    outcome = forward_backward(PlainEngine(method, len(mine), chunks=chunks, keep=chunks // 2), mine)
    norm.commit(method)
    gradients = {name: across.mean(p.grad) for name, p in method.named_parameters() if p.grad is not None}
    running = {name: x for name, x in method.state_dict().items() if "running" in name}
    return {"loss": across.mean(outcome.loss), "gradients": gradients, "running": running}


def test_eight_ranks_of_512_equal_one_rank_of_eight_chunks() -> None:
    one = step(chunks=8)
    assert len(one["gradients"]) == sum(1 for _ in SimCLR(Tiny(), temperature=0.1, dim=8).parameters())
    for rank in run_ranks(RANKS, step, 1, timeout=500.0):
        for name, want in one["gradients"].items():
            assert (rank["gradients"][name] - want).norm() <= 1e-12 * one_norm(one), name
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=1e-13, atol=0)
        torch.testing.assert_close(rank["running"], one["running"], rtol=1e-12, atol=1e-14)


def one_norm(found: dict[str, Any]) -> float:
    """Of all gradients together, as the parity tables weigh an error."""
    return torch.cat([g.flatten() for g in found["gradients"].values()]).norm().item()


def test_the_formula_gives_every_collective_of_a_step() -> None:
    """Each call of a real step on 2 ranks, by kind and size, as benchmarks/scaling.py computes it for 1024."""
    for mode, counts in run_ranks(2, scaling.step, timeout=300.0)[0].items():
        calls = scaling.formula(scaling.simclr(mode), scaling.SAMPLES, 2, mode) + scaling.on_a_cpu(2)
        assert counts == Counter((call.kind, call.size) for call in calls), mode


def test_rings_send_the_least_and_trees_wait_the_least() -> None:
    assert (sent("all_reduce", 1000, 4), sent("all_gather", 1000, 4)) == (1500, 750)
    link = Link("", node=8, bandwidth=1e9, latency=1e-6, between_bandwidth=1e8, between_latency=1e-5)
    assert seconds("all_gather", 10**6, 1, link) == 0
    assert seconds("all_gather", 8 * 10**6, 8, link) == pytest.approx(7 * 1e-6 + 7e6 / 1e9)  # inside a machine
    assert seconds("all_gather", 16 * 10**6, 16, link) == pytest.approx(14e-6 + 1e-5 + 15e6 / 1e8)  # its way out
    assert seconds("all_to_all", 0, 16, link) == pytest.approx(7e-6 + 8e-5)  # straight to each
    assert seconds("all_reduce", 0, 1024, link) == pytest.approx(2 * 7 * 1e-5 + 2 * 7 * 1e-6)  # 128 machines: a tree
    assert seconds("all_reduce", 10**9, 16, link) == pytest.approx(28e-6 + 2e-5 + 2 * 15 / 16 * 10)  # many bytes
