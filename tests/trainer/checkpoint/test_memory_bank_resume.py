"""A memory bank in the engine: never broadcast, saved by rank, resumed on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.pirl import PIRL
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

IMAGES, BATCH, SAVED, END = 31, 12, 3, 6


def make(seed: int = 0, images: int = IMAGES) -> Engine:
    torch.manual_seed(seed)
    method = PIRL(ConvNet(2, "global"), noise=20, temperature=0.2, dim=6)
    method.prepare(images, 1)
    optimizer = build(OptimizerOptions(name="sgd", lr=0.1), method, BATCH)
    return Engine(method, optimizer, EngineOptions(), torch.device("cpu"), BATCH // dist.get_world_size())


def train(engine: Engine, steps: range) -> list[float]:
    """-> the global loss of each step."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(BATCH, 2, 3, 16, 16, generator=generator)
        index = torch.randperm(IMAGES, generator=generator)[:BATCH]
        batch = Batch(views, index, index).chunks(across.size())[across.rank()]
        outcome = forward_backward(engine, batch)
        engine.step(0.1)
        norm.commit(engine.method)
        engine.method.update(outcome.z, outcome.t, batch, (step + 1) / END)
        losses.append(across.mean(outcome.loss).item())
    return losses


def rows(engine: Engine) -> Tensor:
    assert isinstance(engine.method, PIRL)
    return engine.method.bank.rows.clone()


def first(folder: Path) -> dict[str, Any]:
    engine = make()
    found: dict[str, Any] = {"start": rows(engine)}
    train(engine, range(SAVED))
    with Checkpoints(folder, CheckpointOptions(), dist.get_rank(), dist.get_world_size()) as checkpoints:
        dist.barrier()  # no rank may save before all have one
        checkpoints.save(SAVED, engine.pieces(), {}, wait=True)
    found["saved"] = rows(engine)
    found["losses"], found["end"] = train(engine, range(SAVED, END)), rows(engine)

    again = make(seed=99)
    train(again, range(1))
    again.restore(open_saved(folder / f"step-{SAVED:08d}"))
    assert train(again, range(SAVED, END)) == found["losses"]
    ours, theirs = engine.pieces(), again.pieces()
    found["own"] = sorted(name for name, piece in ours.items() if piece.own)
    found["different"] = [name for name in ours if not torch.equal(ours[name].tensor, theirs[name].tensor)]
    return found


def later(folder: Path) -> dict[str, Any]:
    engine = make(seed=99)
    saved = open_saved(folder / f"step-{SAVED:08d}")
    engine.restore(saved)
    found: dict[str, Any] = {"saved": rows(engine), "losses": train(engine, range(SAVED, END)), "end": rows(engine)}
    with pytest.raises(Refusal, match=r"memory bank's rows, which should be .* for 40 images"):
        make(images=40).restore(saved)
    return found


def whole(ranks: list[dict[str, Any]], name: str) -> Tensor:
    joined = torch.empty(IMAGES, ranks[0][name].shape[1])
    for r, rank in enumerate(ranks):
        joined[r :: len(ranks)] = rank[name]
    return joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, first, folder, timeout=300)


def test_resumed_on_as_many_ranks_no_bit_differs(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["different"] == []
        assert rank["own"] == ["method.bank.rows"]
    start = whole(two, "start")
    assert len(set(map(tuple, start.tolist()))) == IMAGES  # no rank was given another's rows
    assert not torch.equal(whole(two, "saved"), start)


@pytest.mark.parametrize("world", [1, 3])
def test_resumed_on_others_it_is_the_same_bank(world: int, two: list[dict[str, Any]], folder: Path) -> None:
    ranks = run_ranks(world, later, folder, timeout=300)
    assert torch.equal(whole(ranks, "saved"), whole(two, "saved"))
    torch.testing.assert_close(ranks[0]["losses"], two[0]["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(whole(ranks, "end"), whole(two, "end"), rtol=1e-3, atol=1e-4)
