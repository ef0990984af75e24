"""One step's forward and backward, whole or in chunks, and the check that stands between it and the update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives as across
from kilobatch.methods.method import Tensors
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.trainer.checkpoint.rng_state import random_state, set_random_state
from kilobatch.trainer.engine import Engine


@dataclass(frozen=True)
class Outcome:
    """loss: 0-dim, this rank's own mean; z, t: the method's outputs for this rank's batch. None carries gradient."""

    loss: Tensor
    z: Tensors
    t: Tensors


class NonFinite(RuntimeError):
    """A loss or a gradient is infinite or no number. Raised on every rank, before the update."""

    def __init__(self, step: int, loss_ranks: list[int], gradient_ranks: list[int]) -> None:
        self.step, self.loss_ranks, self.gradient_ranks = step, loss_ranks, gradient_ranks
        parts = [("the loss", loss_ranks), ("the gradient", gradient_ranks)]
        found = " and ".join(f"{what} on {_ranks(ranks)}" for what, ranks in parts if ranks)
        super().__init__(
            f"step {step}: not finite: {found}. Nothing was updated; the last checkpoint is good. "
            "Lower the learning rate, lengthen the warm-up, or use engine.precision=fp32"
        )


def forward_backward(engine: Engine, batch: Batch) -> Outcome:
    """This rank's gradients of method.loss over its whole batch, added to the parameters' .grad; not yet averaged.

    In chunks C > 1, the memory of one chunk (Gao et al., 2021, arxiv.org/abs/2101.06983): embeddings first without
    gradient, the loss and its gradient by embedding from all of them, then chunk by chunk once more for the
    parameters. Dropout draws the same in both passes, and only the first counts for running statistics.

    The last `keep` chunks keep the graph of their first pass instead of a second one. Chunks go back from the last to
    the first: the kept graphs are gone when the others are made, and gradients add up in the same order for any keep.
    """
    chunks, keep = engine.chunking.decided(batch.views)
    if chunks == 1:
        t, z = engine.target(batch.views), engine.embed(batch.views)
        loss = engine.method.loss(z, t, batch)
        engine.backward(loss)
        return Outcome(loss.detach(), _detached(z), t)

    parts = batch.chunks(chunks)
    t = join([engine.target(part.views) for part in parts])
    draws: list[list[Tensor]] = []
    embedded: list[Tensors] = []
    for k, part in enumerate(parts):
        draws.append(random_state(engine.device))
        with torch.set_grad_enabled(k >= chunks - keep):
            embedded.append(engine.embed(part.views))
    after = random_state(engine.device)

    z = {name: _leaf(x) for name, x in join([_detached(part) for part in embedded]).items()}
    loss = engine.method.loss(z, t, batch)
    leaves = {name: x for name, x in z.items() if x.requires_grad}
    parameters = engine.trained
    found = torch.autograd.grad(loss, [*leaves.values(), *parameters], allow_unused=True)
    by_leaf = {name: g.chunk(chunks) for name, g in zip(leaves, found, strict=False) if g is not None}
    # A parameter that stands in the loss itself, such as a learnable temperature, has its gradient already.
    terms = [(p * g).sum() for p, g in zip(parameters, found[len(leaves) :], strict=True) if g is not None]

    for k in reversed(range(chunks)):
        again = embedded.pop()
        if k < chunks - keep:
            set_random_state(draws[k], engine.device)
            with norm.frozen(engine.method):
                again = engine.embed(parts[k].views)
        # A number with the wanted gradient, for the engine to scale as it would the loss.
        terms += [(again[name] * g[k]).sum() for name, g in by_leaf.items() if again[name].requires_grad]
        engine.backward(torch.stack(terms).sum())
        terms = []
    set_random_state(after, engine.device)
    return Outcome(loss.detach(), _detached(z), t)


def check_finite(engine: Engine, outcome: Outcome, step: int, flags: Sequence[bool] = ()) -> list[bool]:
    """Between forward_backward and engine.step: stops all ranks together when any has a loss or gradient not finite.

    The step's one small all-reduce also agrees on the caller's flags (signals, a checkpoint that is due): returns
    which of them any rank has raised. In fp16 a gradient overflow is left to the loss scale while that is above 1.
    Here alone the host waits for an accelerator in every step, once.

    Raises NonFinite, on every rank.
    """
    world, rank = across.size(), across.rank()
    votes = torch.tensor([0] * (2 * world) + [int(flag) for flag in flags])  # losses and gradients by rank, then flags
    votes = votes.to(engine.device, non_blocking=True)  # else the copy waits for the backward
    votes[rank : 2 * world : world] = torch.stack([outcome.loss.isfinite(), engine.finite()]).logical_not()
    agreed = engine.agree(votes).tolist()
    loss_ranks = [r for r in range(world) if agreed[r]]
    gradient_ranks = [r for r in range(world) if agreed[world + r]]
    if loss_ranks or (gradient_ranks and engine.loss_scale <= 1):
        raise NonFinite(step, loss_ranks, gradient_ranks)
    return [bool(flag) for flag in agreed[2 * world :]]


def join(parts: list[Tensors]) -> dict[str, Tensor]:
    """The outputs of chunks, in order, as those of the batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _detached(z: Tensors) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in z.items()}


def _leaf(x: Tensor) -> Tensor:
    """In fp32 at least: a gradient by an fp16 embedding would underflow, for the loss scale comes later."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() if x.is_floating_point() else x


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
