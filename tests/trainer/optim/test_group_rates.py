"""Groups of parameters with rates of their own, late ones, and clipping by tensor: at every ZeRO stage as in plain
loops of torch, where a late parameter's gradient is None and the optimizer is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.optim.group_rates import GroupRates
from kilobatch.trainer.ranks.skip_dynamo import skip_dynamo
from kilobatch.trainer.step import forward_backward
from tests.helpers.late_groups import BOUND, STEPS, late, plain, section, train
from tests.helpers.process_groups import run_ranks
from tests.helpers.zero_training import Net, Single, difference, make, own_batch, whole_state

NAMES = "lars", "sgd", "adamw", "lamb"
RESUMED = [(0, 0, 6), (1, 1, 6), (1, 1, 8), (2, 2, 5), (2, 2, 6), (0, 2, 8), (2, 0, 5)]  # stage before and after; step
CLIPPED = [("sgd", 0), ("sgd", 1), ("sgd", 2), ("lars", 2)]
RATE_ALONE = [("lars", 0), ("adamw", 0), ("sgd", 2)]
CASES = [(name, stage) for name in NAMES for stage in ((0, 1, 2) if name != "lamb" else (0,))]


def rate_alone(name: str, stage: int) -> dict[str, Tensor]:
    """The wrong construction: late groups get a rate of 0, but their gradients, and so their moments, are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupRates, "_drop_gradient", lambda *_: None)
        patch.setattr("kilobatch.trainer.optim.group_rates._clear", lambda state: None)
        return whole_state(train(make(late(), stage, recipe=section(name)), range(STEPS)))


def count_kept() -> dict[str, Tensor]:
    """Another one: Adam goes on counting steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kilobatch.trainer.optim.group_rates._clear", lambda state: None)
        return whole_state(train(make(late(), 0, recipe=section("adamw")), range(STEPS)))


def resumed(folder: Path, name: str, stages: tuple[int, int], at_step: int) -> float:
    """How far a training that is taken up at this step, maybe at another stage, ends from the one that is not."""
    whole = train(make(late(), stages[0], recipe=section(name)), range(at_step))
    with Checkpoints(folder, CheckpointOptions(), collectives.rank(), collectives.world_size()) as checkpoints:
        torch.distributed.barrier()  # no rank may save before all have one
        torch.distributed.barrier()
        checkpoints.save(at_step, whole.pieces(), {}, wait=True)
    other = make(late(seed=9), stages[1], recipe=section(name))
    other.restore(open_saved(folder / f"step-{at_step:08}"))
    ours, theirs = (whole_state(train(engine, range(at_step, STEPS))) for engine in (whole, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith("step."))
    return difference(theirs, ours)


def infinite_while_it_waits(stage: int, precision: str, factor: float = torch.inf) -> dict[str, Any]:
    """A late parameter's gradient is infinite on rank 1 until its first step: nobody notices. Two chunks."""
    engine = make(late(mode="local"), stage, recipe=section("sgd"), precision=precision, chunks=2)
    steps, hooks = iter(range(STEPS)), []
    if collectives.rank() == 1:
        weight = engine.method.get_parameter("last.weight")
        hooks.append(weight.register_hook(lambda g: g * factor))
    train(engine, [next(steps) for _ in range(6)])
    before, momentum = engine.skipped, whole_state(engine).get("momentum_buffer.last.weight")
    moved = engine.method.get_parameter("last.weight").detach().clone()
    for hook in hooks:
        hook.remove()
    train(engine, steps)
    return {
        "kept": torch.equal(moved, late().get_parameter("last.weight")),
        "moved": not torch.equal(moved, engine.method.get_parameter("last.weight")),
        "momentum": momentum is not None and bool(momentum.any()),
        "skipped": before,  # in fp16, whose scale overflows at first
    }


def clipped_norms(stage: int, precision: str) -> dict[str, float]:
    """The norm of each parameter's step by plain SGD of rate 1, whose gradients were clipped to BOUND."""
    recipe = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}
    engine = make(late(Net), stage, recipe=recipe, clip=BOUND, clip_by="tensor", precision=precision)
    before = {name: p.detach().clone() for name, p in engine.method.named_parameters()}
    skipped = -1
    while skipped != engine.skipped:  # fp16 begins with a scale that overflows
        skipped = engine.skipped
        forward_backward(engine, own_batch(0))
        engine.step(1.0)
    return {name: (p - before[name]).norm().item() for name, p in engine.method.named_parameters()}


def clipped(name: str, stage: int) -> dict[str, Tensor]:
    return whole_state(train(make(late(Net), stage, recipe=section(name), clip=BOUND, clip_by="tensor"), range(STEPS)))


def single(stage: int) -> float:
    """A parameter of which all ranks but the first have no fragment, after two clipped steps."""
    engine = make(Single(), stage, recipe={"name": "sgd"}, clip=1e-3, clip_by="tensor")
    train(engine, range(2))
    return engine.method.get_parameter("scale").item()


def on_one() -> dict[Any, Any]:
    return {name: whole_state(train(make(late(), 0, recipe=section(name)), range(STEPS))) for name in NAMES}


def on_two(folder: Path) -> dict[Any, Any]:
    skip_dynamo()  # as in a worker
    found: dict[Any, Any] = {
        (name, stage): whole_state(train(make(late(), stage, recipe=section(name)), range(STEPS)))
        for name, stage in CASES
    }
    found |= {("clipped", name, stage): clipped(name, stage) for name, stage in CLIPPED}
    found |= {("whole", stage): whole_state(train(make(late(), stage, recipe=section("sgd"), clip=BOUND), range(STEPS)))
              for stage in (0, 2)}  # fmt: skip
    found |= {("rate", name, stage): rate_alone(name, stage) for name, stage in RATE_ALONE} | {"count": count_kept()}
    for before, after, at_step in RESUMED:
        where = folder / f"{before}-{after}-{at_step}"
        found["resumed", before, after, at_step] = resumed(where, "adamw", (before, after), at_step)
    for stage in (0, 1, 2):
        found["infinite", stage] = infinite_while_it_waits(stage, "fp32")
        found["norms", stage] = clipped_norms(stage, "fp32")
        found["single", stage] = single(stage)
    found["finite", "fp16"] = infinite_while_it_waits(0, "fp16", 1.0)
    found["infinite", "fp16"] = infinite_while_it_waits(0, "fp16")
    found["norms", "fp16"] = clipped_norms(0, "fp16")
    return found


def on_three() -> dict[Any, Any]:
    found: dict[Any, Any] = {
        (name, 2): whole_state(train(make(late(), 2, recipe=section(name)), range(STEPS))) for name in ("lars", "adamw")
    }
    return found | {("clipped", "sgd", stage): clipped("sgd", stage) for stage in (1, 2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(2, on_two, tmp_path_factory.mktemp("late"), timeout=400)


@pytest.fixture(scope="module")
def three() -> list[dict[Any, Any]]:
    return run_ranks(3, on_three, timeout=400)


def test_on_one_rank_every_bit_is_a_plain_loops() -> None:
    (found,) = run_ranks(1, on_one, timeout=200)
    for name in NAMES:
        expected = plain(name)
        assert found[name].keys() == expected.keys() > {"method.last.weight"}
        assert [key for key, x in expected.items() if not torch.equal(found[name][key], x)] == [], name


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_late_groups_are_trained_as_by_a_plain_loop(name: str, stage: int, two: list[dict[Any, Any]]) -> None:
    """Parameters, moments and step counts."""
    expected = plain(name)
    for rank in two:
        assert difference(rank[name, stage], expected) <= 1e-4
        for key in (key for key in expected if key.startswith("step.")):
            assert rank[name, stage][key] == expected[key], key


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_on_three_ranks(name: str, three: list[dict[Any, Any]]) -> None:
    expected = plain(name)
    assert max(difference(rank[name, 2], expected) for rank in three) <= 1e-4


def test_wrong_constructions_are_found(two: list[dict[Any, Any]]) -> None:
    for name, stage in RATE_ALONE:
        assert difference(two[0]["rate", name, stage], plain(name)) > 0.01, name
    expected = plain("adamw")
    assert expected["step.last.weight"] == 4 and two[0]["count"]["step.last.weight"] == 10
    assert difference(two[0]["count"], expected) > 0.01


@pytest.mark.parametrize(("before", "after", "at_step"), RESUMED)
def test_a_resume_begins_a_late_group_where_it_should(before: int, after: int, at_step: int, two: Any) -> None:
    """Before its first step, exactly at it, and after it; to the bit where the stage is the same."""
    for rank in two:
        assert rank["resumed", before, after, at_step] <= (0 if before == after else 1e-4)


@pytest.mark.parametrize("case", [0, 1, 2, "fp16"])
def test_nobody_minds_the_gradient_of_a_group_that_waits(case: int | str, two: list[dict[Any, Any]]) -> None:
    for rank in two:
        assert rank["infinite", case]["kept"] and rank["infinite", case]["moved"]
        assert not rank["infinite", case]["momentum"]
        assert rank["infinite", case]["skipped"] == (rank["finite", case]["skipped"] if case == "fp16" else 0)


@pytest.mark.parametrize(("name", "stage"), CLIPPED)
def test_each_tensor_is_clipped_as_by_torch(name: str, stage: int, two: Any, three: Any) -> None:
    expected = plain(name, Net, {}, BOUND)
    found = [rank["clipped", name, stage] for rank in (*two, *three) if ("clipped", name, stage) in rank]
    assert len(found) == (5 if name == "sgd" and stage else 2)
    assert max(difference(x, expected) for x in found) <= 1e-4
    assert difference(plain(name, Net, {}), expected) > 0.01


@pytest.mark.parametrize("stage", [0, 2])
def test_a_group_that_waits_is_not_in_the_global_norm(stage: int, two: list[dict[Any, Any]]) -> None:
    expected = plain("sgd", bound=BOUND, whole=True)
    assert max(difference(rank["whole", stage], expected) for rank in two) <= 1e-4
    assert difference(plain("sgd"), expected) > 0.01


@pytest.mark.parametrize("case", [0, 1, 2, "fp16"])
def test_no_tensor_moves_further_than_the_bound(case: int | str, two: list[dict[Any, Any]]) -> None:
    """In fp16 the gradients are freed of the loss's scale before."""
    for rank in two:
        norms = rank["norms", case]
        assert max(norms.values()) == pytest.approx(BOUND, rel=1e-3)
        assert sum(norm == pytest.approx(BOUND, rel=1e-3) for norm in norms.values()) > 3
        assert [rank["norms", 0][name] for name in norms] == pytest.approx([*norms.values()], rel=0.05, abs=1e-4)


def test_a_rank_without_fragments_takes_part_in_clipping(two: list[dict[Any, Any]]) -> None:
    for rank in two:
        assert rank["single", 1] == pytest.approx(rank["single", 0], rel=1e-6) != 2.0
        assert rank["single", 2] == pytest.approx(rank["single", 0], rel=1e-6)
