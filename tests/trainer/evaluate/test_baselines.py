"""Baselines: the same numbers as a plain computation, on any number of ranks, of all images or of a sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.batch import Batch, make_batch
from kilobatch.data.beton import verify_beton
from kilobatch.data.loading.loader import LoaderWorker, PlainLoader
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.digits import Digits
from kilobatch.methods import collectives
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.trainer.evaluate.baselines import measurement
from kilobatch.trainer.evaluate.baselines.baselines_file import (
    FILE,
    Baselines,
    read_all_baselines,
    read_baselines,
    write_all_baselines,
)
from kilobatch.trainer.evaluate.baselines.measurement import BaselinesFailed, accuracies, raw_pixels, rows_of_rank
from kilobatch.trainer.evaluate.features import Represent
from kilobatch.trainer.evaluate.options import KNNOptions
from tests.helpers.in_memory_data import Block, pixels
from tests.helpers.process_groups import run_ranks

OPTIONS = KNNOptions(k=7, temperature=0.05)
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MOST = 700, 200  # of 1,437 and 360 images: six batches and two


def encoder() -> ConvNet:
    torch.manual_seed(5)
    return ConvNet(4, "global").eval()


def loader(beton: Path, most: int, rank: int, world: int) -> PlainLoader:
    rows = rows_of_rank(verify_beton(beton).samples, most)
    worker = LoaderWorker(rank, world, 1, torch.device("cpu"))
    return PlainLoader(beton, 16, MEAN, STD, worker, batch=measurement.BATCH, rows=rows)


@torch.no_grad()
def measured(folder: Path) -> dict[str, float]:
    rank, world = collectives.rank(), collectives.world_size()
    train, test = (
        loader(folder / f"{split}.beton", most, rank, world)
        for split, most in zip(("train", "test"), MOST, strict=True)
    )
    network = encoder()
    of: dict[str, Represent] = {
        "pixels": raw_pixels(MEAN, STD),
        "untrained": lambda batch: network(batch.views[0][:, 0]),
    }
    return accuracies(of, train, test, OPTIONS, None)


def plain_knn(bank: NDArray, bank_label: NDArray, queries: NDArray, label: NDArray) -> float:
    """A loop in fp64 over queries."""
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    right = 0
    for query, its in zip(queries, label, strict=True):
        cosine = bank @ query
        nearest = np.argsort(-cosine, kind="stable")[: OPTIONS.k]
        votes = np.zeros(10)
        np.add.at(votes, bank_label[nearest], np.exp(cosine[nearest] / OPTIONS.temperature))
        right += int(votes.argmax() == its)
    return right / len(label)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        convert(Digits(split), folder / f"{split}.beton", progress=False)
    return folder


@torch.no_grad()
def test_any_number_of_ranks_gives_the_plain_result(digits: Path) -> None:
    found = measured(digits)
    assert run_ranks(2, measured, digits) == [found] * 2
    assert run_ranks(3, measured, digits) == [found] * 3

    whole = {split: loader(digits / f"{split}.beton", most, 0, 1) for split, most in (("train", 1437), ("test", 360))}
    views, labels = {}, {}
    for (split, images), most in zip(whole.items(), MOST, strict=True):
        batches = list(images)
        index = torch.cat([batch.index for batch in batches])
        assert torch.equal(index, torch.arange(len(index)))
        chosen = rows_of_rank(len(index), most)
        assert len(chosen) == len(np.unique(chosen)) == most
        views[split] = torch.cat([batch.views[0][:, 0] for batch in batches])[chosen]
        labels[split] = torch.cat([batch.label for batch in batches])[chosen].numpy()

    def of(features: dict[str, Tensor]) -> float:
        x = {split: rows.flatten(1).double().numpy() for split, rows in features.items()}
        return plain_knn(x["train"], labels["train"], x["test"], labels["test"])

    pixels = {split: ((x * 0.5 + 0.5) * 255).round() for split, x in views.items()}
    assert found["pixels"] == of(pixels)
    # The network sees other batches here, whose last bits differ: at most one image may change sides.
    assert abs(found["untrained"] - of({split: encoder()(x) for split, x in views.items()})) <= 1 / MOST[1]
    assert 0.3 < found["untrained"] < found["pixels"] < 1


def test_a_bank_of_fewer_images_than_neighbours_and_large_images() -> None:
    """All of them vote; images of more than 64 pixels are reduced to that."""
    labels = torch.tensor([0, 1, 1])
    images = Block(torch.rand(3, 3, 80, 80), labels)
    assert raw_pixels(MEAN, STD)(make_batch(torch.zeros(2, 1, 3, 80, 80))).shape == (2, 3 * 64 * 64)
    found = accuracies({"pixels": raw_pixels(MEAN, STD)}, images, images, KNNOptions(k=200, temperature=1e-4), None)
    assert found == {"pixels": 1.0}
    among = accuracies({"pixels": raw_pixels(MEAN, STD)}, images, images, KNNOptions(k=200, temperature=1e-4), [1])
    assert among == {"pixels": 2 / 3}  # an image of class 0 cannot be found among class 1


def fails_on_one() -> str:
    def fails(batch: Batch) -> Tensor:
        if collectives.rank() == collectives.world_size() - 1:
            raise RuntimeError("no\nmemory")
        return pixels(batch)

    images = Block(torch.rand(6, 3, 8, 8), torch.arange(6))
    try:
        accuracies({"pixels": fails}, images, images, OPTIONS, None)
    except BaselinesFailed as failure:
        return str(failure)
    return "not raised"


def test_a_failure_on_one_rank_is_raised_on_all() -> None:
    assert run_ranks(2, fails_on_one) == ["RuntimeError: no memory"] * 2
    assert fails_on_one() == "RuntimeError: no memory"


def test_the_file_is_whole_and_says_its_conditions(tmp_path: Path) -> None:
    common = {"k": 5, "temperature": 0.07, "classes": 10, "pixels": 0.9833, "untrained": 0.9, "test_images": 360}
    whole = Baselines(
        key="a", in_use=True, train_images=1437, all_train_images=1437, all_test_images=360, labels=72, **common
    )
    part = Baselines(
        key="b", in_use=False, train_images=2048, all_train_images=50000, all_test_images=10000, reduced_to=64, **common
    )
    write_all_baselines(tmp_path, [part, whole])
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert read_all_baselines(tmp_path) == [part, whole] and read_baselines(tmp_path) == whole
    assert whole.conditions() == (
        "k 5, temperature 0.07; 1,437 training images with their labels, where the training had 72 labels; "
        "360 test images"
    )
    assert whole.shares(0.978) == "trained encoder 97.80%, raw pixels 98.33%, untrained encoder 90.00%, chance 10.00%"
    assert whole.values() == {"knn/pixels": 0.9833, "knn/untrained": 0.9, "knn/chance": 0.1}
    assert part.conditions() == (
        "k 5, temperature 0.07; a sample of 2,048 of 50,000 training images with their labels; "
        "a sample of 360 of 10,000 test images"
    )
    assert part.shares() == "raw pixels (64 x 64) 98.33%, untrained encoder 90.00%, chance 10.00%"
    assert set(part.values()) == {"knn_sample/pixels", "knn_sample/untrained", "knn_sample/chance"}
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-30])
    assert read_all_baselines(tmp_path) == [] and read_baselines(tmp_path) is None
