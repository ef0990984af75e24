"""`kilobatch options` and docs/options.md: every option with its type, bounds, default and meaning.

WRITE_OPTIONS=1 python -m pytest tests/launch/cli/test_options.py     writes the document anew
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from kilobatch.launch.cli.reports.options import Option, all_options, as_document
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.method_options import meanings
from kilobatch.launch.recipes.recipe import Recipe, described_models, resolve_recipe, schema
from tests.helpers.transcripts import transcript
from tests.launch.conftest import CommandResult

DOCUMENT = Path(__file__).parents[3] / "docs" / "options.md"
CROP = """\
data.views.crop (section or null)
    a random part of the image; null: the whole image, resized
data.views.crop.scale (2 numbers above 0 and at most 1, default [0.08, 1.0])
    the range of its share of the image's area
data.views.crop.ratio (2 numbers from 0.01 to 100, default [0.75, 1.333])
    the range of width / height

"""


@pytest.fixture(scope="module")
def options() -> dict[str, list[Option]]:
    return all_options()


def test_the_document_is_the_generated_one() -> None:
    if os.environ.get("WRITE_OPTIONS"):
        DOCUMENT.write_text(as_document())
    assert DOCUMENT.read_text() == as_document()


def test_every_option_has_a_meaning(options: dict[str, list[Option]]) -> None:
    missing = [option.key for part in options.values() for option in part if not option.meaning.partition("; its")[0]]
    assert not missing, f"say in the docstring of the class, as `name: text`, what these are: {missing}"
    assert sum(map(len, options.values())) > 190


def test_every_option_is_listed(options: dict[str, list[Option]]) -> None:
    """By a walk of its own through a resolved recipe, and by the constructors of methods."""

    def keys(model: BaseModel, prefix: str) -> list[str]:
        found = []
        for name, value in model:
            found.append(f"{prefix}.{name}")
            found += keys(value, f"{prefix}.{name}") if isinstance(value, BaseModel) else []
        return found

    listed = {option.key for part in options.values() for option in part}
    recipe = resolve_recipe("demo", [])
    for section in Recipe.model_fields:
        if section != "method":
            assert {*keys(getattr(recipe, section), section)} <= listed
    for name in method_options.method_names():
        arguments = method_options.declared(name).arguments
        assert {f"method.{key}" for key in ("name", *arguments)} <= {option.key for option in options[name]}


def test_the_schema_has_each_meaning_once() -> None:
    """An option that both a docstring and a Field describe could be described in two ways."""
    described = schema()["$defs"]
    assert described["Crop"]["properties"]["scale"]["description"] == "the range of its share of the image's area"
    assert described["pirl_options"]["properties"]["noise"]["description"].startswith("images that are drawn")
    for model in described_models(Recipe):
        said = meanings([inspect.cleandoc(model.__doc__ or "")], model.model_fields)
        assert not [name for name in said if model.model_fields[name].description], model


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A. a: one; b: two, null: none. c: three. More.", {"a": "one", "b": "two, null: none", "c": "three. More"}),
        ("a: one; null: none; b: two.", {"a": "one; null: none", "b": "two"}),
        ("a: one. other: of a base. b: two.\n\nno\nmore. c: of\nit", {"a": "one", "b": "two", "c": "of it"}),
        ("The a: is a; value a: none", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_meanings_in_a_docstring(text: str, found: dict[str, str]) -> None:
    assert meanings([text], ["a", "b", "c"]) == found


def test_a_class_says_more_than_the_one_above() -> None:
    assert meanings(["a: mine.", "a: theirs. b: both."], ["a", "b"]) == {"a": "mine", "b": "both"}


def test_what_is_printed(tmp_path: Path) -> None:
    assert transcript(tmp_path, "options", "data.views.crop") == (0, CROP)


@pytest.mark.parametrize(
    ("section", "there", "absent"),
    [
        (None, "run.requeue.crashes (integer at least 0, default 3)", "docs/"),
        ("simclr", "method.temperature (number above 0, default 0.1)", "queue"),
        ("method.moco.queue", "method.queue.length", "method.temperature"),
        ("method", "method: {name: pirl}", "data.train"),
        ("engine", "engine.chunks (integer at least 1 or auto, default 1)", "data.train"),
    ],
)
def test_a_part(section: str | None, there: str, absent: str, kilobatch: Callable[..., CommandResult]) -> None:
    done = kilobatch("options", *([section] if section else []))
    assert done.code == 0 and there in done.out and absent not in done.out


@pytest.mark.parametrize(("section", "near"), [("dat", "data"), ("data.views.jiter", "data.views.jitter")])
def test_no_such_part(section: str, near: str, kilobatch: Callable[..., CommandResult]) -> None:
    refused = kilobatch("options", section)
    assert refused.code == 2 and f"did you mean '{near}'?" in refused.err
