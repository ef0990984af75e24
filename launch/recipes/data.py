"""A recipe's data: paths made absolute, sources converted to .beton. Loads no torch."""

from pathlib import Path

from kilobatch.data.beton import verify
from kilobatch.data.errors import Refusal
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.specs import absolute, unshared
from kilobatch.launch.recipes import recipe, references
from kilobatch.launch.recipes.recipe import Recipe


def prepare_data(chosen: recipe.Recipe) -> None:
    """Converts what is not yet a .beton, once, rather than in each worker. Raises Refusal, also for two that differ in
    their classes."""
    train = verify(prepare(chosen.data.train, "train")).classes
    if chosen.data.test is None:
        return
    test = verify(prepare(chosen.data.test, "test")).classes
    if train != test:
        raise Refusal(
            f"data.test '{chosen.data.test}' ({len(test)} classes) has other classes than data.train "
            f"'{chosen.data.train}' ({len(train)}), so that labels would not match; "
            f"only in one of them: {unshared(train, test)}; "
            "use test images of the same classes, or data.test=null"
        )


def with_absolute_paths(chosen: Recipe) -> Recipe:
    """The recipe, its data and the runs that it takes from named so that the folder one stands in does not matter.
    Raises Refusal for a data source of no known kind."""
    data, labels = chosen.data, chosen.data.labels
    if labels.list is not None:
        labels = labels.model_copy(update={"list": str(Path(labels.list).expanduser().absolute())})
    test = None if data.test is None else absolute(data.test)
    data = data.model_copy(update={"train": absolute(data.train), "test": test, "labels": labels})
    taken = {name: references.absolute(where) for name, where in references.references(chosen).items()}
    return chosen.model_copy(update={"data": data, "method": chosen.method.model_copy(update=taken)})
