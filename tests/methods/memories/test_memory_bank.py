"""The memory bank, and the losses against it, on any number of ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import bank_softmax
from kilobatch.methods.losses.nce import NCE
from kilobatch.methods.memories.memory_bank import MemoryBank
from tests.helpers.plain_queue import unit
from tests.helpers.process_groups import run_ranks

IMAGES, BATCH, DIM = 31, 12, 6  # no number of ranks divides the images
INDEX = torch.tensor([30, 2, 17, 2, 0, 29, 9, 11, 17, 17, 4, 28])  # images 2 and 17 come more than once
TEMPERATURES = (0.2, 0.02)
MOMENTUM = 0.4
NOISE = 50


def own_part(x: Tensor) -> Tensor:
    return x.chunk(collectives.world_size())[collectives.rank()]


def bank() -> MemoryBank:
    torch.manual_seed(0)
    return MemoryBank(IMAGES, DIM).double()


def embeddings() -> Tensor:
    """(BATCH, 2, DIM)."""
    return unit(BATCH, 2, DIM, seed=3)


def computed() -> dict[Any, Any]:
    memory = bank()
    results: dict[Any, Any] = {"rows": memory.rows.clone(), "fetched": memory.fetch(own_part(INDEX))}
    for temperature in TEMPERATURES:
        v = own_part(embeddings()).requires_grad_()
        loss = bank_softmax(v[:, 0], own_part(INDEX), memory, temperature)
        results["softmax", temperature] = loss.detach(), torch.autograd.grad(loss, v)[0][:, 0]
    nce = NCE(NOISE, 0.2).double()
    for step in range(2):
        v = own_part(embeddings()).requires_grad_()
        losses = nce(v, own_part(INDEX), memory)
        weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        results["nce", step] = losses.detach(), torch.autograd.grad(losses @ weights, v)[0], nce.log_z.clone()
        nce.advance()
    memory.follow(own_part(INDEX), own_part(embeddings())[:, 0], MOMENTUM)
    results["followed"] = memory.rows.clone()
    torch.manual_seed(0)
    few = MemoryBank(2, DIM).double()  # fewer images than some ranks
    results["few"] = bank_softmax(own_part(embeddings())[:, 0], own_part(INDEX) % 2, few, 0.2)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return computed()


@pytest.fixture(scope="module", params=[1, 3])  # 2 and 4: in the parity table
def ranks(request: pytest.FixtureRequest, alone: dict[Any, Any]) -> list[dict[Any, Any]]:
    return [alone] if request.param == 1 else run_ranks(request.param, computed, timeout=300)


def whole(ranks: list[dict[Any, Any]], name: str) -> Tensor:
    """The rows in the order of images."""
    rows = torch.empty(IMAGES, DIM, dtype=torch.float64)
    for r, rank in enumerate(ranks):
        rows[r :: len(ranks)] = rank[name]
    return rows


def test_rows_start_the_same_on_any_number_of_ranks(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    assert torch.equal(whole(ranks, "rows"), alone["rows"])
    assert_close(alone["rows"].norm(dim=1), torch.ones(IMAGES, dtype=torch.float64), rtol=1e-6, atol=0)
    assert len(set(map(tuple, alone["rows"].tolist()))) == IMAGES


def test_rows_are_fetched_from_the_ranks_that_have_them(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    assert torch.equal(torch.cat([rank["fetched"] for rank in ranks]), alone["rows"][INDEX])


def test_rows_are_moved_and_the_last_embedding_of_an_image_counts(
    ranks: list[dict[Any, Any]], alone: dict[Any, Any]
) -> None:
    expected = alone["rows"].clone()
    for image, v in zip(INDEX.tolist(), embeddings()[:, 0], strict=True):
        expected[image] = F.normalize(MOMENTUM * alone["rows"][image] + (1 - MOMENTUM) * v, dim=0)
    assert_close(whole(ranks, "followed"), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole(ranks, "followed"), alone["followed"])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_softmax_is_cross_entropy_over_all_images(
    temperature: float, ranks: list[dict[Any, Any]], alone: dict[Any, Any]
) -> None:
    v = embeddings()[:, 0].requires_grad_()
    expected = F.cross_entropy(v @ alone["rows"].T / temperature, INDEX)
    want = torch.autograd.grad(expected, v)[0]
    loss = torch.stack([rank["softmax", temperature][0] for rank in ranks]).mean()
    got = torch.cat([rank["softmax", temperature][1] for rank in ranks]) / len(ranks)
    assert abs(loss - expected) <= 1e-12 * expected
    assert (got - want).norm() <= 1e-12 * want.norm()


def test_a_small_loss_keeps_its_digits_as_the_sum_leaves_out_the_own_row() -> None:
    memory = bank().float()
    others = memory.rows.clone()
    memory.rows[1:] = F.normalize(others[1:] - 3 * others[:1], dim=1)  # all others point away from row 0
    v = memory.rows[:1].clone().requires_grad_()
    loss = bank_softmax(v, torch.tensor([0]), memory, 0.05)
    rows = memory.rows.double()
    exact = ((rows[1:] @ rows[0]) / 0.05).logsumexp(0) - rows[0] @ rows[0] / 0.05
    assert 1e-20 < exact.exp() < 1e-10
    assert_close(loss.double(), exact.exp(), rtol=1e-4, atol=0)


def test_fewer_images_than_ranks(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    assert_close(torch.stack([rank["few"] for rank in ranks]).mean(), alone["few"], rtol=1e-12, atol=0)


def test_noise_is_the_same_on_any_number_of_ranks(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    for step in range(2):
        losses = torch.stack([rank["nce", step][0] for rank in ranks]).mean(0)
        gradient = torch.cat([rank["nce", step][1] for rank in ranks]) / len(ranks)
        assert_close(losses, alone["nce", step][0], rtol=1e-12, atol=0)
        assert_close(gradient, alone["nce", step][1], rtol=1e-10, atol=1e-14)
        for rank in ranks:
            assert_close(rank["nce", step][2], alone["nce", 0][2], rtol=1e-12, atol=0)  # Z once, from all images


def test_noise_differs_by_step_and_view(alone: dict[Any, Any]) -> None:
    (first, *_), (second, *_) = alone["nce", 0], alone["nce", 1]
    assert (first - second).abs().min() > 1e-3
    same_views = NCE(NOISE, 0.2).double()(embeddings()[:, :1].expand(-1, 2, -1), INDEX, bank())
    assert (same_views[0] - same_views[1]).abs() > 1e-3
