"""BatchNorm whose statistics and running averages are the same on every rank, for any ranks x chunks."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* have an underscore, but are what torch's own optimizers are made of.

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from kilobatch.methods import collectives as across
from kilobatch.methods.networks.options import Mode


class _Normalise(Function):
    """Batch normalisation over the samples of every rank: one small sum over ranks forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, C, ...) -> normalised x, and the global mean and unbiased variance (C,), for the running ones."""
        count = x.numel() // x.shape[1]
        scratch = torch.zeros_like(weight), torch.zeros_like(weight)  # with them, halves get fp32 statistics
        mean, var = (s.double() for s in torch.batch_norm_update_stats(x, *scratch, 0.0))
        # Moments about zero add up over ranks. They lose (mean / std)^2 of their precision, so they are in fp64: at a
        # mean of 1000 std the variance is off by 1e-10, and where that matters x itself has no digits left in fp32.
        sums = across.small_sum(torch.cat([mean, var + mean**2, mean.new_ones(1)]) * count)
        total, square, count = sums.split([len(mean), len(mean), 1])
        mean = total / count
        square = (square - total * mean).clamp(min=0)  # about the global mean; rounding could leave less than nothing
        mean, var, unbiased = (s.to(weight.dtype) for s in (mean, square / count, square / (count - 1)))
        ctx.save_for_backward(x, weight, mean, var, count.to(weight.dtype))
        ctx.eps, ctx.biased = eps, bias is not None
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # With the statistics held fixed: dx = dy * scale, and this rank's sums of dy * x_hat and of dy.
        dx, sum_dy_x, sum_dy = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        every_dy_x, every_dy = across.small_sum(torch.stack([sum_dy_x, sum_dy])) / count
        # Through the statistics: -scale * (mean(dy) + x_hat * mean(dy * x_hat)), again of the form of a batch norm.
        scale = weight * torch.rsqrt(var + ctx.eps)
        dx += F.batch_norm(x, mean, var, -scale * every_dy_x, -scale * every_dy, eps=ctx.eps)
        return dx, sum_dy_x, sum_dy if ctx.biased else None, None


class BatchNorm(nn.Module):
    """For (N, C) and (N, C, H, W); the state dict is that of torch's BatchNorm1d and BatchNorm2d.

    mode "global": statistics over the batch of every rank. "local": over what one forward sees, so W ranks x C chunks
    equals one rank x W * C chunks. Statistics are fp32 (or the parameters' type) whatever the autocast type.

    A training forward does not move the running statistics: it adds to a sum, and commit() moves them once a step by
    the average over forwards and ranks. center=False leaves the bias out, affine=False the weight as well.
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
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.mode == "global" and across.size() > 1:
            y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
        else:
            # With momentum 1 the "running" statistics become this batch's own, unbiased as torch keeps them.
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            y = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        if self.counts:
            self.pending_mean += mean
            self.pending_var += var
            self.pending_forwards += 1
        return y

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, mode={self.mode}, eps={self.eps}, momentum={self.momentum}"


def norms(module: nn.Module) -> list[BatchNorm]:
    return [m for m in module.modules() if isinstance(m, BatchNorm)]


def requires_whole_batch(module: nn.Module) -> bool:
    """Whether a norm reads the global batch, so that a batch cannot be computed in chunks."""
    return any(norm.mode == "global" for norm in norms(module))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Training forwards inside leave the pending statistics alone: for a chunk's second pass."""
    before = [(norm, norm.counts) for norm in norms(module)]
    try:
        for norm, _ in before:
            norm.counts = False
        yield
    finally:
        for norm, counts in before:
            norm.counts = counts


@torch.no_grad()
def commit(module: nn.Module) -> None:
    """Moves the running statistics by the pending ones' average over forwards and ranks; call once per step on every
    rank. One all-reduce for all norms. A norm without a forward since the last commit stays as it is, and so does one
    that never counts: a momentum encoder's.
    """
    moved = [norm for norm in norms(module) if norm.counts]
    if not moved:
        return
    pending = [getattr(norm, name) for name in ("pending_mean", "pending_var", "pending_forwards") for norm in moved]
    running = [getattr(norm, name) for name in ("running_mean", "running_var") for norm in moved]
    sizes = [len(x) for x in running]
    # In a row, for few operations instead of some for each norm, while an accelerator stands idle.
    sums, forwards = across.all_sum(torch.cat(pending)).split([sum(sizes), len(moved)])
    seen = forwards.clamp(max=1)  # 0 or 1 for each norm: kept on the device, so that no step waits for it
    rates = torch._foreach_mul(seen.split(1), [norm.momentum for norm in moved])

    def spread(each: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.expand(size) for x, size in zip([*each, *each], sizes, strict=True)])

    after = torch.cat(running).lerp_(sums / spread(forwards.clamp(min=1).split(1)), spread(rates))
    torch._foreach_copy_(running, after.split(sizes))
    torch._foreach_add_([norm.num_batches_tracked for norm in moved], seen.to(torch.int64).unbind())
    torch._foreach_zero_(pending)
