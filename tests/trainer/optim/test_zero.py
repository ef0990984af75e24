"""ZeRO 1 and 2 are stage 0 with less memory: the same updates, and checkpoints that any stage and world take up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.trainer import engine as engines
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim import zero_partitions as zero
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.optimizers import build
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import NonFinite, check_finite, forward_backward
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_method import Toy, weights

CPU = torch.device("cpu")
BATCH = 24
STEPS = 20
LR = {"lars": 1.0, "sgd": 0.05, "adamw": 0.01}
CHAINS = [(0, 2, 1), (2, 1, 0)]  # ZeRO's stage on 4, then 2, then 3 ranks
VARIANTS = [(dialect, nesterov) for dialect in ("google", "bolts", "larc") for nesterov in (False, True)]


class Net(Toy):
    """Convolutions and BatchNorm, and what else an optimizer meets: a parameter that never has a gradient, a frozen
    one, one that LARS does not adapt, one outside the encoder."""

    unadapted = ("last.weight",)

    def __init__(self, mode: norm.Mode) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            norm.BatchNorm(8, mode=mode),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            norm.BatchNorm(12, mode=mode),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.encoder[3].bias.requires_grad_(False)
        self.last = nn.Linear(12 * 4, 8)
        self.spare = nn.Parameter(torch.randn(5, 3))

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        return {"z": self.last(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])}


class Single(Toy):
    """One adapted element, of which all ranks but the first have nothing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.encoder, self.scale = nn.Flatten(), nn.Parameter(torch.full((1, 1), 2.0))

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        return {"z": (self.scale * views[:, :, :, 0, :3].flatten(2))[..., :8].sin()}


def net(mode: norm.Mode = "global", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(mode)


def own_batch(step: int) -> Batch:
    views = torch.randn(BATCH, 2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    whole = Batch(views, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64))
    return whole.chunks(across.size())[across.rank()]


def make(method: Toy, stage: int, name: str = "lars", recipe: dict[str, Any] | None = None, **options: Any) -> Engine:
    given: dict[str, Any] = {"name": name, "lr": 9.0, "weight_decay": 0.01, "trust_coefficient": 0.02, **(recipe or {})}
    optimizer = build(OptimizerOptions(**given), method, BATCH)
    return Engine(method, optimizer, EngineOptions(zero=stage, **options), CPU, BATCH // dist.get_world_size())  # pyright: ignore[reportArgumentType]


def train(engine: Engine, steps: range, lr: float = 1.0) -> list[Tensor]:
    losses = []
    for step in steps:
        outcome = forward_backward(engine, own_batch(step))
        check_finite(engine, outcome, step)
        engine.step(lr * (1 + step) / STEPS)
        norm.commit(engine.method)
        losses.append(outcome.loss)
    return losses


def truth(engine: Engine) -> dict[str, Tensor]:
    """Parameters, masters and optimizer's state, whole; by DeepSpeed's own map of ZeRO's fragments, not by ours."""
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
    """The largest of all tensors, relative to the tensor."""
    assert found.keys() == expected.keys()
    floats = [name for name, x in expected.items() if x.dim() and not name.endswith("shard.value")]
    sizes = {name: expected[name].norm().clamp(min=1e-3) for name in floats}
    return max(((found[name] - expected[name]).norm() / size).item() for name, size in sizes.items())


def free(**given: Any) -> dict[str, Any]:
    """Twenty steps at every stage from the same start, each going its own way."""
    runs = [make(net(), stage, **given) for stage in (0, 1, 2)]
    losses = [torch.stack(train(engine, range(STEPS))) for engine in runs]
    expected, start = weights(runs[0].method), weights(net())
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected]).norm()
    assert moved > 1
    return {"weights": [difference(weights(engine.method), expected) for engine in runs[1:]],
            "losses": [(x - losses[0]).abs().max().item() for x in losses[1:]]}  # fmt: skip


def follow(leader: Engine, follower: Engine) -> None:
    """Puts the follower where the leader is."""
    state = leader.optimizer.state
    with torch.no_grad():
        for ours, theirs in zip(follower.method.parameters(), leader.method.parameters(), strict=True):
            ours.copy_(theirs)
        zero.refresh(follower._deepspeed.optimizer)
        named = dict(leader.method.named_parameters())
        for part in follower._parts:
            mine = follower.optimizer.state[part.flat]
            for key in [key for key, x in state[named[part.names[0]]].items() if x.dim()]:
                flat = mine.setdefault(key, torch.zeros_like(part.flat))
                for f in part.fragments:
                    theirs = state[named[part.names[f.parameter]]][key].flatten()
                    f.of(flat).copy_(theirs[f.start : f.start + f.numel])


def lockstep(steps: int, start: Callable[[], Toy] = net, **given: Any) -> list[float]:
    """Single steps of stages 1 and 2 from where stage 0 stands: largest difference of masters and momentum of each."""
    leader, *followers = [make(start(), stage, **given) for stage in (0, 1, 2)]
    errors = [0.0, 0.0]
    for step in range(steps):
        if step:
            for follower in followers:
                follow(leader, follower)
        train(leader, range(step, step + 1))
        for i, follower in enumerate(followers):
            train(follower, range(step, step + 1))
            errors[i] = max(errors[i], difference(truth(follower), truth(leader)))
            if isinstance(leader.optimizer, LARS) and isinstance(follower.optimizer, LARS):
                ratios = leader.optimizer.trust_ratios(), follower.optimizer.trust_ratios()
                assert ratios[0].keys() == ratios[1].keys() and (ratios[0] or start is not net)
                for name, q in ratios[0].items():
                    torch.testing.assert_close(ratios[1][name], q, rtol=1e-5, atol=0)
    return errors


def clipped(stage: int) -> float:
    """The norm of an update by a gradient whose global norm was clipped to 0.5; without clipping it is above 5."""
    recipe = {"momentum": 0.0, "weight_decay": 0.0}
    engine = make(method := net(), stage, "sgd", recipe, clip=0.5)
    before = [p.detach().clone() for p in method.parameters()]
    train(engine, range(STEPS - 1, STEPS))  # with a learning rate of 1
    moved = [p - old for p, old in zip(method.parameters(), before, strict=True)]
    return torch.cat([x.flatten() for x in moved]).norm().item()


def all_reduces(stage: int) -> int:
    """How many LARS makes in a step."""
    engine, calls = make(net(), stage), []
    forward_backward(engine, own_batch(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(across, "all_sum", lambda x: calls.append(x) or dist.all_reduce(x) or x)
        engine.step(1.0)
    return len(calls)


def stops(stage: int) -> dict[str, Any]:
    """A gradient that is infinite on rank 1 alone, in the first of two chunks to be computed."""
    engine = make(method := net("local"), stage, chunks=2)
    train(engine, range(1))
    before, calls = truth(engine), []
    if across.rank() == 1:
        method.last.weight.register_hook(lambda g: g * torch.inf if not calls.append(1) and len(calls) == 1 else g)
    outcome = forward_backward(engine, own_batch(1))
    with pytest.raises(NonFinite) as raised:
        check_finite(engine, outcome, 1)
    after = truth(engine)
    return {"ranks": raised.value.gradient_ranks, "loss": raised.value.loss_ranks,
            "same": all(torch.equal(x, after[name]) for name, x in before.items())}  # fmt: skip


def resumed(folder: Path, name: str, stage: int) -> list[str]:
    """What differs between four steps in a row and two, a checkpoint, another engine, two steps."""
    whole = make(net(), stage, name)
    train(whole, range(2), LR[name])
    save(folder, whole)
    train(whole, range(2, 4), LR[name])
    other = make(net(seed=99), stage, name)
    other.restore(open_saved(folder / "step-00000002"))
    train(other, range(2, 4), LR[name])
    ours, theirs = truth(whole), truth(other)
    pieces = whole.pieces(), other.pieces()
    assert ours.keys() == theirs.keys() and pieces[0].keys() == pieces[1].keys()
    held = [name for name in pieces[0] if not torch.equal(pieces[0][name].tensor, pieces[1][name].tensor)]
    return held + [name for name in ours if not torch.equal(ours[name], theirs[name])]


def save(folder: Path, engine: Engine) -> None:
    with Checkpoints(folder, CheckpointOptions(), across.rank(), across.size()) as checkpoints:
        dist.barrier()  # no rank may save before all have one
        dist.barrier()
        checkpoints.save(2, engine.pieces(), {}, wait=True)


def on_four(folder: Path) -> dict[Any, Any]:
    """The start of the chains, and where they would end on four ranks at stage 0."""
    found: dict[Any, Any] = {}
    for name in ("lars", "adamw"):
        for stage, *_ in CHAINS:
            engine = make(net(), stage, name)
            train(engine, range(2), LR[name])
            save(folder / f"4-{name}-{stage}", engine)
            found[name, stage] = truth(engine)
            if stage == 0:
                train(engine, range(2, 6), LR[name])
                found[name, "end"] = truth(engine)
    return found


def goes_on(folder: Path, earlier: int, link: int) -> dict[Any, Any]:
    """One link of the chains: what it found in the checkpoint of `earlier` ranks, and what it leaves."""
    found: dict[Any, Any] = {}
    for name in ("lars", "adamw"):
        for chain in CHAINS:
            engine = make(net(seed=99), chain[link], name)
            engine.restore(open_saved(folder / f"{earlier}-{name}-{chain[0]}" / "step-00000002"))
            found[name, chain[0], "start"] = truth(engine)
            train(engine, range(2 * link, 2 * link + 2), LR[name])
            save(folder / f"{across.size()}-{name}-{chain[0]}", engine)
            found[name, chain[0]] = truth(engine)
    return found


def on_two(folder: Path) -> dict[Any, Any]:
    found = goes_on(folder, 4, 1)
    found |= {("lars", *variant): lockstep(2, recipe=dict(zip(("dialect", "nesterov"), variant, strict=True)))
              for variant in VARIANTS}  # fmt: skip
    found |= {
        "free": free(),
        "bf16": lockstep(STEPS, precision="bf16"),
        "all-reduces": [all_reduces(stage) for stage in (0, 1, 2)],
    }
    found |= {"sgd": lockstep(3, name="sgd"), "single": lockstep(3, Single)}
    found |= {"clip": lockstep(2, name="sgd", clip=0.5), "clipped": [clipped(stage) for stage in (0, 1, 2)]}
    for keep in (0, 1):
        found["chunks", keep] = lockstep(2, lambda: net("local"), chunks=2, keep=keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "BUCKET", 200)  # several buckets, and parameters that are larger than one
        found["buckets"] = lockstep(2)
    found |= {("stops", stage): stops(stage) for stage in (0, 1, 2)}
    found |= {("resumed", name, stage): resumed(folder / f"{name}-{stage}", name, stage)
              for name in LR for stage in (1, 2)}  # fmt: skip
    with pytest.raises(Refusal) as found["lamb"]:
        make(net(), 1, "lamb")
    return found | {"lamb": str(found["lamb"].value)}


def on_three(folder: Path) -> dict[Any, Any]:
    found = goes_on(folder, 2, 2)
    return found | {"free": free(), "bf16": lockstep(STEPS, precision="bf16"), "single": lockstep(3, Single)}


Found = dict[int, list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("checkpoints")
    parts = {4: on_four, 2: on_two, 3: on_three}  # in this order: the chains' checkpoints
    return {world: run_ranks(world, part, folder, timeout=400) for world, part in parts.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_lars_over_twenty_steps(world: int, ranks: Found) -> None:
    for rank in ranks[world]:
        assert max(rank["free"]["weights"]) <= 1e-6
        assert max(rank["free"]["losses"]) <= 1e-4  # of about 50


@pytest.mark.parametrize("world", [2, 3])
def test_lars_in_bf16(world: int, ranks: Found) -> None:
    """Step by step from the same weights: left to themselves, a last bit of a weight flips one of bf16."""
    for rank in ranks[world]:
        assert max(rank["bf16"]) <= 1e-6


@pytest.mark.parametrize(
    "case",
    [*[("lars", *variant) for variant in VARIANTS], "sgd", "single", "clip", "buckets", ("chunks", 0), ("chunks", 1)],
    ids=str,
)
def test_a_step_is_that_of_stage_0(case: Any, ranks: Found) -> None:
    for rank in ranks[2]:
        assert max(rank[case]) <= 1e-6


def test_clips_the_norm_over_all_ranks(ranks: Found) -> None:
    for rank in ranks[2]:
        assert rank["clipped"] == pytest.approx([0.5] * 3, rel=1e-4)


def test_a_rank_without_fragments_joins_the_all_reduce(ranks: Found) -> None:
    for world in (2, 3):
        assert max(max(rank["single"]) for rank in ranks[world]) <= 1e-6
    assert ranks[2][0]["all-reduces"] == [0, 1, 1]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_is_not_finite_stops_all_ranks(stage: int, ranks: Found) -> None:
    for rank in ranks[2]:
        assert rank["stops", stage] == {"ranks": [1], "loss": [], "same": True}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", list(LR))
def test_a_checkpoint_brings_back_every_bit(name: str, stage: int, ranks: Found) -> None:
    for rank in ranks[2]:
        assert rank["resumed", name, stage] == []


@pytest.mark.parametrize("stages", CHAINS, ids=str)
@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_goes_on_at_another_stage_on_other_ranks(name: str, stages: tuple[int, int, int], ranks: Found) -> None:
    """4 -> 2 -> 3 ranks: parameters, momenta, step counts to the bit; the end is that of one run on four ranks."""
    first = stages[0]
    for earlier, later in ((4, 2), (2, 3)):
        left = ranks[earlier][0][name, first]
        kept = {"lars": ["momentum_buffer"], "adamw": ["step", "exp_avg", "exp_avg_sq"]}[name]
        assert {f"{key}.last.weight" for key in kept} <= set(left)
        for rank in ranks[later]:
            start = rank[name, first, "start"]
            assert left.keys() == start.keys()
            assert [key for key in left if not torch.equal(left[key], start[key])] == []
            assert not torch.equal(start["method.last.weight"], rank[name, first]["method.last.weight"])
    assert difference(ranks[3][0][name, first], ranks[4][0][name, "end"]) <= 1e-4


def test_refusals(ranks: Found) -> None:
    assert "use engine.zero=0, or optimizer.name=lars, sgd or adamw" in ranks[2][0]["lamb"]
    with pytest.raises(ValidationError, match="stage 3 cuts the parameters themselves.*use 2"):
        EngineOptions(zero=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValidationError, match="use precision bf16, or zero 0"):
        EngineOptions(zero=1, precision="fp16")
