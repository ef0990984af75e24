"""Checks whether the evaluators that a recipe or a command asks for fit its method and its images. Loads no torch."""

from collections.abc import Callable

from kilobatch.data.errors import Mistakes, UserError
from kilobatch.data.sources.specs import has_labels_alone
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.data import count_scored
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.trainer.evaluate.options import CLASSIFYING

Refuse = Callable[[str, str], UserError]  # as in checks.py


def check_evaluators(
    recipe: Recipe,
    workers: int,
    samples: int | None,
    evaluators: list[str] | None,
    refuse: Refuse,
    mistakes: Mistakes,
) -> None:
    """Notes what does not fit.

    samples: images of data.train, among which k-NN searches and from which probes learn; None: not known, or too few to
    train on.
    """
    final = recipe.evaluate.final if evaluators is None else evaluators
    during = [recipe.evaluate.during] if evaluators is None and recipe.evaluate.every_epochs else []
    for option, names in (("evaluate.during", during), ("evaluate.final", final)):
        classifying = [name for name in names if name in CLASSIFYING]
        if classifying and not method_options.declared(recipe.method.name).classifies:
            able = [name for name in method_options.method_names() if method_options.declared(name).classifies]
            asks = f"{option if evaluators is None else 'the evaluation'} asks for {classifying[0]}, but method "
            asks += (
                f"{recipe.method.name} has no classifier (these have: {', '.join(able)}); ask for knn or fast_linear"
            )
            mistakes.add(str(refuse(option, asks)))
    if samples is None:
        return
    if recipe.data.test is not None and (*during, *final) and not has_labels_alone(recipe.data.train):
        try:
            samples = count_scored(recipe.data.train, (*during, *final))
        except UserError as error:
            mistakes.add(str(refuse("data.test", str(error))))
    if "knn" in (*during, *final) and recipe.evaluate.knn.k > samples:
        asks = f"evaluate.knn.k {recipe.evaluate.knn.k} is more than the {samples} images of data.train; use at most "
        mistakes.add(str(refuse("evaluate.knn.k", f"{asks}that")))
    if "linear" in (*during, *final):
        with mistakes.noted():
            _check_linear(recipe, workers, samples, refuse)


def _check_linear(recipe: Recipe, workers: int, samples: int, refuse: Refuse) -> None:
    batch, most = recipe.evaluate.linear.batch, samples // workers * workers
    if batch % workers == 0 and batch <= samples:
        return
    if batch > samples:
        way_out = f"use at most {most}" if most else "use fewer workers, or add images"
        wrong = f"is more than the {samples} images of data.train '{recipe.data.train}'; {way_out}"
    else:
        nearest = [str(n) for n in (batch // workers * workers, -(-batch // workers) * workers) if 0 < n <= samples]
        way_out = " or ".join(nearest) if nearest else f"at most {samples} workers"
        wrong = f"does not divide over {workers} workers; use {way_out}"
    raise refuse("evaluate.linear.batch", f"evaluate.linear.batch {batch} {wrong}")
