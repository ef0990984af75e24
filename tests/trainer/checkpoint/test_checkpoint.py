"""Checkpoints: bit for bit on any number of ranks, copied within the step, removed by the recipe's rule."""

import json
import math
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import Damaged, newest, open_saved
from kilobatch.trainer.checkpoint.rng_state import restore_rng, rng_pieces
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.writer import Checkpoints
from tests.helpers.sample_checkpoints import OPTIONS, pieces, save, values


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = (a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_bit_for_bit_over_world_sizes(tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 1 ranks: what one world size read, the next one writes."""
    held = {**values(), "optimizer.part": torch.arange(1001.0).reshape(7, 11, 13)}
    for step, world in enumerate((1, 2, 3, 1)):
        ranks = [Checkpoints(tmp_path, OPTIONS, rank, world) for rank in range(world)]
        for rank, checkpoints in enumerate(ranks):
            mine = {name: Piece.of(tensor) for name, tensor in held.items()}
            n = held["optimizer.part"].numel()
            start, end = n * rank // world, n * (rank + 1) // world
            part = held["optimizer.part"].reshape(-1)[start:end]
            mine["optimizer.part"] = Piece(part, start, (7, 11, 13), sharded=True)
            checkpoints.save(step, mine, {})
        for checkpoints in ranks:
            checkpoints.close()
        saved = open_saved(tmp_path / f"step-{step:08d}")
        assert saved.world == world and saved.step == step
        assert saved.names() == sorted(held)
        held = {name: saved.whole(name) for name in saved.names()}
    for name, tensor in values().items():
        assert same_bits(held[name], tensor), name
    assert torch.equal(held["optimizer.part"].reshape(-1), torch.arange(1001.0))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_slices_and_own_tensors(tmp_path: Path, world: int) -> None:
    saved = open_saved(save(tmp_path, world, 1))
    conv = values()["method.conv"].reshape(-1)
    for offset, numel in ((0, 0), (0, 1), (len(conv) // 3 - 5, 10), (len(conv) // 2 - 5, 10), (0, len(conv))):
        assert torch.equal(saved.read("method.conv", offset, numel), conv[offset : offset + numel])
    assert torch.equal(saved.read("optimizer.part", 490, 30), torch.arange(490.0, 520.0))
    assert torch.equal(saved.whole("optimizer.alone"), torch.arange(6).reshape(2, 3))
    for rank in range(world):
        assert torch.equal(saved.own("method.queue", rank), torch.full((rank + 2, 3), rank))
    assert saved.own_names() == ["method.queue"]
    with pytest.raises(UserError, match=f"written by {world} ranks, has no tensor 'method.queue' of rank {world}"):
        saved.own("method.queue", world)
    with pytest.raises(UserError, match="no tensor 'method.cov'; did you mean 'method.conv'"):
        saved.whole("method.cov")


def test_writing_is_shared(tmp_path: Path) -> None:
    """Replicated tensors are written once, in equal shares: the write rate grows with the ranks."""
    one = sum(file.stat().st_size for file in save(tmp_path / "one", 1, 1).glob("*.safetensors"))
    three = [file.stat().st_size for file in save(tmp_path / "three", 3, 1).glob("*.safetensors")]
    assert sum(three) < 1.02 * one
    assert max(three) < 1.05 * one / 3


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    ranks = [Checkpoints(tmp_path, OPTIONS, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.save(1, {"tiny": Piece.of(torch.ones(2))}, {})
    for rank in ranks:
        rank.close()
    assert open_saved(tmp_path / "step-00000001").whole("tiny").tolist() == [1, 1]


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    """No file that could run code: each is read whole by the plain safetensors and JSON readers."""
    path = save(tmp_path, 2, 7)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["checkpoint.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert json.loads((path / "checkpoint.json").read_text())["content"]["step"] == 7
    halves = [load_file(path / name)["method.conv"] for name in names[1:]]
    assert torch.equal(torch.cat(halves), values()["method.conv"].reshape(-1))
    with safe_open(path / names[1], framework="pt") as shard:
        assert json.loads(shard.metadata()["pieces"])["method.flags"] == [0, [13], False]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000007"]


def test_meta_floats_are_exact(tmp_path: Path) -> None:
    floats = [0.1 + 0.2, 1e-323, math.inf, -0.0, math.pi * 1e300, math.nan]
    meta = {"floats": floats, "loader": {"epoch": 3}, "text": "ü"}
    found = open_saved(save(tmp_path, 1, 1, meta=meta)).meta
    assert [struct.pack("d", x) for x in found["floats"]] == [struct.pack("d", x) for x in floats]
    assert found["loader"] == {"epoch": 3} and found["text"] == "ü"


def test_snapshot_is_of_the_step(tmp_path: Path) -> None:
    """Changes after save() has returned are not in the checkpoint; overlapping saves wait for each other."""
    weight, meta = torch.zeros(3_000_000), {"loss": [0]}
    with Checkpoints(tmp_path, CheckpointOptions(keep_last=9), 0, 1) as checkpoints:
        for step in range(1, 5):
            weight.fill_(step)
            meta["loss"][0] = step
            checkpoints.save(step, {"w": Piece.of(weight)}, meta)
            weight.fill_(-1)
            meta["loss"][0] = -1
    for step in range(1, 5):
        saved = open_saved(tmp_path / f"step-{step:08d}")
        assert bool((saved.whole("w") == step).all()) and saved.meta == {"loss": [step]}


def test_generators_go_on_where_they_stopped(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), random.gauss(0, 1), np.random.normal()]  # noqa: NPY002

    draw()  # leaves half of a pair of normal numbers in numpy's and Python's
    with Checkpoints(tmp_path, OPTIONS, 0, 1) as checkpoints:
        checkpoints.save(1, rng_pieces(), {}, wait=True)
    expected = [draw() for _ in range(3)]
    draw()
    restore_rng(open_saved(tmp_path / "step-00000001"), 0)
    assert [draw() for _ in range(3)] == expected


def test_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CheckpointOptions(every_steps=3, every_minutes=10)
    first, second = (Checkpoints(tmp_path, options, rank, 2) for rank in range(2))
    assert [step for step in range(1, 10) if second.due_by_steps(step)] == [3, 6, 9]
    assert not first.due_by_clock()
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 601)
    assert first.due_by_clock() and not second.due_by_clock()  # one clock decides
    for rank, checkpoints in enumerate((first, second)):
        checkpoints.save(3, pieces(rank, 2), {})
    assert not first.due_by_clock()
    first.close()
    second.close()
    assert not Checkpoints(tmp_path, CheckpointOptions(every_minutes=None), 0, 1).due_by_clock()


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_retention(tmp_path: Path) -> None:
    options = CheckpointOptions(keep_last=2, keep_every_steps=10)
    small = {"w": Piece.of(torch.zeros(3))}
    with Checkpoints(tmp_path, options, 0, 1) as checkpoints:
        for step in (4, 8, 10, 12, 19, 23, 29, 40, 41, 42):  # by minutes, steps are not round
            checkpoints.save(step, small, {}, wait=True)
    assert saved_steps(tmp_path) == [10, 23, 40, 41, 42]
    assert not list(tmp_path.glob(".*"))


def test_retention_does_not_count_damaged_or_later_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, 1, step, CheckpointOptions(keep_last=4))
    (tmp_path / "step-00000003/checkpoint.json").write_text("")
    save(tmp_path, 1, 4, CheckpointOptions(keep_last=2))
    assert saved_steps(tmp_path) == [2, 3, 4, 9]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 2, 5)
    next(path.glob("rank-00001*")).unlink()
    save(tmp_path, 1, 5)
    assert open_saved(path).world == 1 and saved_steps(tmp_path) == [5]


def test_incomplete_tensors_never_become_a_checkpoint(tmp_path: Path) -> None:
    """A rank that leaves its slice out is found before the folder is renamed."""
    checkpoints = Checkpoints(tmp_path, OPTIONS, 0, 1)
    checkpoints.save(1, {"w": Piece(torch.zeros(4), 1, (6,))}, {})
    with pytest.raises(Damaged, match="elements 0 to 1 of w are missing"):
        checkpoints.close()
    assert newest(tmp_path, print) is None


def test_rank_0_may_rename_as_soon_as_all_markers_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its marker is there, a rank needs nothing in the folder: rank 0 may have renamed it."""
    replace = Path.replace

    def delayed(path: Path, target: Path) -> Path:
        replaced = replace(path, target)
        if target.name.startswith("rank-00001"):
            time.sleep(0.5)
        return replaced

    monkeypatch.setattr(Path, "replace", delayed)
    assert open_saved(save(tmp_path, 2, 1)).world == 2
