"""What no single option can know: whether a recipe's parts fit each other, the data and this machine."""

from typing import Any

import torch

from data.refusal import Refusal
from data.sources import Split, count
from launch.recipe import Recipe
from launch.settings import Settings
from launch.world import pick_device


def check(recipe: Recipe, workers: int, settings: Settings) -> None:
    """Raises Refusal for the first part that does not fit, before any process is started or image decoded.

    settings: where the recipe's values were written, for the message.
    """
    if workers < 1:
        raise Refusal(f"--workers is {workers}; it should be 1 or more")

    def refuse(dotted: str, message: str) -> Refusal:
        return Refusal(f"{settings.where(tuple(dotted.split('.')))}: {message}")

    device = pick_device(recipe.run.device, workers - 1)
    if device.type == "cpu" and recipe.engine.precision == "fp16":
        raise refuse("engine.precision", "engine.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")

    batch, chunks = recipe.data.batch, recipe.engine.chunks
    parts = workers * chunks
    if batch % parts:
        below, above = batch // parts * parts, -(-batch // parts) * parts
        use = f"{below} or {above}" if below else f"{above}"
        raise refuse(
            "data.batch",
            f"data.batch {batch} does not divide over {workers} workers × {chunks} chunks = {parts}; use {use}",
        )
    if recipe.encoder.norm == "global" and chunks > 1:
        raise refuse(
            "engine.chunks",
            f"engine.chunks {chunks} with encoder.norm global: global statistics need the whole batch at once, "
            "a chunk sees its part only; use engine.chunks=1 or encoder.norm=local",
        )
    samples = _count(recipe, "train", refuse)
    if samples < batch:
        raise refuse(
            "data.batch",
            f"data.batch {batch} is more than the {samples} images of data.train '{recipe.data.train}'; "
            f"use at most {samples // parts * parts}"
            if samples >= parts
            else "add images",
        )
    if recipe.data.test is not None:
        _count(recipe, "test", refuse)
    uses_knn = recipe.data.test and (recipe.evaluate.every_epochs or "knn" in recipe.evaluate.final)
    if uses_knn and recipe.evaluate.knn.k > samples:
        raise refuse(
            "evaluate.knn.k",
            f"evaluate.knn.k {recipe.evaluate.knn.k} is more than the {samples} images of data.train; use at most that",
        )


def _count(recipe: Recipe, split: Split, refuse: Any) -> int:
    """Images of data.train or data.test, none decoded."""
    spec = recipe.data.train if split == "train" else recipe.data.test
    assert spec is not None
    try:
        return count(spec, split)
    except Refusal as refusal:
        raise refuse(f"data.{split}", str(refusal)) from refusal


def default_workers(recipe: Recipe) -> int:
    """One for each GPU, or one on a CPU."""
    return torch.cuda.device_count() if pick_device(recipe.run.device, 0).type == "cuda" else 1
