"""k-means over ranks: against a plain form in numpy, the same to the bit for any ranks and tiles, and faiss's."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.clusters.kmeans import DISTANCE_GRID, GRID, SPLIT, Clusters, kmeans, own_share
from tests.helpers.process_groups import run_ranks

ROWS, DIM, K = 203, 12, 17


def samples(rows: int = ROWS, dim: int = DIM) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def plain(x: np.ndarray, c: np.ndarray, rounds: int, spherical: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Lloyd's iteration row by row, in fp64 without a grid."""
    for done in itertools.count():
        distance = ((x[:, None] - c[None]) ** 2).sum(2)
        chosen = (-(x @ c.T) if spherical else distance).argmin(1)
        if done == rounds:
            return c, chosen, distance[range(len(x)), chosen].sum()
        sizes = np.bincount(chosen, minlength=len(c))
        c = np.stack([x[chosen == k].mean(0) if sizes[k] else c[k] for k in range(len(c))])
        for k in np.flatnonzero(sizes == 0):
            donor = sizes.argmax()
            sign = np.where(np.arange(x.shape[1]) % 2, -1, 1) * SPLIT
            c[k], c[donor] = c[donor] * (1 + sign), c[donor] * (1 - sign)
            sizes[k] = sizes[donor] // 2
            sizes[donor] -= sizes[k]
        c = c / np.linalg.norm(c, axis=1, keepdims=True) if spherical else c
    raise AssertionError("unreachable")


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("rounds", [0, 1, 8])
def test_a_plain_form_finds_the_same(spherical: bool, rounds: int) -> None:
    x, start = samples(), samples(400)[-K:]
    found = kmeans(torch.arange(ROWS), x, K, key=0, rounds=rounds, spherical=spherical, start=start)
    c, chosen, objective = plain(x.double().numpy(), start.double().numpy(), rounds, spherical)
    assert found.assignment.tolist() == chosen.tolist()
    assert found.sizes.tolist() == np.bincount(chosen, minlength=K).tolist()
    assert_close(found.centroids.double(), torch.from_numpy(c), rtol=0, atol=2e-6)
    assert abs(found.objective / DISTANCE_GRID - objective) < 1e-4
    assert abs(found.distances.sum() - objective) < 1e-4


def test_empty_clusters_get_halves_of_the_largest() -> None:
    """Starts from rows of which most are one and the same, so that all of them but the first lose every row."""
    x = samples()
    start = torch.cat([x[:1].expand(9, -1), x[1:9]])
    found = kmeans(torch.arange(ROWS), x, K, key=0, rounds=1, start=start)
    c, chosen, _ = plain(x.double().numpy(), start.double().numpy(), 1, False)
    assert_close(found.centroids.double(), torch.from_numpy(c), rtol=0, atol=2e-6)
    assert found.assignment.tolist() == chosen.tolist()
    later = kmeans(torch.arange(ROWS), x, K, key=0, rounds=10, start=start)
    assert later.sizes.min() > 0 and later.objective < found.objective


def test_empty_clusters_keep_their_centroids_where_asked() -> None:
    x = samples().abs()
    start = torch.cat([x[:3], -x[3:5]])  # the last two are on the other side of all rows
    found = kmeans(torch.arange(ROWS), x, 5, key=0, rounds=3, start=start, spherical=True, keep_empty=True)
    assert found.sizes.tolist()[3:] == [0, 0] and found.sizes[:3].min() > 0
    assert_close(found.centroids[3:], start[3:], rtol=0, atol=1 / GRID)
    assert (found.centroids[:3] - start[:3]).norm(dim=1).min() > 0.1


def test_of_equal_centroids_the_first_has_the_row() -> None:
    x = samples()
    start = torch.cat([x[3:4], x[3:4], x[5:6], x[3:4]])
    for tile in [(7, 1), (7, 2), (300, 300)]:
        assert set(kmeans(torch.arange(ROWS), x, 4, key=0, rounds=0, start=start, tile=tile).assignment.tolist()) == {
            0,
            2,
        }


def on_ranks(spherical: bool, tile: Any, strided: bool, duplicates: bool) -> tuple[Tensor, ...]:
    x = samples()
    if duplicates:  # clusters lose all rows, and rows lie between equal centroids
        x = x[torch.arange(ROWS) % 11]
    rank, world = collectives.rank(), collectives.world_size()
    index = torch.arange(rank, ROWS, world) if strided else torch.arange(ROWS).tensor_split(world)[rank]
    found = kmeans(index, x[index], K, key=5, rounds=6, redos=3, spherical=spherical, tile=tile)
    whole = torch.zeros(ROWS, 2, dtype=torch.float64)
    whole[index] = torch.stack([found.assignment.double(), found.distances], 1)
    return (
        collectives.all_reduce_sum(whole),
        found.centroids,
        found.sizes,
        torch.tensor(found.objective),
    )


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("duplicates", [False, True])
def test_neither_ranks_nor_tiles_change_a_bit(spherical: bool, duplicates: bool) -> None:
    whole = on_ranks(spherical, None, False, duplicates)
    for tile in [(1, 1), (13, 5), (64, 16), (500, 500)]:
        for a, b in zip(whole, on_ranks(spherical, tile, False, duplicates), strict=True):
            assert torch.equal(a, b), tile
    for world, strided in [(2, False), (3, True), (4, False)]:
        for found in run_ranks(world, on_ranks, spherical, (13, 5), strided, duplicates):
            for a, b in zip(whole, found, strict=True):
                assert torch.equal(a, b), (world, strided)


def objective(found: Clusters) -> int:
    return found.objective


def test_of_all_redos_the_best_is_kept() -> None:
    x, index = samples(), torch.arange(ROWS)
    many = [objective(kmeans(index, x, K, key=0, rounds=5, redos=n)) for n in range(1, 7)]
    assert many == sorted(many, reverse=True) and len(set(many)) == 3


def test_it_starts_from_rows_and_ends_where_nothing_moves() -> None:
    x, index, calls = samples(), torch.arange(ROWS), list[tuple[int, int]]()
    start = kmeans(index, x, K, key=0, rounds=0).centroids
    near = (start[:, None] - x[None]).norm(dim=2).min(1)
    assert near.values.max() < 2 / GRID * DIM and len(near.indices.unique()) == K
    settled = kmeans(index, x, K, key=0, rounds=100, go_on=lambda done, total: calls.append((done, total)))
    assert 3 < len(calls) < 60 and all(a < b for a, b in itertools.pairwise(done for done, _ in calls))
    assert settled.objective == kmeans(index, x, K, key=0, rounds=101).objective
    again = kmeans(index, x, K, key=0, rounds=1, start=settled.centroids)
    assert torch.equal(again.centroids, settled.centroids)


def parents() -> tuple[Tensor, Tensor, Tensor]:
    x = samples()
    own = own_share(ROWS, x.device)
    found = kmeans(own, x[own], 5, key=1, rounds=4)
    return own, found.centroids, found.sizes


def test_rows_that_every_rank_holds_are_taken_once() -> None:
    _, centroids, sizes = parents()
    for found in run_ranks(2, parents):
        assert torch.equal(found[1], centroids) and torch.equal(found[2], sizes)
    assert sizes.sum() == ROWS


def test_bad_rows_are_refused() -> None:
    x, index = samples(), torch.arange(ROWS)
    with pytest.raises(UserError, match="204 clusters of 203 samples.*use 203 or fewer"):
        kmeans(index, x, 204, key=0, rounds=1)
    with pytest.raises(UserError, match="length up to 2; the longest has 3"):
        kmeans(index, 3 * x, K, key=0, rounds=1)
    x[7, 3] = torch.nan
    with pytest.raises(UserError, match="the longest has inf"):
        kmeans(index, x, K, key=0, rounds=1)
    with pytest.raises(AssertionError, match="each once"):
        kmeans(index * 2, samples(), K, key=0, rounds=1)


@pytest.mark.parametrize("spherical", [False, True])
def test_faiss_finds_the_same(spherical: bool) -> None:
    faiss: Any = pytest.importorskip("faiss")
    x, start, rounds, k = samples(3000, 32), samples(9000, 32)[-50:], 12, 50
    clustering: Any = faiss.Clustering(32, k)
    clustering.niter, clustering.spherical, clustering.min_points_per_centroid = rounds, spherical, 1
    clustering.max_points_per_centroid = len(x)
    faiss.copy_array_to_vector(start.numpy().ravel(), clustering.centroids)
    flat: Any = faiss.IndexFlatIP(32) if spherical else faiss.IndexFlatL2(32)
    clustering.train(x.numpy(), flat)
    theirs = torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, 32).copy())
    found = kmeans(torch.arange(len(x)), x, k, key=0, rounds=rounds, spherical=spherical, start=start)
    assert_close(found.centroids, theirs, rtol=0, atol=1e-5)
    assert found.assignment.tolist() == flat.search(x.numpy(), 1)[1][:, 0].tolist()
