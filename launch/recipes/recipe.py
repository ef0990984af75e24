"""Reads recipes: YAML and overrides in, validated options out. Each section's options are declared where they are
used, in files that import no torch, so that a recipe is read in well under a second."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model

from kilobatch.data.errors import UserError
from kilobatch.data.loading.options import DataOptions
from kilobatch.launch.recipes import catalogue, method_options, overrides, validation_errors
from kilobatch.launch.recipes.method_options import MethodOptions
from kilobatch.launch.recipes.settings import Key, Settings, dump, format_value, read_file
from kilobatch.launch.runs.run_folder import RunOptions
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.evaluate.options import EvaluateOptions
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.schedules import ScheduleOptions
from kilobatch.trainer.options import EngineOptions


class Recipe(BaseModel):
    """Everything that a run needs to know. Two recipes with the same values are equal."""

    model_config = ConfigDict(extra="forbid")

    data: DataOptions
    method: SerializeAsAny[MethodOptions]
    encoder: EncoderOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    engine: EngineOptions
    checkpoint: CheckpointOptions
    evaluate: EvaluateOptions
    run: RunOptions

    def dump_yaml(self) -> str:
        """The resolved recipe: every option of every section. `load_recipe` reads it back equal."""
        return dump(self.model_dump(mode="json"))


def read_recipe(name: str, changes: list[str]) -> tuple[Recipe, Settings]:
    """A recipe by name or path, with overrides (`section.key=value`) on top, and where each of its values was written.

    Raises UserError, one plain message, for whatever is wrong in either.
    """
    settings = catalogue.read_settings(name).under(overrides.read_overrides(changes))
    return _validated(settings), settings


def resolve_recipe(name: str, changes: list[str]) -> Recipe:
    """The recipe that read_recipe returns, without its settings."""
    return read_recipe(name, changes)[0]


def with_images(recipe: Recipe, train: str | None, test: str | None) -> Recipe:
    """The recipe with other training images, or other test images; None: its own."""
    given = {name: spec for name, spec in (("train", train), ("test", test)) if spec is not None}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=given)})


def load_recipe(path: Path, changes: Sequence[str] = ()) -> tuple[Recipe, Settings]:
    """The resolved recipe of a run folder, from its recipe.yaml, with overrides on top."""
    settings = read_file(path).under(overrides.read_overrides(changes))
    return _validated(settings), settings


def recipe_from(values: dict[str, Any], origin: str) -> Recipe:
    """A resolved recipe out of a checkpoint or an exported file; origin: its name, for messages. Raises UserError."""
    return _validated(Settings(values, {(): origin}))


def _validated(settings: Settings) -> Recipe:
    for section, value in settings.values.items():
        if section in Recipe.model_fields and not isinstance(value, dict):
            where, content = settings.where((section,)), "empty" if value is None else format_value(value)
            raise UserError(f"{where}: section '{section}' is {content}; it holds keys, or is left out")
    model = _recipe_of(_method_name(settings))
    sections = {name: {} for name in Recipe.model_fields} | settings.values
    try:
        # Strict as JSON: text is no number and true is not 1, but a list is taken for a tuple.
        recipe = model.model_validate_json(json.dumps(sections), strict=True)
    except ValidationError as error:
        raise validation_errors.user_error(error, settings, model) from error
    _refuse_not_finite(recipe.model_dump(), (), settings)
    return recipe


def _method_name(settings: Settings) -> str:
    key = ("method", "name")
    section = settings.values.get("method", {})
    if "name" not in section:
        raise UserError(
            f"{settings.where(())}: method.name is missing; known: {', '.join(method_options.method_names())}"
        )
    name = section["name"]
    if not isinstance(name, str):
        raise UserError(
            f"{settings.where(key)}: method.name is {format_value(name)}; it is the name of a file in methods/"
        )
    try:
        method_options.declared(name)
    except UserError as error:
        raise UserError(f"{settings.where(key)}: {error}") from error
    return name


@cache
def _recipe_of(method: str) -> type[Recipe]:
    return create_model("Recipe", __base__=Recipe, method=(method_options.options_of(method), ...))


def _refuse_not_finite(value: Any, key: Key, settings: Settings) -> None:
    """Raises UserError for infinity and nan, which pydantic's bounds such as `gt=0` let pass."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{settings.where(key)}: {'.'.join(map(str, key))} is {value}; it should be a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, inner in items:
        _refuse_not_finite(inner, (*key, name), settings)


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors. Nothing is required: what is left out may come by `extends`."""
    options: Any = Union[tuple(method_options.options_of(name) for name in method_options.method_names())]  # noqa: UP007
    model = create_model(
        "Recipe",
        __base__=Recipe,
        extends=(str, Field(None, description="another recipe, by name or path, that this one changes")),
        method=(options, ...),
    )
    return _without_required(model.model_json_schema())


def _without_required(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_required(v) for k, v in value.items() if not (k == "required" and isinstance(v, list))}
    return [_without_required(item) for item in value] if isinstance(value, list) else value
