"""Forward and backward of one step, whole or in chunks, and the check for NaN and infinity before the update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Tensors
from kilobatch.methods.networks import batch_norm
from kilobatch.trainer import adversarial
from kilobatch.trainer.adversarial import Attack
from kilobatch.trainer.checkpoint.rng_state import random_state, set_random_state
from kilobatch.trainer.divergence import LossHistory
from kilobatch.trainer.engine import Engine


@dataclass(frozen=True)
class StepOutput:
    """loss: 0-dim, this rank's own mean; z, t: the method's outputs for this rank's batch; batch: as the method has
    arranged it. None carries gradient."""

    loss: Tensor
    z: Tensors
    t: Tensors
    batch: Batch


class NonFinite(RuntimeError):
    """A loss or a gradient is infinite or no number. Raised on every rank, before the update.

    losses: those of the steps before, where a loop has kept them.
    """

    losses: LossHistory | None = None

    def __init__(self, step: int, loss_ranks: list[int], gradient_ranks: list[int]) -> None:
        self.step, self.loss_ranks, self.gradient_ranks = step, loss_ranks, gradient_ranks
        parts = [("the loss", loss_ranks), ("the gradient", gradient_ranks)]
        faults = " and ".join(f"{what} on {_ranks(ranks)}" for what, ranks in parts if ranks)
        super().__init__(
            f"step {step}: not finite: {faults}. Nothing was updated. "
            "Lower the learning rate, lengthen the warm-up, or use engine.precision=fp32"
        )


def forward_backward(engine: Engine, batch: Batch) -> StepOutput:
    """Adds this rank's gradients of method.loss over its whole batch to the parameters' .grad; not yet averaged.

    In several chunks it takes the memory of one (Gao et al., 2021, arxiv.org/abs/2101.06983). The first pass embeds all
    chunks without gradient; then come the loss and its gradient with respect to the embeddings; a second pass embeds
    chunk by chunk again and carries that gradient to the parameters. Dropout draws the same numbers in both passes
    (ours by the samples' keys, methods/networks/keyed_layers.py; torch's from states that are kept), and only the first
    pass counts for running statistics.

    The last `keep` chunks keep the graph of their first pass and need no second one. The backward goes from the last
    chunk to the first, so that the kept graphs are freed before others are built, and gradients add up in the same
    order for any keep.
    """
    engine.begin(batch.clock)
    with torch.no_grad():
        batch = engine.method.arrange(batch)
    chunks, keep = engine.chunking.decide(batch)
    t = engine.target(batch) if chunks == 1 else join([engine.target(part) for part in batch.chunks(chunks)])
    attacked = batch
    if engine.options.adversarial:
        attack = Attack(engine.method, engine.options.adversarial, engine.autocast, engine.loss_scale)
        attacked = attack.attacked(batch, t, chunks)
    if chunks == 1:
        z = _embed(engine, attacked)
        loss = _loss(engine, z, t, batch)
        engine.backward(loss)
        return StepOutput(loss.detach(), _detached(adversarial.split(z)[0]), t, batch)

    parts = attacked.chunks(chunks)
    rng_states: list[list[Tensor]] = []  # of each chunk's first pass
    embedded: list[Tensors] = []
    for k, part in enumerate(parts):
        rng_states.append(random_state(engine.device))
        with torch.set_grad_enabled(k >= chunks - keep):
            embedded.append(_embed(engine, part))
    rng_after = random_state(engine.device)

    z = {name: _leaf(x) for name, x in join([_detached(part) for part in embedded]).items()}
    loss = _loss(engine, z, t, batch)
    leaves = {name: x for name, x in z.items() if x.requires_grad}
    parameters = engine.trained
    grads = torch.autograd.grad(loss, [*leaves.values(), *parameters], allow_unused=True)
    by_leaf = {name: g.chunk(chunks) for name, g in zip(leaves, grads, strict=False) if g is not None}
    # A parameter that the loss itself uses, such as a learnable temperature, has its gradient already.
    terms = [(p * g).sum() for p, g in zip(parameters, grads[len(leaves) :], strict=True) if g is not None]

    for k in reversed(range(chunks)):
        z_chunk = embedded.pop()
        if k < chunks - keep:
            set_random_state(rng_states[k], engine.device)
            with batch_norm.frozen(engine.method):
                z_chunk = _embed(engine, parts[k])
        # The sum of z * g has the gradient g with respect to z, and is a scalar that the engine can scale like a loss.
        terms += [(z_chunk[name] * g[k]).sum() for name, g in by_leaf.items() if z_chunk[name].requires_grad]
        if terms:  # else all of embed is frozen, and the loss's own parameters have been trained with another chunk
            engine.backward(torch.stack(terms).sum())
        terms = []
    set_random_state(rng_after, engine.device)
    return StepOutput(loss.detach(), _detached(adversarial.split(z)[0]), t, batch)


def check_finite(engine: Engine, outcome: StepOutput, step: int, flags: Sequence[bool] = ()) -> list[bool]:
    """Checks loss and gradients of all ranks; to be called between forward_backward and engine.step.

    One small all-reduce carries this and the caller's flags (signals, a checkpoint that is due). Returns for each flag
    whether any rank has raised it. In fp16 a gradient overflow is left to the loss scale while that is above 1. This is
    the only place in a step where the host waits for the accelerator, and it waits once.

    Raises NonFinite, on every rank, where the loss or the gradient of any rank is not finite.
    """
    world, rank = collectives.world_size(), collectives.rank()
    votes = torch.tensor([0] * (2 * world) + [int(flag) for flag in flags])  # losses and gradients by rank, then flags
    votes = votes.to(engine.device, non_blocking=True)  # a blocking copy would wait for the backward
    votes[rank : 2 * world : world] = torch.stack([outcome.loss.isfinite(), engine.finite()]).logical_not()
    agreed = engine.agree(votes).tolist()
    loss_ranks = [r for r in range(world) if agreed[r]]
    gradient_ranks = [r for r in range(world) if agreed[world + r]]
    if loss_ranks or (gradient_ranks and engine.loss_scale <= 1):
        raise NonFinite(step, loss_ranks, gradient_ranks)
    return [bool(flag) for flag in agreed[2 * world :]]


def join(parts: list[Tensors]) -> dict[str, Tensor]:
    """The chunks' outputs, concatenated in order: those of the whole batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _embed(engine: Engine, batch: Batch) -> Tensors:
    return adversarial.embed(engine.method, batch, engine.embed)


def _loss(engine: Engine, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return adversarial.loss(engine.method, z, t, batch, engine.options.adversarial)


def _detached(z: Tensors) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in z.items()}


def _leaf(x: Tensor) -> Tensor:
    """x as a leaf that requires grad, in fp32 at least: an fp16 gradient would underflow, being not yet scaled."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() if x.is_floating_point() else x


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
