"""Balanced assignments: against lightly's, the same for any ranks, without overflow where epsilon is least."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kilobatch.methods import collectives
from kilobatch.methods.losses.options import SINKHORN_EPSILON
from kilobatch.methods.losses.sinkhorn import sinkhorn
from tests.helpers.process_groups import run_ranks

ROWS, PROTOTYPES = 24, 7


def scores(dtype: Any = torch.float64) -> Tensor:
    x = torch.randn(2, ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    c = torch.randn(PROTOTYPES, 5, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(c, dim=-1).T


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_assignments_are_lightlys(rounds: int) -> None:
    theirs = pytest.importorskip("lightly.loss.swav_loss").sinkhorn
    for view in scores():
        assert_close(sinkhorn(view, 0.05, rounds), theirs(view, iterations=rounds, epsilon=0.05), rtol=1e-9, atol=1e-9)


def test_rows_sum_to_one_and_prototypes_are_used_alike() -> None:
    q = sinkhorn(scores(), 0.05, 50)
    assert_close(q.sum(-1), torch.ones(2, ROWS, dtype=torch.float64))
    assert_close(q.sum(-2), torch.full((2, PROTOTYPES), ROWS / PROTOTYPES, dtype=torch.float64), rtol=0.02, atol=0)


def test_further_rows_are_balanced_along() -> None:
    s = scores()
    whole, part = sinkhorn(s, 0.05, 3), sinkhorn(s[:, :9], 0.05, 3, s[:, 9:])
    assert_close(part, whole[:, :9])
    assert (part - sinkhorn(s[:, :9], 0.05, 3)).abs().max() > 0.01


def on_ranks() -> Tensor:
    world, rank = collectives.world_size(), collectives.rank()
    return collectives.gather(sinkhorn(scores().chunk(world, 1)[rank], 0.05, 3).transpose(0, 1).contiguous())


def test_ranks_change_nothing() -> None:
    whole = sinkhorn(scores(), 0.05, 3).transpose(0, 1)
    for found in run_ranks(3, on_ranks):
        assert_close(found, whole, rtol=1e-12, atol=1e-14)


def test_nothing_overflows_at_the_least_epsilon() -> None:
    s = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [0.5, 1.0, -1.0]])
    q = sinkhorn(s, SINKHORN_EPSILON, 3)
    assert q.isfinite().all()
    assert_close(q.sum(1), torch.ones(3))
    assert_close(q.double(), sinkhorn(s.double(), SINKHORN_EPSILON, 3), rtol=1e-4, atol=1e-6)
