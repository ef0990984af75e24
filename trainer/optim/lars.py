"""LARS (You, Gitman, Ginsburg, 2017, arxiv.org/abs/1708.03888), in the four forms that papers' numbers come from."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* have an underscore, but are what torch's own optimizers are made of.

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.trainer.optim.norms import parameter_norms
from kilobatch.trainer.optim.options import Dialect
from kilobatch.trainer.optim.zero_partitions import Partition

EPSILON = 1e-8  # in the denominators of bolts and larc, as their authors have it


class LARS(Optimizer):
    """An optimizer that makes each tensor's step proportional to the tensor's norm, by the trust ratio q:

        google  u = g + λ w;  q = η |w| / |u|;                   m = μ m + lr q u;  w -= m
        bolts   u = g + λ w;  q = η |w| / (|g| + λ |w| + ε);     m = μ m + q u;     w -= lr m
        larc    as bolts, with q = min(q / lr, 1)
        byol    u = g + λ w;  q = η |w| / |u|;                   m = μ m + q u;     w -= lr m

    google is `lars_optimizer.py` of google-research/simclr (classic momentum), bolts is `lars.py` of Lightning Bolts,
    larc is NVIDIA apex's LARC (clip) around torch's SGD, byol is `optimizers.py` of BYOL's authors, which MoCo v3's,
    Barlow Twins' and VICReg's authors have as well. With google a change of lr does not scale what the momentum already
    holds; with larc the schedule has no effect on a tensor as long as its ratio is below lr.

    Where |w| or the gradient's norm is 0, q = 1; bolts and larc then omit the decay, too. With λ = 0 bolts adapts here,
    whereas its authors' code does not. nesterov: w -= μ m + lr q u (google), lr (μ m + q u) (the others;
    BYOL's authors have none).

    A parameter group with `adapt` False is updated by plain momentum SGD. A group without `adapt` is split in two: its
    tensors with one dimension or none (biases, norms) are neither adapted nor decayed. The optional `names` of a group
    name its tensors in trust_ratios().

    Under DeepSpeed's ZeRO 1 and 2 a group holds one flat tensor of this rank, and step() is called for one group at a
    time; use_partitions() says where the parameters lie in it. The squares of each parameter's fragments are then
    summed over ranks, in one all-reduce of two numbers for each parameter of the adapted group. All ranks take part in
    it, also one that holds no fragment.

    Raises UserError for an unknown dialect or a negative number.
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
            raise UserError(f"LARS has no dialect '{dialect}'{did_you_mean(dialect, get_args(Dialect))}")
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        for name, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise UserError(f"LARS: {name} is {value}; it must be 0 or more")
        self.dialect, self.nesterov = dialect, nesterov
        self._ratios: dict[str, Tensor] = {}
        self._partitions: dict[Tensor, Partition] = {}
        super().__init__(params, numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "adapt" in param_group:
            return super().add_param_group(param_group)
        params = param_group["params"]
        tensors = [params] if isinstance(params, Tensor) else list(params)
        matrices, vectors = [p for p in tensors if p.ndim > 1], [p for p in tensors if p.ndim <= 1]
        if matrices:
            super().add_param_group({**param_group, "params": matrices, "adapt": True})
        if vectors:
            super().add_param_group({**param_group, "params": vectors, "adapt": False, "weight_decay": 0.0})
        return None

    def use_partitions(self, partitions: Sequence[Partition]) -> None:
        """Updates the partitions' flat tensors from now on. Call it once ZeRO has put one in place of each group."""
        self._partitions = {part.flat: part for part in partitions}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, group in enumerate(self.param_groups):
            with_grad = [k for k, p in enumerate(group["params"]) if p.grad is not None]
            if with_grad:
                self._step_group(i, group, with_grad)
        return loss

    def _step_group(self, i: int, group: dict[str, Any], with_grad: list[int]) -> None:
        """with_grad: the indices of the group's parameters that have a gradient."""
        tensors: list[Tensor] = [group["params"][k] for k in with_grad]
        grads: list[Tensor] = [p.grad for p in tensors if p.grad is not None]
        for p in tensors:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in tensors]
        part = self._partitions.get(tensors[0])
        if part is None:
            names = group.get("names") or [f"{i}.{k}" for k in range(len(group["params"]))]
            self._update(group, tensors, grads, buffers, [names[k] for k in with_grad], None)
        else:
            self._update(group, part.of(tensors[0]), part.of(grads[0]), part.of(buffers[0]), part.names, part)

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        names: list[str],
        part: Partition | None,
    ) -> None:
        """weights, grads, buffers: whole tensors, one for each of names, or the fragments of part."""
        lr, momentum = group["lr"], group["momentum"]
        inside = lr if self.dialect == "google" else 1.0  # the factor of q u in the momentum
        outside = 1.0 if self.dialect == "google" else lr  # the factor of the momentum in the step

        if group["adapt"]:
            updates, ratios = self._adapted(weights, grads, group, part)
            self._ratios.update(zip(names, ratios.unbind(), strict=True))
            factors = (inside * (ratios if part is None else ratios[part.parameters])).unbind()
        else:
            updates = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"])) if weights else []
            factors = inside
        if not weights:  # this rank has no fragment of the group, and has taken part in the all-reduce
            return
        torch._foreach_mul_(updates, factors)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        if self.nesterov:
            torch._foreach_add_(updates, buffers, alpha=momentum)
        else:
            updates = buffers
        torch._foreach_add_(weights, updates, alpha=-outside)

    def _adapted(
        self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any], part: Partition | None
    ) -> tuple[list[Tensor], Tensor]:
        """u of every tensor or fragment of this rank, and (P,) q of every parameter of the group."""
        decay, trust = group["weight_decay"], group["trust_coefficient"]
        if self.dialect in ("google", "byol"):
            updates = list(torch._foreach_add(grads, weights, alpha=decay)) if weights else []
            w, u = parameter_norms([weights, updates], part)
            return updates, torch.where((w > 0) & (u > 0), trust * w / u, 1.0)
        w, g = parameter_norms([weights, grads], part)
        ratios = trust * w / (g + decay * w + EPSILON)
        if self.dialect == "larc":
            ratios = (ratios / group["lr"]).clamp(max=1.0) if group["lr"] > 0 else torch.ones_like(ratios)
        defined = (w > 0) & (g > 0)
        ratios = torch.where(defined, ratios, 1.0)
        if not weights:
            return [], ratios
        decays = decay * (defined if part is None else defined[part.parameters])
        updates = list(torch._foreach_mul(weights, decays.to(weights[0].dtype).unbind()))
        torch._foreach_add_(updates, grads)
        return updates, ratios

    def trust_ratios(self) -> dict[str, Tensor]:
        """q of each adapted tensor in the last step, 0-dimensional, on the tensor's device."""
        return dict(self._ratios)
