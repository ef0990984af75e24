"""The files with the images: the same on every rank, and those that the checkpoint was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.data.loading import labels
from kilobatch.data.loading.loader import PlainLoader
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.launch.recipes import data as recipe_data
from kilobatch.launch.recipes.data import (
    PreparedData,
    class_counts,
    data_sha256,
    labelled_of,
    prepare_data,
    used_of,
)
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe, with_images
from kilobatch.launch.worker import components, evaluation
from kilobatch.launch.worker.components import data_of
from kilobatch.launch.worker.pretrained import build_of_recipe
from kilobatch.launch.worker.process_group import World
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method
from kilobatch.methods.networks.keyed_layers import KeyedDropout
from kilobatch.trainer.evaluate.options import EvaluateOptions
from tests.helpers.paper_files import WORDS, add_paper
from tests.helpers.process_groups import run_ranks


class Pixels(Method):
    """The pixels as features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Flatten()


NAMES = ["ant", "bee", "cat"]


def beton(path: Path, labels: list[int], classes: list[str], seed: int = 0) -> str:
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    convert(Arrays(images, np.array(labels), classes), path, progress=False)
    return str(path)


def recipe(tmp_path: Path, *changes: str) -> Recipe:
    train = beton(tmp_path / "train.beton", [0, 1, 2, 0], NAMES)
    test = beton(tmp_path / "test.beton", [0, 0, 1], ["cat", "ant"], seed=1)
    paths = [f"data.train={train}", f"data.test={test}"]
    return resolve_recipe("demo", ["data.views.size=8", "encoder.width=2", *paths, *changes])


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, size, torch.device("cpu"))


def found(changes: list[str], given: PreparedData | None) -> tuple[PreparedData, int]:
    """What a rank finds, and how often it looked; only rank 0 is given anything."""
    looked: list[Recipe] = []
    original = recipe_data.prepare_data

    def counted(recipe: Recipe) -> PreparedData:
        looked.append(recipe)
        return original(recipe)

    components.prepare_data = counted
    rank = collectives.rank()
    ours = resolve_recipe("demo", changes)
    return data_of(ours, world(rank, collectives.world_size()), None if rank else given), len(looked)


def test_ranks_take_what_the_launcher_found(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    data = prepare_data(ours)
    changes = [f"data.train={ours.data.train}", f"data.test={ours.data.test}", "data.views.size=8"]
    assert run_ranks(2, found, changes, data) == [(data, 0), (data, 0)]
    assert run_ranks(2, found, changes, None) == [(data, 1), (data, 0)]  # started by torchrun


def test_a_file_that_a_node_does_not_see_is_named(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    data = prepare_data(ours)
    beton(tmp_path / "test.beton", [0, 0, 1], ["cat", "ant"], seed=2)
    with pytest.raises(
        UserError, match=r"data.test .*test.beton holds other images on .* than where the run was started"
    ):
        data_of(ours, world(), data)
    (tmp_path / "train.beton").unlink()
    with pytest.raises(
        UserError, match=r"data.train .*rank 0 has .*train.beton, which is not there on .* all nodes see"
    ):
        data_of(ours, world(), data)
    source = resolve_recipe("demo", ["data.train=folder:photos", "data.test=null"])
    with pytest.raises(UserError, match=r"converted it to .*all nodes see, by KILOBATCH_CACHE=FOLDER"):
        data_of(source, world(), data)


def test_evaluators_learn_from_the_images_that_were_trained_on(tmp_path: Path) -> None:
    train = beton(tmp_path / "many.beton", [0, 1, 2] * 20, NAMES)
    ours = recipe(tmp_path, "data.order.long_tailed.ratio=4", "data.order.class_balanced=true", f"data.train={train}")
    data = prepare_data(ours)
    used = used_of(ours, data)
    assert used is not None and np.bincount(used % 3).tolist() == [20, 10, 5]
    named = with_images(ours, train, None)
    assert named.data.order is None and data_sha256(named, data) == data.train.sha256 != data_sha256(ours, data)
    assert class_counts(ours, data).tolist() == [20, 10, 5] and class_counts(named, data).tolist() == [20] * 3
    parts = []
    for rank in (0, 1):
        suite = evaluation.suite_of(tmp_path, ours, data, world(rank, 2), Pixels())
        assert suite is not None and (suite.train.samples, suite.test.samples) == (35, 3)
        parts += [batch.index for batch in suite.train]
    assert torch.cat(parts).tolist() == used.tolist()
    sample = suite.sample()[0]
    assert isinstance(sample, PlainLoader) and sample.index.tolist() == used.tolist()
    probe = components.loader_of(ours, data, world(), ours.data.views, 7)  # as the linear protocol makes it
    trained = components.loader_of(ours, data, world(), ours.data.views, 7, options=ours.data.order)
    with probe, trained:
        assert sorted(torch.cat([batch.index for batch in probe.epoch(0)]).tolist()) == used.tolist()
        shown = torch.cat([batch.label for batch in trained.epoch(0)])
        assert shown.bincount().tolist() in ([12, 12, 11], [12, 11, 12], [11, 12, 12])


def test_only_a_method_that_orders_epochs_is_asked() -> None:
    class Ordered(Pixels):
        """An order of every second epoch."""

        def epoch_order(self, epoch: int) -> torch.Tensor | None:
            return torch.arange(5).flip(0) if epoch % 2 else None

    assert components.order_of(Pixels()) is None
    order = components.order_of(Ordered())
    assert order is not None and order(0) is None
    found = order(1)
    assert isinstance(found, np.ndarray) and found.tolist() == [4, 3, 2, 1, 0]


def test_test_images_of_some_classes_are_evaluated_among_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = recipe(tmp_path)
    ours = ours.model_copy(update={"evaluate": EvaluateOptions.model_validate({"knn": {"k": 4}})})
    data = prepare_data(ours)
    suite = evaluation.suite_of(tmp_path, ours, data, world(), Pixels())
    assert suite is not None
    assert (suite.classes, suite.among) == (NAMES, [0, 2])
    assert torch.cat([batch.label for batch in suite.test]).tolist() == [2, 2, 0]  # cat, cat, ant
    values: dict[str, float] = {name: value for of in ("knn", "fast_linear") for name, value in suite.evaluate(of)}
    evaluation.print_values(values, ours, suite)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(", among the 2 classes of the test images: " in line for line in lines)
    whole = evaluation.suite_of(tmp_path, ours, data.model_copy(update={"test": data.train}), world(), Pixels())
    assert whole is not None and whole.among is None
    evaluation.print_values(values, ours, whole)
    assert "among" not in capsys.readouterr().out
    evaluation.print_values({"linear/top1": 0.5}, ours, whole)
    printed = capsys.readouterr().out
    assert "linear top-1 (SGD on frozen features of whole images, " in printed and ", lr 0.1 per 256, " in printed


def test_labels_are_read_and_sorted_once_at_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = recipe(tmp_path, "data.labels.share=0.8", "data.order.long_tailed.ratio=2")
    data, read = prepare_data(asked), list[Path]()
    original = labels.read_labels

    def counted(path: Path) -> NDArray[np.int64]:
        read.append(path)
        return original(path)

    monkeypatch.setattr(labels, "read_labels", counted)
    for _ in range(2):
        used, labelled, counts = used_of(asked, data), labelled_of(asked, data), class_counts(asked, data)
        assert used is not None and labelled is not None and data_sha256(asked, data)
        assert (len(used), len(labelled), counts.tolist()) == (3, 3, [1, 1, 1])
    assert len(read) == 3, "once for the long tail, for which of it have labels, and for the share of these"
    assert used_of(resolve_recipe("demo", ["data.labels.share=0.8"]), data) is None


class Ordered(Pixels):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own

    def epoch_order(self, epoch: int) -> Tensor | None:
        return torch.arange(4) if epoch else torch.arange(4).roll(collectives.rank() if self.own else 1)


def orders_of_ranks() -> list[list[int] | str]:
    found: list[list[int] | str] = []
    for own in (False, True):
        order = components.order_of(Ordered(own))
        assert order is not None
        try:
            found.append([order(epoch).tolist() for epoch in (0, 1)])  # pyright: ignore[reportOptionalMemberAccess]
        except ValueError as error:
            found.append(str(error))
    return found


def test_an_order_that_differs_between_ranks_is_refused_on_all_of_them():
    for found in run_ranks(2, orders_of_ranks):
        assert found[0] == [[3, 0, 1, 2], [0, 1, 2, 3]]
        assert "Ordered.epoch_order(0) differs between ranks; make it of what all of them have alike" in found[1]


class ByWords(Pixels):
    def represent_batch(self, batch: Batch) -> Tensor:
        return batch.fields["tokens"].float()


def test_a_method_that_represents_fields_too_needs_them_of_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_paper(monkeypatch, tmp_path / "papers", "words", WORDS)
    asked = resolve_recipe("demo", ["method.name=words", "data.views.count=1"])
    without = Path(beton(tmp_path / "test.beton", [0, 1], NAMES[:2]))
    components.refuse_missing_fields(asked, Pixels(), "data.test", without)  # an image alone is enough for it
    with pytest.raises(
        UserError, match="words represents a sample by its tokens, weight too, and data.test has no tok"
    ):
        components.refuse_missing_fields(asked, ByWords(), "data.test", without)
    one = tmp_path / "both.beton"
    fields = {"tokens": np.zeros((2, 5), np.int64), "weight": np.zeros(2)}
    convert(Arrays(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), NAMES[:2], fields), one, progress=False)
    components.refuse_missing_fields(asked, ByWords(), "data.test", one)


def test_dropout_of_a_head_draws_by_the_samples_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_paper(monkeypatch, tmp_path / "papers", "words", WORDS)
    asked = resolve_recipe("demo", ["method.name=words", "encoder.width=2", "data.views.count=1"])
    head = build_of_recipe(asked, DataFacts(4, 3)).get_submodule("head.0")
    assert isinstance(head, KeyedDropout) and head.rate == 0.2
    add_paper(monkeypatch, tmp_path / "others", "words", WORDS.replace("nn.Dropout(0.2)", "nn.AlphaDropout(0.2)"))
    with pytest.raises(UserError, match="the method's layer head.0 is a AlphaDropout, which draws from torch's gen"):
        build_of_recipe(asked, DataFacts(4, 3))
