"""BatchNorm whose statistics and running averages are the same on every rank, for any ranks x chunks."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* are private by name, but torch's own optimizers are made of them.

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from kilobatch.methods import collectives
from kilobatch.methods.networks.options import Mode


class _Normalise(Function):
    """Batch normalisation over the samples of every rank: one small sum over ranks forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, C, ...) -> normalised x, and the global mean and unbiased variance (C,), for the running ones."""
        count = x.numel() // x.shape[1]
        unused = torch.zeros_like(weight), torch.zeros_like(weight)  # fp32 ones make fp32 statistics of halves
        mean, var = (s.double() for s in torch.batch_norm_update_stats(x, *unused, 0.0))
        # Moments about zero add up over ranks. They lose (mean / std)^2 of their precision, so they are in fp64: at a
        # mean of 1000 std the variance is off by 1e-10, and where that matters x itself has no digits left in fp32.
        sums = collectives.all_reduce_small(torch.cat([mean, var + mean**2, mean.new_ones(1)]) * count)
        total, squares, count = sums.split([len(mean), len(mean), 1])
        mean = total / count
        squares = (squares - total * mean).clamp(min=0)  # about the global mean; rounding may make it negative
        mean, var, unbiased = (s.to(weight.dtype) for s in (mean, squares / count, squares / (count - 1)))
        ctx.save_for_backward(x, weight, mean, var, count.to(weight.dtype))
        ctx.eps, ctx.biased = eps, bias is not None
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # With fixed statistics: dx = dy * scale, and this rank's sums of dy * x_hat and of dy.
        dx, sum_dy_x, sum_dy = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        mean_dy_x, mean_dy = collectives.all_reduce_small(torch.stack([sum_dy_x, sum_dy])) / count
        # Through the statistics: -scale * (mean(dy) + x_hat * mean(dy * x_hat)), which is a batch norm, too.
        scale = weight * torch.rsqrt(var + ctx.eps)
        dx += F.batch_norm(x, mean, var, -scale * mean_dy_x, -scale * mean_dy, eps=ctx.eps)
        return dx, sum_dy_x, sum_dy if ctx.biased else None, None


class BatchNorm(nn.Module):
    """Batch normalisation of (N, C) and (N, C, H, W), with the state dict of torch's BatchNorm1d and BatchNorm2d.

    mode "global": statistics over the batches of all ranks. "local": over the samples of one forward, so that W ranks x
    C chunks equal one rank x W * C chunks. Statistics are fp32 (or the parameters' type) whatever the autocast type.

    A training forward does not change the running statistics: it adds to a sum, and commit() updates them once a step
    by the average over forwards and ranks. center=False leaves out the bias, affine=False the weight as well.

    stand_in: a norm that computes in this one's place (`standing_in`). It is no submodule, so that the state dict has
    its names once.
    """

    weight: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    pending_mean: Tensor
    pending_var: Tensor
    pending_forwards: Tensor

    def __init__(
        self,
        features: int,
        mode: Mode = "global",
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        center: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.mode, self.eps, self.momentum, self.counts = mode, eps, momentum, True
        self.stand_in: tuple[BatchNorm, ...] = ()  # one at most
        if affine:
            self.weight = nn.Parameter(torch.ones(features))
        else:
            self.register_buffer("weight", torch.ones(features), persistent=False)
        self.bias = nn.Parameter(torch.zeros(features)) if center and affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("pending_mean", torch.zeros(features), persistent=False)
        self.register_buffer("pending_var", torch.zeros(features), persistent=False)
        self.register_buffer("pending_forwards", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.stand_in), self).normalised(x, self.counts)

    def normalised(self, x: Tensor, counts: bool) -> Tensor:
        """x (N, C, ...), normalised. counts: whether the running statistics will take this forward in."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.mode == "global" and collectives.world_size() > 1:
            y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
        else:
            # With momentum 1 the "running" statistics become those of this batch, unbiased as torch keeps them.
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            y = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        if counts and self.counts:
            self.pending_mean += mean
            self.pending_var += var
            self.pending_forwards += 1
        return y

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, mode={self.mode}, eps={self.eps}, momentum={self.momentum}"


def norms(module: nn.Module) -> list[BatchNorm]:
    return [m for m in module.modules() if isinstance(m, BatchNorm)]


def requires_whole_batch(module: nn.Module) -> bool:
    """True if a norm reads the global batch, so that a batch cannot be computed in chunks."""
    return any(norm.mode == "global" for norm in norms(module))


def twins(module: nn.Module) -> nn.ModuleList:
    """A second norm for each of the module's, as it is now, in order."""
    return nn.ModuleList(copy.deepcopy(norm) for norm in norms(module))


@contextmanager
def standing_in(originals: Sequence[BatchNorm], twins: Sequence[BatchNorm]) -> Iterator[None]:
    """Lets each twin compute in its original's place."""
    try:
        for norm, twin in zip(originals, twins, strict=True):
            norm.stand_in = (twin,)
        yield
    finally:
        for norm in originals:
            norm.stand_in = ()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keeps training forwards inside it from changing the pending statistics: for the second pass of a chunk."""
    previous = [(norm, norm.counts) for norm in norms(module)]
    try:
        for norm, _ in previous:
            norm.counts = False
        yield
    finally:
        for norm, counts in previous:
            norm.counts = counts


@torch.no_grad()
def commit(module: nn.Module) -> None:
    """Updates the running statistics by the pending ones' average over forwards and ranks. To be called once per step
    on every rank; one all-reduce for all norms. A norm without a forward since the last commit stays as it is, and so
    does that of a momentum encoder without statistics of its own, which counts no forward.
    """
    tracking = [norm for norm in norms(module) if norm.counts]
    if not tracking:
        return
    pending = [getattr(norm, name) for name in ("pending_mean", "pending_var", "pending_forwards") for norm in tracking]
    running = [getattr(norm, name) for name in ("running_mean", "running_var") for norm in tracking]
    sizes = [len(x) for x in running]
    # All norms in one tensor: a few operations for each norm would leave an accelerator idle.
    sums, forwards = collectives.all_reduce_sum(torch.cat(pending)).split([sum(sizes), len(tracking)])
    updates = forwards.clamp(max=1)  # 0 or 1 for each norm, kept on the device: no step waits for it
    rates = torch._foreach_mul(updates.split(1), [norm.momentum for norm in tracking])

    def per_channel(per_norm: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.expand(size) for x, size in zip([*per_norm, *per_norm], sizes, strict=True)])

    updated = torch.cat(running).lerp_(sums / per_channel(forwards.clamp(min=1).split(1)), per_channel(rates))
    torch._foreach_copy_(running, updated.split(sizes))
    torch._foreach_add_([norm.num_batches_tracked for norm in tracking], updates.to(torch.int64).unbind())
    torch._foreach_zero_(pending)
