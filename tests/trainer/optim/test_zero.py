"""ZeRO stages 1 and 2 make the same updates as stage 0, and checkpoints fit any stage and number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.trainer import engine as engines
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import NonFinite, check_finite, forward_backward
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_method import weights
from tests.helpers.zero_training import STEPS, Single, difference, lockstep, make, net, own_batch, train, whole_state

LR = {"lars": 1.0, "sgd": 0.05, "adamw": 0.01}
CHAINS = [(0, 2, 1), (2, 1, 0)]  # ZeRO's stage on 4, then 2, then 3 ranks
VARIANTS = [(dialect, nesterov) for dialect in ("google", "bolts", "larc", "byol") for nesterov in (False, True)]


def independent(**options: Any) -> dict[str, Any]:
    """Twenty steps at every stage from the same start."""
    runs = [make(net(), stage, **options) for stage in (0, 1, 2)]
    losses = [torch.stack(train(engine, range(STEPS))) for engine in runs]
    expected, start = weights(runs[0].method), weights(net())
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected]).norm()
    assert moved > 1
    return {"weights": [difference(weights(engine.method), expected) for engine in runs[1:]],
            "losses": [(x - losses[0]).abs().max().item() for x in losses[1:]]}  # fmt: skip


def clipped(stage: int) -> float:
    """The norm of an update by a gradient whose global norm was clipped to 0.5; without clipping it is above 5."""
    recipe = {"momentum": 0.0, "weight_decay": 0.0}
    engine = make(method := net(), stage, "sgd", recipe, clip=0.5)
    before = [p.detach().clone() for p in method.parameters()]
    train(engine, range(STEPS - 1, STEPS))  # with a learning rate of 1
    moved = [p - old for p, old in zip(method.parameters(), before, strict=True)]
    return torch.cat([x.flatten() for x in moved]).norm().item()


def all_reduces(stage: int) -> int:
    """The number of all-reduces that LARS makes in a step."""
    engine, calls = make(net(), stage), []
    forward_backward(engine, own_batch(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "all_reduce_sum", lambda x: calls.append(x) or dist.all_reduce(x) or x)
        engine.step(1.0)
    return len(calls)


def stops(stage: int) -> dict[str, Any]:
    """A gradient that is infinite on rank 1 alone, in the first of two chunks to be computed."""
    engine = make(method := net("local"), stage, chunks=2)
    train(engine, range(1))
    before, calls = whole_state(engine), []
    if collectives.rank() == 1:
        method.last.weight.register_hook(lambda g: g * torch.inf if not calls.append(1) and len(calls) == 1 else g)
    outcome = forward_backward(engine, own_batch(1))
    with pytest.raises(NonFinite) as raised:
        check_finite(engine, outcome, 1)
    after = whole_state(engine)
    return {"ranks": raised.value.gradient_ranks, "loss": raised.value.loss_ranks,
            "same": all(torch.equal(x, after[name]) for name, x in before.items())}  # fmt: skip


def resumed(folder: Path, name: str, stage: int) -> list[str]:
    """The tensors that differ between four steps in a row and two, a checkpoint, another engine, two steps."""
    whole = make(net(), stage, name)
    train(whole, range(2), LR[name])
    save(folder, whole)
    train(whole, range(2, 4), LR[name])
    other = make(net(seed=99), stage, name)
    other.restore(open_saved(folder / "step-00000002"))
    train(other, range(2, 4), LR[name])
    ours, theirs = whole_state(whole), whole_state(other)
    pieces = whole.pieces(), other.pieces()
    assert ours.keys() == theirs.keys() and pieces[0].keys() == pieces[1].keys()
    held = [name for name in pieces[0] if not torch.equal(pieces[0][name].tensor, pieces[1][name].tensor)]
    return held + [name for name in ours if not torch.equal(ours[name], theirs[name])]


def save(folder: Path, engine: Engine) -> None:
    with Checkpoints(folder, CheckpointOptions(), collectives.rank(), collectives.world_size()) as checkpoints:
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
            found[name, stage] = whole_state(engine)
            if stage == 0:
                train(engine, range(2, 6), LR[name])
                found[name, "end"] = whole_state(engine)
    return found


def continued(folder: Path, earlier: int, link: int) -> dict[Any, Any]:
    """One link of the chains: the state restored from the checkpoint of `earlier` ranks, and that after two steps."""
    found: dict[Any, Any] = {}
    for name in ("lars", "adamw"):
        for chain in CHAINS:
            engine = make(net(seed=99), chain[link], name)
            engine.restore(open_saved(folder / f"{earlier}-{name}-{chain[0]}" / "step-00000002"))
            found[name, chain[0], "start"] = whole_state(engine)
            train(engine, range(2 * link, 2 * link + 2), LR[name])
            save(folder / f"{collectives.world_size()}-{name}-{chain[0]}", engine)
            found[name, chain[0]] = whole_state(engine)
    return found


def on_two(folder: Path) -> dict[Any, Any]:
    found = continued(folder, 4, 1)
    found |= {("lars", *variant): lockstep(2, recipe=dict(zip(("dialect", "nesterov"), variant, strict=True)))
              for variant in VARIANTS}  # fmt: skip
    found |= {
        "independent": independent(),
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
    with pytest.raises(UserError) as found["lamb"]:
        make(net(), 1, "lamb")
    return found | {"lamb": str(found["lamb"].value)}


def on_three(folder: Path) -> dict[Any, Any]:
    found = continued(folder, 2, 2)
    return found | {
        "independent": independent(),
        "bf16": lockstep(STEPS, precision="bf16"),
        "single": lockstep(3, Single),
    }


Found = dict[int, list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("checkpoints")
    parts = {4: on_four, 2: on_two, 3: on_three}  # in this order: the chains' checkpoints
    return {world: run_ranks(world, part, folder, timeout=400) for world, part in parts.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_lars_over_twenty_steps(world: int, ranks: Found) -> None:
    for rank in ranks[world]:
        assert max(rank["independent"]["weights"]) <= 1e-6
        assert max(rank["independent"]["losses"]) <= 1e-4  # of about 50


@pytest.mark.parametrize("world", [2, 3])
def test_lars_in_bf16(world: int, ranks: Found) -> None:
    """Step by step from the same weights, because a difference in the last bit of a weight may flip a bit in bf16."""
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
def test_an_infinite_gradient_stops_all_ranks(stage: int, ranks: Found) -> None:
    for rank in ranks[2]:
        assert rank["stops", stage] == {"ranks": [1], "loss": [], "same": True}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", list(LR))
def test_a_checkpoint_brings_back_every_bit(name: str, stage: int, ranks: Found) -> None:
    for rank in ranks[2]:
        assert rank["resumed", name, stage] == []


@pytest.mark.parametrize("stages", CHAINS, ids=str)
@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_resumes_at_another_stage_on_other_ranks(name: str, stages: tuple[int, int, int], ranks: Found) -> None:
    """4 -> 2 -> 3 ranks: parameters, momenta, step counts to the bit; the end is that of one run on four ranks."""
    first = stages[0]
    for earlier, later in ((4, 2), (2, 3)):
        left = ranks[earlier][0][name, first]
        keys = {"lars": ["momentum_buffer"], "adamw": ["step", "exp_avg", "exp_avg_sq"]}[name]
        assert {f"{key}.last.weight" for key in keys} <= set(left)
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
