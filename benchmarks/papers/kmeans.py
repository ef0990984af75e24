"""k-means of unit rows beside faiss's, from the same start: seconds of processor time, and the rate of the products.

    python -m benchmarks.papers.kmeans
    python -m benchmarks.papers.kmeans --rows 20000 --clusters 200

Needs faiss-cpu. One thread each, in turns. faiss computes in fp32; ours in fp64, in which its products are exact, and
is the same to the bit for any ranks.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kilobatch.methods.clusters.kmeans import CPU_TILE, DISTANCE_GRID, kmeans

DIM, TURNS = 128, 2


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of one tile's product."""
    x, c = torch.randn(CPU_TILE[0], DIM, dtype=dtype), torch.randn(CPU_TILE[1], DIM, dtype=dtype)
    repeats = 400
    taken = min(seconds(lambda: [x @ c.T for _ in range(repeats)]) for _ in range(3))
    return 2 * repeats * CPU_TILE[0] * CPU_TILE[1] * DIM / taken


def by_faiss(faiss: Any, x: Tensor, start: Tensor, rounds: int) -> float:
    """Clusters the rows; returns the sum of squared distances at the end."""
    clustering: Any = faiss.Clustering(DIM, len(start))
    clustering.niter, clustering.max_points_per_centroid, clustering.min_points_per_centroid = rounds, len(x), 1
    faiss.copy_array_to_vector(start.numpy().ravel(), clustering.centroids)
    index: Any = faiss.IndexFlatL2(DIM)
    clustering.train(x.numpy(), index)
    return float(index.search(x.numpy(), 1)[0].astype("float64").sum())


def by_ours(x: Tensor, start: Tensor, rounds: int) -> float:
    found = kmeans(torch.arange(len(x)), x, len(start), key=0, rounds=rounds, start=start)
    return found.objective / DISTANCE_GRID


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    faiss: Any = importlib.import_module("faiss")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)

    torch.manual_seed(0)
    centres = torch.randn(2 * arguments.clusters, DIM)[torch.randint(2 * arguments.clusters, (arguments.rows,))]
    x = F.normalize(centres + torch.randn(arguments.rows, DIM), dim=1)
    start, rounds = x[torch.randperm(len(x))[: arguments.clusters]], arguments.rounds
    ways: dict[str, Callable[[], float]] = {
        "faiss": lambda: by_faiss(faiss, x, start, rounds),
        "ours": lambda: by_ours(x, start, rounds),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    objectives: dict[str, float] = {}
    for _ in range(TURNS):
        for name, way in ways.items():
            taken[name].append(seconds(lambda: objectives.update({name: way()})))  # noqa: B023
    operations = 2 * len(x) * len(start) * DIM * (rounds + 1)
    table = Table(title=f"{len(x):,} rows of {DIM}, {len(start):,} clusters, {rounds} rounds")
    for column in ("", "seconds", "GFLOP/s", "sum of squared distances"):
        table.add_column(column, justify="right")
    for name in ways:
        best = min(taken[name])
        table.add_row(name, f"{best:.1f}", f"{operations / best / 1e9:.1f}", f"{objectives[name]:.2f}")
    console = Console()
    console.print(table)
    console.print(f"ours takes {min(taken['ours']) / min(taken['faiss']):.2f} times faiss's time")
    rates = " ".join(f"{dtype}: {product_rate(dtype) / 1e9:.0f}" for dtype in (torch.float32, torch.float64))
    console.print(f"a tile's product, GFLOP/s: {rates}")


if __name__ == "__main__":
    main()
