"""Search for the keys nearest to each query, without a matrix of all similarities."""

import torch
from torch import Tensor

from kilobatch.methods.tiles.torch_ops import CPU_TILE, sides


def nearest(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """queries (N, D), keys (m, D) -> similarities and rows of the nearest keys, (N, min(count, m)), nearest first."""
    height, width = sides(queries, CPU_TILE)
    scores, rows = [], []
    for q in queries.split(height):
        best, best_rows = q[:, :0], torch.empty_like(q[:, :0], dtype=torch.int64)
        for first in range(0, len(keys), width):
            s = q @ keys[first : first + width].to(q.dtype).T
            tile_rows = torch.arange(first, first + s.shape[1], device=s.device).expand_as(s)
            best, columns = torch.cat([best, s], 1).topk(min(count, best.shape[1] + s.shape[1]), 1)
            best_rows = torch.cat([best_rows, tile_rows], 1).gather(1, columns)
        scores.append(best)
        rows.append(best_rows)
    return torch.cat(scores), torch.cat(rows)
