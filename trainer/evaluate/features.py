"""Computes features of images, each rank those of its own block, and gathers rows for evaluators."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.ranks.phase import phase

Represent = Callable[[Batch], Tensor]  # a clean view of each of N samples -> (N, D) float32


class Images(Protocol):
    """Clean images, one view each: this rank's contiguous block of the data set, in order and complete."""

    samples: int  # over all ranks

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Features:
    """This rank's rows. x: (n, D) float32; label: (n,) int64."""

    x: Tensor
    label: Tensor


def representing(method: Method) -> AbstractContextManager[Represent]:
    """A context that gives the method's represent_batch(), without gradient and in evaluation mode.

    Every module's mode is restored afterwards.
    """
    return _evaluated(method, method.represent_batch)


def classifying(method: Method) -> AbstractContextManager[Represent]:
    """A context that gives the method's logits(), as representing() does."""
    return _evaluated(method, lambda batch: method.logits(batch.views[0][:, 0]))


@contextmanager
def _evaluated(method: Method, output: Represent) -> Iterator[Represent]:
    @torch.no_grad()
    def evaluated(batch: Batch) -> Tensor:
        return output(batch).float()

    with evaluation_mode(method):
        yield evaluated


@contextmanager
def evaluation_mode(method: Method) -> Iterator[None]:
    """Has all modules in evaluation mode, and each in its own again afterwards."""
    training = {module: module.training for module in method.modules()}
    method.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def extract(represent: Represent, images: Images) -> Features:
    """Features and labels of this rank's block. A rank whose block is empty gets (0, D)."""
    parts: list[tuple[Tensor, Tensor]] = []
    done = 0
    for batch in images:
        parts.append((represent(batch), batch.label))
        done += len(batch) * collectives.world_size()
        phase("features of images", min(done, images.samples), images.samples)
        heartbeat()
    device = parts[0][0].device if parts else _rank_device()
    width = max(count_rows(parts[0][0].shape[1] if parts else 0, device))
    if not parts:
        return Features(torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    x, label = (torch.cat(column) for column in zip(*parts, strict=True))
    return Features(x, label)


def count_rows(count: int, device: torch.device) -> list[int]:
    """Every rank's count, in rank order."""
    return collectives.gather(torch.tensor([count], device=device)).tolist()


def gather_rows(x: Tensor) -> Tensor:
    """Every rank's rows (n_r, ...), any number from each, in rank order: (sum of n_r, ...). Without gradient."""
    counts = count_rows(len(x), x.device)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = collectives.gather(padded).split(max(counts)) if max(counts) else [padded] * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_parts(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Every rank's parts, in rank order; a rank may have none. They are pickled: keep them small and on the CPU."""
    if collectives.world_size() == 1:
        return parts
    everyone: list[list[tuple[Tensor, ...]]] = [[] for _ in range(collectives.world_size())]
    dist.all_gather_object(everyone, parts)
    return [part for of_rank in everyone for part in of_rank]


def _rank_device() -> torch.device:
    """The device on which this rank's process group communicates."""
    nccl = collectives.world_size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
