"""Jigsaw views: the choice of patches, their places and their order."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kilobatch.data.augment.jigsaw import jigsaw, patch_side, patches
from kilobatch.data.counter_rng import keys
from kilobatch.data.views.options import Crop, Second, Views
from tests.helpers.loaders import SAMPLES, loader, photo, write

SIZE, N = 32, 2000
CELL, PATCH = 10, 8


def pixel_places(n: int = N) -> Tensor:
    """Row and column in the view of each pixel of the patches, (n, 9, 2, PATCH, PATCH): from views of coordinates."""
    place = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    views = torch.cat([place, place[:1]]).float().expand(n, -1, -1, -1)
    return patches(jigsaw(views, keys(1, 2, torch.arange(n), 2)[:, 1]))[:, :, :2]


def test_patches_are_squares_of_their_cells() -> None:
    assert (patch_side(255), patch_side(224), patch_side(SIZE)) == (64, 56, PATCH)
    place = pixel_places()
    corner = place[..., :1, :1]
    steps = torch.stack(torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")).float()
    assert torch.equal(place, corner + steps)
    inside = corner % CELL
    assert corner.max() <= 2 * CELL + CELL - PATCH and inside.max() == CELL - PATCH and inside.min() == 0


def test_every_cell_comes_once_and_orders_and_moves_are_even() -> None:
    corner = pixel_places()[..., 0, 0]  # (N, 9, 2)
    cells = (corner // CELL) @ torch.tensor([3.0, 1.0])  # (N, 9)
    assert torch.equal(cells.sort(1).values, torch.arange(9.0).expand(N, 9))
    for counts in (torch.bincount(cells[:, place].long(), minlength=9) for place in range(9)):
        assert (counts - N / 9).abs().max() < 5 * (N / 9) ** 0.5
    moved = torch.bincount((corner % CELL).flatten().long())
    assert (moved / moved.sum() - 1 / 3).abs().max() < 0.01
    assert len(set(map(tuple, cells.tolist()))) > 0.99 * N


def test_nothing_else_is_shown() -> None:
    views = torch.ones(4, 3, SIZE, SIZE)
    assert jigsaw(views, torch.arange(4)).sum() == 4 * 3 * (3 * PATCH) ** 2


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jigsaw")
    return write(folder / "photos.beton", [photo(i, 50, 60) for i in range(SAMPLES)])


def test_an_images_jigsaw_depends_on_seed_epoch_and_image_alone(beton: Path) -> None:
    views = Views(size=SIZE, second=Second(crop=Crop(scale=(0.6, 1.0)), blur=None, solarize=None))

    def shown(epoch: int = 0, **options: int | bool) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        ranks = int(options.get("world", 1))
        for rank in range(ranks):
            with loader(beton, views, **{"jigsaw": True, **options, "rank": rank}) as batches:
                for batch in batches.epoch(epoch):
                    found |= dict(zip(batch.index.tolist(), batch.views.clone(), strict=True))
        return found

    whole, ranks, other = shown(), shown(world=2, threads=2), shown(epoch=1)
    assert whole.keys() == ranks.keys() and len(whole) == 48
    assert all(torch.equal(whole[i], ranks[i]) for i in whole)
    assert not any(torch.equal(whole[i][1], other[i][1]) for i in whole.keys() & other.keys())
    plain = shown(jigsaw=False)
    second_keys = keys(5, 0, torch.tensor(sorted(whole)), 2)[:, 1]
    seconds = jigsaw(torch.stack([plain[i][1] for i in sorted(whole)]), second_keys)
    for i, second in zip(sorted(whole), seconds, strict=True):
        assert torch.equal(whole[i], torch.stack([plain[i][0], second]))
