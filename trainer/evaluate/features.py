"""From images to features: each rank its own block; and the exchanges of rows that evaluators need."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives as across
from kilobatch.methods.method import Method
from kilobatch.trainer.ranks.heartbeat import beat

Represent = Callable[[Tensor], Tensor]  # (N, 3, H, W) float32 -> (N, D) float32


class Images(Protocol):
    """Clean images, one view each: this rank's contiguous block, in order, nothing dropped."""

    samples: int  # over all ranks

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Features:
    """This rank's rows. x: (n, D) float32; label: (n,) int64."""

    x: Tensor
    label: Tensor


def representing(method: Method) -> AbstractContextManager[Represent]:
    """The method's features, without gradient and in evaluation mode; every module's mode is put back afterwards."""
    return _evaluated(method, method.represent)


def classifying(method: Method) -> AbstractContextManager[Represent]:
    """The method's logits, likewise."""
    return _evaluated(method, method.logits)


@contextmanager
def _evaluated(method: Method, output: Represent) -> Iterator[Represent]:
    training = {module: module.training for module in method.modules()}
    method.eval()

    @torch.no_grad()
    def evaluated(images: Tensor) -> Tensor:
        return output(images).float()

    try:
        yield evaluated
    finally:
        for module, mode in training.items():
            module.training = mode


def extract(represent: Represent, images: Images) -> Features:
    """Features and labels of this rank's block. A rank whose block is empty gets (0, D)."""
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in images:
        parts.append((represent(batch.views[:, 0]), batch.label))
        beat()
    here = _here(parts[0][0].device if parts else None)
    width = max(count_rows(parts[0][0].shape[1] if parts else 0, here))
    if not parts:
        return Features(torch.zeros(0, width, device=here), torch.zeros(0, dtype=torch.int64, device=here))
    x, label = (torch.cat(column) for column in zip(*parts, strict=True))
    return Features(x, label)


def count_rows(count: int, device: torch.device) -> list[int]:
    """Every rank's count, in rank order."""
    return across.gather(torch.tensor([count], device=device)).tolist()


def gather_rows(x: Tensor) -> Tensor:
    """Every rank's rows (n_r, ...), any number from each, in rank order: (sum of n_r, ...). Without gradient."""
    counts = count_rows(len(x), x.device)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = across.gather(padded).split(max(counts)) if max(counts) else [padded] * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_parts(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Every rank's parts, in rank order; a rank may have none. For small things on the CPU: they travel as objects."""
    if across.size() == 1:
        return parts
    everyone: list[list[tuple[Tensor, ...]]] = [[] for _ in range(across.size())]
    dist.all_gather_object(everyone, parts)
    return [part for each in everyone for part in each]


def exchange(x: Tensor) -> Tensor:
    """(W, ...) -> (W, ...): x[r] goes to rank r; row s of the result came from rank s."""
    if across.size() == 1:
        return x
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x.contiguous())
    return received


def _here(device: torch.device | None) -> torch.device:
    if device is not None:
        return device
    nccl = across.size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
