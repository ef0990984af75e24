"""A method with late groups and groups with rates of their own, trained by the engine and by a plain loop of torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch, Clock
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.parameter_groups import ParameterGroup
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.step import check_finite, forward_backward
from tests.helpers.toy_method import plain_loss
from tests.helpers.zero_training import BATCH, Net, own_batch

PER_EPOCH, STEPS = 4, 10
FIRST = {"last.weight": 6, "last.bias": 6, "temperature": 3}  # the first step of each late parameter
BASE, DECAY = 0.02, 0.1
BOUND = 0.3  # between the norms of the parameters' gradients


class Late(Net):
    """last from epoch 1.5 on, the temperature from epoch 0.7, which is within an epoch's third step."""

    def groups(self) -> Sequence[ParameterGroup]:
        return [
            ParameterGroup("last", from_epoch=1.5),
            ParameterGroup("temperature", from_epoch=0.7, decay=1.0),
            ParameterGroup("encoder.3", lr=0.5, schedule=False, decay=2.0),
            ParameterGroup("encoder.1", lr=3.0),
        ]


def late(kind: type[Net] = Late, seed: int = 0, mode: batch_norm.Mode = "global") -> Net:
    torch.manual_seed(seed)
    return kind(mode)


def at(step: int, batch: Batch) -> Batch:
    return batch.replaced(clock=Clock(step, STEPS, PER_EPOCH))


def rate(step: int) -> tuple[float, float]:
    """The learning rate and the weight decay of a step."""
    return BASE * (1 - step / STEPS), DECAY * (1 + step)


def section(name: str) -> dict[str, Any]:
    lr = 50 * BASE if name == "lars" else BASE
    return {"name": name, "lr": lr, "weight_decay": DECAY, "trust_coefficient": 0.02, "dialect": "byol"}


def train(engine: Engine, steps: Iterable[int]) -> Engine:
    scale = engine.optimizer.defaults["lr"] / BASE
    for step in steps:
        outcome = forward_backward(engine, at(step, own_batch(step)))
        check_finite(engine, outcome, step)
        lr, decay = rate(step)
        engine.step(scale * lr, decay)
        batch_norm.commit(engine.method)
    return engine


def plain(
    name: str, kind: type[Net] = Late, first: dict[str, int] = FIRST, bound: float = 0.0, whole: bool = False
) -> dict[str, Tensor]:
    """Where a loop of torch ends: parameters and the optimizer's state. bound: of each tensor's gradient, or of all
    together."""
    method = late(kind)
    optimizer = build_optimizer(OptimizerOptions.model_validate(section(name)), method, BATCH)
    named = {key: p for key, p in method.named_parameters() if p.requires_grad}
    scale = optimizer.defaults["lr"] / BASE
    clipped: set[str] = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        plain_loss(method, own_batch(step)).backward()
        for key, p in named.items():
            if step < first.get(key, 0):
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            elif bound and not whole and nn.utils.clip_grad_norm_([p], bound) > bound:
                clipped.add(key)
        if whole:
            nn.utils.clip_grad_norm_(named.values(), bound)
        lr, decay = rate(step)
        lr *= scale
        for group in optimizer.param_groups:
            names = set(group["names"])
            group["lr"], group["weight_decay"] = lr, decay if group["params"][0].ndim > 1 else 0.0
            if kind is Late:
                group["lr"] = {"encoder.3.weight": 0.5 * BASE * scale, "encoder.1.bias": 3 * lr}.get(min(names), lr)
                group["weight_decay"] *= 2 if "encoder.3.weight" in names else 1
                group["weight_decay"] += decay if "temperature" in names else 0
        optimizer.step()
        batch_norm.commit(method)
    assert not bound or whole or 3 < len(clipped) < len(named), f"the bound is not between the norms: {clipped}"
    found = {f"method.{key}": p.detach() for key, p in method.named_parameters()}
    for key, p in named.items():
        found |= {f"{of}.{key}": x for of, x in optimizer.state[p].items() if isinstance(x, Tensor)}
    return found
