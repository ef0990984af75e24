"""Orders of images and fields of samples that a recipe asks for: checked against its data before anything starts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.planning.plan import images_per_epoch
from kilobatch.launch.recipes import checks, method_options
from kilobatch.launch.recipes.recipe import read_recipe, resolve_recipe

BALANCED, TAIL = "data.order.class_balanced=true", "data.order.long_tailed.ratio=10"


def check(*changes: str, workers: int = 1) -> None:
    recipe, settings = read_recipe("demo", list(changes))
    checks.check(recipe, workers, settings)


REFUSED: dict[str, tuple[list[str], str]] = {
    "two orders": ([BALANCED, "data.order.images_per_class=2"], "data.order: class_balanced and images_per_class 2 a"),
    "an unknown key": (["data.order.balanced=true"], "'data.order' has no key 'balanced'; did you mean 'class_ba"),
    "no long tail": (["data.order.long_tailed.ratio=1"], "data.order.long_tailed.ratio is 1; .*greater than 1"),
    "no order": (["data.order=balanced"], r"data.order is balanced; it holds keys of its own \(long_tailed, class_bal"),
    "unlabelled images": (
        [BALANCED, "data.labels.share=0.5"],
        r"override 'data.order.class_balanced=true': .* by their labels, and 719 of them have none; use data.unl",
    ),
    "a batch that does not divide": (
        ["data.order.images_per_class=7", "data.batch=64"],
        "override 'data.order.images_per_class=7': .*does not divide data.batch 64; use a data.batch of 63 or 70",
    ),
    "too few classes": (["data.order.images_per_class=4", "data.batch=64"], "data.batch 64 of 16 classes, and 10 have"),
    "a batch of more than the tail": (
        [TAIL, "data.batch=600"], "data.batch 600 is more than the 576 images that data.order.long_tailed leaves",
    ),
    "more neighbours than the tail": ([TAIL, "evaluate.knn.k=577"], "evaluate.knn.k 577 is more than the 576 images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_order_that_does_not_fit_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        check(*changes)


def test_orders_that_fit_pass() -> None:
    check(BALANCED, TAIL, "data.batch=64")
    check(BALANCED, "data.labels.share=0.5", "data.unlabelled=drop", "data.batch=64")
    check("data.order.images_per_class=8", "data.batch=64", workers=4)
    check(TAIL, "data.labels.share=0.5", "data.batch=64")


def test_a_plan_counts_the_images_that_an_order_leaves() -> None:
    assert images_per_epoch(resolve_recipe("demo", [BALANCED]), None) == 1437
    assert images_per_epoch(resolve_recipe("demo", [TAIL]), None) == 576
    drop = ["data.labels.share=0.1", "data.unlabelled=drop"]
    assert images_per_epoch(resolve_recipe("demo", [TAIL, *drop]), None) == 58


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .beton of images with tokens, beside its source and one without; the demo's method needs tokens and lengths."""
    monkeypatch.chdir(tmp_path)
    images = {"images": np.zeros((40, 8, 8, 3), np.uint8), "labels": np.arange(40) % 2}
    np.savez("plain.npz", **images)
    np.savez("tokens.npz", **images, tokens=np.zeros((40, 3), np.int64))
    np.savez("both.npz", **images, tokens=np.zeros((40, 3), np.int64), lengths=np.zeros(40, np.int64))
    convert(open_source("npz:both.npz", "train"), tmp_path / "both.beton", progress=False)
    original = method_options.declared

    def declared(name: str) -> SimpleNamespace:
        return SimpleNamespace(**{**vars(original(name)), "needs": frozenset({"tokens", "lengths"})})

    monkeypatch.setattr(method_options, "declared", declared)
    return tmp_path


def test_a_source_without_a_needed_field_is_refused_by_name(captions: Path) -> None:
    small = ["data.batch=8", "evaluate.knn.k=3"]
    for train, message in (
        (
            "npz:plain.npz",
            r"needs lengths, tokens beside .* has no lengths, tokens \(its fields: none\)",
        ),
        (
            "npz:tokens.npz",
            r"has no lengths \(its fields: tokens\); use npz:FILE with an array lengths, a row",
        ),
        ("digits", r"data.train 'digits' has no lengths, tokens"),
    ):
        with pytest.raises(UserError, match=message):
            check(f"data.train={train}", "data.test=npz:plain.npz", *small)
    for train in ("npz:both.npz", "both.beton"):  # test images may do without
        check(f"data.train={train}", "data.test=npz:plain.npz", *small)


def test_a_damaged_source_is_one_mistake(captions: Path) -> None:
    make: Callable[[], object] = lambda: check("data.train=npz:gone.npz", "data.batch=8")  # noqa: E731
    with pytest.raises(UserError, match="gone.npz: there is no such file") as refused:
        make()
    assert "mistakes:" not in str(refused.value)
