"""The loaders: batches depend on seed, epoch and step alone, damaged files are refused, threads end."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kilobatch.data.augment.cpu.flip import mirror
from kilobatch.data.augment.device import augment
from kilobatch.data.batch import Batch
from kilobatch.data.beton import Writer
from kilobatch.data.counter_rng import keys
from kilobatch.data.cpus import spare_threads
from kilobatch.data.errors import UserError
from kilobatch.data.loading.decoders import BatchRequest, ViewDecoder
from kilobatch.data.loading.loader import Loader, LoaderWorker, PlainLoader
from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher
from kilobatch.data.loading.sampling import epoch_order, rank_batches
from kilobatch.data.sources.image_files import encode
from kilobatch.data.views.options import Affine, Crop, Solarize, Views

CPU = torch.device("cpu")
SAMPLES = 50
VIEWS = Views(size=24, affine=Affine(degrees=20, shift=0.1), solarize=Solarize())
PLAIN = {"crop": None, "flip": 0, "jitter": None, "grey": 0, "blur": None, "mean": (0, 0, 0), "std": (1, 1, 1)}


def photo(i: int, width: int, height: int) -> Image.Image:
    """An image of smooth colours, a different one for each i."""
    noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write(path: Path, images: list[Image.Image]) -> Path:
    with path.open("wb") as file:
        writer = Writer(file, len(images))
        for label, image in enumerate(images):
            stored = encode(image, None, 90)
            writer.append(stored.mode, stored.width, stored.height, stored.data, label)
        writer.finish()
    return path


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with sides from 40 to 99: those below 65 are stored as pixels, the others as JPEGs."""
    images = [photo(i, 40 + 7 * i % 60, 40 + 11 * i % 60) for i in range(SAMPLES)]
    return write(tmp_path_factory.mktemp("loader") / "mixed.beton", images)


def loader(
    beton: Path, views: Views = VIEWS, *, rank: int = 0, world: int = 1, threads: int = 1, **changed: Any
) -> Loader:
    options: dict[str, Any] = {"batch": 8, "seed": 5}
    return Loader(beton, views, LoaderWorker(rank, world, threads, CPU), **{**options, **changed})


def plain(beton: Path, size: int = 24, *, rank: int = 0, world: int = 1, threads: int = 1) -> PlainLoader:
    return PlainLoader(beton, size, (0, 0, 0), (1, 1, 1), LoaderWorker(rank, world, threads, CPU), batch=8)


def stacked(batches: Iterator[Batch] | list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    batches = list(batches)
    return (
        torch.cat([batch.views for batch in batches]),
        torch.cat([batch.index for batch in batches]),
        torch.cat([batch.label for batch in batches]),
    )


def threads_of_loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "Prefetcher"]


@dataclass
class Epochs:
    """The batches of two epochs, as one rank with one thread gets them."""

    batches: list[list[Batch]]


@pytest.fixture(scope="module")
def reference(beton: Path) -> Epochs:
    with loader(beton) as whole:
        return Epochs([list(whole.epoch(0)), list(whole.epoch(1))])


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
        assert torch.equal(views, batch.views)
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
        assert torch.equal(batch.views, before.views) and torch.equal(batch.index, before.index)


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
        copies = [batch.views.clone() for batch in held]
        list(one.epoch(1))
    for batch, copy, before in zip(held, copies, reference.batches[0], strict=True):
        assert torch.equal(batch.views, copy) and torch.equal(batch.views, before.views)


def test_leaving_an_epoch_early_leaves_one_thread_and_closing_none(beton: Path, reference: Epochs):
    assert threads_of_loaders() == []
    one = loader(beton)
    for _ in range(3):
        for batch in islice(one.epoch(0), 2):
            assert batch.views.isfinite().all()
    assert len(threads_of_loaders()) == 1
    rest = list(one.epoch(0, 2))  # goes on where it was left
    assert torch.equal(stacked(rest)[0], stacked(reference.batches[0][2:])[0])
    one.close()
    assert threads_of_loaders() == []
    for _ in plain(beton):
        break
    assert threads_of_loaders() == []


def test_the_iterator_of_an_epoch_that_was_left_raises(beton: Path):
    with loader(beton) as one:
        old = one.epoch(0)
        next(old)
        next(one.epoch(1))
        with pytest.raises(RuntimeError, match="epoch 0 of this loader has been left"):
            next(old)


def test_torch_keeps_its_threads(beton: Path):
    before = torch.get_num_threads()
    with loader(beton, threads=2) as one:
        next(one.epoch(0))
        assert torch.get_num_threads() == before
        counts: list[int] = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert counts == [before]


def test_importing_the_loader_keeps_torchs_threads():
    code = (
        "import torch; torch.set_num_threads(2); "
        "import kilobatch.data.loading.prefetch; assert torch.get_num_threads() == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_fails_in_an_epoch_ends_with_its_own_error(beton: Path):
    code = f"""
import torch
from pathlib import Path
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.views.options import Views
worker = LoaderWorker(rank=0, world=1, threads=2, device=torch.device("cpu"))
loader = Loader(Path({str(beton)!r}), Views(size=24), worker, batch=8, seed=0)
next(loader.epoch(0))
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


def damaged(beton: Path, tmp_path: Path, keep: float) -> Path:
    """A copy in which the JPEG of sample 40 is zeros after this fraction of it."""
    copy = tmp_path / "damaged.beton"
    data = bytearray(beton.read_bytes())
    begin = [i for i in range(len(data) - 1) if data[i : i + 3] == b"\xff\xd8\xff"]
    stored = [i for i in range(SAMPLES) if max(40 + 7 * i % 60, 40 + 11 * i % 60) > 64]
    start, end = begin[stored.index(40)], begin[stored.index(40) + 1]
    cut_at = start + int(keep * (end - start))
    data[cut_at:end] = bytes(end - cut_at)
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_damaged_jpeg_is_refused_by_name(beton: Path, tmp_path: Path, keep: float):
    path = damaged(beton, tmp_path, keep)
    with pytest.raises(UserError, match=r"damaged.beton, sample 40: .*convert it again"):
        list(plain(path))
    with loader(path, threads=2) as one, pytest.raises(UserError, match="sample 40"):
        for epoch in range(3):
            list(one.epoch(epoch))
    assert threads_of_loaders() == []


def test_a_jpeg_that_only_draws_a_warning_is_shown(tmp_path: Path):
    image = photo(0, 80, 80)
    stored = encode(image, None, 90)
    marker = stored.data.index(b"\xff\xc0")
    path = tmp_path / "warning.beton"
    with path.open("wb") as file:
        writer = Writer(file, 1)
        writer.append(0, 80, 80, stored.data[:marker] + b"\x00\x00" + stored.data[marker:], 0)
        writer.finish()
    clean = write(tmp_path / "clean.beton", [image])
    with pytest.raises(AssertionError):  # libjpeg warns ...
        decode_without_pillow(path)
    shown, expected = (next(iter(plain(p, size=24))).views for p in (path, clean))
    assert (shown - expected).abs().mean() < 1 / 255  # ... and Pillow reads it


def test_a_loader_leaves_numbas_types_as_they_are(beton: Path):
    pixels: Any = numba.uint8[::1]
    before = hash(pixels)
    OpenBeton(beton, ViewDecoder(beton, VIEWS, 0, 0, 1, CPU), CPU)
    assert pixels.mutable and hash(pixels) == before and numba.uint8[::1] is pixels


def decode_without_pillow(path: Path) -> None:
    images = ViewDecoder(path, VIEWS, 0, 0, 1, CPU)

    def fail(*_: object) -> None:
        raise AssertionError

    setattr(images, "decode_with_pillow", fail)  # noqa: B010
    next(Prefetcher(OpenBeton(path, images, CPU), iter([BatchRequest(0, 0, np.arange(1))])))


def test_a_file_whose_tables_contradict_each_other_is_refused(beton: Path, tmp_path: Path):
    short = tmp_path / "short.beton"
    short.write_bytes(beton.read_bytes()[: -SAMPLES * 24])
    with pytest.raises(UserError, match="short.beton is damaged"):
        list(plain(short))


def test_a_batch_that_does_not_divide_is_refused(beton: Path):
    with pytest.raises(UserError, match="global batch 10 does not divide over 4 ranks; use 8 or 12"):
        loader(beton, batch=10, world=4)
    with pytest.raises(UserError, match="global batch 2 does not divide over 4 ranks; use 4"):
        loader(beton, batch=2, world=4)


def test_a_dataset_smaller_than_a_batch_is_refused(beton: Path):
    with pytest.raises(UserError, match="50 samples, fewer than one global batch of 64; set data.batch to at most 48"):
        loader(beton, batch=64, world=4)


def test_cropped_bytes_augmented_in_batches_are_the_planar_views(beton: Path, reference: Epochs):
    """The way that views take on an accelerator, run on the CPU."""
    batch = reference.batches[0][0]
    images = ViewDecoder(beton, VIEWS, 5, 0, 2, CPU)
    with loader(beton) as one:
        next(one.epoch(0))
        table = one.beton.images.table
    assert table is not None
    out = np.zeros((8, 2, 24, 24, 3), np.uint8)
    failed = np.zeros(8, np.bool_)
    images.make_views(table, 0, batch.index.numpy(), out, failed)
    assert not failed.any()
    views = augment(torch.from_numpy(out).permute(0, 1, 4, 2, 3), keys(5, 0, batch.index, 2), VIEWS)
    std = torch.tensor(VIEWS.std)[:, None, None]
    assert ((views - batch.views) * std * 255).abs().mean() < 2


def test_views_without_augmentation_are_the_images(beton: Path):
    with loader(beton, Views(count=1, size=24, **PLAIN)) as one:
        batch = next(one.epoch(0))
    for view, i in zip(batch.views[:, 0], batch.index.tolist(), strict=True):
        image = photo(i, 40 + 7 * i % 60, 40 + 11 * i % 60).resize((24, 24), Image.Resampling.BOX)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        assert (view - expected).abs().mean() < 4 / 255


@pytest.mark.parametrize("width", [1, 2, 5, 6, 11, 224])
def test_mirrors(width: int):
    image = np.random.default_rng(0).integers(0, 256, (4, width, 3), dtype=np.uint8)
    flipped = image.copy()
    mirror(flipped[1:3])
    assert (flipped[1:3] == image[1:3, ::-1]).all()
    assert (flipped[[0, 3]] == image[[0, 3]]).all()


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
    assert batch.views.shape == (10, 1, 3, 24, 24) and batch.views.std() > 0.3


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
    assert next(iter(plain(beton, size=112))).views.mean() > 0.99
    assert next(iter(plain(beton, size=95))).views.mean() == pytest.approx(112 * 112 / 128 / 192, abs=0.01)


def test_a_worker_takes_its_share_of_what_it_is_granted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert [spare_threads(sharing) for sharing in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert [spare_threads(sharing) for sharing in (1, 2, 8)] == [4, 2, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert spare_threads(1) == 8
