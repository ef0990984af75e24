"""Reads the changes that the command line makes in a recipe: `section.key=value`, the value as YAML."""

from collections.abc import Sequence
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.data.sources.specs import FORMS
from kilobatch.launch.recipes.settings import Key, Settings, parse

SHORT = {"seed": "run.seed"}  # keys that may be written without their section


def read_overrides(overrides: Sequence[str]) -> Settings:
    """All overrides as one tree; a later one wins. Raises UserError for a text that is not `section.key=value`."""
    settings = Settings()
    for text in overrides:
        settings = settings.under(_read_override(text))
    return settings


def _read_override(text: str) -> Settings:
    path, equals, value_text = text.partition("=")
    names = SHORT.get(path, path).split(".")
    if not equals or not all(name and name == name.strip() for name in names):
        raise UserError(f"override '{text}' is not of the form section.key=value, such as optimizer.lr=4.8")
    if not value_text.strip():
        raise UserError(f"override '{text}' has no value; write {path}=null for none")
    source = f"override '{text}'"
    value, inner = _read_value(value_text, source)

    key: Key = tuple(names)
    origins = {key[:n]: source for n in range(1, len(key))} | {(*key, *rest): source for rest in inner}
    tree: dict[str, Any] = {names[-1]: value}
    for name in reversed(names[:-1]):
        tree = {name: tree}
    return Settings(tree, origins)


def _read_value(text: str, source: str) -> tuple[Any, dict[Key, str]]:
    """A value and the origins in it. Text without quotes is meant as it stands: YAML would cut it off at " #", and take
    "folder:a: b" for a mapping. Raises UserError for broken YAML."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source} has bytes that are not UTF-8, which no recipe can hold; rename what it names"
        ) from None
    if text.partition(":")[0] in FORMS:
        return text, {(): source}
    value, inner = parse(text, source, lines=False)
    plain = isinstance(value, str) and text.lstrip()[0] not in "\"'|>!"
    return (text.strip() if plain else value), inner
