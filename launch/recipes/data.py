"""Prepares a recipe's data: makes paths absolute, converts sources to .beton. Loads no torch."""

from pathlib import Path

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.specs import absolute_spec, describe_class_difference
from kilobatch.launch.recipes import references
from kilobatch.launch.recipes.recipe import Recipe


def prepare_data(recipe: Recipe) -> None:
    """Converts sources that are no .beton yet: once, here, rather than in each worker.

    Raises UserError, also where training and test images have different classes.
    """
    train = verify_beton(prepare(recipe.data.train, "train")).classes
    if recipe.data.test is None:
        return
    test = verify_beton(prepare(recipe.data.test, "test")).classes
    if train != test:
        raise UserError(
            f"data.test '{recipe.data.test}' ({len(test)} classes) has other classes than data.train "
            f"'{recipe.data.train}' ({len(train)}), so that labels would not match; "
            f"only in one of them: {describe_class_difference(train, test)}; "
            "use test images of the same classes, or data.test=null"
        )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of its data and of the runs that it refers to, so that it can be used from any
    folder. Raises UserError for a data source of no known kind."""
    data, labels = recipe.data, recipe.data.labels
    if labels.list is not None:
        labels = labels.model_copy(update={"list": str(Path(labels.list).expanduser().absolute())})
    test = None if data.test is None else absolute_spec(data.test)
    data = data.model_copy(update={"train": absolute_spec(data.train), "test": test, "labels": labels})
    runs = {name: references.absolute_reference(where) for name, where in references.references(recipe).items()}
    return recipe.model_copy(update={"data": data, "method": recipe.method.model_copy(update=runs)})
