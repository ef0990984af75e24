"""What no single option can know: whether a recipe's parts fit each other, the data and the number of workers.
Loads no torch; what this machine has is asked in devices.py."""

from typing import Any, Protocol, runtime_checkable

from data.refusal import Refusal
from data.sources import Split, count
from launch import explain, method_options
from launch.recipe import Recipe
from launch.settings import Settings


@runtime_checkable
class Checked(Protocol):
    """A group of a method's options that knows which batches it cannot work with, as a queue does."""

    def check(self, batch: int) -> None:
        """batch: the global one. Raises Refusal."""
        ...


def check(recipe: Recipe, workers: int, settings: Settings, evaluators: list[str] | None = None) -> None:
    """Raises Refusal for the first part that does not fit, before any process is started or image decoded.

    settings: where the recipe's values were written, for the message; evaluators: what will run; None: training, and
    the recipe's own.
    """
    if workers < 1:
        raise Refusal(f"--workers is {workers}; it should be 1 or more")

    def refuse(dotted: str, message: str) -> Refusal:
        return Refusal(f"{settings.where(tuple(dotted.split('.')))}: {message}")

    views, wanted = recipe.data.views.count, method_options.declared(recipe.method.name).views
    if wanted not in (None, views):
        raise refuse(
            "data.views.count",
            f"data.views.count is {views}, but method {recipe.method.name} takes {wanted} views of an image; "
            f"use {wanted}",
        )

    batch, chunks = recipe.data.batch, recipe.engine.chunks
    parts = workers * chunks
    if batch < 2:
        raise refuse("data.batch", f"data.batch {batch} has no other image to contrast with; use 2 or more")
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
    _check_groups(recipe, settings)
    samples = _count(recipe, "train", refuse)
    if samples < batch:
        most = samples // parts * parts
        way_out = f"use at most {most}" if most >= 2 else f"{max(2, parts)} is the least here: add images"
        raise refuse(
            "data.batch",
            f"data.batch {batch} is more than the {samples} images of data.train '{recipe.data.train}'; {way_out}",
        )
    if recipe.data.test is not None:
        _count(recipe, "test", refuse)
        _check_evaluators(recipe, workers, samples, evaluators, refuse)


def _check_groups(recipe: Recipe, settings: Settings) -> None:
    """The method's own groups of options."""
    for name, group in recipe.method:
        if not isinstance(group, Checked):
            continue
        try:
            group.check(recipe.data.batch)
        except Refusal as refusal:
            key, said = ("method", name), str(refusal)
            where = explain.where_of_parts(key, said, settings) or settings.where(key)
            raise Refusal(f"{where}: {said}") from refusal


def _check_evaluators(recipe: Recipe, workers: int, samples: int, evaluators: list[str] | None, refuse: Any) -> None:
    """samples: of data.train, which k-NN looks into and probes learn from."""
    final = recipe.evaluate.final if evaluators is None else evaluators
    while_training = evaluators is None and recipe.evaluate.every_epochs
    if (while_training or "knn" in final) and recipe.evaluate.knn.k > samples:
        raise refuse(
            "evaluate.knn.k",
            f"evaluate.knn.k {recipe.evaluate.knn.k} is more than the {samples} images of data.train; use at most that",
        )
    batch, most = recipe.evaluate.linear.batch, samples // workers * workers
    if "linear" not in final or (batch % workers == 0 and batch <= samples):
        return
    if batch > samples:
        way_out = f"use at most {most}" if most else "use fewer workers, or add images"
        wrong = f"is more than the {samples} images of data.train '{recipe.data.train}'; {way_out}"
    else:
        nearest = [str(n) for n in (batch // workers * workers, -(-batch // workers) * workers) if 0 < n <= samples]
        way_out = " or ".join(nearest) if nearest else f"at most {samples} workers"
        wrong = f"does not divide over {workers} workers; use {way_out}"
    raise refuse("evaluate.linear.batch", f"evaluate.linear.batch {batch} {wrong}")


def _count(recipe: Recipe, split: Split, refuse: Any) -> int:
    """Images of data.train or data.test, none decoded."""
    spec = recipe.data.train if split == "train" else recipe.data.test
    assert spec is not None
    try:
        return count(spec, split)
    except Refusal as refusal:
        raise refuse(f"data.{split}", str(refusal)) from refusal
