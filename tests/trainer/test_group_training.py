"""A method of two groups of views trains on batches of the loader, the same on ranks and in chunks."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch, blank
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.views.options import Crop, Views
from kilobatch.methods import collectives
from kilobatch.methods.method import Tensors
from kilobatch.trainer.step import forward_backward
from tests.helpers.loaders import CPU, photo, write
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_method import GLOBAL_BATCH, Toy, sgd_engine

GROUPS = (Views(size=16), Views(count=3, size=8, crop=Crop(scale=(0.05, 0.3))))


class Crops(Toy):
    """Each view, of any size, is to resemble the first view of its own image, among those of all images."""

    further_groups: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        convolution, pooling = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2)
        self.encoder = nn.Sequential(convolution, nn.GELU(), pooling, nn.Flatten(), nn.Linear(6 * 4, 8))

    def embed(self, batch: Batch) -> Tensors:
        groups = [self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2]) for views in batch.views]
        return {"z": torch.cat(groups, 1)}  # (n, 5, 8)

    def target(self, batch: Batch) -> Tensors:
        return {"t": batch.views[0][:, 0].mean((2, 3))}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        first, *others = F.normalize(z["z"].float(), dim=-1).unbind(1)
        every, own = collectives.gather(first), collectives.local_rows(len(first))
        losses = [F.cross_entropy(other @ every.T / self.temperature, own) for other in others]
        return torch.stack(losses).mean() + t["t"].float().square().mean()


def train(beton: Path, chunks: int) -> list[float]:
    """The losses of three steps, over two epochs."""
    torch.manual_seed(0)
    engine, losses = sgd_engine(Crops(), chunks=chunks), []
    worker = LoaderWorker(collectives.rank(), collectives.world_size(), 1, CPU)
    with Loader(beton, GROUPS, worker, batch=GLOBAL_BATCH, seed=3) as loader:
        for epoch, steps in ((0, 2), (1, 1)):
            for _, batch in zip(range(steps), loader.epoch(epoch), strict=False):
                assert [group.shape[1:] for group in batch.views] == [(2, 3, 16, 16), (3, 3, 8, 8)]
                losses.append(collectives.mean(forward_backward(engine, batch).loss.double()).item())
                engine.step(0.1)
    return losses


def on_one_rank(beton: Path) -> dict[int, list[float]]:
    return {chunks: train(beton, chunks) for chunks in (1, 4)}


@pytest.mark.parametrize("world", [2])
def test_ranks_and_chunks_train_alike(world: int, tmp_path: Path) -> None:
    beton = write(tmp_path / "photos.beton", [photo(i, 30, 40) for i in range(2 * GLOBAL_BATCH)])
    whole = run_ranks(1, on_one_rank, beton)[0]
    assert whole[1][0] != whole[1][1] and whole[4] == pytest.approx(whole[1], rel=1e-5)
    for rank in run_ranks(world, train, beton, 2):
        assert rank == pytest.approx(whole[1], rel=1e-5)


def test_a_blank_batch_has_the_shapes_of_all_groups() -> None:
    batch = blank(4, GROUPS)
    assert [group.shape for group in batch.views] == [(4, 2, 3, 16, 16), (4, 3, 3, 8, 8)]
    assert Crops().embed(batch)["z"].shape == (4, 5, 8)
