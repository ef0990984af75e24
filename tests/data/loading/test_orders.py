"""Orders of an epoch by labels or by a method: long-tailed parts, balanced classes, batches of P x K, names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.beton import read_labels
from kilobatch.data.beton_writer import write_samples
from kilobatch.data.errors import UserError
from kilobatch.data.loading.labels import balanced_share, count_labelled, count_used, labelled_samples, used_samples
from kilobatch.data.loading.loader import Loader
from kilobatch.data.loading.options import LabelOptions, LongTailed, OrderOptions
from kilobatch.data.loading.sampling import (
    balanced_order,
    class_batches,
    epoch_order,
    long_tail,
    sample_names,
)
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import encode
from kilobatch.data.tensor_rng import sample_keys
from kilobatch.data.views.options import Views
from tests.helpers import loaders

SIZES = (20, 12, 5, 3)
UNEVEN = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))  # 40 images of four classes
BALANCED = OrderOptions(class_balanced=True)
BY_CLASS = OrderOptions(images_per_class=3)
VIEWS = Views(size=18)


def counts(labels: NDArray[np.int64], some: NDArray[np.int64]) -> list[int]:
    return np.bincount(labels[some], minlength=int(labels.max()) + 1).tolist()


def test_a_long_tail_has_the_sizes_of_ldam():
    cifar10, cifar100 = np.repeat(np.arange(10), 5000), np.repeat(np.arange(100), 500)
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # its code: int(5000 * 0.01 ** (i / 9))
    assert counts(cifar10, long_tail(cifar10, 100, "exponential", 0)) == expected
    assert len(long_tail(cifar100, 100, "exponential", 3)) == 10847
    assert counts(cifar10, long_tail(cifar10, 10, "step", 0)) == [5000] * 5 + [500] * 5
    mixed = np.random.default_rng(1).permutation(cifar10)
    assert counts(mixed, long_tail(mixed, 100, "exponential", 0)) == expected


def test_a_long_tail_keeps_its_ratio_where_classes_are_uneven():
    labels = np.repeat(np.arange(3), (60, 100, 30))
    assert counts(labels, long_tail(labels, 4, "exponential", 0)) == [60, 30, 15]  # of 60, 200 and 120 the least
    assert counts(labels, long_tail(labels, 1.5, "step", 0)) == [45, 30, 30]
    assert counts(UNEVEN, long_tail(UNEVEN, 1000, "exponential", 0)) == [20, 2, 1, 1]  # one at least


def test_a_long_tail_is_chosen_by_its_seed_alone():
    chosen = [long_tail(UNEVEN, 5, "exponential", seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] == sorted(set(chosen[0]))
    assert long_tail(np.arange(24) % 3, 4, "exponential", 7).tolist() == GOLDEN_TAIL
    labels = np.arange(400) % 4  # a share of the labels of the same seed is another choice
    tail, share = (set(some.tolist()) for some in (long_tail(labels, 10, "step", 0), balanced_share(labels, 4, 0.1, 0)))
    assert len({i for i in tail if labels[i] == 3}) == 10 and len(tail & {i for i in share if labels[i] == 3}) < 5


GOLDEN_TAIL = [0, 3, 4, 6, 9, 10, 12, 15, 16, 18, 20, 21, 22, 23]


def test_each_class_comes_equally_often_in_every_part_of_an_epoch():
    order = balanced_order(5, 2, UNEVEN, 42)
    turns = UNEVEN[order[:40]].reshape(10, 4)
    assert (np.sort(turns, 1) == np.arange(4)).all() and len(np.unique(turns, axis=0)) > 5
    for label, size in enumerate(SIZES):
        shown = order[UNEVEN[order] == label]
        for start in range(0, len(shown), size):  # a round of the class
            assert len(set(shown[start : start + size].tolist())) == min(size, len(shown) - start)
    assert balanced_order(5, 2, UNEVEN, 30).tolist() == order[:30].tolist()
    assert balanced_order(5, 3, UNEVEN, 42).tolist() != order.tolist() != balanced_order(6, 2, UNEVEN, 42).tolist()
    assert order[:8].tolist() == GOLDEN_BALANCED


GOLDEN_BALANCED = [37, 35, 16, 20, 17, 31, 12, 21]


def test_batches_hold_so_many_images_of_so_many_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), (30, 30, 20, 9, 5, 4, 2)))
    order = class_batches(5, 1, labels, 25, 3, 4).reshape(25, 3, 4)
    assert (labels[order] == labels[order[:, :, :1]]).all()  # side by side
    assert all(len(set(labels[batch[:, 0]].tolist())) == 3 for batch in order)
    for images in order.reshape(-1, 4):
        assert len(set(images.tolist())) == min(4, SMALLEST if labels[images[0]] == 6 else 4)
    shown = np.bincount(labels[order[:, :, 0]].ravel(), minlength=7)
    assert shown.min() >= 6 and shown.sum() == 75  # two of three rounds' classes, each time others
    largest = order.reshape(-1, 4)[labels[order.reshape(-1, 4)[:, 0]] == 0][:7]  # a round: 7 draws of 4 of the 30
    assert len(set(largest.ravel().tolist())) == 28
    assert class_batches(5, 1, labels, 9, 3, 4).tolist() == order[:9].ravel().tolist()
    assert order[0].tolist() == GOLDEN_BATCH


SMALLEST = 2  # images of the last class
GOLDEN_BATCH = [[22, 88, 5, 59], [26, 48, 10, 12], [72, 93, 67, 96]]


def test_a_name_counts_how_often_its_sample_has_come():
    assert sample_names(np.array([3, 1, 3, 3, 0, 1]), 10).tolist() == [3, 1, 13, 23, 0, 11]
    order = epoch_order(0, 0, 30)
    assert sample_names(order, 30).tolist() == order.tolist()
    assert sample_names(np.zeros(0, np.int64), 30).tolist() == []


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("uneven") / "photos.beton")


def write(path: Path, times: int = 1) -> Path:
    """Photographs with the labels UNEVEN, all of them so many times."""
    images = [encode(loaders.photo(i, 40, 30), Encoding()) for i in range(40)]
    samples = [(x.mode, x.width, x.height, x.data, int(label)) for x, label in zip(images, UNEVEN, strict=True)]
    write_samples(path, samples * times, ["a", "b", "c", "d"])
    return path


def loader(beton: Path, **options: Any) -> Loader:
    return loaders.loader(beton, VIEWS, **{"batch": 12, **options})


def batches(beton: Path, first_step: int = 0, planar: bool = True, **options: Any) -> list[Batch]:
    """Of two epochs, from a step of the first on. planar: whether the decoder colours the views."""
    with loader(beton, **options) as one:
        one.beton.images.planar = planar
        return [batch for epoch in range(2) for batch in one.epoch(epoch, 0 if epoch else first_step)]


def tensors(batch: Batch) -> tuple[Tensor, ...]:
    return *batch.views, batch.index, batch.label, batch.keys


ORDERS = {
    "balanced": {"options": BALANCED},
    "by class": {"options": BY_CLASS},
    "of a method": {"order": lambda epoch: np.tile(epoch_order(1, epoch, 20), 2)},
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_does_not_depend_on_ranks_nor_on_where_it_was_interrupted(beton: Path, name: str):
    whole = batches(beton, **ORDERS[name])
    assert len(whole) == 6
    for world in (2, 3):
        ranks = [batches(beton, rank=rank, world=world, threads=2, **ORDERS[name]) for rank in range(world)]
        for parts, expected in zip(zip(*ranks, strict=True), whole, strict=True):
            for tensor, *columns in zip(tensors(expected), *map(tensors, parts), strict=True):
                assert torch.equal(torch.cat(columns), tensor)
    for one, expected in zip(batches(beton, first_step=2, **ORDERS[name]), whole[2:], strict=True):
        assert all(map(torch.equal, tensors(one), tensors(expected)))


@pytest.mark.parametrize("planar", [True, False], ids=["on a CPU", "as on an accelerator"])
@pytest.mark.parametrize("jigsaw", [False, True])
def test_a_sample_that_comes_again_is_drawn_for_anew(beton: Path, tmp_path: Path, planar: bool, jigsaw: bool):
    """As sample number `name` of a file in which all images stand three times."""
    thrice = write(tmp_path / "thrice.beton", times=3)
    how: dict[str, Any] = {"planar": planar, "jigsaw": jigsaw}
    epochs = batches(beton, options=BALANCED, **how)
    indices = [torch.cat([b.index for b in epochs[start : start + 3]]).numpy() for start in (0, 3)]
    names = [sample_names(index, 40) for index in indices]
    assert all(name.max() >= 80 and (name < 40).sum() > 10 for name in names)
    others = batches(thrice, order=lambda epoch: np.resize(names[epoch], 120), **how)  # ten batches an epoch
    for step, (batch, other) in enumerate(zip(epochs, others[:3] + others[10:13], strict=True)):
        assert torch.equal(batch.views[0], other.views[0]) and torch.equal(batch.label, other.label)
        assert torch.equal(batch.index, other.index % 40)
        assert torch.equal(batch.keys, sample_keys(5, step, other.index))


def test_orders_are_made_of_the_samples_that_are_trained_on(beton: Path):
    order = OrderOptions(long_tailed=LongTailed(ratio=4), class_balanced=True)
    used = used_samples(beton, order)
    assert used is not None and counts(UNEVEN, used) == [12, 7, 4, 3]
    assert count_used(str(beton), order) == 26 and count_used(str(beton), BALANCED) == 40
    labels = LabelOptions(share=0.5)
    labelled = labelled_samples(beton, labels, used)
    assert labelled is not None and set(labelled) < set(used) and sorted(counts(UNEVEN, labelled)) == [3, 3, 3, 4]
    assert count_labelled(str(beton), labels, order) == len(labelled) == 13

    epoch = batches(beton, used=used, options=order)
    assert len(epoch) == 4 and counts(UNEVEN, np.concatenate([b.index for b in epoch[:2]])) == [6] * 4
    assert set(torch.cat([b.index for b in epoch]).tolist()) <= set(used.tolist())
    plain = batches(beton, used=used)
    assert sorted(torch.cat([b.index for b in plain[:2]]).tolist()) == sorted(used[epoch_order(5, 0, 26)[:24]].tolist())
    dropped = {"used": used, "labelled": labelled, "drop_unlabelled": True, "options": order}
    assert set(torch.cat([b.index for b in batches(beton, **dropped)]).tolist()) == set(labelled.tolist())
    kept = batches(beton, used=used, labelled=labelled)
    assert all(((b.label >= 0) == torch.isin(b.index, torch.from_numpy(labelled))).all() for b in kept)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels are missing": (
        {"options": BALANCED, "labelled": np.arange(30)},
        "data.order.class_balanced takes images by their labels, and 10 of them have none; .*data.unlabelled=drop",
    ),
    "a batch that does not divide": (
        {"options": OrderOptions(images_per_class=5)},
        "images_per_class 5 does not divide data.batch 12; use a data.batch of 10 or 15",
    ),
    "too few classes": (
        {"options": OrderOptions(images_per_class=2)},
        "makes data.batch 12 of 6 classes, and 4 have images; use data.batch=8 at most, or .*images_per_class=3",
    ),
    "a part of too few images": (
        {"used": np.arange(11), "options": BALANCED}, "has 11 samples in data.order, fewer than one global batch of 12",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_order_that_does_not_fit_is_refused(beton: Path, case: str):
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        loader(beton, **options)


def test_a_method_is_asked_for_its_order_when_an_epoch_begins(beton: Path):
    asked: list[int] = []

    def order(epoch: int) -> NDArray[np.int64] | None:
        asked.append(epoch)
        return None if epoch == 1 else np.arange(40)[::-1] - epoch % 2

    with loader(beton, order=order) as one:
        for epoch in (0, 1):
            found = list(one.epoch(epoch))
            assert asked == list(range(epoch + 1)) and len(found) == 3
            expected = np.arange(40)[::-1] if epoch == 0 else epoch_order(5, 1, 40)
            assert torch.cat([b.index for b in found]).tolist() == expected[:36].tolist()
        resumed = list(one.epoch(2, 2))
        assert asked == [0, 1, 2] and resumed[0].index.tolist() == list(range(15, 3, -1))
        left = one.epoch(4, 1)
        assert next(left).index[0] == 27 and asked[3:] == [4]
        next(one.epoch(4))  # an epoch that begins again is asked for again
        assert asked[3:] == [4, 4]


WRONG: dict[str, tuple[Callable[[int], Any], str]] = {
    "too few": (lambda epoch: np.arange(35), r"epoch_order\(0\) has 35 samples; return at least the 36"),
    "unknown": (lambda epoch: np.arange(5, 45), r"has sample 40, which is none of the 40"),
    "negative": (lambda epoch: np.arange(40) - 1, r"has sample -1, which is none of the 40"),
    "floats": (lambda epoch: np.arange(40.0), r"float64 of shape \(40,\); return sample indices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_methods_order_that_is_none_is_refused(beton: Path, case: str):
    order, message = WRONG[case]
    with loader(beton, order=order) as one, pytest.raises(ValueError, match=message):
        one.epoch(0)


def test_a_methods_order_has_to_lie_within_what_is_trained_on(beton: Path):
    used = np.arange(0, 40, 2)
    none_of = "has sample 1, which is none of the 20 that are trained on"
    with loader(beton, used=used, order=lambda epoch: np.arange(20)) as one, pytest.raises(ValueError, match=none_of):
        one.epoch(0)
    assert read_labels(beton).tolist() == UNEVEN.tolist()


def test_two_orders_at_once_are_refused():
    with pytest.raises(ValueError, match=r"class_balanced and images_per_class 3 are two orders"):
        OrderOptions(class_balanced=True, images_per_class=3)
