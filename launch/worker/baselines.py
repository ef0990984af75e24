"""Makes a run's baselines once, at its start, and keeps them in baselines.json for all its evaluations."""

import hashlib
import json
from dataclasses import replace

from kilobatch.data.errors import warn
from kilobatch.launch.recipes.data import PreparedData
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.worker.process_group import World
from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.baselines.baselines_file import Baselines, read_all_baselines, write_all_baselines
from kilobatch.trainer.evaluate.baselines.measurement import BaselinesFailed, most_images
from kilobatch.trainer.evaluate.image_sample import SIDE
from kilobatch.trainer.evaluate.suite import EvaluationSuite


def with_baselines(
    suite: EvaluationSuite, recipe: Recipe, data: PreparedData, world: World, *, in_use: bool
) -> EvaluationSuite:
    """The suite with its baselines, from the run's folder or, where they are not there yet, measured now. All ranks
    call it together.

    in_use: whether the training is to be compared with them from now on. Where an image cannot be read they are left
    out, with a warning: a training does not need them.
    """
    key = _key(recipe, data)
    known = read_all_baselines(suite.folder) if world.rank == 0 else []
    found = collectives.from_rank_0(lambda: next((each for each in known if each.key == key), None))
    if found is None and (found := _measured(suite, key, world)) is None:
        return suite
    if world.rank == 0 and (in_use > found.in_use or found.key not in {each.key for each in known}):
        found = found.model_copy(update={"in_use": in_use or found.in_use})
        others = [each.model_copy(update={"in_use": each.in_use and not in_use}) for each in known if each.key != key]
        write_all_baselines(suite.folder, [found, *others])
    return replace(suite, baselines=found)


def _measured(suite: EvaluationSuite, key: str, world: World) -> Baselines | None:
    """The baselines, which rank 0 prints; None where they failed."""
    try:
        values = suite.measure_baselines()
    except BaselinesFailed as failure:
        if world.rank == 0:
            warn(f"k-NN of raw pixels and of the untrained encoder is left out of all evaluations: {failure}")
        return None
    knn, whole = suite.options.knn, (suite.train.samples, suite.test.samples)
    train, test = (min(pair) for pair in zip(whole, most_images(knn.k), strict=True))
    found = Baselines(
        key=key,
        in_use=False,
        k=min(knn.k, train),
        temperature=knn.temperature,
        train_images=train,
        test_images=test,
        all_train_images=whole[0],
        all_test_images=whole[1],
        labels=suite.labels,
        classes=len(suite.classes if suite.among is None else suite.among),
        reduced_to=SIDE if suite.views.size > SIDE else None,
        pixels=values["pixels"],
        untrained=values["untrained"],
    )
    if world.rank == 0:
        print(f"before training, k-NN ({found.conditions()}): {found.shares()}", flush=True)
    return found


def _key(recipe: Recipe, data: PreparedData) -> str:
    """A hash of what the baselines depend on."""
    views, test = recipe.data.groups[0], data.test
    assert test is not None, "without test images there is no suite"
    parts = [data.train.sha256, test.sha256, recipe.run.seed, views.size, views.mean, views.std, views.interpolation]
    sections = recipe.evaluate.knn, recipe.encoder, recipe.method
    parts += [section.model_dump(mode="json") for section in sections]
    if (order := recipe.data.order) is not None and order.long_tailed is not None:  # other training images
        parts.append(order.long_tailed.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
