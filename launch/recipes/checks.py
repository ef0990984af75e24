"""What no single option can know: whether a recipe's parts fit each other, the data and the number of workers.
Loads no torch; what this machine has is asked in devices.py."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from kilobatch.data.errors import Refusal
from kilobatch.data.loading.labels import count_labelled
from kilobatch.data.sources.specs import Split, count, count_classes
from kilobatch.launch.recipes import method_options, references
from kilobatch.launch.recipes import validation_errors as explain
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.methods.options import Beside, Fitting
from kilobatch.trainer.evaluate.options import CLASSIFYING


@runtime_checkable
class Checked(Protocol):
    """A group of a method's options that knows which batches it cannot work with, as a queue does."""

    def check(self, batch: int) -> None:
        """batch: the global one. Raises Refusal."""
        ...


def check(
    recipe: Recipe,
    workers: int,
    settings: Settings,
    evaluators: list[str] | None = None,
    awaited: Mapping[str, Recipe] | None = None,
    begun: bool = False,
    images: int | None = None,
) -> None:
    """Raises Refusal for the first part that does not fit, before any process is started or image decoded.

    settings: where the recipe's values were written, for the message; evaluators: what will run; None: training, and
    the recipe's own; awaited: runs that the recipe's method starts or learns from and that will have been trained by
    then, as the method names them; begun: whether the training has begun, so that it no longer looks for such runs;
    images: of data.train, where the data are not to be looked for.
    """
    if workers < 1:
        raise Refusal(f"--workers is {workers}; it should be 1 or more")

    def refuse(dotted: str, message: str) -> Refusal:
        return Refusal(f"{settings.where(tuple(dotted.split('.')))}: {message}")

    declared = method_options.declared(recipe.method.name)
    views, wanted = recipe.data.views.count, declared.views
    if wanted not in (None, views):
        raise refuse(
            "data.views.count",
            f"data.views.count is {views}, but method {recipe.method.name} takes {wanted} views of an image; "
            f"use {wanted}",
        )

    batch, chunks = recipe.data.batch, 1 if recipe.engine.chunks == "auto" else recipe.engine.chunks
    parts = workers * chunks
    if batch < 2 and not declared.classifies:
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
    if recipe.engine.zero and recipe.optimizer.name == "lamb":
        raise refuse(
            "engine.zero",
            f"engine.zero {recipe.engine.zero} with optimizer.name lamb: it would take the norms of a rank's pieces "
            "for those of whole tensors; use engine.zero=0, or optimizer.name=lars or adamw",
        )
    _check_groups(recipe, settings)
    if evaluators is None:
        _check_options(recipe, Beside(recipe.method, recipe.encoder, workers, chunks), settings)
    samples = images if images is not None else _count(recipe, "train", refuse)
    classes = count_classes(recipe.data.train, "train") if images is None and declared.classifies else None
    if classes == 1:
        raise refuse(
            "data.train",
            f"data.train '{recipe.data.train}' has a single class, and method {recipe.method.name} nothing to tell "
            "apart; a folder: source needs a folder for each class",
        )
    used = samples if evaluators is not None or images is not None else _used(recipe, samples, refuse)
    if used < batch:
        most = used // parts * parts
        way_out = f"use at most {most}" if most >= 2 else f"{max(2, parts)} is the least here: add images"
        which = "images" if used == samples else "labelled images (data.unlabelled is drop)"
        raise refuse(
            "data.batch",
            f"data.batch {batch} is more than the {used} {which} of data.train '{recipe.data.train}'; {way_out}",
        )
    if evaluators is None and not begun:
        references.check(recipe, awaited or {}, refuse, classes)
    if recipe.data.test is not None and images is None:
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


def _check_options(recipe: Recipe, beside: Beside, settings: Settings) -> None:
    """The method's options that go with some values of others only."""
    for name, field in type(recipe.method).model_fields.items():
        for kind in field.metadata:
            if not isinstance(kind, Fitting):
                continue
            try:
                kind.fits(getattr(recipe.method, name), beside)
            except Refusal as refusal:
                raise Refusal(f"{settings.where(('method', name))}: {refusal}") from refusal


def _used(recipe: Recipe, samples: int, refuse: Any) -> int:
    """How many of the training images are trained on."""
    labels = recipe.data.labels
    if labels.all:
        return samples
    try:
        some = count_labelled(recipe.data.train, labels)
    except Refusal as refusal:
        raise refuse("data.labels.list" if labels.list else "data.labels", str(refusal)) from refusal
    if recipe.data.unlabelled == "drop":
        return some
    declared = method_options.declared(recipe.method.name)
    if declared.classifies and "teacher" not in declared.arguments and some < samples:
        raise refuse(
            "data.unlabelled",
            f"data.unlabelled is keep, but method {recipe.method.name} learns from labels alone, and {samples - some} "
            f"of {samples} images have none; use data.unlabelled=drop",
        )
    return samples


def _check_evaluators(recipe: Recipe, workers: int, samples: int, evaluators: list[str] | None, refuse: Any) -> None:
    """samples: of data.train, which k-NN looks into and probes learn from."""
    final = recipe.evaluate.final if evaluators is None else evaluators
    during = [recipe.evaluate.during] if evaluators is None and recipe.evaluate.every_epochs else []
    for option, names in (("evaluate.during", during), ("evaluate.final", final)):
        asked = [name for name in names if name in CLASSIFYING]
        if asked and not method_options.declared(recipe.method.name).classifies:
            able = [name for name in method_options.names() if method_options.declared(name).classifies]
            raise refuse(
                option,
                f"{option if evaluators is None else 'the evaluation'} asks for {asked[0]}, but method "
                f"{recipe.method.name} has no classifier (these have: {', '.join(able)}); ask for knn or fast_linear",
            )
    if "knn" in (*during, *final) and recipe.evaluate.knn.k > samples:
        raise refuse(
            "evaluate.knn.k",
            f"evaluate.knn.k {recipe.evaluate.knn.k} is more than the {samples} images of data.train; use at most that",
        )
    batch, most = recipe.evaluate.linear.batch, samples // workers * workers
    if "linear" not in (*during, *final) or (batch % workers == 0 and batch <= samples):
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
