"""A method with every kind of parameter, trained at ZeRO stages 0, 1 and 2 side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.parameter_groups import ParameterGroup
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim import zero_partitions
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import check_finite, forward_backward
from tests.helpers.toy_method import Toy

CPU = torch.device("cpu")
BATCH = 24
STEPS = 20


class Net(Toy):
    """A network with convolutions, BatchNorm and other parameters that an optimizer may have: one that never gets a
    gradient, a frozen one, one that LARS does not adapt, one outside the encoder."""

    def __init__(self, mode: batch_norm.Mode) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            batch_norm.BatchNorm(8, mode=mode),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            batch_norm.BatchNorm(12, mode=mode),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.encoder[3].bias.requires_grad_(False)
        self.last = nn.Linear(12 * 4, 8)
        self.spare = nn.Parameter(torch.randn(5, 3))

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup("last.weight", adapt=False)]

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        views = batch.views[0]
        return {"z": self.last(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])}


class Single(Toy):
    """A method with a single adapted element, so that all ranks but the first have no fragment of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.encoder, self.scale = nn.Flatten(), nn.Parameter(torch.full((1, 1), 2.0))

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {"z": (self.scale * batch.views[0][:, :, :, 0, :3].flatten(2))[..., :8].sin()}


def net(mode: batch_norm.Mode = "global", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(mode)


def own_batch(step: int) -> Batch:
    views = torch.randn(BATCH, 2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    whole = make_batch(views, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64))
    return whole.chunks(collectives.world_size())[collectives.rank()]


def make(method: Toy, stage: int, name: str = "lars", recipe: dict[str, Any] | None = None, **options: Any) -> Engine:
    section: dict[str, Any] = {"name": name, "lr": 9.0, "weight_decay": 0.01, "trust_coefficient": 0.02}
    optimizer = build_optimizer(OptimizerOptions(**section | (recipe or {})), method, BATCH)
    return Engine(method, optimizer, EngineOptions(zero=stage, **options), CPU, BATCH // dist.get_world_size())  # pyright: ignore[reportArgumentType]


def train(engine: Engine, steps: range, lr: float = 1.0) -> list[Tensor]:
    losses = []
    for step in steps:
        outcome = forward_backward(engine, own_batch(step))
        check_finite(engine, outcome, step)
        engine.step(lr * (1 + step) / STEPS)
        batch_norm.commit(engine.method)
        losses.append(outcome.loss)
    return losses


def whole_state(engine: Engine) -> dict[str, Tensor]:
    """Parameters, masters and optimizer state, whole, read by DeepSpeed's own map of ZeRO's fragments."""
    named, state = dict(engine.method.named_parameters()), engine.optimizer.state
    found = {f"method.{name}": p.detach().clone() for name, p in named.items()}
    optimized = {name: p for name, p in named.items() if p.requires_grad}
    sharded = engine._deepspeed.optimizer
    if not engine.options.zero:
        return found | {f"{key}.{name}": x.clone() for name, p in optimized.items() for key, x in state[p].items()}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    sharded._hp_optimizer_states_linked = False  # it links the first group's state alone, and once
    sharded._lazy_init_hp_params_optimizer_state()
    for name, p in optimized.items():
        master: Any = safe_get_full_fp32_param(p)
        assert torch.equal(master, p), f"the master of {name}"
        group = next(i for i, members in enumerate(sharded.bit16_groups) if any(p is member for member in members))
        for key, x in state[sharded.single_partition_of_fp32_groups[group]].items():
            whole: Any = x.clone() if x.dim() == 0 else safe_get_full_optimizer_state(p, key)
            found[f"{key}.{name}"] = whole
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of all tensors, relative to the tensor's norm."""
    assert found.keys() == expected.keys()
    floats = [name for name, x in expected.items() if x.dim() and not name.endswith("shard.value")]
    sizes = {name: expected[name].norm().clamp(min=1e-3) for name in floats}
    return max(((found[name] - expected[name]).norm() / size).item() for name, size in sizes.items())


def copy_state(leader: Engine, follower: Engine) -> None:
    """Gives the follower the leader's parameters and optimizer state."""
    state = leader.optimizer.state
    with torch.no_grad():
        for ours, theirs in zip(follower.method.parameters(), leader.method.parameters(), strict=True):
            ours.copy_(theirs)
        zero_partitions.refresh(follower._deepspeed.optimizer)
        named = dict(leader.method.named_parameters())
        for part in follower._parts:
            mine = follower.optimizer.state[part.flat]
            for key in [key for key, x in state[named[part.names[0]]].items() if x.dim()]:
                flat = mine.setdefault(key, torch.zeros_like(part.flat))
                for f in part.fragments:
                    theirs = state[named[part.names[f.parameter]]][key].flatten()
                    f.of(flat).copy_(theirs[f.start : f.start + f.numel])


def lockstep(steps: int, start: Callable[[], Toy] = net, **options: Any) -> list[float]:
    """The largest differences of stages 1 and 2 from stage 0, in steps that all begin from the state of stage 0."""
    leader, *followers = [make(start(), stage, **options) for stage in (0, 1, 2)]
    errors = [0.0, 0.0]
    for step in range(steps):
        if step:
            for follower in followers:
                copy_state(leader, follower)
        train(leader, range(step, step + 1))
        for i, follower in enumerate(followers):
            train(follower, range(step, step + 1))
            errors[i] = max(errors[i], difference(whole_state(follower), whole_state(leader)))
            if isinstance(leader.optimizer, LARS) and isinstance(follower.optimizer, LARS):
                ratios = leader.optimizer.trust_ratios(), follower.optimizer.trust_ratios()
                assert ratios[0].keys() == ratios[1].keys() and (ratios[0] or start is not net)
                for name, q in ratios[0].items():
                    torch.testing.assert_close(ratios[1][name], q, rtol=1e-5, atol=0)
    return errors
