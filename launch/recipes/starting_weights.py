"""Finds and checks the weights that an encoder starts with, which may be of another package. Loads no torch."""

from collections.abc import Callable, Mapping
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import (
    ENCODER_START,
    differing_encoder,
    locate_reference,
    metadata_of,
    recipe_of,
    refuse_damaged_or_unfinished,
)


def locate_weights(where: str) -> Path:
    """The path of an encoder's starting weights: as of a reference, but a file may be of any package."""
    path = Path(where).expanduser()
    return path if path.is_file() else locate_reference(where)


def is_foreign(path: Path) -> bool:
    """Whether a path is a file that another package has written: it does not say a recipe of ours."""
    return path.is_file() and (path.suffix != ".safetensors" or "recipe" not in metadata_of(path))


def check_encoder_start(recipe: Recipe, awaited: Mapping[str, Recipe], refuse: Callable[[str, str], UserError]) -> None:
    """Raises UserError where there are no starting weights, or a run's are of another network. The content of a file of
    another package is looked at when it is loaded: that needs torch.

    awaited: the recipes of runs that will have been trained by then.
    """
    where = recipe.encoder.start
    if where is None:
        return
    if start := getattr(recipe.method, "start", None):
        raise refuse(
            ENCODER_START,
            f"{ENCODER_START} '{where}' and method.start '{start}' both give the encoder its weights; use one of them",
        )
    try:
        if where not in awaited and is_foreign(locate_weights(where)):
            return
        other = awaited[where] if where in awaited else recipe_of(where)
        if where not in awaited:
            refuse_damaged_or_unfinished(where, other)
    except UserError as error:
        raise refuse(ENCODER_START, f"{ENCODER_START} '{where}': {error}") from error
    if differing := differing_encoder(recipe.encoder, other.encoder.model_copy(update={"stem": recipe.encoder.stem})):
        raise refuse(
            ENCODER_START,
            f"{ENCODER_START} '{where}' has another encoder: {differing}; set these as there, or name another run",
        )
