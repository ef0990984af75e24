"""A small method with every kind of parameter and buffer, and its plain gradients in one process."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Memory, Method, Tensors
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions

GLOBAL_BATCH = 16


class Shard(Memory):
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.full((2,), float(collectives.rank())))

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        self.value.copy_(sum((held("value", rank) for rank in range(ranks)), torch.zeros(2)) / collectives.world_size())


class Toy(Method):
    """InfoNCE with a learnable temperature in the loss, a frozen teacher, and a buffer that differs by rank."""

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        middle = BatchNorm(6, mode="local") if batch_norm else nn.GELU()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3), middle, nn.Flatten(), nn.Dropout(dropout), nn.Linear(6 * 16, 8)
        )
        self.teacher = nn.Linear(3 * 36, 8).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor([0.3]))
        self.shard = Shard()

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0]
        return {"z": self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])}

    def target(self, batch: Batch) -> Tensors:
        return {"t": self.teacher(batch.views[0][:, 0].flatten(1))}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        a, b = F.normalize(z["z"].float(), dim=-1).unbind(1)
        logits = a @ collectives.gather(b).T / self.temperature
        nearness = F.mse_loss(a, F.normalize(t["t"].float(), dim=-1))
        return 20 * F.cross_entropy(logits, collectives.local_rows(len(a))) + nearness


def toy(batch_norm: bool = False, dropout: float = 0.0, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy(batch_norm, dropout)


def batch(step: int = 0) -> Batch:
    """The global batch of a step."""
    views = torch.randn(GLOBAL_BATCH, 2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    return make_batch(views, torch.arange(GLOBAL_BATCH), torch.zeros(GLOBAL_BATCH, dtype=torch.int64))


def own_batch(step: int = 0) -> Batch:
    return batch(step).chunks(collectives.world_size())[collectives.rank()]


def plain_loss(method: Method, whole: Batch, chunks: int = 1) -> Tensor:
    """The loss of the whole batch, in one graph."""
    parts = whole.chunks(chunks)
    z = torch.cat([method.embed(part)["z"] for part in parts])
    t = torch.cat([method.target(part)["t"] for part in parts])
    return method.loss({"z": z}, {"t": t}, whole)


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def weights(method: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}


def sgd_engine(method: Toy, **options: Any) -> Engine:
    """An engine with plain SGD, in the current process group. options: of EngineOptions."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1.0)
    samples = GLOBAL_BATCH // dist.get_world_size()
    return Engine(method, optimizer, EngineOptions(**options), torch.device("cpu"), samples)
