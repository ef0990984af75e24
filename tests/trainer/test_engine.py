"""DeepSpeed changes nothing that it is not asked to change, and a checkpoint restores every bit."""

import gc
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.methods.networks import batch_norm
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import check_finite, forward_backward
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_method import GLOBAL_BATCH, Toy, batch, gradients, own_batch, plain_loss, toy, weights

CPU = torch.device("cpu")
LR = {"lars": 0.5, "sgd": 0.05, "adamw": 0.01, "lamb": 0.01}


def make(method: Toy, name: str = "sgd", momentum: float = 0.9, **options: Any) -> Engine:
    recipe = OptimizerOptions(name=name, lr=9.0, momentum=momentum, weight_decay=0.01)  # pyright: ignore[reportArgumentType]
    optimizer = build_optimizer(recipe, method, GLOBAL_BATCH)
    return Engine(method, optimizer, EngineOptions(**options), CPU, GLOBAL_BATCH // dist.get_world_size())


def train(engine: Engine, steps: range, lr: float) -> list[Tensor]:
    losses = []
    for step in steps:
        outcome = forward_backward(engine, own_batch(step))
        check_finite(engine, outcome, step)
        engine.step(lr)
        batch_norm.commit(engine.method)
        engine.method.shard.value += dist.get_rank() + 1  # pyright: ignore[reportAttributeAccessIssue,reportOperatorIssue]
        losses.append(outcome.loss)
    return losses


def trained(name: str) -> dict[str, Tensor]:
    method = toy()
    train(make(method, name), range(5), LR[name])
    return weights(method)


def clipped(clip: float) -> dict[str, Tensor]:
    method = toy()
    forward_backward(engine := make(method, momentum=0.0, clip=clip), own_batch())
    before = weights(method)
    engine.step(1.0)
    return {name: before[name] - x for name, x in weights(method).items() if not name.startswith("shard")}


def left_alone() -> dict[str, Any]:
    method = toy()
    before = weights(method)
    engine = make(method, "lars")
    after = weights(method)
    train(engine, range(1), 0.5)
    return {
        "initialise": all(torch.equal(x, before[name]) for name, x in after.items()),
        "shard": after["shard.value"],
        "teacher": torch.equal(weights(method)["teacher.weight"], before["teacher.weight"]),
        "no gradient": method.teacher.weight.grad is None,
    }


def precision(name: str) -> dict[str, Any]:
    method = toy(batch_norm=True)
    engine = make(method, precision=name, chunks=2)
    dtypes = engine.embed(own_batch())["z"].dtype, engine.target(own_batch())["t"].dtype
    seen: dict[str, Tensor] = {}
    hook = engine.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(method)))
    while not seen:  # fp16 begins with a scale that overflows
        forward_backward(engine, own_batch())
        engine.step(0.001)
    hook.remove()
    losses = train(engine, range(1, 4), 0.001)
    return {"dtypes": dtypes, "gradients": seen, "losses": losses, "parameters": {p.dtype for p in method.parameters()}}


def resumed(folder: Path, name: str, precision: str = "fp32") -> dict[str, Any]:
    """Four steps in a row, and two steps, a checkpoint, another engine, two steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with Checkpoints(folder, CheckpointOptions(), rank, world) as checkpoints:
        dist.barrier()  # no rank may save before all have one
        whole = make(toy(batch_norm=True), name, precision=precision)
        train(whole, range(2), LR[name])
        checkpoints.save(2, whole.pieces(), {}, wait=True)
    losses = train(whole, range(2, 4), LR[name])

    other = make(toy(batch_norm=True, seed=99), name, precision=precision)
    train(other, range(1), LR[name])  # state to be replaced
    other.restore(open_saved(folder / "step-00000002"))
    again = train(other, range(2, 4), LR[name])
    ours, theirs = whole.pieces(), other.pieces()
    different = [key for key in ours if not torch.equal(ours[key].tensor, theirs[key].tensor)]
    return {"names": sorted(ours), "same names": set(ours) == set(theirs), "different": different,
            "losses": torch.equal(torch.stack(losses), torch.stack(again)), "own": ours["method.shard.value"].own,
            "shard": ours["method.shard.value"].tensor.clone()}  # fmt: skip


def refusals(folder: Path) -> dict[str, str]:
    """The messages of what is refused, by case."""
    messages = {}
    saved = open_saved(folder / "step-00000002")
    with pytest.raises(UserError) as messages["scaler"]:
        make(toy(batch_norm=True), precision="fp16").restore(saved)
    engine = make(toy(batch_norm=True))
    engine.method.temperature = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError) as messages["shape"]:
        engine.restore(saved)
    engine = make(toy(batch_norm=True))
    engine.method.shard.sharded = False  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
    with pytest.raises(UserError) as messages["placement"]:
        engine.restore(saved)
    with pytest.raises(UserError) as messages["chunks"]:
        make(toy(), chunks=3)
    method = toy(batch_norm=True)
    batch_norm.norms(method)[0].mode = "global"
    with pytest.raises(UserError) as messages["global"]:
        make(method, chunks=2)
    return {name: str(info.value) for name, info in messages.items()}


def traps() -> dict[str, str]:
    messages = {}
    for name, change in {
        "half": lambda m: m.half(),
        "channels": lambda m: m.to(memory_format=torch.channels_last),
        "scalar": lambda m: setattr(m, "temperature", torch.nn.Parameter(torch.tensor(1.0))),
    }.items():
        change(method := toy())
        with pytest.raises(AssertionError) as messages[name]:
            make(method)
    return {name: str(info.value) for name, info in messages.items()}


def scenarios(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(name) for name in LR}
    found |= {"clip 0": clipped(0.0), "clip 0.5": clipped(0.5), "left alone": left_alone()}
    found |= {name: precision(name) for name in ("fp32", "bf16", "fp16")}
    found |= {f"resumed {name}": resumed(folder / name, name) for name in LR}
    found["resumed fp16"] = resumed(folder / "fp16", "sgd", "fp16")
    return found | {"refusals": refusals(folder / "sgd"), "traps": traps()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, scenarios, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", list(LR))
def test_trains_as_one_plain_process_does(name: str, ranks: list[dict[str, Any]]) -> None:
    method = toy()
    optimizer = build_optimizer(OptimizerOptions(name=name, lr=LR[name], weight_decay=0.01), method, GLOBAL_BATCH)  # pyright: ignore[reportArgumentType]
    for step in range(5):
        optimizer.zero_grad()
        plain_loss(method, batch(step)).backward()
        optimizer.step()
    start, end = weights(toy()), weights(method)
    for rank in ranks:
        for key in gradients(method):
            moved = (end[key] - start[key]).norm()
            assert moved > 0
            assert (rank[name][key] - end[key]).norm() <= 1e-4 * moved, key


def test_clips_only_when_asked(ranks: list[dict[str, Any]]) -> None:
    method = toy()
    plain_loss(method, batch()).backward()
    expected = gradients(method)
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    assert size > 2  # DeepSpeed's own default would clip it to 1
    for rank in ranks:
        for name, g in expected.items():
            decay = 0.01 * weights(toy())[name] if g.ndim > 1 else 0
            torch.testing.assert_close(rank["clip 0"][name], g + decay, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rank["clip 0.5"][name], g * 0.5 / size + decay, rtol=1e-3, atol=1e-4)


def test_buffers_and_frozen_parameters_are_left_alone(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        found = rank["left alone"]
        assert found["initialise"] and found["teacher"] and found["no gradient"]
        assert found["shard"].tolist() == [number, number]


def test_autocast_keeps_parameters_in_fp32(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
            assert rank[name]["dtypes"] == (dtype, dtype)
            assert rank[name]["parameters"] == {torch.float32}
            assert torch.isfinite(torch.stack(rank[name]["losses"])).all()
            size = torch.stack([g.norm() for g in rank["fp32"]["gradients"].values()]).norm()
            for key, g in rank["fp32"]["gradients"].items():
                assert (rank[name]["gradients"][key] - g).norm() < 0.02 * size, (name, key)
        assert not torch.equal(torch.stack(rank["bf16"]["losses"]), torch.stack(rank["fp32"]["losses"]))


@pytest.mark.parametrize("name", [*LR, "fp16"])
def test_a_checkpoint_brings_back_every_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        found = rank[f"resumed {name}"]
        assert found["same names"] and found["different"] == [] and found["losses"]
        assert found["own"] and found["shard"].tolist() == [number + 4 * (number + 1)] * 2


def test_pieces_are_named_by_parameter(ranks: list[dict[str, Any]]) -> None:
    names = ranks[0]["resumed lars"]["names"]
    assert {"method.encoder.0.weight", "method.encoder.1.running_mean", "method.teacher.weight"} <= set(names)
    assert "optimizer.momentum_buffer.encoder.0.weight" in names
    assert not any("pending" in name for name in names)
    assert "optimizer.step.temperature" in ranks[0]["resumed adamw"]["names"]
    assert {"scaler.scale", "scaler.growth", "scaler.skipped"} <= set(ranks[0]["resumed fp16"]["names"])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("scaler", "no tensor 'scaler.scale'"),
        ("shape", r"temperature is \(1,\), this run's \(3,\)"),
        ("placement", "holds shard.value by rank, this run whole; resume with the placement"),
        ("chunks", "engine.chunks is 3, which does not divide the 8 samples"),
        ("global", "engine.chunks=1 or encoder.norm=local"),
    ],
)
def test_refuses(case: str, says: str, ranks: list[dict[str, Any]]) -> None:
    assert re.search(says, ranks[0]["refusals"][case])


@pytest.mark.parametrize(
    ("case", "says"), [("half", "float16"), ("channels", "not contiguous"), ("scalar", "temperature has no dimension")]
)
def test_traps_are_shut(case: str, says: str, ranks: list[dict[str, Any]]) -> None:
    assert says in ranks[0]["traps"][case]


def compiled() -> list[Tensor]:
    return train(make(toy(), compile=True), range(2), 0.05) + train(make(toy()), range(2), 0.05)


def imported_by_a_collection() -> list[str]:
    """The modules that are imported while ZeRO engines are collected, after a step."""
    gc.collect()
    gc.disable()
    for stage in (1, 2):
        engine = engine_of(stage)
        outcome = forward_backward(engine, own_batch(0))
        check_finite(engine, outcome, 0)
        engine.step(0.1)
        del engine, outcome
    before = {*sys.modules}
    gc.collect()
    return sorted({*sys.modules} - before)


def engine_of(stage: Any) -> Engine:
    method = toy()
    optimizer = build_optimizer(OptimizerOptions(name="lars", lr=0.1), method, GLOBAL_BATCH)
    return Engine(method, optimizer, EngineOptions(zero=stage), torch.device("cpu"), GLOBAL_BATCH)


def test_an_engine_that_is_collected_imports_nothing() -> None:
    assert run_ranks(1, imported_by_a_collection) == [[]]


@pytest.mark.slow
def test_compiles() -> None:
    (losses,) = run_ranks(1, compiled, timeout=400)
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-4, atol=1e-4)
