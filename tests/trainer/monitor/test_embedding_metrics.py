"""Measures on embeddings whose values are known by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kilobatch.trainer.monitor.embedding_metrics import (
    ROWS,
    collapse,
    effective_rank,
    measure,
    similarities,
    spread,
    uniformity,
)


def sphere(samples: int, views: int, dimensions: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(samples, views, dimensions, generator=draw), dim=-1)


def test_collapsed_to_a_point() -> None:
    values = measure(torch.ones(64, 2, 16) * 3)
    assert values["similarity/positive"] == pytest.approx(1)
    assert values["similarity/negative"] == pytest.approx(1)
    assert values["embedding/alignment"] == pytest.approx(0, abs=1e-6)
    assert values["embedding/uniformity"] == pytest.approx(0, abs=1e-5)
    assert values["embedding/std"] == pytest.approx(0, abs=1e-6)
    assert values["embedding/effective_rank"] == pytest.approx(1, abs=1e-3)
    assert "one point" in (collapse(values) or "")


def test_collapsed_to_a_line() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    z = (signs[:, None] * torch.full((1, 4), 0.5))[:, None].expand(64, 2, 4)
    values = measure(z)
    assert values["embedding/effective_rank"] == pytest.approx(1, abs=1e-3)
    assert values["embedding/std"] == pytest.approx(1)
    assert "one line" in (collapse(values) or "")


def test_orthogonal_samples_with_equal_views() -> None:
    values = measure(torch.eye(8)[:, None].expand(8, 2, 8) * 5)
    assert values["similarity/positive"] == pytest.approx(1)
    assert values["similarity/negative"] == pytest.approx(0, abs=1e-6)
    assert values["embedding/alignment"] == pytest.approx(0, abs=1e-6)
    assert values["embedding/uniformity"] == pytest.approx(-4)  # every pair at a squared distance of 2
    assert values["embedding/effective_rank"] == pytest.approx(8)
    assert collapse(values) is None


def test_opposite_views() -> None:
    z = torch.stack([torch.eye(6), -torch.eye(6)], dim=1)
    assert measure(z)["embedding/alignment"] == pytest.approx(4)
    assert similarities(z)[0].item() == pytest.approx(-1)


def test_uniform_on_the_sphere() -> None:
    values = measure(sphere(1000, 2, 64))
    assert values["embedding/std"] == pytest.approx(1, abs=0.02)
    assert values["similarity/negative"] == pytest.approx(0, abs=0.01)
    # E exp(4 x·y − 4) with x·y about normal of variance 1 / 64
    assert values["embedding/uniformity"] == pytest.approx(-4 + 16 / 2 / 64, abs=0.01)
    assert 60 < values["embedding/effective_rank"] < 64
    assert collapse(values) is None


@pytest.mark.parametrize("views", [2, 3])
def test_against_the_papers_formulas(views: int) -> None:
    """Plain loops over pairs; the authors' code for uniformity (torch.pdist)."""
    z = sphere(20, views, 5).double() + 0.3
    z = normalize(z, dim=-1)
    pairs = [(a, b) for a in range(views) for b in range(views) if a != b]
    expected = sum((z[:, a] - z[:, b]).norm(dim=1).square().mean() for a, b in pairs) / len(pairs)
    assert measure(z)["embedding/alignment"] == pytest.approx(float(expected))
    each = [torch.pdist(z[:, v]).square().mul(-2).exp().mean().log() for v in range(views)]
    torch.testing.assert_close(uniformity(z), torch.stack(each).mean())
    cosine = torch.einsum("ivd,jwd->ijvw", z, z)
    off = ~torch.eye(20, dtype=torch.bool)
    torch.testing.assert_close(similarities(z)[1], cosine[off].mean())
    torch.testing.assert_close(similarities(z)[0], torch.stack([cosine[~off][:, a, b] for a, b in pairs]).mean())


def test_effective_rank_against_the_singular_values() -> None:
    for shape in ((200, 12), (12, 200)):
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        share = torch.linalg.svdvals(rows)
        share = share / share.sum()
        expected = math.exp(-float((share * share.log()).sum()))
        assert effective_rank(rows).item() == pytest.approx(expected, rel=1e-9)
    low = torch.randn(300, 3) @ torch.randn(3, 64)
    assert 1 < effective_rank(low).item() <= 3.001


def test_scale_and_rows_beyond_the_first_do_not_matter() -> None:
    z = sphere(ROWS, 2, 8)
    values = measure(z)
    assert measure(torch.cat([z * 7, torch.ones(500, 2, 8)])) == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert spread(z).item() == pytest.approx(values["embedding/std"])


def test_no_gradient_is_kept() -> None:
    z = sphere(8, 2, 4).requires_grad_()
    assert all(isinstance(value, float) for value in measure(z).values())
    assert z.grad is None
