"""Jigsaw views: the choice of patches, their places and their order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobatch.data.augment.cpu import augment as cpu
from kilobatch.data.augment.cpu.patches import augment_patches
from kilobatch.data.augment.device import augment
from kilobatch.data.augment.jigsaw import augment_by_patch, jigsaw, patches
from kilobatch.data.counter_rng import uniform
from kilobatch.data.tensor_rng import keys, part_keys
from kilobatch.data.views import columns
from kilobatch.data.views.draws import draw_all
from kilobatch.data.views.options import Blur, Crop, Jitter, Photometric, Second, Solarize, Views, patch_side
from tests.data.augment.test_augment import channels_first, photos
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
                    found |= dict(zip(batch.index.tolist(), batch.views[0].clone(), strict=True))
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


BY_PATCH = Views(
    size=96,
    jitter=Jitter(probability=0.8),
    photometric=Photometric(probability=0.66, solarize=Solarize(probability=1, threshold=(0, 256)), autocontrast=1),
    second=Second(blur=Blur(probability=0.5, kernel=9), solarize=None, by_patch=True),
)
UNCHANGED = {"jitter": None, "photometric": None, "grey": 0.0, "blur": None}


def by_cpu(images: np.ndarray, view_keys: Tensor, views: Views) -> Tensor:
    """The second views of images (N, S, S, 3) on a CPU, (N, 3, S, S)."""
    out = np.full((len(images), 3, views.size, views.size), np.nan, np.float32)
    scratch = np.empty(cpu.scratch_length(views), np.float32)
    for image, view_key, made in zip(images, view_keys.numpy().view(np.uint64), out, strict=True):
        augment_patches(image, view_key, views.plans()[1], made, scratch)
    return torch.from_numpy(out)


def by_batch(images: np.ndarray, view_keys: Tensor, views: Views) -> Tensor:
    both = channels_first(images)[:, None].expand(-1, 2, -1, -1, -1)
    return augment_by_patch(both, torch.stack([view_keys + 1, view_keys], 1), views)[:, 1]


def test_patches_have_the_same_colours_on_cpus_and_in_batches() -> None:
    images, view_keys = photos(12, 96), keys(1, 2, torch.arange(12), 2)[:, 1]
    apart = (by_cpu(images, view_keys, BY_PATCH) - by_batch(images, view_keys, BY_PATCH)).abs()
    assert (255 * 0.229 * apart).mean((1, 2, 3)).max() < 0.05  # of 255, each image


@pytest.mark.parametrize("form", [by_cpu, by_batch])
def test_a_patch_is_a_view_of_its_own(form) -> None:
    """Without colours and flips the patches are those of any jigsaw; with them each is what a view of its pixels, with
    a key of its own, would be."""
    images, view_keys = photos(4, 96), keys(1, 2, torch.arange(4), 2)[:, 1]
    second = Second(blur=None, solarize=None, by_patch=True)
    bare = BY_PATCH.model_copy(update={**UNCHANGED, "flip": 0.0, "second": second})
    plain = Views(count=1, size=96, **UNCHANGED, mean=bare.mean, std=bare.std)
    whole = jigsaw(augment(channels_first(images)[:, None], view_keys[:, None], plain)[:, 0], view_keys)
    torch.testing.assert_close(form(images, view_keys, bare), whole, rtol=0, atol=1e-5)

    cut = patches(jigsaw(channels_first(images), view_keys))  # bytes
    made = patches(form(images, view_keys, BY_PATCH))
    own_keys = part_keys(view_keys[:, None], torch.arange(columns.PATCH_DRAW, columns.PATCH_DRAW + 9))
    side = patch_side(96)
    scratch = np.empty(cpu.scratch_length(BY_PATCH), np.float32)
    for i in range(len(images)):
        for place in range(9):
            own = np.uint64(own_keys[i, place].item() % 2**64)
            want = np.empty((3, side, side), np.float32)
            upright = cut[i, place].permute(1, 2, 0)
            flipped = uniform(own, columns.FLIP_DRAW) < 0.5
            pixels = (upright.flip(1) if flipped else upright).contiguous().numpy()
            plan = BY_PATCH.second_view().plan()
            cpu.augment(pixels, draw_all(own, own, plan), plan, want, scratch)
            assert (made[i, place] - torch.from_numpy(want)).abs().mean() < 1e-3


def test_patches_of_a_view_differ_in_flip_and_colours() -> None:
    """Of nine equal patches: their keys draw different things."""
    row = np.linspace(0, 255, 32).astype(np.uint8)  # brighter to the right, and the same in each cell
    images = np.tile(np.stack([row, row // 2, 255 - row], 1), (8, 96, 3, 1))
    view_keys = keys(1, 2, torch.arange(8), 2)[:, 1]
    flips = BY_PATCH.model_copy(update={**UNCHANGED, "second": Second(blur=None, solarize=None, by_patch=True)})
    made = patches(by_cpu(images, view_keys, flips))[:, :, 0]
    flipped = (made[..., 0] > made[..., -1]).all(2)  # (8, 9)
    assert 20 < flipped.sum() < 52 and not (flipped == flipped[:, :1]).all(1).any()
    coloured = patches(by_cpu(images, view_keys, BY_PATCH)).mean((3, 4))  # (8, 9, 3)
    assert (coloured.std(1) > 0.2).all()


def test_loader_gives_patches_of_their_own_colours(beton: Path) -> None:
    """On a CPU: whatever the ranks and threads; and the first view is as it always was."""
    views = BY_PATCH.model_copy(update={"size": SIZE, "second": Second(blur=None, solarize=None, by_patch=True)})

    def shown(**options: int) -> dict[int, Tensor]:
        with loader(beton, views, jigsaw=True, **options) as batches:
            return {
                int(i): view for batch in batches.epoch(0) for i, view in zip(batch.index, batch.views[0], strict=True)
            }

    whole, other = shown(), shown(threads=2)
    assert all(torch.equal(whole[i], other[i]) for i in whole)
    as_ever = views.model_copy(update={"second": Second(blur=None, solarize=None)})
    with loader(beton, as_ever, jigsaw=True) as batches:
        for batch in batches.epoch(0):
            for i, view in zip(batch.index, batch.views[0], strict=True):
                assert torch.equal(whole[int(i)][0], view[0]) and not torch.equal(whole[int(i)][1], view[1])
