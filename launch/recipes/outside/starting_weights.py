"""Finds and checks the weights that an encoder starts with, which may be of another package. Loads no torch."""

from collections.abc import Callable, Mapping

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import (
    ENCODER_START,
    differing_encoder,
    is_foreign,
    locate_weights,
    recipe_of,
    refuse_damaged_or_unfinished,
)


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
