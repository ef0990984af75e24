"""Queues and momentum encoders in the engine: never broadcast, saved by rank, resumed on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.methods.memories.options import share
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from tests.helpers.plain_queue import dealt, rows, start
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_memory_method import DIM, MOMENTUM, ODD, TOTAL, keys, make, train

SAVED, END = 5, 8


def first(folder: Path) -> dict[str, Any]:
    """Up to the checkpoint and on; and on from the checkpoint in an engine that has been elsewhere."""
    torch.manual_seed(0)
    engine = make()
    found: dict[str, Any] = {"start": keys(engine), "before": train(engine, range(SAVED)), "saved": keys(engine)}
    with Checkpoints(folder, CheckpointOptions(), dist.get_rank(), dist.get_world_size()) as checkpoints:
        dist.barrier()  # no rank may save before all have one
        checkpoints.save(SAVED, engine.pieces(), {}, wait=True)
    found["weights"] = {name: p.clone() for name, p in engine.method.named_parameters()}
    found["told"], found["end"] = train(engine, range(SAVED, END)), keys(engine)

    again = make(seed=99)
    train(again, range(1))
    again.restore(open_saved(folder / f"step-{SAVED:08d}"))
    told = train(again, range(SAVED, END))
    ours, theirs = engine.pieces(), again.pieces()
    found["own"] = sorted(name for name, piece in ours.items() if piece.own)
    found["different"] = [name for name in ours if not torch.equal(ours[name].tensor, theirs[name].tensor)]
    found["again"] = all(
        torch.equal(a[name], b[name]) for a, b in zip(found["told"], told, strict=True) for name in ("loss", "keys")
    )
    return found


def later(folder: Path) -> dict[str, Any]:
    engine = make(seed=99)
    engine.restore(open_saved(folder / f"step-{SAVED:08d}"))
    found: dict[str, Any] = {"start": keys(engine)}
    found["weights"] = {name: p.clone() for name, p in engine.method.named_parameters()}
    found["told"], found["next"] = train(engine, range(SAVED, SAVED + 1)), keys(engine)
    found["told"] += train(engine, range(SAVED + 1, END))
    found["end"] = keys(engine)
    if dist.get_world_size() == 2:
        found |= {precision: followed(precision) for precision in ("fp32", "bf16")}
    return found


def followed(precision: str) -> dict[str, Any]:
    """100 steps, and the momentum encoder's average over again in fp64: section 3.3, eq. 2, momentum by cosine."""
    engine = make(precision=precision)
    online, momentum = engine.method.encoder, engine.method.momentum_encoder
    assert isinstance(momentum, torch.nn.Module)
    begin = average = _flat(momentum).double()
    unreduced = []
    engine.optimizer.register_step_pre_hook(lambda *_: unreduced.append([p.grad for p in momentum.parameters()]))

    def follow(step: int) -> None:
        nonlocal average
        m = 1 - (1 - MOMENTUM) * (torch.tensor((step + 1) / TOTAL * torch.pi).double().cos().item() + 1) / 2
        average = m * average + (1 - m) * _flat(online).double()

    train(engine, range(TOTAL), follow)
    groups = engine.optimizer.param_groups
    return {
        "error": ((_flat(momentum) - average).abs().max() / average.abs().max()).item(),
        "moved": ((average - begin).norm() / begin.norm()).item(),
        "lag": ((average - _flat(online)).norm() / average.norm()).item(),
        "buffers": all(map(torch.equal, momentum.buffers(), online.buffers())),
        "running": next(online.buffers()).abs().sum().item(),
        "reduced": [g is not None for grads in unreduced for g in grads],
        "optimized": sum(p.numel() for group in groups for p in group["params"]) - len(_flat(online)),
    }


def _flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(4, first, folder, timeout=300)


@pytest.fixture(scope="module")
def fewer(folder: Path, four: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks(world, later, folder, timeout=300) for world in (2, 3)}


def test_the_engine_broadcasts_no_shard(four: list[dict[str, Any]]) -> None:
    for name, length in (("shards", 48), ("odd", ODD)):
        every = torch.cat([rank["start"][name] for rank in four])
        assert rows(every.double()) == rows(start(length, DIM))  # each key once: no two ranks hold the same
        assert len(set(map(tuple, every.tolist()))) == length


def test_resumed_on_as_many_ranks_no_bit_differs(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["different"] == [] and rank["again"]
        assert rank["own"] == [f"method.{name}.{buffer}" for name in ("odd", "shards") for buffer in ("keys", "pushed")]


@pytest.mark.parametrize("world", [2, 3])
def test_resumed_on_fewer_it_is_the_same_queue(world: int, four: Any, fewer: dict[int, list[dict[str, Any]]]) -> None:
    ranks = fewer[world]
    for rank in ranks:
        assert rows(rank["start"]["whole"]) == rows(four[0]["saved"]["whole"])
        assert all(torch.equal(p, four[0]["weights"][name]) for name, p in rank["weights"].items())
    for moment in ("start", "next", "end"):
        whole = rows(ranks[0][moment]["whole"])
        assert rows(torch.cat([rank[moment]["shards"] for rank in ranks])) == whole
        assert rows(ranks[1][moment]["whole"]) == whole
    assert rows(ranks[0]["start"]["whole"]) != rows(ranks[0]["end"]["whole"])
    for told, expected in zip(ranks[0]["told"], four[0]["told"], strict=True):
        torch.testing.assert_close(told["loss"], expected["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("world", [2, 3])
def test_where_nothing_divides_keys_are_dealt_by_age(
    world: int, four: Any, fewer: dict[int, list[dict[str, Any]]]
) -> None:
    shards = dealt([key.float() for key in start(ODD, DIM)], 4)
    shards = _pushed(shards, [rank["before"] for rank in four])
    assert [rows(shard) for shard in shards] == [rows(rank["saved"]["odd"]) for rank in four]
    newest_first = [shard[-age] for age in range(1, 14) for shard in shards if age <= len(shard)]
    shards = dealt(newest_first[::-1], world)
    assert [rows(shard) for shard in shards] == [rows(rank["start"]["odd"]) for rank in fewer[world]]
    following = _pushed(shards, [rank["told"][:1] for rank in fewer[world]])
    assert [rows(shard) for shard in following] == [rows(rank["next"]["odd"]) for rank in fewer[world]]
    shards = _pushed(shards, [rank["told"] for rank in fewer[world]])
    assert [rows(shard) for shard in shards] == [rows(rank["end"]["odd"]) for rank in fewer[world]]


def _pushed(shards: list[list[Tensor]], told: list[list[dict[str, Any]]]) -> list[list[Tensor]]:
    """Every rank's keys after those that it made, the newest of its share kept."""
    made = [[key for step in steps for key in step["keys"]] for steps in told]
    world = len(shards)
    return [(shards[r] + made[r])[-share(ODD, r, world) :] for r in range(world)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_momentum_encoder_is_the_average_that_fp64_finds(precision: str, fewer: dict[int, Any]) -> None:
    for rank in fewer[2]:
        found = rank[precision]
        assert found["error"] <= 1e-6 and found["moved"] > 0.01 and found["lag"] > 1e-3
        assert found["buffers"] and found["running"] > 0


def test_neither_optimizer_nor_all_reduce_sees_it(fewer: dict[int, Any]) -> None:
    for rank in fewer[2]:
        reduced = rank["fp32"]["reduced"]
        assert len(reduced) == TOTAL * 5 and not any(reduced)
        assert rank["fp32"]["optimized"] == 0
