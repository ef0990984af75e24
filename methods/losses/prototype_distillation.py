"""Distillation between views by a softmax over prototypes, whose scores never exist for a whole batch at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CPU_SCORES, ACCELERATOR_SCORES = 2**21, 2**25  # of a block, as numbers


def prototype_distillation(
    z: Tensor,
    prototypes: Tensor,
    q_of: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The mean over this rank's n samples and over pairs of a teacher's view i and another view v of DINO's
    cross-entropy -sum_k q_i,k log softmax(z_v C^T / tau)_k (Caron et al. 2021, arxiv.org/abs/2104.14294, eq. 1 and 3).

    z (n, V, D): the student's rows, the teacher's T views first; prototypes (K, D): C, the student's. q_of: the
    teacher's rows t (n, T, D), its prototypes B (K, D) and the centre c (K,), q = softmax((t B^T - c) / tau_T), without
    gradient. Nothing crosses ranks.

    Computed in blocks of samples, with the gradient in the forward: of V K scores a sample one block's exist at a time.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _Distillation.apply(z, prototypes, *q_of, temperature, teacher_temperature)


def teacher_probabilities(t: Tensor, prototypes: Tensor, center: Tensor, temperature: float) -> Tensor:
    """q (n, T, K) of the teacher's rows t (n, T, D)."""
    return (torch.addmm(-center, t.flatten(0, 1), prototypes.T) / temperature).softmax(1).unflatten(0, t.shape[:2])


def information(p: Tensor) -> Tensor:
    """What the assignments p (..., K) say of which image it is, in nats: the entropy of their mean less their mean
    entropy. 0 where all images have one and the same, be it even or a single prototype; at most ln K."""
    rows = p.flatten(0, -2)
    return torch.special.entr(rows.mean(0)).sum() - torch.special.entr(rows).sum(1).mean()


class _Distillation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        prototypes: Tensor,
        t: Tensor,
        teacher_prototypes: Tensor,
        center: Tensor,
        temperature: float,
        teacher_temperature: float,
    ) -> Tensor:
        (n, views, _), taught = z.shape, t.shape[1]
        most = CPU_SCORES if z.device.type == "cpu" else ACCELERATOR_SCORES
        size = max(1, most // (views * len(prototypes)))
        share = 1 / (n * taught * (views - 1))  # of a sample and a pair in the mean
        # How many of the teacher's views each of the student's is compared with.
        pairs = z.new_tensor([taught - 1] * taught + [taught] * (views - taught))[:, None]
        total, dz, dc = z.new_zeros(()), torch.empty_like(z), torch.zeros_like(prototypes)
        for rows, taught_rows, d in zip(z.split(size), t.split(size), dz.split(size), strict=True):
            q = teacher_probabilities(taught_rows, teacher_prototypes, center, teacher_temperature)
            q_sum = q.sum(1)  # (b, K)
            log_p = (rows / temperature @ prototypes.T).log_softmax(2)  # (b, V, K)
            # The sum over pairs, by the sum over all views less each one's with itself.
            total += (q * log_p[:, :taught]).sum() - (q_sum * log_p.sum(1)).sum()
            g = log_p.exp_().mul_(pairs).sub_(q_sum[:, None])  # by the scores
            g[:, :taught] += q
            torch.matmul(g, prototypes, out=d)
            dc.addmm_(g.flatten(0, 1).T, rows.flatten(0, 1))
        ctx.save_for_backward(dz.mul_(share / temperature), dc.mul_(share / temperature))
        return total * share

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dz, dc = ctx.saved_tensors
        return grads[0] * dz, grads[0] * dc, None, None, None, None, None
