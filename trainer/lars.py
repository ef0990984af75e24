"""LARS: You, Gitman, Ginsburg, 2017. arxiv.org/abs/1708.03888; in the three forms that papers' numbers come from."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* have an underscore, but are what torch's own optimizers are made of.

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from data.refusal import Refusal, did_you_mean
from trainer.options import Dialect

EPSILON = 1e-8  # in the denominators of bolts and larc, as their authors have it


class LARS(Optimizer):
    """Every tensor's step is made proportional to its own norm, by the trust ratio q:

        google  u = g + λ w;  q = η |w| / |u|;                   m = μ m + lr q u;  w -= m
        bolts   u = g + λ w;  q = η |w| / (|g| + λ |w| + ε);     m = μ m + q u;     w -= lr m
        larc    as bolts, with q = min(q / lr, 1)

    google is `lars_optimizer.py` of google-research/simclr (classic momentum), bolts is `lars.py` of Lightning Bolts,
    larc is NVIDIA apex's LARC (clip) around torch's SGD. With google a new lr leaves alone what the momentum holds;
    with larc the schedule has no effect on a tensor as long as its ratio is below lr.

    Where |w| or the gradient's norm is 0, q = 1; bolts and larc then leave the decay out too. With λ = 0 bolts still
    adapts here; its authors' code then does not. nesterov: w -= μ m + lr q u (google), lr (μ m + q u) (the others).

    A parameter group has `adapt`: False is plain momentum SGD. A group that does not say is split: tensors with one
    dimension or none (biases, norms) are neither adapted nor decayed. `names` of a group, if given, name its tensors in
    trust_ratios().

    Raises Refusal for an unknown dialect or a negative number.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        dialect: Dialect = "google",
    ) -> None:
        if dialect not in get_args(Dialect):
            raise Refusal(f"LARS has no dialect '{dialect}'{did_you_mean(dialect, get_args(Dialect))}")
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        for name, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise Refusal(f"LARS: {name} is {value}; it must be 0 or more")
        self.dialect, self.nesterov = dialect, nesterov
        self._ratios: dict[str, Tensor] = {}
        super().__init__(params, numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "adapt" in param_group:
            return super().add_param_group(param_group)
        given = param_group["params"]
        tensors = [given] if isinstance(given, Tensor) else list(given)
        matrices, vectors = [p for p in tensors if p.ndim > 1], [p for p in tensors if p.ndim <= 1]
        if matrices:
            super().add_param_group({**param_group, "params": matrices, "adapt": True})
        if vectors:
            super().add_param_group({**param_group, "params": vectors, "adapt": False, "weight_decay": 0.0})
        return None

    @torch.no_grad()
    def allocate(self) -> None:
        """Makes the momentum of every group, where it is not yet there: DeepSpeed's ZeRO links the optimizer's state
        once, after the first group's step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.allocate()
        for i, group in enumerate(self.param_groups):
            held = [k for k, p in enumerate(group["params"]) if p.grad is not None]
            if held:
                self._step_group(i, group, held)
        return loss

    def _step_group(self, i: int, group: dict[str, Any], held: list[int]) -> None:
        """held: which of the group's parameters have a gradient."""
        weights: list[Tensor] = [group["params"][k] for k in held]
        grads: list[Tensor] = [w.grad for w in weights if w.grad is not None]
        buffers: list[Tensor] = [self.state[w]["momentum_buffer"] for w in weights]
        lr, momentum = group["lr"], group["momentum"]
        inside = lr if self.dialect == "google" else 1.0  # what the momentum holds besides q u
        outside = 1.0 if self.dialect == "google" else lr

        if group["adapt"]:
            updates, ratios = self._adapted(weights, grads, group)
            names = group.get("names") or [f"{i}.{k}" for k in range(len(group["params"]))]
            self._ratios.update(zip((names[k] for k in held), ratios, strict=True))
            torch._foreach_mul_(updates, [inside * q for q in ratios])
        else:
            decayed = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
            updates = list(torch._foreach_mul(decayed, inside))

        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        if self.nesterov:
            torch._foreach_add_(updates, buffers, alpha=momentum)
        else:
            updates = buffers
        torch._foreach_add_(weights, updates, alpha=-outside)

    def _adapted(
        self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """u and q of every tensor."""
        decay, trust = group["weight_decay"], group["trust_coefficient"]
        if self.dialect == "google":
            updates = list(torch._foreach_add(grads, weights, alpha=decay))
            w, u = norms(weights), norms(updates)
            ratios = torch.where((w > 0) & (u > 0), trust * w / u, 1.0)
            return updates, ratios.unbind()
        w, g = norms(weights), norms(grads)
        ratios = trust * w / (g + decay * w + EPSILON)
        if self.dialect == "larc":
            ratios = (ratios / group["lr"]).clamp(max=1.0) if group["lr"] > 0 else torch.ones_like(ratios)
        defined = (w > 0) & (g > 0)
        updates = list(torch._foreach_mul(weights, (decay * defined).unbind()))
        torch._foreach_add_(updates, grads)
        return updates, torch.where(defined, ratios, 1.0).unbind()

    def trust_ratios(self) -> dict[str, Tensor]:
        """q of the last step for every adapted tensor, 0-dimensional on its device; reading them waits for it."""
        return dict(self._ratios)


def norms(tensors: list[Tensor]) -> Tensor:
    """(P,) the 2-norm of each tensor. Where tensors are cut over ranks, this is the place that must cross them."""
    return torch.stack(torch._foreach_norm(tensors))
