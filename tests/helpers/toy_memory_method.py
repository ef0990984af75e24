"""A small method with all memories: a momentum encoder, and queues that are sharded, replicated, and of odd length."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder, rising
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import check_finite, forward_backward

BATCH, DIM, TOTAL = 24, 6, 100
LENGTH, ODD = 48, 50
MOMENTUM = 0.9


class ToyMemoryMethod(Method):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(48, 16), batch_norm.BatchNorm(16, "global"), nn.ReLU(), nn.Linear(16, DIM, bias=False)
        )
        self.momentum_encoder = MomentumEncoder(self.encoder)
        self.shards = Queue(QueueOptions(length=LENGTH, placement="sharded"), DIM)
        self.whole = Queue(QueueOptions(length=LENGTH, placement="replicated"), DIM)
        self.odd = Queue(QueueOptions(length=ODD, placement="sharded"), DIM)

    def embed(self, batch: Batch) -> Tensors:
        return {"q": F.normalize(self.encoder(batch.views[0][:, 0].flatten(1)).float(), dim=1)}

    def target(self, batch: Batch) -> Tensors:
        return {"k": F.normalize(self.momentum_encoder(batch.views[0][:, 1].flatten(1)).float(), dim=1)}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        losses = [info_nce(z["q"], t["k"], queue, 0.2) for queue in (self.shards, self.whole, self.odd)]
        return torch.stack(losses).sum()

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.momentum_encoder.follow(self.encoder, rising(MOMENTUM, batch.clock.after))
        for queue in (self.shards, self.whole, self.odd):
            queue.push(t["k"])


def make(seed: int = 0, precision: str = "fp32") -> Engine:
    torch.manual_seed(seed)
    method = ToyMemoryMethod()
    optimizer = build_optimizer(OptimizerOptions(name="sgd", lr=9.0, weight_decay=0.0), method, BATCH)
    options = EngineOptions(precision=precision)  # pyright: ignore[reportArgumentType]
    return Engine(method, optimizer, options, torch.device("cpu"), BATCH // dist.get_world_size())


def batch(step: int) -> Batch:
    """This rank's part of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 1, 3, 4, 4, generator=generator)
    views = images + 0.3 * torch.randn(BATCH, 2, 3, 4, 4, generator=generator)
    whole = make_batch(views, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64))
    return whole.replaced(clock=Clock(step, TOTAL, TOTAL)).chunks(collectives.world_size())[collectives.rank()]


def train(engine: Engine, steps: range, after: Callable[[int], object] = lambda step: None) -> list[dict[str, Any]]:
    """Trains as Loop does. Returns the global loss of each step, and the keys that this rank made."""
    records = []
    for step in steps:
        outcome = forward_backward(engine, batch(step))
        check_finite(engine, outcome, step)
        engine.step(0.1)
        batch_norm.commit(engine.method)
        engine.method.update(outcome.z, outcome.t, outcome.batch)
        after(step)
        records.append({"loss": collectives.mean(outcome.loss), "keys": outcome.t["k"]})
    return records


def keys(engine: Engine) -> dict[str, Tensor]:
    return {name: queue.keys.clone() for name, queue in engine.method.named_modules() if isinstance(queue, Queue)}
