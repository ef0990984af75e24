"""Runs a recipe's evaluators after epochs, and later on the newest checkpoint."""

import json
from pathlib import Path

from rich.console import Console

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors
from kilobatch.data.loading.loader import PlainLoader
from kilobatch.launch.recipes.data import PreparedData, class_numbers
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.worker import pretrained
from kilobatch.launch.worker.components import loader_of, loader_worker, method_of
from kilobatch.launch.worker.process_group import World
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.evaluate import linear, moved
from kilobatch.trainer.evaluate.class_subset import Relabelled
from kilobatch.trainer.evaluate.options import Evaluator
from kilobatch.trainer.evaluate.suite import EvaluationSuite

LABELS = {
    "classify/top1": "top-1 of its classifier",
    "classify/top5": "top-5 of its classifier",
    "classify_moved/top1": "top-1 of its classifier on moved images",
    "classify_moved/top5": "top-5 of its classifier on moved images",
    "knn/top1": "k-NN top-1 (k {knn.k}, temperature {knn.temperature:g})",
    "linear/top1": "linear top-1 (the papers' protocol: SGD on frozen features, augmented)",
    "linear/top5": "linear top-5 (the papers' protocol)",
    "fast_linear/top1": "fast linear top-1 (L-BFGS on cached features; not the papers' protocol)",
    "fast_linear/top5": "fast linear top-5 (L-BFGS on cached features)",
}


def suite_of(run: Path, recipe: Recipe, data: PreparedData, world: World, method: Method) -> EvaluationSuite | None:
    """The models and images for evaluators; None where the recipe has no test set."""
    if data.test is None:
        return None
    classes, test_classes = (verify_beton(file.beton).classes for file in (data.train, data.test))
    numbers = class_numbers(classes, test_classes)
    assert numbers is not None, "prepare_data refuses test images of other classes"
    views, options = recipe.data.views, recipe.evaluate

    def clean(beton: Path) -> PlainLoader:
        worker, filter_ = loader_worker(recipe, world), views.interpolation
        return PlainLoader(beton, views.size, views.mean, views.std, worker, batch=256, interpolation=filter_)

    return EvaluationSuite(
        method=method,
        untrained=lambda: method_of(recipe, data).to(world.device),
        train=clean(data.train.beton),
        test=Relabelled(clean(data.test.beton), numbers),
        probe=lambda: loader_of(recipe, data, world, linear.probe_views(views), options.linear.batch),
        views=views,
        classes=classes,
        among=None if len(numbers) == len(classes) else sorted(numbers),
        options=options,
        folder=run,
    )


def after_epoch(recipe: Recipe, suite: EvaluationSuite | None, epoch: int) -> dict[str, float]:
    """The values of evaluate.during, after every evaluate.every_epochs epochs; none after the others."""
    every = recipe.evaluate.every_epochs
    return dict(suite.evaluate(recipe.evaluate.during)) if suite and every and epoch % every == 0 else {}


def evaluate(
    run: Path,
    recipe: Recipe,
    data: PreparedData,
    world: World,
    method: Method,
    saved: Saved | None,
    evaluators: list[Evaluator],
) -> None:
    """Evaluates the newest checkpoint; writes the values to the terminal and to evaluations.jsonl. Raises UserError
    where there is none."""
    suite = suite_of(run, recipe, data, world, method)
    if saved is None or suite is None:
        raise UserError(f"{run} has no {'checkpoint' if saved is None else 'test set (data.test is null)'} to evaluate")
    pretrained.restore(method, saved.whole)
    values = {key: value for name in evaluators for key, value in suite.evaluate(name)}
    if world.rank == 0:
        print(f"{run}, {saved.folder.name}, {recipe.data.test}:")
        print_values(values, recipe, suite)
        path = run / "evaluations.jsonl"
        with refusing_os_errors(path), path.open("a") as file:
            options = recipe.evaluate.model_dump(mode="json", include=set(evaluators))
            images = {"train": recipe.data.train, "test": recipe.data.test}
            line = {"step": saved.step, **images, **values, "options": options}
            if suite.among is not None:
                line["among_classes"] = len(suite.among)
            file.write(json.dumps(line) + "\n")


def print_values(values: dict[str, float], recipe: Recipe, suite: EvaluationSuite) -> None:
    """Prints the values of evaluators, each on a line that says what it is."""
    among = "" if suite.among is None else f", among the {len(suite.among)} classes of the test images"
    console = Console(emoji=False)
    if any(name.startswith("moved/") for name in values):
        console.print(moved.table(values, among))
    for name, value in values.items():
        if not name.startswith("moved/"):
            console.print(f"{LABELS[name].format(knn=recipe.evaluate.knn)}{among}: {value:.2%}", soft_wrap=True)
