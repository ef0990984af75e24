"""A cluster's concentration: against numpy's form of the authors' code, on several ranks, finite at a collapse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.clusters.concentration import concentration
from kilobatch.methods.clusters.kmeans import Clusters, kmeans
from tests.helpers.process_groups import run_ranks

ROWS, K = 150, 60  # clusters of one row, and of several


def found() -> Clusters:
    x = F.normalize(torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    own = torch.arange(ROWS).tensor_split(collectives.world_size())[collectives.rank()]
    return kmeans(own, x[own], K, key=0, rounds=5)


def plain(clusters: Clusters, temperature: float) -> np.ndarray:
    members = [clusters.distances[clusters.assignment == k].numpy() for k in range(K)]
    phi = np.array([np.sqrt(d).mean() / np.log(len(d) + 10) if len(d) > 1 else 0.0 for d in members])
    phi[[len(d) < 2 for d in members]] = phi.max()
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_it_is_the_authors(temperature: float) -> None:
    clusters = found()
    assert (clusters.sizes < 2).any() and (clusters.sizes > 2).any()
    np.testing.assert_allclose(concentration(clusters, temperature), plain(clusters, temperature), rtol=1e-8)


def on_ranks() -> Tensor:
    return concentration(found(), 0.2)


def test_ranks_change_no_bit() -> None:
    whole = on_ranks()
    assert all(torch.equal(whole, part) for world in (2, 3) for part in run_ranks(world, on_ranks))


def test_rows_on_their_centroids_leave_it_finite() -> None:
    clusters = found()
    collapsed = concentration(replace(clusters, distances=torch.zeros(ROWS, dtype=torch.float64)), 0.2)
    assert collapsed.tolist() == [0.2] * K
    one_spread = clusters.distances.where(clusters.assignment == clusters.sizes.argmax(), 0)
    assert concentration(replace(clusters, distances=one_spread), 0.2).min() >= 0.002
