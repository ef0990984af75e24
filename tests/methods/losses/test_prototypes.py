"""The contrast with prototypes: against sets in plain code, the same for any ranks, with and without draws."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.clusters.prototypes import Prototypes
from kilobatch.methods.losses.prototypes import candidates, prototype_nce
from tests.helpers.process_groups import run_ranks

IMAGES, K, DIM, SAMPLES = 60, 20, 6, 12


def prototypes() -> Prototypes:
    made, generator = Prototypes(IMAGES, K, DIM).double(), torch.Generator().manual_seed(0)
    made.assignment.copy_(torch.randint(K, (IMAGES,), generator=generator))
    made.centroids.copy_(F.normalize(torch.randn(K, DIM, generator=generator, dtype=torch.float64), dim=1))
    made.phi.copy_(torch.rand(K, generator=generator) / 5 + 0.1)
    return made


def queries() -> Tensor:
    q = torch.randn(SAMPLES, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return F.normalize(q, dim=1)


def batch(step: int = 3) -> Batch:
    index = torch.arange(SAMPLES) * 4
    return make_batch(torch.zeros(SAMPLES, 1), index, seed=7, clock=Clock(step, 100, 10))


def others(negatives: int, step: int = 3, level: int = 0) -> set[int]:
    own = prototypes().of(batch().index)
    columns, counts, _ = candidates(own, batch(step).keys, K, level, negatives)
    assert len(columns[counts]) == len(columns[counts].unique())
    assert set(own.tolist()) <= set(columns[counts].tolist())
    return set(columns[counts].tolist()) - set(own.tolist())


def plain(q: Tensor, allowed: Callable[[int], bool]) -> Tensor:
    p = prototypes()
    losses = []
    for query, image in zip(q, batch().index.tolist(), strict=True):
        own = int(p.assignment[image])
        logits = torch.stack([query @ p.centroids[c] / p.phi[c] for c in range(K) if allowed(c)])
        losses.append(logits.logsumexp(0) - query @ p.centroids[own] / p.phi[own])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("negatives", [None, 1, 4, 8, 1000])
def test_values_and_gradients_are_those_of_a_softmax_over_a_set(negatives: int | None) -> None:
    own = set(prototypes().of(batch().index).tolist())
    assert len(own) < SAMPLES, "some images share a prototype"
    drawn = others(negatives) if negatives else set[int]()
    assert len(drawn) == (min(negatives, K - len(own)) if negatives else 0)
    q, theirs = queries().requires_grad_(), queries().requires_grad_()
    loss = prototype_nce(q, prototypes(), batch(), 0, negatives)
    want = plain(theirs, lambda c: negatives is None or c in own | drawn)
    loss.backward()
    want.backward()
    assert_close(loss, want, rtol=1e-12, atol=0)
    assert_close(q.grad, theirs.grad, rtol=1e-11, atol=1e-14)


def test_draws_differ_by_step_and_level_and_are_even() -> None:
    assert others(4) == others(4)
    assert len({frozenset(others(4, step, level)) for step in range(3) for level in range(3)}) == 9
    counts = torch.zeros(K)
    for step in range(600):
        counts[list(others(4, step))] += 1
    drawn = counts[counts > 0]
    assert len(drawn) == K - len(prototypes().of(batch().index).unique())
    expected = 2400 / len(drawn)
    assert (drawn - expected).abs().max() < 5 * expected**0.5


def on_ranks(negatives: int | None) -> tuple[Tensor, Tensor]:
    world, rank = collectives.world_size(), collectives.rank()
    q = queries().chunk(world)[rank].requires_grad_()
    loss = prototype_nce(q, prototypes(), batch().chunks(world)[rank], 1, negatives)
    (gradient,) = torch.autograd.grad(loss, q)
    return collectives.mean(loss.detach()), collectives.gather(gradient / world)


@pytest.mark.parametrize("negatives", [None, 4])
def test_ranks_change_nothing(negatives: int | None) -> None:
    loss, gradient = on_ranks(negatives)
    for found in run_ranks(3, on_ranks, negatives):
        assert_close(found[0], loss, rtol=1e-13, atol=0)
        assert_close(found[1], gradient, rtol=1e-12, atol=1e-16)
