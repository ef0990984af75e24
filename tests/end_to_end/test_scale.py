"""A global batch of 4096 images on one machine: 8 ranks of 512 images give the same as one rank in 8 chunks."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step_collectives
from kilobatch.data.batch import make_batch
from kilobatch.methods import collectives
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.costs.collective_time import Link, seconds, sent
from kilobatch.trainer.plain_step import PlainEngine
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

IMAGES, RANKS, SIDE = 4096, 8, 4


class Tiny(Encoder):
    """(N, 3, 4, 4) -> (N, 6), with a BatchNorm over the chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm = 6, "local"
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 2), batch_norm.BatchNorm(4, "local"), nn.Tanh(), nn.Flatten())
        self.last = nn.Linear(4 * 9, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(images))


def step(chunks: int) -> dict[str, Any]:
    """The loss, the gradients and the running statistics of a step on all ranks together, in fp64."""
    torch.manual_seed(0)
    method = SimCLR(Tiny(), temperature=0.1, dim=8).double()
    views = torch.randn(IMAGES, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = make_batch(views, torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64))
    mine = whole.chunks(collectives.world_size())[collectives.rank()]
    outcome = forward_backward(PlainEngine(method, len(mine), chunks=chunks, keep=chunks // 2), mine)
    batch_norm.commit(method)
    gradients = {name: collectives.mean(p.grad) for name, p in method.named_parameters() if p.grad is not None}
    running = {name: x for name, x in method.state_dict().items() if "running" in name}
    return {"loss": collectives.mean(outcome.loss), "gradients": gradients, "running": running}


def test_eight_ranks_of_512_equal_one_rank_of_eight_chunks() -> None:
    expected = step(chunks=8)
    assert len(expected["gradients"]) == sum(1 for _ in SimCLR(Tiny(), temperature=0.1, dim=8).parameters())
    for rank in run_ranks(RANKS, step, 1, timeout=500.0):
        for name, want in expected["gradients"].items():
            assert (rank["gradients"][name] - want).norm() <= 1e-12 * norm_of_all(expected), name
        torch.testing.assert_close(rank["loss"], expected["loss"], rtol=1e-13, atol=0)
        torch.testing.assert_close(rank["running"], expected["running"], rtol=1e-12, atol=1e-14)


def norm_of_all(outcome: dict[str, Any]) -> float:
    """The norm of all gradients together, by which the parity tables divide an error."""
    return torch.cat([g.flatten() for g in outcome["gradients"].values()]).norm().item()


def test_the_formula_gives_every_collective_of_a_step() -> None:
    """Each call of a real step on 2 ranks, by kind and size, as benchmarks/step_collectives.py computes it for 1024."""
    for mode, counts in run_ranks(2, step_collectives.count_step, timeout=300.0)[0].items():
        method = step_collectives.simclr(mode)
        calls = step_collectives.formula(method, step_collectives.SAMPLES, 2, mode) + step_collectives.cpu_calls(2)
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
