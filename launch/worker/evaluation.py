"""Runs a recipe's evaluators after epochs, and later on the newest checkpoint."""

import json
from collections.abc import Sized
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors
from kilobatch.data.loading.loader import PlainLoader
from kilobatch.launch.recipes.data import PreparedData, PreparedFile, class_numbers, labelled_of, scored_by
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.runs.table_printing import print_table
from kilobatch.launch.worker import pretrained
from kilobatch.launch.worker.baselines import with_baselines
from kilobatch.launch.worker.components import clean_loader, loader_of, method_of, refuse_missing_fields
from kilobatch.launch.worker.process_group import World
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.rng_state import random_state, set_random_state
from kilobatch.trainer.evaluate import linear, moved
from kilobatch.trainer.evaluate.baselines import measurement
from kilobatch.trainer.evaluate.baselines.baselines_file import describe_voting, read_baselines
from kilobatch.trainer.evaluate.class_subset import Relabelled
from kilobatch.trainer.evaluate.options import Evaluator, KNNOptions
from kilobatch.trainer.evaluate.suite import EvaluationSuite
from kilobatch.trainer.ranks.phase import announce

LABELS = {
    "classify/top1": "top-1 of its classifier",
    "classify/top5": "top-5 of its classifier",
    "classify_moved/top1": "top-1 of its classifier on moved images",
    "classify_moved/top5": "top-5 of its classifier on moved images",
    "knn/top1": "k-NN top-1 ({voting})",
    "linear/top1": "linear top-1 ({linear})",
    "linear/top5": "linear top-5 (likewise)",
    "linear/held_out": "the same rate and decay, top-1 of held-out training images",
    "fast_linear/top1": "fast linear top-1 (L-BFGS on cached features; no paper's protocol)",
    "fast_linear/top5": "fast linear top-5 (L-BFGS on cached features)",
}


def suite_of(
    run: Path, recipe: Recipe, data: PreparedData, world: World, method: Method, labelled: Sized | None = None
) -> EvaluationSuite | None:
    """The models and images for evaluators; None where the recipe has no test set, or the training images no labels,
    without which none of them can be asked for. The training images are those that
    were trained on: of a long-tailed data.order its part, each once. labelled: those of them that have labels; None:
    all, or it is not known."""
    if (test := data.test) is None:
        return None
    classes, test_classes = (verify_beton(file.beton).classes for file in (data.train, test))
    if not classes:
        return None
    numbers = class_numbers(classes, test_classes)
    assert numbers is not None, "prepare_data refuses test images of other classes"
    for name, spec, file in (("train", recipe.data.train, data.train), ("test", recipe.data.test, test)):
        refuse_missing_fields(recipe, method, f"data.{name} '{spec}'", file.beton)
    views, options = recipe.data.groups[0], recipe.evaluate

    used = scored_by(recipe, data)

    def clean(file: PreparedFile, used: NDArray[np.int64] | None = None, most: int | None = None) -> PlainLoader:
        if most is None:
            return clean_loader(recipe, world, file.beton, used=used)
        images = verify_beton(file.beton).samples if used is None else len(used)
        rows = measurement.rows_of_rank(images, most)
        return clean_loader(recipe, world, file.beton, batch=measurement.BATCH, used=used, rows=rows)

    def untrained() -> Method:
        states = random_state(world.device)  # the training goes on with them
        built = method_of(recipe, data).to(world.device)
        set_random_state(states, world.device)
        return built

    @cache
    def sample() -> tuple[PlainLoader, Relabelled]:
        most = measurement.most_images(options.knn.k)
        return clean(data.train, used, most[0]), Relabelled(clean(test, None, most[1]), numbers)

    return EvaluationSuite(
        method=method,
        untrained=untrained,
        train=clean(data.train, used),
        test=Relabelled(clean(test), numbers),
        sample=sample,
        probe=lambda: loader_of(
            recipe, data, world, linear.probe_views(views, options.linear), options.linear.batch, used=used
        ),
        views=views,
        classes=classes,
        among=None if len(numbers) == len(classes) else sorted(numbers),
        options=options,
        folder=run,
        labels=len(labelled) if labelled is not None and method.classifies else None,
    )


def after_epoch(recipe: Recipe, suite: EvaluationSuite | None, epoch: int) -> dict[str, float]:
    """The values of evaluate.during and the baselines, after every evaluate.every_epochs epochs; none after the
    others."""
    every = recipe.evaluate.every_epochs
    if not (suite and every and epoch % every == 0):
        return {}
    return {**dict(suite.evaluate(recipe.evaluate.during)), **baseline_values(suite)}


def baseline_values(suite: EvaluationSuite) -> dict[str, float]:
    """The baselines as metrics.jsonl has them; none where they are not known."""
    return suite.baselines.values() if suite.baselines else {}


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
    written, _ = load_recipe(run / "recipe.yaml")
    labelled = labelled_of(recipe, data) if recipe.data.train == written.data.train else None
    suite = suite_of(run, recipe, data, world, method, labelled)
    if saved is None or suite is None:
        raise UserError(f"{run} has no {'checkpoint' if saved is None else 'test set (data.test is null)'} to evaluate")
    pretrained.restore(method, saved.whole)  # at once: a run that is trained meanwhile will remove the checkpoint
    as_trained = (written.evaluate.knn, written.data) == (recipe.evaluate.knn, recipe.data)
    missing = as_trained and read_baselines(run) is None  # a run of an earlier version
    suite = with_baselines(suite, recipe, data, world, in_use=missing)
    values: dict[str, float] = {}
    for name in evaluators:
        announce(f"evaluating: {describe_work(name, recipe)}")
        values |= suite.evaluate(name)
    if world.rank == 0:
        print(f"{run}, {saved.folder.name}, {recipe.data.test}:")
        print_values(values, recipe, suite)
        if "picture" in evaluators:
            print(f"picture: {suite.picture_file}", flush=True)
        path = run / "evaluations.jsonl"
        with refusing_os_errors(path), path.open("a") as file:
            options = recipe.evaluate.model_dump(mode="json", include=set(evaluators))
            images = {"train": recipe.data.train, "test": recipe.data.test}
            line = {"step": saved.step, **images, **values, **baseline_values(suite), "options": options}
            if suite.baselines is not None:
                line["baselines"] = suite.baselines.model_dump(exclude={"key", "in_use"})
            if suite.among is not None:
                line["among_classes"] = len(suite.among)
            file.write(json.dumps(line) + "\n")


def describe_work(name: str, recipe: Recipe) -> str:
    """What an evaluator does, and how much of it where it takes long."""
    options = recipe.evaluate
    works = {
        "knn": "k-NN",
        "linear": f"linear, {options.linear.epochs} epochs of the training images",
        "fast_linear": "fast linear",
        "moved": "k-NN of moved images, by pixels, untrained and trained encoder",
        "picture": "a picture of neighbours and of the embedding",
        "classify": "its classifier",
        "classify_moved": "its classifier on moved images",
    }
    return works[name]


def print_values(values: dict[str, float], recipe: Recipe, suite: EvaluationSuite) -> None:
    """Prints the values of evaluators, each on a line that says what it is, and the baselines beside them."""
    among = "" if suite.among is None else f", among the {len(suite.among)} classes of the test images"
    console, baselines, knn = Console(emoji=False), suite.baselines, recipe.evaluate.knn

    def voting(options: KNNOptions) -> str:
        images = suite.train.samples
        return describe_voting(min(options.k, images), options.temperature, images, images, suite.labels)

    has_moved = any(name.startswith("moved/") for name in values)
    if has_moved:
        chance = baselines.chance if baselines else None
        print_table(moved.table(values, f"{voting(moved.NEIGHBOURS)}{among}", chance), console)
    for name, value in values.items():
        if name == "linear/lr":
            chosen = f"lr {value:g} and decay {values['linear/weight_decay']:g}"
            console.print(f"linear: {chosen} are the best of {len(recipe.evaluate.linear.grid)}", soft_wrap=True)
        elif name in LABELS:
            options = recipe.evaluate.linear
            protocol = options.protocol(linear.probe_views(recipe.data.groups[0], options))
            label = LABELS[name].format(voting=voting(knn), linear=protocol)
            console.print(f"{label}{among}: {value:.2%}", soft_wrap=True)
    # The table of `moved` has the same numbers where it asks the same neighbours.
    shown = has_moved and baselines and not baselines.sampled and knn == moved.NEIGHBOURS
    if values and baselines and not shown:
        shares = baselines.shares(values.get("knn_sample/top1"))
        console.print(f"to compare: k-NN ({baselines.conditions()}){among}: {shares}", soft_wrap=True)
