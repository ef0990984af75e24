"""Reads recipes: YAML and overrides in, validated options out. Each section's options are declared where they are
used, in files that import no torch, so that a recipe is read in well under a second."""

import inspect
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, create_model

from kilobatch.data.errors import Mistakes, UserError
from kilobatch.data.loading.options import DataOptions
from kilobatch.launch.recipes import catalogue, method_options, overrides, validation_errors
from kilobatch.launch.recipes.method_options import MethodOptions
from kilobatch.launch.recipes.settings import Key, Settings, dump, format_value, read_file
from kilobatch.launch.runs.run_folder import RunOptions
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.source_file import absolute_source
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.evaluate.options import EvaluateOptions
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.schedules import ScheduleOptions
from kilobatch.trainer.options import EngineSection


class Recipe(BaseModel):
    """Everything that a run needs to know. Two recipes with the same values are equal.

    data: images, batch and views. method: the paper's method. encoder: the network that is kept. optimizer: its name
    and rates. schedule: epochs and the course of the learning rate. engine: how a step is computed. checkpoint: when
    checkpoints are made and which are kept. evaluate: how the encoder is judged. run: name, folder and seed of a run.
    """

    model_config = ConfigDict(extra="forbid")

    data: DataOptions
    method: SerializeAsAny[MethodOptions]
    encoder: EncoderOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    engine: EngineSection
    checkpoint: CheckpointOptions
    evaluate: EvaluateOptions
    run: RunOptions

    def dump_yaml(self) -> str:
        """The resolved recipe: every option of every section. `load_recipe` reads it back equal."""
        return dump(self.model_dump(mode="json"))


def read_recipe(name: str, changes: list[str]) -> tuple[Recipe, Settings]:
    """A recipe by name or path, with overrides (`section.key=value`) on top, and where each of its values was written.

    Raises UserError, one plain message, for all that is wrong in either, each mistake on a line.
    """
    mistakes = Mistakes()
    settings = catalogue.read_settings(name).under(overrides.read_overrides(changes, mistakes))
    return _validated(settings, mistakes), settings


def resolve_recipe(name: str, changes: list[str]) -> Recipe:
    """The recipe that read_recipe returns, without its settings."""
    return read_recipe(name, changes)[0]


def with_images(recipe: Recipe, train: str | None, test: str | None) -> Recipe:
    """The recipe with other training images, which are used whole, or other test images; None: its own."""
    given: dict[str, Any] = {name: spec for name, spec in (("train", train), ("test", test)) if spec is not None}
    if train is not None:
        given["order"] = None
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=given)})


def load_recipe(path: Path, changes: Sequence[str] = ()) -> tuple[Recipe, Settings]:
    """The resolved recipe of a run folder, from its recipe.yaml, with overrides on top."""
    mistakes = Mistakes()
    settings = read_file(path).under(overrides.read_overrides(changes, mistakes))
    return _validated(settings, mistakes), settings


def recipe_from(values: dict[str, Any], origin: str) -> Recipe:
    """A resolved recipe out of a checkpoint or an exported file; origin: its name, for messages. Raises UserError."""
    return _validated(Settings(values, {(): origin}), Mistakes())


def _validated(settings: Settings, mistakes: Mistakes) -> Recipe:
    """The recipe. mistakes: those that were found before; UserError is raised for them and for all others at once."""
    sections: dict[str, Any] = {name: {} for name in Recipe.model_fields}
    for section, value in settings.values.items():
        if section not in Recipe.model_fields or isinstance(value, dict):
            sections[section] = value
            continue
        where, content = settings.where((section,)), "empty" if value is None else format_value(value)
        mistakes.add(f"{where}: section '{section}' is {content}; it holds keys, or is left out")
    method = _method_name(settings, mistakes)
    model = _any_method() if method is None else _recipe_of(absolute_source(method))
    recipe = None
    try:
        # Strict as JSON: text is no number and true is not 1, but a list is taken for a tuple.
        recipe = model.model_validate_json(json.dumps(sections), strict=True)
    except ValidationError as error:
        validation_errors.note(error, settings, model, mistakes)
    if recipe is not None:
        _note_not_finite(recipe.model_dump(), (), settings, mistakes)
    mistakes.refuse()
    assert recipe is not None, "what is not valid is a mistake"
    return recipe


def _method_name(settings: Settings, mistakes: Mistakes) -> str | None:
    """The method's name; None where it is none, which is noted."""
    key = ("method", "name")
    section = settings.values.get("method", {})
    if not isinstance(section, dict):
        return None  # noted as a section
    if "name" not in section:
        mistakes.add(f"{settings.where(())}: method.name is missing; known: {', '.join(method_options.method_names())}")
        return None
    name = section["name"]
    if not isinstance(name, str):
        known = ", ".join(method_options.method_names())
        mistakes.add(f"{settings.where(key)}: method.name is {format_value(name)}; it is a method's name: {known}")
        return None
    try:
        method_options.declared(name)
    except UserError as error:
        mistakes.add(f"{settings.where(key)}: {error}")
        return None
    return name


@cache
def _recipe_of(method: str) -> type[Recipe]:
    return create_model("Recipe", __base__=Recipe, method=(method_options.options_of(method), ...))


@cache
def _any_method() -> type[Recipe]:
    """The recipe of an unknown method, whose other sections are checked all the same."""
    return create_model("Recipe", __base__=Recipe, method=(dict[str, Any], ...))


def _note_not_finite(value: Any, key: Key, settings: Settings, mistakes: Mistakes) -> None:
    """Notes infinity and nan, which pydantic's bounds such as `gt=0` let pass."""
    if isinstance(value, float) and not math.isfinite(value):
        mistakes.add(f"{settings.where(key)}: {'.'.join(map(str, key))} is {value}; it should be a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, inner in items:
        _note_not_finite(inner, (*key, name), settings, mistakes)


def schema(further: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors, with the meaning of every option. Nothing is required: what is
    left out may come by `extends`. further: methods as FILE.py:Class. Raises UserError for one that cannot be read."""
    names = [*method_options.method_names(), *further]
    options: Any = Union[tuple(method_options.options_of(name) for name in names)]  # noqa: UP007
    model = create_model(
        "Recipe",
        __base__=Recipe,
        extends=(str, Field(None, description="another recipe, by name or path, that this one changes")),
        method=(options, ...),
    )
    found = model.model_json_schema()
    for name in further:
        found["$defs"][method_options.model_name(name)]["properties"]["name"]["const"] = name
    for described in described_models(model):
        properties = found["$defs"].get(described.__name__, found)["properties"]
        texts = [cls.__doc__ or "" for cls in described.__mro__ if issubclass(cls, BaseModel) and cls is not BaseModel]
        for option, said in method_options.meanings(map(inspect.cleandoc, texts), described.model_fields).items():
            properties[option].setdefault("description", said)
    return _without_required(found)


def described_models(annotation: Any) -> set[type[BaseModel]]:
    """The models of options that a type holds, at any depth. Their docstrings or fields say what each option is."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return {model for part in get_args(annotation) for model in described_models(part)}
    return {annotation}.union(*(described_models(field.annotation) for field in annotation.model_fields.values()))


def _without_required(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_required(v) for k, v in value.items() if not (k == "required" and isinstance(v, list))}
    return [_without_required(item) for item in value] if isinstance(value, list) else value
