"""`kilobatch recipes`: one line for each recipe, made of the comment that it opens with; or one recipe whole."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kilobatch.launch.recipes import catalogue
from kilobatch.launch.recipes.recipe import read_recipe
from kilobatch.launch.recipes.settings import Key, format_path, format_value

NUMBER = r"[\d.]+(?: and [\d.]+)? %"


def print_recipes() -> None:
    """Prints a line for each recipe: its name, the figure to expect, what it is. Lines are never broken, so that each
    can be found by `grep`."""
    names = catalogue.recipe_names()
    figures = [expected(catalogue.opening(name)) for name in names]
    name_width, width = max(map(len, names)), max(map(len, figures))
    print(f"{'recipe':{name_width}}  {'expected':{width}}  what it is")
    for name, figure in zip(names, figures, strict=True):
        print(f"{name:{name_width}}  {figure:{width}}  {summary(catalogue.opening(name))}")
    print("\nkilobatch recipes NAME shows one; kilobatch init SOURCE writes one for your own images")


def print_recipe(name: str) -> None:
    """Prints what a recipe opens with, and each setting with the file and line that it comes from. Raises UserError as
    read_recipe does."""
    _, settings = read_recipe(name, [])
    print(
        f"{name}: {format_path(catalogue.locate(name, near=Path() if catalogue.is_path(name) else catalogue.FOLDER))}"
    )
    for line in catalogue.opening(name):
        print(line)
    print()
    lines = [(f"{'.'.join(map(str, key))}={format_value(value)}", settings.where(key)) for key, value in _leaves(
        settings.values, ())]  # fmt: skip
    width = max(len(text) for text, _ in lines if len(text) <= 60)
    for text, origin in lines:
        print(f"{text:{width}}  # {origin}")
    print(
        f"\nwhat is not listed is as kilobatch options says; change any of it: kilobatch train {name} optimizer.lr=0.1"
    )


def summary(opening: list[str]) -> str:
    """The first words of an opening: without what stands in brackets, and up to the first colon or full stop."""
    text = re.sub(r" \([^()]*\)", "", " ".join(opening))
    return re.split(r"[:.] |[:.]$|, (?:as|with) | kilobatch ", text)[0]


def expected(opening: list[str]) -> str:
    """The figure that an opening says to expect, and of what: `64.5 % linear`; measured ones are those of this
    repository. "-" where it names none."""
    text = " ".join(opening).partition("Expect: ")[2]
    if text.startswith(("no ", "not ")) or not (cited := re.search(rf"(?:about )?{NUMBER}", text)):
        return "-"
    measured = re.search(r"measured: ([\d.]+ %)", text)
    kind = next((f" {word}" for word in ("k-NN", "linear", "top-1") if word in text.partition(";")[0]), "")
    return f"{measured[1] if measured else cited[0]}{kind}{', measured' if measured else ''}"


def _leaves(values: dict[str, Any], key: Key) -> Iterator[tuple[Key, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*key, name))
        else:
            yield (*key, name), value
