"""Writes checkpoints for tests: tensors of every kind, saved by several ranks in one process."""

from pathlib import Path

import torch
from torch import Tensor

from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.writer import Checkpoints

OPTIONS = CheckpointOptions(timeout_minutes=0.5)


def values() -> dict[str, Tensor]:
    """Tensors of every type that a checkpoint may hold, some large enough that the ranks share the writing."""
    generator = torch.Generator().manual_seed(0)
    return {
        "method.conv": torch.randn(
            70, 33, 7, 9, generator=generator
        ),  # more than TINY elements, not divisible by 2 or 3
        "method.half": torch.randn(300, 301, generator=generator).to(torch.bfloat16),
        "method.fp16": torch.randn(17, generator=generator).half(),
        "method.fp64": torch.randn(3, generator=generator, dtype=torch.float64),
        "method.count": torch.tensor(2**62 + 1),
        "method.bytes": torch.randint(0, 256, (99_999,), generator=generator, dtype=torch.uint8),
        "method.flags": torch.randint(0, 2, (13,), generator=generator).bool(),
        "method.none": torch.empty(0, 5),
        "method.special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def pieces(rank: int, world: int) -> dict[str, Piece]:
    """values(), two tensors sharded as under ZeRO (one of them all on the last rank), and one that differs by rank."""
    held = {name: Piece.of(tensor) for name, tensor in values().items()}
    flat = torch.arange(1001.0)
    start, end = 1001 * rank // world, 1001 * (rank + 1) // world
    held["optimizer.part"] = Piece(flat[start:end], start, (7, 11, 13), sharded=True)
    if rank == world - 1:
        held["optimizer.alone"] = Piece(torch.arange(6), 0, (2, 3), sharded=True)
    held["method.queue"] = Piece.of(torch.full((rank + 2, 3), rank), own=True)
    return held


def save(folder: Path, world: int, step: int, options: CheckpointOptions = OPTIONS, meta: dict | None = None) -> Path:
    ranks = [Checkpoints(folder, options, rank, world) for rank in range(world)]
    for rank, checkpoints in enumerate(ranks):
        checkpoints.save(step, pieces(rank, world), meta or {})
    for checkpoints in ranks:
        checkpoints.close()
    return folder / f"step-{step:08d}"
