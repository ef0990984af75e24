"""Training images without labels, of which all or some have none: what needs labels is refused before it starts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.loading.labels import count_labelled, known_samples, labelled_samples
from kilobatch.data.loading.options import LabelOptions
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.recipes import checks
from kilobatch.launch.recipes.recipe import read_recipe

KNN = ["evaluate.during=knn", "evaluate.final=[knn]", "evaluate.knn.k=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images; ten of them have labels in some.txt, none has one in none.txt, and all have one in all.txt."""
    root = tmp_path_factory.mktemp("images")
    lines = []
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(root / f"{i:02}.png")
        lines.append((f"{i:02}.png", f"\t{'bird' if i % 2 else 'cat'}"))
    (root / "all.txt").write_text("".join(f"{name}{label}\n" for name, label in lines))
    (root / "some.txt").write_text("".join(f"{name}{label * (i < 10)}\n" for i, (name, label) in enumerate(lines)))
    (root / "none.txt").write_text("".join(f"{name}\n" for name, _ in lines))
    return root


def check(*changes: str) -> None:
    recipe, settings = read_recipe("demo", ["data.batch=8", *changes])
    checks.check(recipe, 1, settings)


def test_images_without_labels_are_trained_on(folder: Path) -> None:
    for name in ("none", "some"):
        check(f"data.train=list:{folder}/{name}.txt", "data.test=null")
    check(f"data.train=list:{folder}/some.txt", f"data.test=list:{folder}/all.txt", *KNN)


@pytest.mark.parametrize(
    ("train", "changes", "says"),
    [
        (
            "none",
            KNN,
            r"knn learn from labels of the training images, .*has none; use data.test=null, and",
        ),
        ("none", ["evaluate.every_epochs=0"], r"moved, picture learn from labels"),
        ("some", [*KNN, "evaluate.knn.k=11"], r"evaluate.knn.k 11 is more than the 10 images of data.train"),
        ("some", ["data.order.class_balanced=true"], r"6 of them have none; use data.unlabelled=drop"),
        (
            "some",
            ["data.order.long_tailed.ratio=2"],
            r"long_tailed takes images by their labels, and 6 of 16",
        ),
        ("some", ["data.unlabelled=drop", "data.batch=12"], r"12 is more than the 10 labelled images"),
    ],
)
def test_what_needs_labels_is_refused(train: str, changes: list[str], says: str, folder: Path) -> None:
    with pytest.raises(UserError, match=says):
        check(f"data.train=list:{folder}/{train}.txt", f"data.test=list:{folder}/all.txt", *changes)


@pytest.mark.parametrize(
    ("train", "says"), [("none", "has no labels, and method"), ("some", "and 6 of 16 images have n")]
)
def test_methods_that_learn_from_labels_are_refused(train: str, says: str, folder: Path) -> None:
    recipe, settings = read_recipe(
        "simclr_v2_digits_finetune",
        ["method.start=null", "data.batch=8", f"data.train=list:{folder}/{train}.txt", "data.test=null"]
        + ["data.labels.share=1", "data.unlabelled=keep"],
    )
    with pytest.raises(UserError, match=says):
        checks.check(recipe, 1, settings)


def test_labels_are_chosen_among_those_that_there_are(folder: Path, tmp_path: Path) -> None:
    spec = f"list:{folder}/some.txt"
    beton = tmp_path / "some.beton"
    convert(open_source(spec, "train"), beton, progress=False)
    some = folder / "three.txt"
    some.write_text("01.png\n03.png\n15.png\n")
    for options, expected in (
        (LabelOptions(), 10),
        (LabelOptions(share=0.5), 5),
        (LabelOptions(list=str(some)), 2),  # the third has no label
    ):
        found = labelled_samples(beton, options)
        assert found is not None and len(found) == expected == count_labelled(spec, options) and (found < 10).all()
        assert count_labelled(str(beton), options) == expected
    known = known_samples(beton, np.array([3, 9, 12]))
    assert known is not None and known.tolist() == [3, 9]
    convert(open_source(f"list:{folder}/all.txt", "train"), tmp_path / "all.beton", progress=False)
    assert labelled_samples(tmp_path / "all.beton", LabelOptions()) is known_samples(tmp_path / "all.beton") is None
