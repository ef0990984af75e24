"""The loaders: batches depend on seed, epoch and step alone."""

from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from kilobatch.data.augment.device import augment
from kilobatch.data.cpus import spare_threads
from kilobatch.data.loading.decoders import ViewDecoder
from kilobatch.data.loading.prefetch import OpenBeton
from kilobatch.data.loading.sampling import epoch_order, rank_batches
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views.options import Crop, Views
from tests.helpers.loaders import CPU, PLAIN, SAMPLES, VIEWS, Epochs, loader, photo, plain, stacked, write


def test_an_epoch_is_the_order_cut_into_whole_batches(beton: Path, reference: Epochs):
    for epoch, batches in enumerate(reference.batches):
        views, index, label = stacked(batches)
        assert len(batches) == SAMPLES // 8
        assert views.shape == (48, 2, 3, 24, 24) and views.dtype == torch.float32
        assert index.tolist() == rank_batches(epoch_order(5, epoch, SAMPLES), 8, 0, 1).ravel().tolist()
        assert torch.equal(label, index)  # each image's label is its number, here
    with loader(beton) as one:
        assert one.samples == SAMPLES and one.steps_per_epoch == SAMPLES // 8


@pytest.mark.parametrize(("world", "threads"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_views_and_order_do_not_depend_on_ranks_or_threads(beton: Path, reference: Epochs, world: int, threads: int):
    ranks = []
    for rank in range(world):
        with loader(beton, rank=rank, world=world, threads=threads) as part:
            ranks.append(list(part.epoch(1)))
    for step, batch in enumerate(reference.batches[1]):
        views, index, label = stacked([rank[step] for rank in ranks])
        assert torch.equal(views, batch.views[0])
        assert torch.equal(index, batch.index) and torch.equal(label, batch.label)


def test_a_view_does_not_depend_on_the_batch_it_is_in(beton: Path, reference: Epochs):
    views, index, _ = stacked(reference.batches[0])
    with loader(beton, batch=12) as other:
        others, indices, _ = stacked(other.epoch(0))
    assert torch.equal(index, indices) and torch.equal(views, others)


@pytest.mark.parametrize("first_step", [1, 5, 6])
def test_an_epoch_continued_in_its_middle_has_the_same_batches(beton: Path, reference: Epochs, first_step: int):
    with loader(beton) as fresh:
        rest = [*fresh.epoch(0, first_step), *fresh.epoch(1)]
    expected = [*reference.batches[0][first_step:], *reference.batches[1]]
    assert len(rest) == len(expected)
    for batch, before in zip(rest, expected, strict=True):
        assert torch.equal(batch.views[0], before.views[0]) and torch.equal(batch.index, before.index)


def test_epochs_seeds_samples_and_views_differ(beton: Path, reference: Epochs):
    views, index, _ = stacked(reference.batches[0])
    later, later_index, _ = stacked(reference.batches[1])
    with loader(beton, seed=6) as other:
        foreign, foreign_index, _ = stacked(other.epoch(0))
    assert (views[:, 0] != views[:, 1]).flatten(1).any(1).all()
    for others, indices in ((later, later_index), (foreign, foreign_index)):
        where = {int(i): row for row, i in enumerate(indices)}
        common = [(row, where[int(i)]) for row, i in enumerate(index) if int(i) in where]
        assert len(common) > 40
        assert all((views[a] != others[b]).any() for a, b in common)


def test_batches_may_be_held(beton: Path, reference: Epochs):
    with loader(beton) as one:
        held = list(one.epoch(0))
        copies = [batch.views[0].clone() for batch in held]
        list(one.epoch(1))
    for batch, copy, before in zip(held, copies, reference.batches[0], strict=True):
        assert torch.equal(batch.views[0], copy) and torch.equal(batch.views[0], before.views[0])


def test_a_loader_leaves_numbas_types_as_they_are(beton: Path):
    pixels: Any = numba.uint8[::1]
    before = hash(pixels)
    OpenBeton(beton, ViewDecoder(beton, VIEWS, 0, 0, 1, CPU), CPU)
    assert pixels.mutable and hash(pixels) == before and numba.uint8[::1] is pixels


def test_cropped_bytes_augmented_in_batches_are_the_planar_views(beton: Path, reference: Epochs):
    """The way that views take on an accelerator, run on the CPU."""
    batch = reference.batches[0][0]
    images = ViewDecoder(beton, VIEWS, 5, 0, 2, CPU)
    with loader(beton) as one:
        next(one.epoch(0))
        table = one.beton.images.table
    assert table is not None
    out = np.zeros(8 * 2 * 24 * 24 * 3, np.uint8)
    failed = np.zeros(8, np.bool_)
    images.make_views(table, 0, batch.index.numpy(), batch.index.numpy(), out, failed)
    assert not failed.any()
    views = augment(
        torch.from_numpy(out).view(8, 2, 24, 24, 3).permute(0, 1, 4, 2, 3), keys(5, 0, batch.index, 2), VIEWS
    )
    std = torch.tensor(VIEWS.std)[:, None, None]
    assert ((views - batch.views[0]) * std * 255).abs().mean() < 2


def test_views_without_augmentation_are_the_images(beton: Path):
    with loader(beton, Views(count=1, size=24, **PLAIN)) as one:
        batch = next(one.epoch(0))
    for view, i in zip(batch.views[0][:, 0], batch.index.tolist(), strict=True):
        image = photo(i, 40 + 7 * i % 60, 40 + 11 * i % 60).resize((24, 24), Image.Resampling.BOX)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        assert (view - expected).abs().mean() < 4 / 255


def test_flips_turn_every_second_view_left_to_right(beton: Path):
    views = {}
    for flip in (0, 0.5, 1):
        with loader(beton, Views(count=2, size=24, **{**PLAIN, "flip": flip})) as one:
            views[flip] = stacked(one.epoch(0))[0].flatten(0, 1)
    assert torch.equal(views[1], views[0].flip(-1))
    flipped = (views[0.5] == views[1]).flatten(1).all(1)
    assert ((views[0.5] == views[0]).flatten(1).all(1) | flipped).all()
    assert 0.3 < flipped.float().mean() < 0.7


def test_a_linear_probe_can_train_on_crops_and_flips_alone(beton: Path):
    views = Views(count=1, size=24, crop=Crop(scale=(0.3, 1)), jitter=None, grey=0, blur=None)
    with loader(beton, views, batch=10) as one:
        batch = next(one.epoch(0))
    assert batch.views[0].shape == (10, 1, 3, 24, 24) and batch.views[0].std() > 0.3


@pytest.mark.parametrize("world", [1, 3])
def test_plain_views_are_all_samples_in_order(beton: Path, world: int):
    ranks = [plain(beton, rank=rank, world=world, threads=2) for rank in range(world)]
    assert [rank.samples for rank in ranks] == [SAMPLES] * world
    views, index, label = stacked([batch for rank in ranks for batch in rank])
    assert index.tolist() == label.tolist() == list(range(SAMPLES))
    assert views.shape == (SAMPLES, 1, 3, 24, 24)
    again = stacked(batch for batch in ranks[0])
    assert torch.equal(again[0], views[: len(again[0])])


def test_large_plain_views_are_the_middle_of_the_image(tmp_path: Path):
    image = np.zeros((128, 192, 3), np.uint8)
    image[8:120, 40:152] = 255  # 7/8 of 128, in the middle
    beton = write(tmp_path / "middle.beton", [Image.fromarray(image)])
    assert next(iter(plain(beton, size=112))).views[0].mean() > 0.99
    assert next(iter(plain(beton, size=95))).views[0].mean() == pytest.approx(112 * 112 / 128 / 192, abs=0.01)


def test_a_worker_takes_its_share_of_what_it_is_granted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert [spare_threads(sharing) for sharing in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert [spare_threads(sharing) for sharing in (1, 2, 8)] == [4, 2, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert spare_threads(1) == 8
