"""Queues, memory banks and momentum encoders in the engine: saved by rank, and resumed on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.batch import Clock, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import share
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.pirl import PIRL
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import forward_backward
from tests.helpers import toy_memory_method as toy
from tests.helpers.plain_queue import dealt, rows, start
from tests.helpers.process_groups import run_ranks

IMAGES, BANK_BATCH, BANK_STEPS = 31, 12, 6


def make_bank(seed: int = 0, images: int = IMAGES) -> Engine:
    """PIRL, whose memory bank has a row for each image; the images do not divide over the ranks."""
    torch.manual_seed(seed)
    method = PIRL(ConvNet(2, "global"), noise=20, temperature=0.2, dim=6)
    method.prepare(DataFacts(images, 1))
    optimizer = build_optimizer(OptimizerOptions(name="sgd", lr=0.1), method, BANK_BATCH)
    return Engine(method, optimizer, EngineOptions(), torch.device("cpu"), BANK_BATCH // dist.get_world_size())


def train_bank(engine: Engine, steps: range) -> list[dict[str, Any]]:
    """The global loss of each step."""
    records = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(BANK_BATCH, 2, 3, 16, 16, generator=generator)
        index = torch.randperm(IMAGES, generator=generator)[:BANK_BATCH]
        batch = make_batch(views, index, index).chunks(collectives.world_size())[collectives.rank()]
        outcome = forward_backward(engine, batch)
        engine.step(0.1)
        batch_norm.commit(engine.method)
        engine.method.update(outcome.z, outcome.t, batch.replaced(clock=Clock(step, BANK_STEPS, BANK_STEPS)))
        records.append({"loss": collectives.mean(outcome.loss)})
    return records


def bank_rows(engine: Engine) -> dict[str, Tensor]:
    assert isinstance(engine.method, PIRL)
    return {"bank": engine.method.bank.rows.clone()}


@dataclass(frozen=True)
class Case:
    """A method with memories. saved: the step of its checkpoint; end: the last step; contents: of its memories."""

    make: Callable[..., Engine]
    train: Callable[..., list[dict[str, Any]]]
    contents: Callable[[Engine], dict[str, Tensor]]
    saved: int
    end: int


CASES = {
    "queues": Case(toy.make, toy.train, toy.keys, saved=5, end=8),
    "bank": Case(make_bank, train_bank, bank_rows, saved=3, end=BANK_STEPS),
}


def checkpoint(folder: Path, name: str) -> Path:
    return folder / name / f"step-{CASES[name].saved:08d}"


def first(folder: Path, name: str) -> dict[str, Any]:
    """Trains up to the checkpoint and on; and on from the checkpoint in an engine with another state."""
    case = CASES[name]
    engine = case.make()
    found: dict[str, Any] = {"start": case.contents(engine)}
    found["before"], found["saved"] = case.train(engine, range(case.saved)), case.contents(engine)
    with Checkpoints(folder / name, CheckpointOptions(), dist.get_rank(), dist.get_world_size()) as checkpoints:
        dist.barrier()  # no rank may save before all have one
        checkpoints.save(case.saved, engine.pieces(), {}, wait=True)
    found["weights"] = {key: p.clone() for key, p in engine.method.named_parameters()}
    found["after"], found["end"] = case.train(engine, range(case.saved, case.end)), case.contents(engine)

    again = case.make(seed=99)
    case.train(again, range(1))
    again.restore(open_saved(checkpoint(folder, name)))
    records = case.train(again, range(case.saved, case.end))
    ours, theirs = engine.pieces(), again.pieces()
    found["own"] = sorted(key for key, piece in ours.items() if piece.own)
    found["different"] = [key for key in ours if not torch.equal(ours[key].tensor, theirs[key].tensor)]
    found["again"] = all(torch.equal(a[key], b[key]) for a, b in zip(found["after"], records, strict=True) for key in a)
    return found


def later(folder: Path, name: str) -> dict[str, Any]:
    """Restores the checkpoint and trains on."""
    case = CASES[name]
    engine = case.make(seed=99)
    saved = open_saved(checkpoint(folder, name))
    engine.restore(saved)
    found: dict[str, Any] = {"start": case.contents(engine)}
    found["weights"] = {key: p.clone() for key, p in engine.method.named_parameters()}
    found["after"], found["next"] = case.train(engine, range(case.saved, case.saved + 1)), case.contents(engine)
    found["after"] += case.train(engine, range(case.saved + 1, case.end))
    found["end"] = case.contents(engine)
    if name == "bank":
        with pytest.raises(UserError, match=r"memory bank's rows, which should be .* for 40 images"):
            make_bank(images=40).restore(saved)
    elif dist.get_world_size() == 2:
        found |= {precision: followed(precision) for precision in ("fp32", "bf16")}
    return found


def followed(precision: str) -> dict[str, Any]:
    """100 steps, and the momentum encoder's average computed again in fp64: section 3.3, eq. 2, momentum by cosine."""
    engine = toy.make(precision=precision)
    online, momentum = engine.method.encoder, engine.method.momentum_encoder
    assert isinstance(momentum, torch.nn.Module)
    begin = average = _flat(momentum).double()
    unreduced = []
    engine.optimizer.register_step_pre_hook(lambda *_: unreduced.append([p.grad for p in momentum.parameters()]))

    def follow(step: int) -> None:
        nonlocal average
        cosine = torch.tensor((step + 1) / toy.TOTAL * torch.pi).double().cos().item()
        m = 1 - (1 - toy.MOMENTUM) * (cosine + 1) / 2
        average = m * average + (1 - m) * _flat(online).double()

    toy.train(engine, range(toy.TOTAL), follow)
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


Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def queues(folder: Path) -> Ranks:
    """On 4 ranks."""
    return run_ranks(4, first, folder, "queues", timeout=300)


@pytest.fixture(scope="module")
def bank(folder: Path) -> Ranks:
    """On 2 ranks."""
    return run_ranks(2, first, folder, "bank", timeout=300)


@pytest.fixture(scope="module")
def fewer(folder: Path, queues: Ranks) -> dict[int, Ranks]:
    """The queues, resumed on 2 and on 3 ranks."""
    return {world: run_ranks(world, later, folder, "queues", timeout=300) for world in (2, 3)}


def whole_bank(ranks: Ranks, moment: str) -> Tensor:
    joined = torch.empty(IMAGES, ranks[0][moment]["bank"].shape[1])
    for r, rank in enumerate(ranks):
        joined[r :: len(ranks)] = rank[moment]["bank"]
    return joined


def test_the_engine_broadcasts_no_queue(queues: Ranks) -> None:
    for name, length in (("shards", 48), ("odd", toy.ODD)):
        every = torch.cat([rank["start"][name] for rank in queues])
        assert rows(every.double()) == rows(start(length, toy.DIM))  # each key once: no two ranks hold the same
        assert len(set(map(tuple, every.tolist()))) == length


def test_the_engine_broadcasts_no_bank(bank: Ranks) -> None:
    initial = whole_bank(bank, "start")
    assert len(set(map(tuple, initial.tolist()))) == IMAGES  # no rank was given another's rows
    assert not torch.equal(whole_bank(bank, "saved"), initial)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("queues", [f"method.{name}.{buffer}" for name in ("odd", "shards") for buffer in ("keys", "pushed")]),
        ("bank", ["method.bank.rows"]),
    ],
)
def test_resumed_on_as_many_ranks_no_bit_differs(name: str, own: list[str], request: pytest.FixtureRequest) -> None:
    for rank in request.getfixturevalue(name):
        assert rank["different"] == [] and rank["again"]
        assert rank["own"] == own


@pytest.mark.parametrize("world", [1, 3])
def test_resumed_on_other_ranks_it_is_the_same_bank(world: int, bank: Ranks, folder: Path) -> None:
    ranks = run_ranks(world, later, folder, "bank", timeout=300)
    assert torch.equal(whole_bank(ranks, "start"), whole_bank(bank, "saved"))
    losses, expected = ([record["loss"].item() for record in of[0]["after"]] for of in (ranks, bank))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(whole_bank(ranks, "end"), whole_bank(bank, "end"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world", [2, 3])
def test_resumed_on_fewer_ranks_it_is_the_same_queue(world: int, queues: Ranks, fewer: dict[int, Ranks]) -> None:
    ranks = fewer[world]
    for rank in ranks:
        assert rows(rank["start"]["whole"]) == rows(queues[0]["saved"]["whole"])
        assert all(torch.equal(p, queues[0]["weights"][name]) for name, p in rank["weights"].items())
    for moment in ("start", "next", "end"):
        whole = rows(ranks[0][moment]["whole"])
        assert rows(torch.cat([rank[moment]["shards"] for rank in ranks])) == whole
        assert rows(ranks[1][moment]["whole"]) == whole
    assert rows(ranks[0]["start"]["whole"]) != rows(ranks[0]["end"]["whole"])
    for record, expected in zip(ranks[0]["after"], queues[0]["after"], strict=True):
        torch.testing.assert_close(record["loss"], expected["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("world", [2, 3])
def test_keys_that_do_not_divide_are_dealt_by_age(world: int, queues: Ranks, fewer: dict[int, Ranks]) -> None:
    shards = dealt([key.float() for key in start(toy.ODD, toy.DIM)], 4)
    shards = _pushed(shards, [rank["before"] for rank in queues])
    assert [rows(shard) for shard in shards] == [rows(rank["saved"]["odd"]) for rank in queues]
    newest_first = [shard[-age] for age in range(1, 14) for shard in shards if age <= len(shard)]
    shards = dealt(newest_first[::-1], world)
    assert [rows(shard) for shard in shards] == [rows(rank["start"]["odd"]) for rank in fewer[world]]
    following = _pushed(shards, [rank["after"][:1] for rank in fewer[world]])
    assert [rows(shard) for shard in following] == [rows(rank["next"]["odd"]) for rank in fewer[world]]
    shards = _pushed(shards, [rank["after"] for rank in fewer[world]])
    assert [rows(shard) for shard in shards] == [rows(rank["end"]["odd"]) for rank in fewer[world]]


def _pushed(shards: list[list[Tensor]], records: list[list[dict[str, Any]]]) -> list[list[Tensor]]:
    """Every rank's keys after it has pushed those of its records, cut to the newest of its share."""
    made = [[key for step in steps for key in step["keys"]] for steps in records]
    world = len(shards)
    return [(shards[r] + made[r])[-share(toy.ODD, r, world) :] for r in range(world)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_momentum_encoder_is_the_average_in_fp64(precision: str, fewer: dict[int, Ranks]) -> None:
    for rank in fewer[2]:
        found = rank[precision]
        assert found["error"] <= 1e-6 and found["moved"] > 0.01 and found["lag"] > 1e-3
        assert found["buffers"] and found["running"] > 0


def test_the_momentum_encoder_is_neither_reduced_nor_optimized(fewer: dict[int, Ranks]) -> None:
    for rank in fewer[2]:
        reduced = rank["fp32"]["reduced"]
        assert len(reduced) == toy.TOTAL * 5 and not any(reduced)
        assert rank["fp32"]["optimized"] == 0
